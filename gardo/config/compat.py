"""What each value of ``algorithm.compat`` stands for: the one table of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Compat = Literal["paper", "official"]

COMPAT: dict[Compat, dict[str, Any]] = {
    "paper": {
        "kl_when_ungated": "none",
        "gate.ties": "auto",
        "reference.judged_by": "epoch",
    },
    "official": {
        "kl_scale": "official",
        "kl_reduction": "microbatch",
        "kl_when_ungated": {"nft": "all"},
        "gate.mode": "official",
        "gate.ties": "ordinal",
        "gate.share_of": "nonnegative",
        "reference.judged_by": "update",
        "reference.reset_every": 16,  # more than 15 epochs
    },
}
"""Values of ``algorithm`` by their dotted names, some by ``algorithm.name``.

They are the defaults of keys, and a key that is set wins; but for the ``TOGGLES``.
"""
TOGGLES = ("kl_when_ungated", "gate.ties", "reference.judged_by")
"""Those that are no keys: nobody would try one alone, so only ``compat`` sets them."""


def compat_value(dotted: str, compat: Compat, algorithm: str) -> Any:
    """A value of the table for an algorithm: the paper's where its published code has none."""
    value = COMPAT[compat][dotted]
    return value.get(algorithm, COMPAT["paper"][dotted]) if isinstance(value, dict) else value


def resolved_ties(ties: Any, mode: Any) -> Any:
    """What a value of ``gate.ties`` means: ``auto`` is ordinal with ``gate.mode`` official."""
    return ("ordinal" if mode == "official" else "half") if ties == "auto" else ties


def with_compat_defaults(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of ``algorithm``, and where they are not set those of its ``compat``."""
    compat = data.get("compat", "paper")
    if compat not in list(COMPAT):
        return data  # which is refused later
    data = dict(data)
    for dotted in (name for name in COMPAT[compat] if name not in TOGGLES):
        value = compat_value(dotted, compat, data.get("name", "grpo"))
        section, _, name = dotted.rpartition(".")
        own = (data.get(section) or {}) if section else data
        if isinstance(own, Mapping) and name not in own:
            data |= {section: {**own, name: value}} if section else {name: value}
    return data
