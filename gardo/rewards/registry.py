"""Rewards and feature extractors by name; a class is imported only when a recipe asks for it."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gardo.rewards.base import Backbone, Reward
from gardo.rewards.features import FeatureExtractor
from gardo.rewards.functions import FunctionReward, is_scoring_function
from gardo.types import UserError

# name -> "module:class"
_REWARDS: dict[str, str] = {
    "count": "gardo.rewards.shapes:CountReward",
    "shape_fit": "gardo.rewards.shapes:ShapeFitReward",
    "clean": "gardo.rewards.shapes:CleanlinessReward",
    "strict_count": "gardo.rewards.shapes:StrictCountReward",
    "artifact": "gardo.rewards.shapes:ArtifactReward",
    "judge": "gardo.rewards.judge:JudgeReward",
    "preference": "gardo.rewards.preference:PreferenceReward",
    "pickscore": "gardo.rewards.pickscore:PickScoreReward",
    "clipscore": "gardo.rewards.clipscore:CLIPScoreReward",
    "aesthetic": "gardo.rewards.aesthetic:AestheticReward",
    "hpsv2": "gardo.rewards.hpsv2:HPSv2Reward",
    "imagereward": "gardo.rewards.imagereward:ImageRewardReward",
    "hpsv3": "gardo.rewards.vlm:HPSv3Reward",
    "unifiedreward": "gardo.rewards.vlm:UnifiedRewardReward",
    "deqa": "gardo.rewards.deqa:DeQAReward",
    "ocr": "gardo.rewards.ocr:OCRReward",
    "geneval": "gardo.rewards.geneval.reward:GenEvalReward",
    "jpeg_compressibility": "gardo.rewards.jpeg:JPEGCompressibilityReward",
    "jpeg_incompressibility": "gardo.rewards.jpeg:JPEGIncompressibilityReward",
}
_FEATURES: dict[str, str] = {
    "judge": "gardo.rewards.features:JudgeFeatures",
    "dinov3": "gardo.rewards.dinov3:DINOv3Features",
}

ENTRY_POINTS = "gardo.rewards"
"""The group of entry points by which installed packages add rewards."""


def reward_names() -> list[str]:
    """Names of the built-in rewards and of those that installed packages bring."""
    return sorted(_all_rewards())


def _all_rewards() -> dict[str, str]:
    """Name -> Python path. A built-in name always means the built-in reward."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {**{e.name: f"{e.module}:{e.attr}" for e in found}, **_REWARDS}


def build_reward(name: str, device: torch.device | str = "cpu", **parameters: Any) -> Reward:
    """Build a reward by name (built in or an entry point) or Python path ``module:attribute``.

    The attribute is a `Reward` class or a factory, called with ``device`` and the recipe's
    parameters, or a plain function ``fn(images, prompts, metadata)`` that returns the scores (see
    `gardo.rewards.functions`).

    Raises:
        UserError: unknown name, module or attribute, a refused parameter value, or a result that
            is no `Reward`.
    """
    factory = load_factory("reward", name, _all_rewards())
    if is_scoring_function(factory):
        return FunctionReward(name, factory, parameters)
    try:
        inspect.signature(factory).bind(device=device)
    except ValueError:  # some callables of C extensions do not tell
        pass
    except TypeError as error:
        if not parameters:  # which may be what it misses
            raise UserError(f"reward '{name}': cannot be built: {error}") from None
    try:
        reward = factory(device=device, **parameters)
    except ValueError as error:
        raise UserError(f"reward '{name}': {error}") from error
    if not isinstance(reward, Reward):
        raise UserError(
            f"reward '{name}': expected a gardo.rewards.base.Reward, got {type(reward).__name__}"
        )
    return reward


def declared_backbones(rewards: Iterable[str], features: str | None) -> list[Backbone]:
    """The models that rewards and a feature extractor say they load, each once; none is loaded.

    Raises:
        UserError: as `load_factory`.
    """
    known = _all_rewards()
    factories = [load_factory("reward", name, known) for name in rewards]
    if features is not None:
        factories.append(load_factory("feature extractor", features, _FEATURES))
    return list(dict.fromkeys(b for f in factories for b in getattr(f, "backbones", ())))


def feature_names() -> list[str]:
    """Names of the built-in feature extractors."""
    return sorted(_FEATURES)


def build_features(
    name: str, device: torch.device | str = "cpu", **parameters: Any
) -> FeatureExtractor:
    """Build a feature extractor by name or by Python path ``module:attribute``.

    The attribute is called with ``device`` and the recipe's parameters.

    Raises:
        UserError: unknown name, module or attribute, a refused parameter value, or a result that
            is no `FeatureExtractor`.
    """
    factory = load_factory("feature extractor", name, _FEATURES)
    try:
        features = factory(device=device, **parameters)
    except ValueError as error:
        raise UserError(f"feature extractor '{name}': {error}") from error
    if not isinstance(features, FeatureExtractor):
        raise UserError(
            f"feature extractor '{name}': expected a gardo.rewards.features.FeatureExtractor, "
            f"got {type(features).__name__}"
        )
    return features


def load_factory(kind: str, name: str, registry: Mapping[str, str]) -> Callable[..., Any]:
    """Import what a registry name or a Python path ``module:attribute`` stands for.

    Args:
        kind: what is looked for, as error messages call it.
        name: a key of ``registry`` or a Python path.
        registry: name -> Python path.

    Raises:
        UserError: unknown name, module or attribute, or an attribute that cannot be called.
    """
    target = registry.get(name, name)
    module_name, colon, attribute = target.partition(":")
    importable = all(part.isidentifier() for part in module_name.split("."))
    if not (importable and colon and attribute):
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"unknown {kind} '{name}'{hint} (built in: {', '.join(sorted(registry))}; "
            "or a Python path 'module:attribute')"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        asked_for = error.name and f"{module_name}.".startswith(f"{error.name}.")
        if not asked_for:
            raise  # a dependency of the module is missing: its own message says which
        raise UserError(f"{kind} '{name}': no module named '{module_name}'") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        problem = "has no" if factory is None else "cannot call its"
        raise UserError(f"{kind} '{name}': module '{module_name}' {problem} '{attribute}'")
    return factory
