"""The group-scaled GEMM: the order of its groups, a transcription of the specification, and faster equals."""
