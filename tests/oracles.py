"""Slow and obvious: what the fast code must agree with, one token and one expert at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def descending(values: list[float]) -> list[int]:
    """Indices from the largest value to the smallest; ties in index order."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


def top_k_choice(probs: list[float], k: int) -> set[int]:
    return set(descending(probs)[:k])


def top_p_choice(probs: list[float], p: float, form: str, min_experts: int = 1, max_experts: int | None = None):
    """Walks down the experts until the mass reaches p (paper) or passes it (released)."""
    order, chosen, mass = descending(probs), [], 0.0
    for expert in order:
        chosen.append(expert)
        mass += probs[expert]
        rounded = float(torch.tensor(mass, dtype=torch.float32))
        if p < 1.0 and (rounded >= p if form == "paper" else rounded > p):
            break
    wanted = max(len(chosen), min_experts)
    return set(order[: wanted if max_experts is None else min(wanted, max_experts)])


def top_any_choice(margins: list[float], active: list[bool], min_experts=0, max_experts=None):
    """Active experts of positive margin; the best ones fill up to the floor, and the ceiling keeps the best."""
    order = [expert for expert in descending(margins) if active[expert]]
    chosen = {expert for expert in order if margins[expert] > 0} | set(order[:min_experts])
    return chosen & set(order[:max_experts])


def moe_output(x_TD: Tensor, gates_TE: Tensor, map_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor) -> Tensor:
    """Sum over the chosen experts of gate * SwiGLU(x), one token at a time. Differentiable."""
    rows = []
    for token, x_D in enumerate(x_TD):
        total_D = torch.zeros_like(x_D) + 0.0 * x_D
        for expert in map_TE[token].nonzero().flatten().tolist():
            gate_F, up_F = (w_up_EHD[expert] @ x_D).chunk(2)
            activation_F = gate_F * torch.sigmoid(gate_F) * up_F
            total_D = total_D + gates_TE[token, expert] * (w_down_EDF[expert] @ activation_F)
        rows.append(total_D)
    return torch.stack(rows) if rows else x_TD.clone()


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def kept_under_capacity(scores_TE: Tensor, map_TE: Tensor, capacity: int, policy: str) -> Tensor:
    """Of each expert's tokens the ``capacity`` best-scored, or the first."""
    kept = torch.zeros_like(map_TE)
    for expert in range(map_TE.shape[1]):
        tokens = map_TE[:, expert].nonzero().flatten().tolist()
        if policy == "probs":
            tokens.sort(key=lambda token: (-scores_TE[token, expert].item(), token))
        for token in tokens[:capacity]:
            kept[token, expert] = True
    return kept


def kept_within_limit(scores_TE: Tensor, map_TE: Tensor, max_routes: int, policy: str) -> Tensor:
    """Hands out places in rounds: every token's best expert, then every token's second best, until none is left."""
    kept, left = torch.zeros_like(map_TE), max_routes
    for rank in range(map_TE.shape[1]):
        round_of = []
        for token in range(map_TE.shape[0]):
            chosen = map_TE[token].nonzero().flatten().tolist()
            chosen.sort(key=lambda expert, t=token: (-scores_TE[t, expert].item(), expert))
            if rank < len(chosen):
                round_of.append((token, chosen[rank]))
        if len(round_of) > left and policy == "probs":
            round_of.sort(key=lambda route: (-scores_TE[route].item(), route[0]))
        for route in round_of[:left]:
            kept[route] = True
        left -= min(left, len(round_of))
    return kept
