"""What bytes mean and where they lie: MXFP4, the layouts of the kernel, the experts of a rank."""
