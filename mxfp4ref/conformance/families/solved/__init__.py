"""What an output that differs proves by itself: equations that are solved, not hypotheses that are tried."""
