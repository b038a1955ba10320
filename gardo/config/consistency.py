"""What must hold between the keys of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gardo.config.schema import Config
from gardo.config.traits import TRAITS


def contradictions(c: Config) -> Iterator[str]:
    """Sentences about keys that contradict each other."""
    if c.prompts.path is None and c.prompts.dataset is None and c.prompts.generator is None:
        yield "prompts: expected prompts.path, prompts.dataset or prompts.generator, got none"
    samples = c.prompts.per_epoch * c.prompts.group_size
    if c.train.updates_per_epoch > samples:
        yield (
            f"train.updates_per_epoch: expected at most per_epoch x group_size = {samples}, "
            f"got {c.train.updates_per_epoch}"
        )
    window = c.sampling.sde_window
    if c.sampling.sde_window_range is not None:
        low, high = c.sampling.sde_window_range
        # it may reach beyond num_steps, where it ends: a recipe's range outlives fewer steps
        if not 0 <= low < high or high - low < window:
            yield (
                "sampling.sde_window_range: expected 0 <= first < last that holds the window of "
                f"{window} steps, got [{low}, {high}]"
            )
    gate = c.algorithm.gate
    yield from _of_judges(c)
    if c.algorithm.reference.guard and not c.rewards.aux:
        yield "algorithm.reference.guard: needs at least one auxiliary reward (rewards.aux)"
    bounded = gate.adaptive and gate.adaptation == "official"
    if bounded and gate.mode in ("paper", "official") and not 0.02 <= gate.fraction <= 0.2:
        yield (
            "algorithm.gate.fraction: an adaptive fraction moves in [0.02, 0.2]; expected a start "
            f"within it (or algorithm.gate.adaptive false), got {gate.fraction}"
        )
    if c.algorithm.reward_scale != "none" and c.algorithm.advantage_norm != "none":
        yield (
            f"algorithm.reward_scale: {c.algorithm.reward_scale} takes the place of a standard "
            f"deviation; expected algorithm.advantage_norm none, got {c.algorithm.advantage_norm}"
        )
    if c.algorithm.diversity and c.rewards.features is None:
        yield "algorithm.diversity: needs rewards.features (what distances are measured in)"
    for role in ("proxy_weights", "aux", "eval"):
        names = list(getattr(c.rewards, role))
        for name in names:
            # it becomes part of metric names and of servers' URLs
            if not re.fullmatch(r"(?!\.+$)[\w.:+-]+", name):
                yield (
                    f"rewards.{role.split('_')[0]}: expected names of letters, digits and _ . : + "
                    f"-, got '{name}'"
                )
            if names.count(name) > 1:
                yield f"rewards.{role}: expected different rewards, got '{name}' twice"
    for name in c.rewards.proxy_weights:
        if name in c.rewards.aux:
            yield f"rewards.aux: '{name}' is the proxy and cannot judge itself"
    if c.algorithm.kl_reduction == "microbatch" and c.algorithm.compat != "official":
        yield (
            "algorithm.kl_reduction: microbatch, which depends on the batch size, is the published "
            "code's; expected gated or batch, or algorithm.compat official"
        )
    name, traits = c.algorithm.name, TRAITS[c.algorithm.name]
    if c.algorithm.ratio_norm != "none" and not traits.ratios:
        yield (
            f"algorithm.ratio_norm: {name} has no ratio; expected none, "
            f"got {c.algorithm.ratio_norm}"
        )
    if c.sampling.same_latent and not traits.noisy:
        yield (
            f"sampling.same_latent: {name} adds no noise while sampling, so all samples of a "
            "prompt would be the same image; expected false"
        )
    if c.sampling.solver != "euler" and traits.noisy:
        yield (
            f"sampling.solver: {name}'s rollouts are noisy steps; expected euler, "
            f"got {c.sampling.solver}"
        )
    if c.model.full_finetune and c.precision == "fp16":
        yield "model.full_finetune: expected precision fp32 or bf16, got fp16"
    for alarm in c.health.stop_on:
        if getattr(c.health, alarm) is None:
            yield f"health.stop_on: '{alarm}' is off; expected a threshold for health.{alarm}"
        if alarm == "diversity" and c.rewards.features is None:
            yield "health.stop_on: 'diversity' needs rewards.features, which distances are of"
        if alarm in ("ratio", "ratio_mean", "clip_fraction") and not traits.ratios:
            yield f"health.stop_on: {name} has no ratio; expected alarms of {name}, got '{alarm}'"
        if alarm == "kl" and not c.algorithm.has_kl:
            yield "health.stop_on: 'kl' is not measured without algorithm.kl_coef"
    best, every = c.checkpoint.keep_best, c.checkpoint.every
    if best is not None and best.startswith("evaluation/"):
        if not (every and c.evaluation.every and c.evaluation.every % every == 0):
            yield (
                f"checkpoint.keep_best: '{best}' needs checkpoints where evaluations are; expected "
                f"evaluation.every to be a multiple of checkpoint.every, got "
                f"{c.evaluation.every} and {every}"
            )


def _of_judges(c: Config) -> Iterator[str]:
    """Of those who judge the proxy: auxiliary rewards, and the uncertainty that it reports."""
    algorithm, gate = c.algorithm, c.algorithm.gate
    if algorithm.has_kl and gate.mode == "official":
        for name, value, needed in (
            ("anchor", gate.anchor, "batch"),
            ("uncertainty", gate.uncertainty, "ensemble"),
        ):
            if value != needed:
                yield (
                    f"algorithm.gate.{name}: expected {needed} with algorithm.gate.mode official, "
                    f"got {value}"
                )
    if gate.anchor == "base" and gate.scope == "group":
        yield (
            "algorithm.gate.anchor: base ranks against the samples of all prompts; expected "
            "algorithm.gate.scope batch, got group"
        )
    if algorithm.kl_target is not None and gate.mode == "off":
        yield (
            "algorithm.kl_coef: target_share holds the weight of a penalty; expected an "
            "algorithm.gate.mode that penalises somebody, got off"
        )
    if c.rewards.aux or gate.uncertainty == "sigma":
        return
    for needs, key, instead in (
        (
            algorithm.has_kl and gate.mode in ("paper", "official"),
            f"gate.mode: '{gate.mode}'",
            "; without either use gate.mode all or off",
        ),
        (algorithm.has_kl and gate.anchor == "base", "gate.anchor: base", ""),
        (algorithm.cap.mode == "on", "cap: on", ""),
        (algorithm.diversity == "supported", "diversity: supported", ""),
    ):
        if needs:
            yield (
                f"algorithm.{key} needs at least one auxiliary reward (rewards.aux), or a proxy "
                f"that reports its uncertainty (algorithm.gate.uncertainty sigma){instead}"
            )
