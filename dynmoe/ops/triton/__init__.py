"""The MoE layer's own GPU kernels. They run on a CPU too, in Triton's interpreter (TRITON_INTERPRET=1), for tests."""
