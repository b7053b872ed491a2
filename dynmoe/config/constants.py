"""Constants that several packages share, in a module without torch."""

# The label of a token whose loss does not count, as in PyTorch's cross-entropy.
IGNORED = -100
# Values of train.moe_backend.
MOE_BACKENDS = ("auto", "triton", "grouped_mm", "loop", "sonic", "mxfp8", "mxfp8_emulated")
# Those whose products have operands in MXFP8, and the elements that share a scale there.
MXFP8_BACKENDS = ("mxfp8", "mxfp8_emulated")
MXFP8_BLOCK = 32
# Logits that the cross-entropy computes at a time: few enough to fit a CPU's cache, enough to fill a GPU.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Largest number of elements in a communication bucket of DeepSpeed.
DEEPSPEED_BUCKET = 500_000_000
# Elements of the parameters that ZeRO 3 gathers ahead of the layers that need them.
DEEPSPEED_PREFETCH = 50_000_000
# Elements up to which a parameter stays whole under ZeRO 3: more than the thresholds of a router, which budgets read.
DEEPSPEED_PERSISTENT = 100_000
