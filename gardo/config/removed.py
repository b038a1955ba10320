"""Keys that earlier versions had, and what became of them."""

from __future__ import annotations

from typing import Any

from gardo.config.compat import COMPAT, TOGGLES, compat_value, resolved_ties
from gardo.config.traits import TRAITS
from gardo.types import UserError

_BOUND, _RATIO = "sampling.max_ratio_deviation", "health.ratio"


def compat_of_earlier(data: dict[str, Any]) -> None:
    """Name in a run's file of an earlier version, in place, the ``compat`` that it meant.

    What was called ``paper`` then is ``gardo`` now. Such a file is complete; one that a user wrote
    is not, and means what it says.
    """
    algorithm = _section(data, "algorithm")
    complete = {"recipe", "overwrite", "algorithm"} <= data.keys()
    if complete and "diversity_scale" not in algorithm and algorithm.get("compat") == "paper":
        algorithm["compat"] = "gardo"


def refuse_removed(dotted: str, given: Any, data: dict[str, Any]) -> None:
    """Refuse a key that is gone; UserError says what to do instead, with the other keys' values."""
    if dotted == _BOUND:
        raise UserError(f"{dotted}: renamed to {_RATIO}")
    if dotted not in TOGGLES or not _known(data):
        return  # an unknown algorithm.compat or name is refused later, by its own name
    compat = _section(data, "algorithm").get("compat", "gardo")
    giving = _giving(dotted, given, data)
    if compat in giving:
        advice = f"this is what algorithm.compat {compat} does: leave it out"
    elif giving:
        advice = f"only algorithm.compat {' or '.join(giving)} does that"
    else:
        advice = f"no algorithm.compat does that with the other settings, got {given!r}"
    raise UserError(f"{dotted}: gone; {advice}")


def settle_removed(data: dict[str, Any], to_evaluate: bool = False) -> None:
    """Take the keys that are gone out of a configuration, as files of earlier versions have them.

    Args:
        data: what a file holds, on top of what it is merged into; changed in place.
        to_evaluate: whether to leave out keys of training whatever they say, as no evaluation
            depends on them.

    Raises:
        UserError: such a key has another value than what holds without it.
    """
    for dotted in (_BOUND, *TOGGLES):
        if dotted in data:  # written with its dots
            refuse_removed(dotted, data[dotted], data)
        section, _, name = dotted.rpartition(".")
        area = _section(data, section)
        if name not in area:
            continue
        given = area.pop(name)
        if dotted == _BOUND:
            kept = _keep_bound(given, _section(data, "health"))
        else:
            compat = _section(data, "algorithm").get("compat", "gardo")
            kept = not _known(data) or compat in _giving(dotted, given, data)
        if not kept and not to_evaluate:
            refuse_removed(dotted, given, data)
    algorithm = _section(data, "algorithm")
    # earlier versions had it without compat official, too
    if to_evaluate and algorithm.get("kl_reduction") == "microbatch":
        del algorithm["kl_reduction"]


def _keep_bound(bound: Any, health: dict[str, Any]) -> bool:
    """Make ``health.ratio`` the stricter of the two bounds that were; whether that can be done.

    On resume, too: a process checks its first update by it, as the earlier version did.
    """
    alarm = health.get("ratio", 1e-3)
    if not all(value is None or isinstance(value, (int, float)) for value in (bound, alarm)):
        return False
    if "ratio" in health:
        health["ratio"] = min((v for v in (bound, alarm) if v is not None), default=None)
        return True
    return bool(bound == alarm)


def _known(data: dict[str, Any]) -> bool:
    """Whether the compat and the name of the algorithm are known ones."""
    algorithm = _section(data, "algorithm")
    compat, name = algorithm.get("compat", "gardo"), algorithm.get("name", "grpo")
    return compat in list(COMPAT) and name in list(TRAITS)


def _giving(dotted: str, given: Any, data: dict[str, Any]) -> list[str]:
    """The values of ``algorithm.compat`` with which it is as a key that is gone asks for."""
    name = _section(data, "algorithm").get("name", "grpo")
    found: list[str] = []
    for compat, defaults in COMPAT.items():
        mode = _section(data, "algorithm.gate").get("mode", defaults["algorithm.gate.mode"])
        implied = compat_value(dotted, compat, name)
        if resolved_ties(given, mode) == resolved_ties(implied, mode):
            found.append(compat)
    return found


def _section(data: dict[str, Any], dotted: str) -> dict[str, Any]:
    """A section, or an empty one where there is none."""
    for part in dotted.split("."):
        inner = data.get(part)
        data = inner if isinstance(inner, dict) else {}
    return data
