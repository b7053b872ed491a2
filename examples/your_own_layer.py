"""Our layer in a plain PyTorch model: python examples/your_own_layer.py"""

import torch
from torch import nn

from dynmoe.config import load_config
from dynmoe.moe import MoEContext, MoELayer

sizes = ["model.hidden=32", "model.moe.experts=8", "model.moe.expert_hidden=64", "model.router.kind=top_p"]
layer = MoELayer(load_config(None, sizes).model, layer=0, seed=0, context=MoEContext())
model = nn.Sequential(nn.Linear(2, 32), layer, nn.Linear(32, 1))  # the layer's losses travel with its output

torch.manual_seed(0)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(401):
    x = torch.rand(512, 2) * 2 - 1
    wanted = torch.where(x[:, :1] > 0, torch.sin(6 * x[:, 1:]), x[:, 1:] ** 2)  # two different functions
    loss = nn.functional.mse_loss(model(x), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rows = layer.drain().routed_rows
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}, {rows / len(x):.2f} experts per token")
