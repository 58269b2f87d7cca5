"""What is wrong with a quantiser, a dequantisation or a byte order, solved from their output."""
