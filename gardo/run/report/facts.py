"""What was run, where and how: the head of a report."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from gardo.run.progress import format_seconds
from gardo.run.report.load import Run
from gardo.run.report.tables import MISSING


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run and where: (name, value) pairs, a dash where the run does not say."""
    config, info = run.config, run.summary
    epochs = len({row["epoch"] for row in run.metrics})
    planned = config.get("epochs")
    done = f"{epochs} of {planned} epochs" if isinstance(planned, int) else f"{epochs} epochs"
    state = "finished" if info.get("finished") else "not finished"
    versions = info.get("versions")
    memory = info.get("peak_memory_bytes")
    seconds = info.get("seconds")
    return [
        ("State", f"{state}, {done}"),
        ("Recipe", _first(info.get("recipe"), config.get("recipe"))),
        ("Model", _first(config.get("model.path"), info.get("model"))),
        ("Seed", _first(config.get("seed"))),
        ("Started", _date(info.get("started"))),
        ("Duration", format_seconds(seconds) if isinstance(seconds, (int, float)) else MISSING),
        ("Hardware", _first(info.get("hardware"))),
        (
            "Peak memory",
            f"{memory / 2**30:.2f} GiB" if isinstance(memory, (int, float)) else MISSING,
        ),
        (
            "Versions",
            ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, dict) and versions
            else MISSING,
        ),
        ("Command", _first(info.get("command"))),
    ]


def _first(*values: Any) -> str:
    """The first value that is given, as text."""
    for value in values:
        if value is not None and value != "":
            return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return MISSING


def _date(value: Any) -> str:
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = _first(value)
    iso = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(.*)", text)
    if iso is None:
        return text
    zone = "UTC" if iso[3] in ("Z", "+00:00") else iso[3]
    return f"{iso[1]} {iso[2]} {zone}".rstrip()


SWITCHES = {
    "algorithm.name": "algorithm",
    "algorithm.kl_coef": "KL coefficient",
    "algorithm.kl_coef.target_share": "KL's share of the gradient",
    "algorithm.gate.mode": "gate",
    "algorithm.gate.fraction": "gate fraction",
    "algorithm.gate.adaptive": "adaptive fraction",
    "algorithm.reference.kl_threshold": "reference reset at KL",
    "algorithm.reference.reset_every": "reference reset every",
    "algorithm.reference.reset_steps": "reference reset after steps",
    "algorithm.gate.anchor": "ranked against",
    "algorithm.gate.uncertainty": "judged by",
    "algorithm.cap.mode": "cap on the proxy",
    "algorithm.cap.percentile": "percentile of the cap",
    "algorithm.reward_scale": "reward scale",
    "algorithm.diversity": "diversity factor",
    "algorithm.advantage_norm": "advantage norm",
    "algorithm.clip_range": "clip range",
    "algorithm.compat": "compat",
    "prompts.per_epoch": "prompts per epoch",
    "prompts.group_size": "group size",
    "sampling.sde": "SDE",
    "sampling.num_steps": "steps",
    "sampling.noise_level": "noise level",
    "sampling.guidance_scale": "guidance",
    "train.learning_rate": "learning rate",
    "precision": "precision",
}


_NEVER_AT_ZERO = {
    "algorithm.reference.kl_threshold",
    "algorithm.reference.reset_every",
    "algorithm.reference.reset_steps",
}


def switches(run: Run) -> list[tuple[str, str]]:
    """The settings that tell methods apart, as (name, value), those that the config has."""
    return [
        (
            name,
            "never" if key in _NEVER_AT_ZERO and run.config[key] == 0 else plain(run.config[key]),
        )
        for key, name in SWITCHES.items()
        if key in run.config
    ]


def method(run: Run) -> str:
    """The method in words, from its switches; empty when the config names no algorithm."""
    setting = {
        key.removeprefix("algorithm."): value
        for key, value in run.config.items()
        if key.startswith("algorithm.")
    }
    if "name" not in setting:
        return ""
    name = str(setting["name"])
    words = [{"grpo": "GRPO", "nft": "DiffusionNFT"}.get(name, name)]
    mode = setting.get("gate.mode")
    coefficient = setting.get("kl_coef", setting.get("kl_coef.target_share"))
    if coefficient == 0 or mode == "off":
        words.append("no KL penalty")
    elif mode is not None and coefficient is not None:
        words.append(
            "KL penalty on every sample"
            if mode == "all"
            else "gated KL"
            if mode == "paper"
            else f"gated KL ({mode})"
        )
        if any(setting.get(key.removeprefix("algorithm.")) for key in _NEVER_AT_ZERO):
            words.append("adaptive reference")
    if setting.get("cap.mode") == "on":
        words.append("capped proxy")
    if setting.get("diversity"):
        words.append("diversity-aware advantage")
    if setting.get("advantage_norm") not in (None, "none"):
        words.append(f"advantage divided by {setting['advantage_norm']}")
    return " + ".join(words)


def plain(value: Any) -> str:
    """A setting as text: on/off for booleans, a dash for nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return _first(value)
