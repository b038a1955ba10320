"""The keys of the method: gate, reference policy, and the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from gardo.config.compat import Compat, compat_value, resolved_ties, with_compat_defaults
from gardo.config.fields import (
    ClipRange,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    key,
    section,
)
from gardo.config.traits import TRAITS


class GateConfig(Section):
    mode: Literal["paper", "official", "all", "off"] = key(
        "paper",
        "which samples get the KL penalty: over-rated by the proxy (paper), under-rated (official)",
    )
    fraction: Fraction = key(0.1, "initial share of samples that are gated")
    share_of: Literal["nonnegative", "all"] = key(
        "nonnegative", "what the fraction is a share of: the samples with U >= 0, or all"
    )
    adaptive: bool = key(True, "adapt the fraction to the trend of the uncertainty")
    scope: Literal["batch", "group"] = key("batch", "win rates over the batch or the prompt group")


class ReferenceConfig(Section):
    kl_threshold: NonNegativeFloat = key(3e-4, "reset when the epoch's KL exceeds this; 0: never")
    reset_every: NonNegative = key(10, "reset at least every so many epochs; 0: never")
    guard: bool = key(
        False, "reset only to a policy that the auxiliary rewards trust no less than the reference"
    )
    guard_window: Positive = key(5, "epochs that the guard judges a policy by")
    guard_share: Share = key(
        0.05, "share of the samples, the most uncertain, whose mean uncertainty it watches"
    )
    guard_uncertainty: NonNegativeFloat = key(
        0.05, "most that this mean may exceed the lowest of any reference so far"
    )
    guard_win_rate: Fraction = key(
        0.5, "least win rate against the reference's samples by the auxiliary rewards"
    )


class NFTConfig(Section):
    beta: PositiveFloat = key(1.0, "strength of the implicit positive and negative policies")
    decay_rate: NonNegativeFloat = key(
        0.001, "the behaviour policy keeps min(rate * (optimizer steps - start), max) of itself"
    )
    decay_start: NonNegative = key(0, "optimizer steps in which it follows the policy at once")
    decay_max: Fraction = key(0.5, "the most that it keeps of itself at an epoch's end")


class AlgorithmConfig(Section):
    name: Literal[tuple(TRAITS)] = key(  # type: ignore[valid-type]
        "grpo", "policy gradient on the denoising steps, or DiffusionNFT on the forward process"
    )
    compat: Compat = key(
        "paper",
        "official: defaults of gate.mode, gate.share_of, kl_scale, kl_reduction and "
        "reference.reset_every as in the published code, and what else it does differently",
    )
    kl_coef: NonNegativeFloat = key(0.1, "weight of the KL penalty; 0: no reference pass")
    kl_scale: Literal["exact", "official"] = key("exact", "variance in the KL")
    kl_reduction: Literal["gated", "batch", "microbatch"] = key(
        "gated",
        "KL averaged over the gated samples of an update, over all its samples, or (with compat "
        "official) over the gated samples of each micro-batch",
    )
    clip_range: ClipRange = key(1e-4, "PPO clip range, or [low, high]")
    ratio_norm: Literal["none", "guard"] = key(
        "none", "guard: GRPO-Guard's normalised ratio and gradient weights (grpo)"
    )
    adv_clip: PositiveFloat = key(5.0, "advantages are clamped to +- this")
    advantage_norm: Literal["none", "group_std", "global_std"] = key(
        "none", "what centred rewards are divided by"
    )
    diversity: bool = key(True, "multiply positive advantages by the nearest-neighbour distance")
    gate: GateConfig = section(GateConfig, "which samples are penalised")
    reference: ReferenceConfig = section(ReferenceConfig, "when the reference policy is reset")
    nft: NFTConfig = section(NFTConfig, "DiffusionNFT's own settings")

    @property
    def kl_when_ungated(self) -> Literal["none", "all"]:
        """Who is penalised where no sample of an update or micro-batch is gated."""
        return self._set_by_compat("kl_when_ungated")

    @property
    def gate_ties(self) -> Literal["half", "ordinal"]:
        """Equal rewards count one half, or rank in sample order."""
        return resolved_ties(self._set_by_compat("gate.ties"), self.gate.mode)

    @property
    def reset_judged_by(self) -> Literal["epoch", "update"]:
        """Which KL ``reference.kl_threshold`` looks at.

        The epoch's mean over gated samples, or the KL term in the loss of any optimizer step.
        """
        return self._set_by_compat("reference.judged_by")

    def _set_by_compat(self, dotted: str) -> Any:
        return compat_value(dotted, self.compat, self.name)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_compat(cls, data: Any) -> Any:
        return with_compat_defaults(data) if isinstance(data, Mapping) else data
