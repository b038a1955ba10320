"""What each value of ``algorithm.compat`` stands for: the one table of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Compat = Literal["paper", "official", "gardo"]

COMPAT: dict[Compat, dict[str, Any]] = {
    # Algorithm 1 and the appendix of arXiv 2512.24138, as written
    "paper": {
        "algorithm.kl_scale": "exact",
        "algorithm.kl_reduction": "batch",
        "algorithm.kl_when_ungated": "none",
        "algorithm.diversity_scale": "raw",
        "algorithm.gate.mode": "paper",
        "algorithm.gate.ties": "strict",
        "algorithm.gate.share_of": "all",
        "algorithm.gate.adaptation": "paper",
        "algorithm.reference.judged_by": "update",
        "algorithm.reference.kl_threshold": 1e-4,
        "algorithm.reference.reset_every": 0,
        "algorithm.reference.reset_steps": 100,
        # an ODE would draw one image for the whole group
        "sampling.same_latent": {"grpo": True, "nft": False},
    },
    # the code published with it
    "official": {
        "algorithm.kl_scale": "official",
        "algorithm.kl_reduction": "microbatch",
        "algorithm.kl_when_ungated": {"nft": "all"},
        "algorithm.diversity_scale": "group_mean",
        "algorithm.gate.mode": "official",
        "algorithm.gate.ties": "ordinal",
        "algorithm.gate.share_of": "nonnegative",
        "algorithm.gate.adaptation": "official",
        "algorithm.reference.judged_by": "update",
        "algorithm.reference.kl_threshold": 3e-4,
        "algorithm.reference.reset_every": 16,  # more than 15 epochs
        "algorithm.reference.reset_steps": 0,
        "sampling.same_latent": False,
    },
    # this project's own; docs/method.md has the evidence for each deviation from the paper
    "gardo": {
        "algorithm.kl_scale": "exact",
        "algorithm.kl_reduction": "gated",
        "algorithm.kl_when_ungated": "none",
        "algorithm.diversity_scale": "group_mean",
        "algorithm.gate.mode": "paper",
        "algorithm.gate.ties": "auto",
        "algorithm.gate.share_of": "nonnegative",
        "algorithm.gate.adaptation": "official",
        "algorithm.reference.judged_by": "epoch",
        "algorithm.reference.kl_threshold": 3e-4,
        "algorithm.reference.reset_every": 10,
        "algorithm.reference.reset_steps": 0,
        "sampling.same_latent": False,
    },
}
"""Values by dotted key, some by ``algorithm.name``.

They are the defaults of keys, and a key that is set wins; but for the ``TOGGLES``.
"""
TOGGLES = ("algorithm.kl_when_ungated", "algorithm.gate.ties", "algorithm.reference.judged_by")
"""Those that are no keys: nobody would try one alone, so only ``compat`` sets them."""


def compat_value(dotted: str, compat: Compat, algorithm: str) -> Any:
    """A value of the table for an algorithm: our own where its paper or code has none."""
    value = COMPAT[compat][dotted]
    return value.get(algorithm, COMPAT["gardo"][dotted]) if isinstance(value, dict) else value


def resolved_ties(ties: Any, mode: Any) -> Any:
    """What a value of ``gate.ties`` means: ``auto`` is ordinal with ``gate.mode`` official."""
    return ("ordinal" if mode == "official" else "half") if ties == "auto" else ties


def with_compat_defaults(
    data: Mapping[str, Any], area: str, compat: Any, algorithm: Any
) -> Mapping[str, Any]:
    """The keys of an area of the configuration, and where not set those of a ``compat``."""
    if compat not in list(COMPAT):
        return data  # which is refused later
    data = dict(data)
    for dotted in (name for name in COMPAT[compat] if name not in TOGGLES):
        if not dotted.startswith(f"{area}."):
            continue
        value = compat_value(dotted, compat, algorithm)
        section, _, name = dotted.removeprefix(f"{area}.").rpartition(".")
        own = (data.get(section) or {}) if section else data
        if isinstance(own, Mapping) and name not in own:
            data |= {section: {**own, name: value}} if section else {name: value}
    return data
