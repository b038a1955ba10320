"""What is compared: three parts of the experiment, each with its proxy and its methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.mixture import rewards
from gardo.config import AlgorithmConfig

KL_COEF = 0.05
RESET_EVERY = 10
_ALL = {"mode": "all"}


@dataclass(frozen=True)
class Method:
    """One way to train: a name and the keys of ``algorithm`` as a recipe would set them."""

    name: str
    algorithm: AlgorithmConfig


def _method(name: str, reference: str = "none", kl_coef: float = KL_COEF, **keys: Any) -> Method:
    """GARDO's shaping; ``reference`` is none (no KL), static, adaptive or guarded."""
    period = RESET_EVERY if reference in ("adaptive", "guarded") else 0
    reset = {"kl_threshold": 0.0, "reset_every": period, "guard": reference == "guarded"}
    weight = 0.0 if reference == "none" else kl_coef
    algorithm = {"clip_range": 0.1, "kl_coef": weight, "reference": reset, **keys}
    return Method(name, AlgorithmConfig.model_validate(algorithm))


@dataclass(frozen=True)
class Part:
    """A part of the experiment.

    Attributes:
        proxy: the reward that is optimised, from ``points [N, 2]`` and ``context [N]``.
        contexts: how many contexts the prompt groups cycle through.
    """

    name: str
    title: str
    proxy: Callable[[Tensor, Tensor], Tensor]
    methods: tuple[Method, ...]
    contexts: int = 1


def _true(points: Tensor, context: Tensor) -> Tensor:
    return rewards.true_reward(points)


def _second_saturated(points: Tensor, context: Tensor) -> Tensor:
    return torch.where(context == 0, rewards.true_reward(points), rewards.saturated(points))


def _hackable(points: Tensor, context: Tensor) -> Tensor:
    return rewards.hackable(points)


GRPO = _method("grpo", diversity=False, advantage_norm="group_std")
GRPO_NO_STD = _method("grpo-no-std", diversity=False)
GRPO_KL = _method("grpo-kl", "static", diversity=False, advantage_norm="group_std", gate=_ALL)
SHAPING = _method("shaping")
GARDO_STATIC = _method("gardo-static", "static")
GARDO = _method("gardo", "adaptive")
GARDO_GUARDED = _method("gardo-guarded", "guarded")

PARTS = (
    Part(
        "base",
        "Correct proxy: is the rare best mode found?",
        _true,
        (GRPO, GRPO_NO_STD, SHAPING, GARDO, GARDO_GUARDED),
    ),
    Part(
        "std",
        "Saturated proxy in one of two contexts: is its noise followed?",
        _second_saturated,
        (GRPO, GRPO_NO_STD),
        contexts=2,
    ),
    Part(
        "hack",
        "Reachable flaw of the proxy: who follows it?",
        _hackable,
        (GRPO, GRPO_KL, SHAPING, GARDO_STATIC, GARDO, GARDO_GUARDED),
    ),
)


def find_part(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def find_method(part: Part, name: str) -> Method:
    return next(method for method in part.methods if method.name == name)
