"""What generators share: held-out words, distinct draws and the checks of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gardo.rng import generator


def draw_distinct(total: int, size: int, seed: int, *keys: str) -> list[int]:
    """``size`` different whole numbers below ``total``, in random order; a function of seed, keys.

    Raises:
        ValueError: ``size`` is larger than ``total``.
    """
    check_integer("size", size, low=1)
    if size > total:
        raise ValueError(f"size: expected at most the {total} different prompts, got {size}")
    order = torch.randperm(total, generator=generator(seed, "prompts", *keys))
    return order[:size].tolist()


def split_values(
    split: str, name: str, values: Sequence[Any], held_out: Sequence[Any]
) -> tuple[Any, ...]:
    """The values that a split may use: the others for ``train``, the held-out ones for ``test``.

    With nothing held out, ``test`` uses all.

    Raises:
        ValueError: ``held_out`` is no subset of ``values``.
    """
    foreign = [value for value in held_out if value not in values]
    if foreign:
        raise ValueError(f"held_out_{name}: expected some of {name}, got {foreign[0]!r}")
    if split == "train":
        return tuple(value for value in values if value not in held_out)
    return tuple(held_out) if held_out else tuple(values)


def check_split(split: str, held_out: bool) -> None:
    """Refuse a split other than train and test, and a test split without anything held out."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got '{split}'")
    if split == "test" and not held_out:
        raise ValueError(
            "split 'test' has what is held out: expected held_out_classes or held_out_counts"
        )


def check_subset(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Refuse values that are no list, empty, repeated or unknown."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name}: expected a list, got {values!r}")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(known)}; got {unknown[0]!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: expected different values, got {list(values)}")


def check_counts(name: str, counts: Sequence[int], low: int) -> None:
    """Refuse counts that are no list of different integers of at least ``low``."""
    if not isinstance(counts, Sequence):
        raise ValueError(f"{name}: expected a list of integers, got {counts!r}")
    for count in counts:
        check_integer(name, count, low)
    if len(set(counts)) != len(counts):
        raise ValueError(f"{name}: expected different values, got {list(counts)}")


def check_integer(name: str, value: object, low: int) -> None:
    """Refuse what is no integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


def allocate(
    total: int, weights: Mapping[str, float], capacities: Mapping[str, int]
) -> dict[str, int]:
    """Divide ``total`` in proportion to the weights, by Sainte-Laguë's method.

    No share is larger than its capacity; what it would have had goes to the others.

    Raises:
        ValueError: the capacities of all positive weights together are smaller than ``total``.
    """
    room = {name: capacities[name] for name, weight in weights.items() if weight > 0}
    if total > sum(room.values()):
        raise ValueError(
            f"size: expected at most the {sum(room.values())} different prompts, got {total}"
        )
    shares = dict.fromkeys(weights, 0)
    for _ in range(total):
        open_shares = [name for name in room if shares[name] < room[name]]
        winner = min(open_shares, key=lambda name: (shares[name] + 0.5) / weights[name])
        shares[winner] += 1
    return shares
