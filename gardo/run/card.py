"""The model card that goes with exported weights: what they are, how to load them, what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gardo.config import Config, to_yaml
from gardo.families import FAMILIES


def model_card(config: Config, family: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: of the run.
        family: of the model, such as ``sd3``.
        evaluations: the run's held-out evaluations, the first and the last of which are shown.
    """
    base, full = config.model.path, config.model.full_finetune
    pipeline = FAMILIES[family].pipeline
    tags = ["text-to-image", "diffusers", "reinforcement-learning", "gardo"]
    tags += [] if full else ["lora"]
    front = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    front += [f"- {tag}" for tag in tags]
    if not base.startswith("builtin:"):
        front.append(f"base_model: {json.dumps(base)}")
    weights = "its transformer" if full else "LoRA weights for it"
    load = [
        "```python",
        "import torch",
        f"from diffusers import {pipeline}" + (", AutoModel" if full else ""),
        "",
    ]
    if full:
        load += [
            'transformer = AutoModel.from_pretrained("path/to/export", subfolder="transformer")',
            f"pipe = {pipeline}.from_pretrained({json.dumps(base)}, transformer=transformer)",
        ]
    else:
        load += [
            f"pipe = {pipeline}.from_pretrained({json.dumps(base)})",
            'pipe.load_lora_weights("path/to/export")',
        ]
    sampling = config.sampling
    load += [
        f'image = pipe("a prompt", num_inference_steps={config.evaluation.num_steps}, '
        f"guidance_scale={sampling.guidance_scale}).images[0]",
        "```",
    ]
    average = "exponential moving average" if config.train.ema else "last weights"
    algorithm = config.algorithm
    target = algorithm.kl_target
    weight = f"kl_coef {algorithm.kl_coef}" if target is None else f"KL's gradient share {target:g}"
    proxies = config.rewards.proxy_weights
    body = [
        f"# {config.recipe}: {base} fine-tuned with GARDO",
        "",
        f"Starting from `{base}`, {weights}, trained by online RL on "
        f"{' + '.join(f'`{name}`' for name in proxies)} for {config.epochs} epochs of "
        f"{config.prompts.per_epoch} x {config.prompts.group_size} images "
        f"({algorithm.name}, {weight}, gate {algorithm.gate.mode}). "
        f"The weights are the {average}.",
        "",
        "## Use",
        "",
        *load,
        "",
        "## Evaluation",
        "",
        *_table(config, evaluations),
        "",
        "## Configuration",
        "",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
    ]
    return "\n".join([*front, "---", "", *body, ""])


def write_model_card(
    folder: Path, config: Config, family: str, evaluations: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``README.md`` into the folder of the export."""
    (folder / "README.md").write_text(model_card(config, family, evaluations), encoding="utf-8")


def _table(config: Config, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return ["The run made no held-out evaluation."]
    compared = [*evaluations[:1], *evaluations[1:][-1:]]  # the first and the last
    shown = [
        name
        for name in compared[-1]
        if name.endswith("/mean") or name in ("diversity/pairwise", "feature_distance")
    ]
    settings = config.evaluation
    lines = [
        f"Live weights, {settings.num_steps} ODE steps, seed {settings.seed}, "
        f"{settings.samples_per_prompt} images of each of at most {settings.max_prompts} prompts.",
        "",
        f"| | {' | '.join(_when(row) for row in compared)} |",
        f"|---|{'---|' * len(compared)}",
    ]
    role = dict.fromkeys(config.rewards.aux, "auxiliary")
    role |= dict.fromkeys(config.rewards.proxy_weights, "trained on")
    for name in shown:
        label = name.removeprefix("reward/").removesuffix("/mean")
        what = f" ({role[label]})" if label in role else ""
        values = " | ".join(_number(row.get(name)) for row in compared)
        lines.append(f"| {label}{what} | {values} |")
    return lines


def _when(evaluation: Mapping[str, Any]) -> str:
    epoch = evaluation["epoch"]
    return f"after {epoch} epochs" if epoch else "before"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
