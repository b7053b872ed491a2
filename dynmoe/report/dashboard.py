"""The W&B dashboard as code: sections and panels over metric names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dynmoe.config import Config
from dynmoe.errors import first_line
from dynmoe.routers import ROUTERS
from dynmoe.train.checkpoint import write_atomically

_STEP = "train/step"
_TOKENS = "train/tokens"
_FLOPS = "train/cumulative_flops"
_TIMEOUT_S = 5
_CONTROL_METRICS = sorted({router.CONTROL_METRIC for router in ROUTERS.values()})
# Sections of panels: title, x axis, and metrics or a regular expression over the metrics of all layers.
_PANELS: dict[str, list[tuple[str, str, list[str] | str]]] = {
    "Loss": [
        ("Loss by step", _STEP, ["train/lm_loss", "eval/loss"]),
        ("Loss by tokens", _TOKENS, ["train/lm_loss", "eval/loss"]),
        ("Loss by activated FLOPs", _FLOPS, ["train/lm_loss", "eval/loss"]),
    ],
    "Experts per token": [
        (
            "Selected experts, mean over layers, and budget",
            _STEP,
            ["moe/selected_per_token_mean", "moe/experts_per_token_target"],
        ),
        ("By layer", _STEP, "moe/layer_.*/experts_per_token_mean"),
        ("95th percentile by layer", _STEP, "moe/layer_.*/experts_per_token_p95"),
        ("Tokens without any expert", _STEP, "moe/layer_.*/tokens_without_expert_frac"),
    ],
    "Tasks and domains": [
        ("Accuracy by task", _STEP, "eval/tasks/.*/acc"),
        ("Loss by domain", _STEP, "eval/domains/.*/loss"),
        ("Experts per token by task and domain", _STEP, "eval/(tasks|domains)/.*/experts_per_token_mean"),
    ],
    "Load": [
        ("Busiest expert over the mean", _STEP, "moe/layer_.*/load_max_over_mean"),
        ("Busiest expert-parallel rank over the mean", _STEP, "moe/layer_.*/ep_rank_load_max_over_mean"),
        ("Experts that computed no token", _STEP, "moe/layer_.*/dead_experts"),
        ("Experts in use", _STEP, "moe/layer_.*/active_experts"),
        ("Dropped routes", _STEP, "moe/layer_.*/dropped_routes_frac"),
    ],
    "Router": [
        ("Entropy", _STEP, "moe/layer_.*/router_entropy"),
        ("Control value (threshold, p or k)", _STEP, f"moe/layer_.*/({'|'.join(_CONTROL_METRICS)})"),
        ("Auxiliary losses", _STEP, "moe/.*_loss"),
    ],
    "Speed": [
        ("Tokens per second", _STEP, ["train/tokens_per_s"]),
        ("TFLOP/s per rank, activated and static", _STEP, ["train/tflops_per_rank", "train/tflops_per_rank_static"]),
        ("MFU", _STEP, ["train/mfu"]),
        ("Peak memory", _STEP, ["memory/peak_gib"]),
    ],
}


def build(project: str, entity: str) -> Any:
    """Builds the workspace (wandb-workspaces) of ``project`` without sending it."""
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces import workspaces

    def panel(title: str, x: str, metrics: list[str] | str) -> Any:
        which = {"metric_regex": metrics} if isinstance(metrics, str) else {"y": metrics}
        return panels.LinePlot(title=title, x=x, **which)

    sections = [
        workspaces.Section(name=name, panels=[panel(*own) for own in content], is_open=place < 4)
        for place, (name, content) in enumerate(_PANELS.items())
    ]
    media = ("moe/load", "report/load_0", "report/histogram_0", "report/experts_per_token")
    sections.append(workspaces.Section(name="Pictures", panels=[panels.MediaBrowser(media_keys=list(media))]))
    return workspaces.Workspace(entity=entity, project=project, name="DynMoE", sections=sections)


def publish(config: Config, entity: str, output: Path) -> str:
    """Saves the dashboard at W&B, or its definition in ``output`` without an account or a server.

    Returns:
        What was done, in one sentence.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    project = config.logging.wandb_project
    try:
        if not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("no API key; run wandb login")
        # Requested first, because this call times out early if the server does not respond.
        own = wandb.Api(timeout=_TIMEOUT_S).default_entity
        workspace = build(project, entity or own)
        workspace.save()
    except Exception as error:  # whatever fails, the definition can be written
        definition = build(project, entity)._spec  # the package has no public access to it
        write_atomically(output, json.dumps(definition, indent=1) + "\n")
        return f"W&B cannot be reached ({first_line(error)}). Definition of the dashboard: {output}"
    return f"Dashboard: {workspace.url}"
