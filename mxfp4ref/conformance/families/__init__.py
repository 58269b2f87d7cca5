"""Diagnosis by families: a wrong kernel is a stage, a place and a change."""
