"""The keys of the method: gate, reference policy, and the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from gardo.config.compat import Compat, compat_value, resolved_ties, with_compat_defaults
from gardo.config.fields import (
    ClipRange,
    Diversity,
    Fraction,
    KLCoef,
    NonNegative,
    NonNegativeFloat,
    Percentile,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Switch,
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
    adaptation: Literal["official", "paper"] = key(
        "official",
        "official: by the mean of the U >= 0, from the second epoch on, within [0.02, 0.2]; paper: "
        "by that of all U, when the window of 20 epochs is full, without a floor",
    )
    scope: Literal["batch", "group"] = key("batch", "win rates over the batch or the prompt group")
    anchor: Literal["batch", "base"] = key(
        "batch",
        "what samples are ranked against: the batch, or those that the base drew before training "
        "(the first rollout, all prompts), which the fraction is then a share of",
    )
    uncertainty: Literal["ensemble", "sigma", "both"] = key(
        "ensemble",
        "who judges the proxy: the auxiliary rewards, the uncertainty that it reports itself "
        "(RewardOutput.sigma; the less the better), or both",
    )


class ReferenceConfig(Section):
    kl_threshold: NonNegativeFloat = key(3e-4, "reset when the epoch's KL exceeds this; 0: never")
    reset_every: NonNegative = key(10, "reset at least every so many epochs; 0: never")
    reset_steps: NonNegative = key(
        0, "reset after so many optimizer steps, at the end of the epoch; 0: never"
    )
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


class CapConfig(Section):
    switch: ClassVar[str | None] = "mode"  # --algorithm.cap on

    mode: Switch = key(
        "off", "a sample may earn from the proxy at most what the auxiliary rewards support"
    )
    percentile: Percentile = key(
        80.0, "of the base's uncertainty, as allowance: the lower, the stronger the cap"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_switch(cls, data: Any) -> Any:
        return data if isinstance(data, Mapping) else {"mode": data}


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
        "gardo",
        "whose defaults: the paper as written, the code published with it, or this project's own "
        "(docs/method.md)",
    )
    kl_coef: KLCoef = key(
        0.1,
        "weight of the KL penalty, 0: no reference pass; or {target_share: 0.3}: held so that the "
        "KL's gradient is this share of the policy's",
    )
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
    reward_scale: Literal["none", "auto"] = key(
        "none", "auto: divide centred rewards by their RMS in the first epoch, the same for all"
    )
    diversity: Diversity = key(
        True,
        "multiply positive advantages by the nearest-neighbour distance; supported: only those of "
        "samples with an uncertainty up to cap.percentile of the base's",
    )
    diversity_scale: Literal["group_mean", "raw"] = key(
        "group_mean", "distances relative to the group's mean, or as they are"
    )
    cap: CapConfig = section(CapConfig, "the anchored cap on the proxy")
    gate: GateConfig = section(GateConfig, "which samples are penalised")
    reference: ReferenceConfig = section(ReferenceConfig, "when the reference policy is reset")
    nft: NFTConfig = section(NFTConfig, "DiffusionNFT's own settings")

    @property
    def has_kl(self) -> bool:
        """Whether there is a KL penalty, and thus a use of the reference."""
        return self.kl_coef != 0

    @property
    def kl_target(self) -> float | None:
        """The share of the policy's gradient that the KL's is held at; None: a fixed weight."""
        return self.kl_coef["target_share"] if isinstance(self.kl_coef, dict) else None

    @property
    def needs_judges(self) -> bool:
        """Whether samples are compared by what others than the proxy say of them."""
        gated = self.has_kl and self.gate.mode in ("paper", "official")
        return gated or self.needs_anchor

    @property
    def needs_anchor(self) -> bool:
        """Whether samples are compared with those of the base."""
        anchored = self.has_kl and self.gate.anchor == "base"
        return anchored or self.cap.mode == "on" or self.diversity == "supported"

    @property
    def kl_when_ungated(self) -> Literal["none", "all"]:
        """Who is penalised where no sample of an update or micro-batch is gated."""
        return self._set_by_compat("algorithm.kl_when_ungated")

    @property
    def gate_ties(self) -> Literal["half", "ordinal", "strict"]:
        """Equal rewards count one half, rank in sample order, or count nothing."""
        return resolved_ties(self._set_by_compat("algorithm.gate.ties"), self.gate.mode)

    @property
    def reset_judged_by(self) -> Literal["epoch", "update"]:
        """Which KL ``reference.kl_threshold`` looks at.

        The epoch's mean over gated samples, or the KL term in the loss of any optimizer step.
        """
        return self._set_by_compat("algorithm.reference.judged_by")

    def _set_by_compat(self, dotted: str) -> Any:
        return compat_value(dotted, self.compat, self.name)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_compat(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        compat, name = data.get("compat", "gardo"), data.get("name", "grpo")
        return with_compat_defaults(data, "algorithm", compat, name)
