"""The one interface of all rewards; `gardo.rewards.registry` has their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Backbone:
    """A model that a reward or a feature extractor loads; those of one name share it.

    Attributes:
        name: what the planner calls it.
        bytes: of its weights, in the precision that it has on a GPU by default.
    """

    name: str
    bytes: float


class RewardUnavailable(UserError):
    """A reward that cannot go on scoring; the run stops with a checkpoint.

    Attributes:
        reward: its name.
    """

    def __init__(self, reward: str, message: str) -> None:
        super().__init__(f"reward '{reward}': {message}")
        self.reward = reward


class Reward(ABC):
    """Scores images; subclasses set `spec`, and `backbones` if any, and implement `score`."""

    spec: ClassVar[RewardSpec] = RewardSpec()
    backbones: ClassVar[tuple[Backbone, ...]] = ()

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
