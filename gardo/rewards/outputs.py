"""Asking rewards, checking and joining what they return: a float32 per image, NaN if missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gardo.rewards.base import Reward
from gardo.types import RewardOutput, UserError


def to_scores(name: str, value: Any, count: int) -> Tensor:
    """Check the scores of a batch and convert them.

    Args:
        name: of the reward, for the message.
        value: a floating point tensor or array ``[count]``, or a list of as many numbers.
        count: how many images were scored.

    Returns:
        ``[count]`` float32 without gradient. What is not finite is missing, hence NaN: an infinite
        score would spoil its group's mean.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, (list, tuple)):
        strange = [v for v in value if isinstance(v, bool) or not isinstance(v, Real)]
        if strange:
            raise _unexpected(name, count, f"a list with {strange[0]!r}")
        value = torch.tensor([float(v) for v in value], dtype=torch.float64)
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(np.float64))
    if not isinstance(value, Tensor):
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value)
        raise _unexpected(name, count, kind.__name__ if isinstance(kind, type) else kind)
    if not value.is_floating_point():
        raise _unexpected(name, count, f"a tensor of {value.dtype}")
    if value.shape != (count,):
        raise _unexpected(name, count, f"shape {list(value.shape)}")
    scores = value.detach().float()
    return scores.where(scores.isfinite(), torch.nan)


def _unexpected(name: str, count: int, got: str) -> UserError:
    return UserError(
        f"reward '{name}': expected {count} scores, one per image, as a floating point tensor "
        f"[{count}] or a list of numbers, got {got}"
    )


def check_output(name: str, output: Any, count: int) -> RewardOutput:
    """Check what `Reward.score` returned for ``count`` images, each of its tensors as `to_scores`.

    Without a score there is no sigma.

    Raises:
        UserError: not a `RewardOutput`, wrong scores, details or sigma in it, or a negative sigma.
    """
    if not isinstance(output, RewardOutput):
        raise UserError(f"reward '{name}': expected a RewardOutput, got {type(output).__name__}")
    details = {key: to_scores(f"{name}/{key}", v, count) for key, v in output.details.items()}
    scores = to_scores(name, output.scores, count)
    if output.sigma is None:
        return RewardOutput(scores, details)
    sigma = to_scores(f"{name}/sigma", output.sigma, count).to(scores.device)
    if (sigma < 0).any():
        lowest = float(sigma[~sigma.isnan()].min())
        raise UserError(f"reward '{name}': expected sigma to be at least 0, got {lowest:g}")
    return RewardOutput(scores, details, sigma.where(scores.isfinite(), torch.nan))


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Join the outputs of consecutive batches; a detail or sigma that one lacks is NaN there."""
    if not outputs:
        return RewardOutput(torch.zeros(0))
    names = dict.fromkeys(name for output in outputs for name in output.details)
    sigmas = [output.sigma for output in outputs]

    def column(parts: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(outputs, parts, strict=True)
        return torch.cat(
            [torch.full_like(o.scores, torch.nan) if p is None else p for o, p in pairs]
        )

    return RewardOutput(
        column([output.scores for output in outputs]),
        {name: column([output.details.get(name) for output in outputs]) for name in names},
        None if all(sigma is None for sigma in sigmas) else column(sigmas),
    )


def missing(count: int) -> RewardOutput:
    """The output for ``count`` images that could not be scored."""
    return RewardOutput(torch.full((count,), torch.nan))


@torch.inference_mode()
def score_batch(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> RewardOutput:
    """Score images with one reward, in the batches and the dtype that it prefers.

    Args:
        name: of the reward, for messages.
        reward: what scores.
        images: ``[B, 3, H, W]`` float in [0, 1]; ``B`` may be 0.
        prompts: ``B`` texts.
        metadata: ``B`` records.

    Returns:
        scores, details and sigma, each ``[B]`` float32; NaN where missing.

    Raises:
        UserError: the reward returned something else than a finite or missing number per image.
    """
    spec = reward.spec
    if spec.dtype is not None:
        images = images.to(spec.dtype)
    outputs = []
    for start in range(0, len(images), spec.batch_size or max(len(images), 1)):
        rows = slice(start, start + (spec.batch_size or len(images)))
        output = reward.score(images[rows], prompts[rows], metadata[rows])
        outputs.append(check_output(name, output, len(images[rows])))
    return concatenate(outputs) if outputs else RewardOutput(images.new_zeros(0).float())
