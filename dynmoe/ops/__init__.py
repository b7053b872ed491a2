"""Operators of an MoE layer that do not depend on routers: permutation, experts, all-to-all."""

from dynmoe.ops.all_to_all import AllToAllGroup, AsyncAllToAll, exchange_routes
from dynmoe.ops.attach_loss import attach_loss
from dynmoe.ops.linear_fp32 import linear_fp32
from dynmoe.ops.permute import Permutation, gather_rows, sum_rows
from dynmoe.ops.routed_experts import Backend, configured_backend, pick_backend, routed_experts

__all__ = [
    "AllToAllGroup",
    "AsyncAllToAll",
    "Backend",
    "Permutation",
    "attach_loss",
    "configured_backend",
    "exchange_routes",
    "gather_rows",
    "linear_fp32",
    "pick_backend",
    "routed_experts",
    "sum_rows",
]
