"""Group-limited selection (DeepSeek-V3, arXiv 2412.19437, section 2.1.2: node-limited routing).

The experts form groups of equal size, in order. A token may use only experts of its best groups. If each group is on
ranks of its own, that bounds the number of ranks to which a token is sent.

Shape letters of this file: G groups, L experts of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.selection import rank_descending


def within_best_groups(ranked_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """The values by which experts are selected, with -inf for the experts outside a token's best groups.

    The value of a group is the sum of its two best experts; a group of one expert has that expert's.

    Args:
        ranked_TE: such as scores plus biases, or scores minus thresholds; constant to autograd.
        n_group: number of groups, a divisor of E.
        topk_group: number of groups that a token may use. Ties go to the lower group.

    Raises:
        ValueError: a number is out of range.
    """
    num_experts = ranked_TE.shape[1]
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"n_group={n_group} must divide the number of experts ({num_experts})")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group} must be between 1 and n_group ({n_group})")
    if topk_group == n_group:
        return ranked_TE
    ranked_TGL = ranked_TE.unflatten(1, (n_group, -1))
    best_TG = ranked_TGL.topk(min(2, ranked_TGL.shape[2]), dim=2).values.sum(dim=2)
    outside_TG = rank_descending(best_TG) >= topk_group
    return ranked_TGL.masked_fill(outside_TG.unsqueeze(2), -torch.inf).flatten(1)
