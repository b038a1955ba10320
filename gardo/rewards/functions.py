"""Plain functions as rewards: ``fn(images, prompts, metadata)`` returns a score per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.outputs import check_output, to_scores
from gardo.types import RewardOutput, UserError


def is_scoring_function(candidate: Callable[..., Any]) -> bool:
    """Whether a callable scores images, rather than builds a reward.

    It does if it is no class and takes three positional arguments, none of which is called
    ``device``: factories are called with ``device`` as a keyword.
    """
    if isinstance(candidate, type):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(candidate).parameters.values())[:3]
    except ValueError:  # some callables of C extensions do not tell
        return False
    names = [p.name for p in parameters if p.kind in positional]
    return len(names) == 3 and "device" not in names


class FunctionReward(Reward):
    """A reward that calls a user's function.

    The function gets ``images [B, 3, H, W]`` (float in [0, 1], on the device they were drawn on),
    ``B`` prompts and ``B`` metadata records, and returns the scores as a floating point tensor
    ``[B]``, a list of numbers or a `RewardOutput`. It may carry a `RewardSpec` in an attribute
    ``spec``; without one, higher is better, in any range and batch size.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], parameters: Mapping[str, Any]
    ) -> None:
        """Bind the recipe's ``parameters`` as keywords.

        Raises:
            UserError: parameters that the function does not take, or a ``spec`` that is none.
        """
        try:
            inspect.signature(function).bind(None, None, None, **parameters)
        except TypeError as error:
            raise UserError(f"rewards.parameters.{name}: {error}") from None
        spec = getattr(function, "spec", RewardSpec())
        if not isinstance(spec, RewardSpec):
            raise UserError(
                f"reward '{name}': expected its attribute 'spec' to be a "
                f"gardo.rewards.base.RewardSpec, got {type(spec).__name__}"
            )
        self.name = name
        self.spec = spec  # type: ignore[misc]  # each function has its own
        self._function = partial(function, **parameters)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        value = self._function(images, prompts, metadata)
        if isinstance(value, RewardOutput):
            return check_output(self.name, value, len(images))
        return RewardOutput(to_scores(self.name, value, len(images)).to(images.device))
