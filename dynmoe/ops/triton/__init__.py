"""GPU kernels of the MoE layer. For tests they also run on a CPU, in Triton's interpreter (TRITON_INTERPRET=1)."""
