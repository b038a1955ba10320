"""Keys that earlier versions had, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from gardo.config.compat import COMPAT, TOGGLES, compat_value, resolved_ties
from gardo.config.traits import TRAITS
from gardo.types import UserError

_BOUND, _RATIO = "sampling.max_ratio_deviation", "health.ratio"
REMOVED = {_BOUND: f"renamed to {_RATIO}"} | {
    f"algorithm.{toggle}": "gone; algorithm.compat official sets it" for toggle in TOGGLES
}
"""What is said of each."""


def refuse_removed(dotted: str) -> None:
    """Refuse a key that was typed; UserError says what replaces it."""
    if dotted in REMOVED:
        raise UserError(f"{dotted}: {REMOVED[dotted]}")


def without_removed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that are gone, as files of earlier versions have them.

    Raises:
        UserError: such a key has another value than what holds without it.
    """
    rest = deepcopy(dict(data))
    for dotted in REMOVED:
        area, name = _parent(rest, dotted)
        if name in area and not _holds_anyway(dotted, area.pop(name), rest):
            refuse_removed(dotted)
    return rest


def _holds_anyway(dotted: str, given: Any, data: dict[str, Any]) -> bool:
    """Whether a configuration without the key means the same."""
    if dotted == _BOUND:
        return bool(given == 1e-3)  # the default, and now that of health.ratio
    algorithm, gate = _parent(data, "algorithm.")[0], _parent(data, "algorithm.gate.")[0]
    compat, name = algorithm.get("compat", "paper"), algorithm.get("name", "grpo")
    if compat not in list(COMPAT) or name not in list(TRAITS):
        return True  # refused by their own name later
    implied = compat_value(dotted.removeprefix("algorithm."), compat, name)
    mode = gate.get("mode", COMPAT[compat].get("gate.mode"))
    return bool(resolved_ties(given, mode) == resolved_ties(implied, mode))


def take_over_bound(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, with one bound in place of the two that an earlier version had.

    It is the laxer one: the run neither stops nor warns where it did not before.
    """
    own = deepcopy(dict(data))
    (sampling, name), (health, _) = _parent(own, _BOUND), _parent(own, _RATIO)
    bound, alarm = sampling.pop(name, 0.0), health.get("ratio")
    if bound is None:
        health["ratio"] = None
    elif isinstance(alarm, float):
        health["ratio"] = max(bound, alarm)
    return own


def _parent(data: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The section that a key lies in, or an empty one, and the key's name in it."""
    *sections, name = dotted.split(".")
    for section in sections:
        inner = data.get(section)
        data = inner if isinstance(inner, dict) else {}
    return data, name
