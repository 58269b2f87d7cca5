"""What the SM90 hardware and kernel compute, operation by operation and bit for bit."""
