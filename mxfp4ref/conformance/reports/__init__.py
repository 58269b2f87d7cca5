"""A conformance report in words, as JSON, JUnit XML and HTML; and a failing case as a script that reproduces it."""
