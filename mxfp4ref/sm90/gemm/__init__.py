"""The group-scaled GEMM: the order of its groups, a transcription of `docs/arithmetic.md`, and faster equals."""
