"""Engines: the only place that knows DeepSpeed or Megatron-Core (datasets excepted)."""
