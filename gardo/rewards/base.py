"""The one interface of all rewards, and their registry by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gardo.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class RewardSpec:
    """What a caller must know of a reward before it calls it.

    Attributes:
        higher_is_better: the direction; training always maximises ``scores`` when True and
            ``-scores`` otherwise.
        value_range: smallest and largest possible score, None for an open end.
        needs_prompt: whether the score depends on the prompt or its metadata.
        batch_size: the largest batch that the reward wants to see at once; None for any.
        dtype: what its callers convert the images to; None for any floating point dtype.
        remote: whether it waits for a server rather than computes; it is then called from a
            thread of its own.
    """

    higher_is_better: bool = True
    value_range: tuple[float | None, float | None] = (None, None)
    needs_prompt: bool = True
    batch_size: int | None = None
    dtype: torch.dtype | None = None
    remote: bool = False


class RewardUnavailable(UserError):
    """A reward that cannot go on scoring; the run stops with a checkpoint.

    Attributes:
        reward: its name.
    """

    def __init__(self, reward: str, message: str) -> None:
        super().__init__(f"reward '{reward}': {message}")
        self.reward = reward


class Reward(ABC):
    """Scores images; subclasses set `spec` and implement `score`."""

    spec: ClassVar[RewardSpec] = RewardSpec()

    @abstractmethod
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score a batch.

        Args:
            images: ``[B, 3, H, W]`` float in [0, 1], on any device.
            prompts: ``B`` prompt texts.
            metadata: ``B`` metadata records of the prompts.

        Returns:
            scores ``[B]`` float32 on the device of ``images``; NaN where scoring failed.
        """

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        """Return why this reward cannot judge the prompt, or None; asked at load time."""
        return None

    def check_prompts(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[str | None]:
        """`check_prompt` for many prompts; overridden where one question takes long."""
        return [self.check_prompt(*pair) for pair in zip(prompts, metadata, strict=True)]

    def interrupt(self) -> None:  # noqa: B027  # most rewards never wait
        """Let calls that wait in another thread fail soon; later calls are as before."""


# name -> "module:class"; a class is imported only when a recipe asks for it.
_REGISTRY: dict[str, str] = {
    "count": "gardo.rewards.shapes:CountReward",
    "shape_fit": "gardo.rewards.shapes:ShapeFitReward",
    "clean": "gardo.rewards.shapes:CleanlinessReward",
    "strict_count": "gardo.rewards.shapes:StrictCountReward",
    "artifact": "gardo.rewards.shapes:ArtifactReward",
    "judge": "gardo.rewards.judge:JudgeReward",
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


ENTRY_POINTS = "gardo.rewards"
"""The group of entry points by which installed packages add rewards."""


def reward_names() -> list[str]:
    """Names of the built-in rewards and of those that installed packages bring."""
    return sorted(_all_rewards())


def _all_rewards() -> dict[str, str]:
    """Name -> Python path. A built-in name always means the built-in reward."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {**{e.name: f"{e.module}:{e.attr}" for e in found}, **_REGISTRY}


def build_reward(name: str, device: torch.device | str = "cpu", **parameters: Any) -> Reward:
    """Build a reward by name (built in or an entry point) or Python path ``module:attribute``.

    The attribute is a `Reward` class or a factory, called with ``device`` and the recipe's
    parameters, or a plain function ``fn(images, prompts, metadata)`` that returns the scores (see
    `gardo.rewards.functions`).

    Raises:
        UserError: unknown name, module or attribute, a refused parameter value, or a result that
            is no `Reward`.
    """
    from gardo.rewards.functions import FunctionReward, is_scoring_function

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
