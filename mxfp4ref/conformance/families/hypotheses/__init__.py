"""Hypotheses: changes at a stage and a place, each of which predicts an output in every bit."""
