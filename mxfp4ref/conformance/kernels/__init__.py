"""Kernels under test: what they are, how they are found, and stand-ins for them."""
