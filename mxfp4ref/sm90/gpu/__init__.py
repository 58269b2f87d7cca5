"""The kernel's stages as Triton kernels for a Hopper GPU: its own tensor cores do the steps."""
