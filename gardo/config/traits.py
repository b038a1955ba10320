"""What settings must fit: the algorithms' traits, here because checking them needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class Traits(NamedTuple):
    """Of an algorithm.

    Attributes:
        noisy: whether its rollouts are noisy steps, with log-probs, rather than steps of an ODE.
        ratios: whether its loss has the ratio of the policy's probabilities to those of sampling.
    """

    noisy: bool
    ratios: bool


TRAITS = {
    "grpo": Traits(noisy=True, ratios=True),
    "nft": Traits(noisy=False, ratios=False),
}
"""By ``algorithm.name``; the classes are in ``gardo.algorithms.registry``."""
