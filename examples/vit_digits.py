"""DynMoE's vision case at small scale: a ViT that reads digits and adds and removes experts under DeepSpeed.

python examples/vit_digits.py, or torchrun --nproc-per-node 2 examples/vit_digits.py to spread the experts over ranks.
"""

import argparse
import os
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynmoe.config import Config, load_config
from dynmoe.engines.deepspeed import DeepSpeedMoELayer, make_context, start_processes
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.runtime import MoERuntime
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.train.optimizer import parameter_groups

PATCH = 2
CLASSES = 10
SETTINGS = [
    "model.layers=4", "model.hidden=64", "model.heads=4", "model.moe.experts=8", "model.moe.active_at_start=4",
    "model.moe.expert_hidden=64", "model.router.kind=top_any", "model.router.variant=improved",
    "adaptation.interval=50", "adaptation.window=25", "adaptation.removal_share=0.1", "optimizer.weight_decay=0.05",
]  # fmt: skip


class Block(nn.Module):
    """Attention over all patches, then experts."""

    def __init__(self, config: Config, layer: int, context: MoEContext, moe: type[MoELayer]) -> None:
        super().__init__()
        hidden = config.model.hidden
        self.attention_norm = nn.LayerNorm(hidden)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, config.model.heads, batch_first=True)
        self.moe = moe(config.model, layer, config.train.seed, context)

    def forward(self, x_BPD: Tensor) -> Tensor:
        normed_BPD = self.attention_norm(x_BPD)
        x_BPD = x_BPD + self.attention(normed_BPD, normed_BPD, normed_BPD, need_weights=False)[0]
        return x_BPD + self.moe(self.ffn_norm(x_BPD))


class ViT(nn.Module):
    """Embeds patches of 2 x 2 pixels, applies the blocks, averages over patches, and classifies.

    ``moe`` is the class of the layers with experts: DeepSpeed's engine needs its own.
    """

    def __init__(self, config: Config, context: MoEContext, moe: type[MoELayer] = DeepSpeedMoELayer) -> None:
        super().__init__()
        hidden = config.model.hidden
        patches = (8 // PATCH) ** 2
        self.embed = nn.Linear(PATCH * PATCH, hidden)
        self.positions = nn.Parameter(torch.randn(patches, hidden) * 0.02)
        self.blocks = nn.Sequential(*(Block(config, layer, context, moe) for layer in range(config.model.layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, images_B88: Tensor) -> Tensor:
        patches_BPp = F.unfold(images_B88[:, None], PATCH, stride=PATCH).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches_BPp) + self.positions)).mean(dim=1))


def shifted(images_B88: Tensor) -> Tensor:
    """Shifts each image by up to one pixel, to augment the 1,400 images."""
    moved = F.pad(images_B88, (1, 1, 1, 1))
    corners = torch.randint(3, (len(moved), 2)).tolist()
    return torch.stack(
        [image[top : top + 8, left : left + 8] for image, (top, left) in zip(moved, corners, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=128, help="images per step over all ranks")
    given = parser.parse_args()
    steps = given.steps
    batch = given.batch
    device = start_processes()
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    config = load_config(None, [*SETTINGS, f"train.steps={steps}", f"parallel.expert={ranks}"])
    context = make_context(ranks)
    torch.manual_seed(0)
    model = ViT(config, context).to(device)
    layers = [block.moe for block in model.blocks]
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(model, config))
    adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=2e-3)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=adam,
        config={
            "train_micro_batch_size_per_gpu": batch // ranks,
            # Buckets that fit a small model: by default each step allocates 2 GB.
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 2**20, "allgather_bucket_size": 2**20},
        },
    )  # fmt: skip
    named = model.named_parameters()
    runtime = MoERuntime(config, layers, context, OptimizerState(optimizer, adam), named, device)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test = order[:360]
    train = order[360:]
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50, (steps - step + 1) / (0.5 * steps)) * group["lr_factor"]
        chosen = train[torch.randint(len(train), (batch,))][rank::ranks]  # the same draw on every rank
        batch_B88 = shifted(images[chosen]).to(device)
        runtime.calibrate(partial(engine, batch_B88))
        with runtime.step(step, loss_scale=1.0):
            loss = F.cross_entropy(engine(batch_B88), labels[chosen].to(device))
            engine.backward(loss)
        engine.step()
        events = runtime.apply_step(step)
        rows = runtime.report().routed_rows.values()
        if rank == 0 and (step % 100 == 0 or events):
            used = ", ".join(f"{count / (batch * 16):.2f}" for count in rows)
            active = [int(layer.router.active_E.sum()) for layer in layers]
            print(f"step {step}: loss {loss.item():.3f}, experts per token by layer {used}, in use {active}")
    engine.eval()
    with torch.no_grad():
        right = (engine(images[test].to(device)).argmax(dim=1).cpu() == labels[test]).float().mean().item()
    if rank == 0:
        print(f"test accuracy {right:.4f} on {len(test)} unseen digits")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
