"""Keys that earlier versions had, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from gardo.types import UserError

_BOUND = "sampling.max_ratio_deviation"
REMOVED = {_BOUND: "renamed to health.ratio"}
_FORMER_BOUND = 1e-3  # its default, and now that of health.ratio


def refuse_removed(dotted: str) -> None:
    """Refuse a key that was typed; UserError says what replaces it."""
    if dotted in REMOVED:
        raise UserError(f"{dotted}: {REMOVED[dotted]}")


def without_removed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that are gone, as in files of earlier versions.

    Raises:
        UserError: such a key has another value than what holds without it.
    """
    rest = deepcopy(dict(data))
    for dotted in REMOVED:
        area, name = _parent(rest, dotted)
        if name in area and area.pop(name) != _FORMER_BOUND:
            refuse_removed(dotted)
    return rest


def take_over_bound(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, with one bound in place of the two that an earlier version had.

    It is the laxer one: the run neither stops nor warns where it did not before.
    """
    own = deepcopy(dict(data))
    (sampling, name), (health, _) = _parent(own, _BOUND), _parent(own, "health.ratio")
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
