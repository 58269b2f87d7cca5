"""The layer: one call, the forward, its parallel forms, and the drop-in for flashinfer's function."""
