"""What is compared: GARDO, its baselines, and GARDO with each part off, as recipe overrides."""

from __future__ import annotations

from dataclasses import dataclass, field

STATIC = {"algorithm.reference.kl_threshold": "0", "algorithm.reference.reset_every": "0"}
GRPO = {
    "algorithm.kl_coef": "0",
    "algorithm.diversity": "false",
    "algorithm.advantage_norm": "group_std",
}
KL_COEF = "algorithm.kl_coef"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        overrides: on top of the recipe, which is GARDO.
        swept: whether it has a KL, whose coefficient is varied.
    """

    name: str
    title: str
    overrides: dict[str, str] = field(default_factory=dict)
    swept: bool = True


METHODS = (
    Method("grpo", "Flow-GRPO without KL", GRPO, swept=False),
    Method(
        "grpo-kl", "Flow-GRPO, KL on all samples", {**GRPO, "algorithm.gate.mode": "all", **STATIC}
    ),
    Method("gardo", "GARDO"),
    Method("gardo-kl-on-all", "GARDO, KL on all samples", {"algorithm.gate.mode": "all"}),
    Method("gardo-static", "GARDO, static reference", STATIC),
    Method("gardo-no-diversity", "GARDO, no diversity", {"algorithm.diversity": "false"}),
    Method("gardo-with-std", "GARDO, with std", {"algorithm.advantage_norm": "group_std"}),
    Method(
        "multi-reward",
        "Flow-GRPO on the weighted sum",
        {**GRPO, "rewards.proxy": "{count: 1.0, shape_fit: 0.5, clean: 0.5}", "rewards.aux": "[]"},
        swept=False,
    ),
    Method(
        "grpo-guard",
        "GRPO-Guard",
        # its ratio lies about a transition's standard deviation closer to 1
        {**GRPO, "algorithm.ratio_norm": "guard", "algorithm.clip_range": "1e-3"},
        swept=False,
    ),
    Method(
        "grpo-fast",
        "Flow-GRPO-Fast, window of 2",
        {**GRPO, "sampling.sde_window": "2"},
        swept=False,
    ),
)


@dataclass(frozen=True)
class Setting:
    """A method at one KL coefficient; None for a method without a KL."""

    method: Method
    kl_coef: float | None

    @property
    def name(self) -> str:
        return self.method.name if self.kl_coef is None else f"{self.method.name}-{self.kl_coef:g}"

    @property
    def overrides(self) -> dict[str, str]:
        if self.kl_coef is None:
            return self.method.overrides
        return {**self.method.overrides, KL_COEF: f"{self.kl_coef:g}"}


def settings(kl_coefs: tuple[float, ...], methods: tuple[Method, ...] = METHODS) -> list[Setting]:
    """Every method, those with a KL at every coefficient."""
    return [
        Setting(method, coef)
        for method in methods
        for coef in (kl_coefs if method.swept else (None,))
    ]
