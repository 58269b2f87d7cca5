"""The kernel's GEMM, activation and routers in replaceable parts, for defects to change one of."""
