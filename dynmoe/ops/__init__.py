"""The moving parts of an MoE layer that know nothing of routers: permutation, grouped GEMM, all-to-all."""

from dynmoe.ops.all_to_all import all_to_all_rows, exchange_counts
from dynmoe.ops.attach_loss import attach_loss
from dynmoe.ops.grouped import grouped_mm, swiglu_experts
from dynmoe.ops.linear_fp32 import linear_fp32
from dynmoe.ops.permute import Permutation, gather_rows, permute_rows, sum_rows

__all__ = [
    "Permutation",
    "all_to_all_rows",
    "attach_loss",
    "exchange_counts",
    "gather_rows",
    "grouped_mm",
    "linear_fp32",
    "permute_rows",
    "sum_rows",
    "swiglu_experts",
]
