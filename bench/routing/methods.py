"""The compared routers: the overrides of each, with two experts per token wherever the number can be set."""

from __future__ import annotations

REFERENCE = "top-k 2"
# The gates of a token sum to 1 here, as in half of the other routers. Both forms of top-2 are references, so that no
# difference of the gates is taken for one of the number of experts.
RENORMALIZED = "top-k 2, renormalized"
REFERENCES = (REFERENCE, RENORMALIZED)
_HELD = "budget.experts_per_token=2"
_TOP_K_2 = ("model.router.kind=top_k", "model.router.k=2")
_TOP_P = "model.router.kind=top_p"
_TOP_ANY = "model.router.kind=top_any"

# Fields that are not named have their defaults; only the learning rate is swept.
METHODS: dict[str, tuple[str, ...]] = {
    REFERENCE: _TOP_K_2,
    RENORMALIZED: (*_TOP_K_2, "model.router.renormalize=true"),
    "top-k 2, renormalized, balance 1e-4": (
        *_TOP_K_2, "model.router.renormalize=true", "model.router.balance_loss=1e-4",
    ),
    "top-k 1": ("model.router.kind=top_k", "model.router.k=1"),
    "top-k 4": ("model.router.kind=top_k", "model.router.k=4"),
    "top-k 2, loss-free": (*_TOP_K_2, "model.router.balance_loss=0", "budget.method=loss_free"),
    "top-k 2, quantile": (*_TOP_K_2, "model.router.balance_loss=0", "budget.method=quantile"),
    "top-p 0.4, paper": (_TOP_P, "model.router.variant=paper", "model.router.p=0.4"),
    "top-p, held": (_TOP_P, "model.router.variant=improved", "model.router.p=0.15", "budget.method=pi", _HELD),
    "top-p, held, renormalized": (
        _TOP_P, "model.router.variant=improved", "model.router.p=0.15", "model.router.renormalize=true",
        "budget.method=pi", _HELD,
    ),
    "DTop-p": ("model.router.kind=dtop_p", "budget.method=pi", "budget.scope=global", _HELD),
    "top-any, released": (_TOP_ANY, "model.router.variant=released"),
    "top-any, held": (_TOP_ANY, "model.router.variant=improved", "budget.method=loss_free", _HELD),
    "quantile thresholds": ("model.router.kind=quantile", _HELD),
    "expert threshold": ("model.router.kind=expert_threshold", _HELD),
    "ReLU": ("model.router.kind=relu", _HELD),
    "null experts": ("model.router.kind=null_experts", "model.router.k=4", "model.router.num_null=16"),
    "identity experts": (
        # A rate for runs of some hundred steps: docs/routers.md.
        "model.router.kind=identity_experts", "model.router.k=3", "model.router.num_identity=8",
        "budget.method=loss_free", "budget.rate=1", _HELD,
    ),
    # Two gates of 24 sum to less than 0.1 at the start; LongCat-Flash multiplies them by 6.
    "identity experts, scale 6": (
        "model.router.kind=identity_experts", "model.router.k=3", "model.router.num_identity=8",
        "model.router.gate_scale=6", "budget.method=loss_free", "budget.rate=1", _HELD,
    ),
    "SeqTopK": ("model.router.kind=seq_top_k", _HELD),
}  # fmt: skip
