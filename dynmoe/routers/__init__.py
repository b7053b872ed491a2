"""The routers, one file each. To add a router, write its file and import it here."""

from dynmoe.routers.base import ROUTERS, RouterSpec, TensorSpec, router_of
from dynmoe.routers.da_moe import DAMoE
from dynmoe.routers.dtop_p import DTopP
from dynmoe.routers.expert_race import ExpertRace
from dynmoe.routers.expert_threshold import ExpertThreshold
from dynmoe.routers.identity_experts import IdentityExperts
from dynmoe.routers.null_experts import NullExperts
from dynmoe.routers.quantile import Quantile
from dynmoe.routers.relu import ReLU
from dynmoe.routers.resonance import Resonance
from dynmoe.routers.seq_top_k import SeqTopK
from dynmoe.routers.sigmoid import Sigmoid
from dynmoe.routers.top_any import TopAny
from dynmoe.routers.top_k import TopK
from dynmoe.routers.top_p import TopP

__all__ = [
    "ROUTERS", "DAMoE", "DTopP", "ExpertRace", "ExpertThreshold", "IdentityExperts", "NullExperts", "Quantile", "ReLU",
    "Resonance", "RouterSpec", "SeqTopK", "Sigmoid", "TensorSpec", "TopAny", "TopK", "TopP", "router_of",
]  # fmt: skip
