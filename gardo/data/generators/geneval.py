"""Prompts with GenEval's records for its six tasks.

Texts, records and rules of combination (no coloured persons, two different colours in colour
attribution, counts with an upper bound) are those of GenEval's prompts (Ghosh et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gardo.data.coco import CLASSES, COLORS, POSITIONS, TASKS, number_word, plural, with_article
from gardo.data.generators.vocabulary import (
    allocate,
    check_counts,
    check_integer,
    check_split,
    check_subset,
    draw_distinct,
    split_values,
)
from gardo.types import Prompt

# Flow-GRPO's training mix (position : counting : colour attribution : colours : two objects =
# 7 : 5 : 3 : 1 : 1), with a few single objects.
DEFAULT_MIX: Mapping[str, float] = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 1,
}


def geneval_prompts(
    *,
    split: str = "train",
    size: int = 1000,
    seed: int = 0,
    mix: Mapping[str, float] = DEFAULT_MIX,
    classes: Sequence[str] = CLASSES,
    colors: Sequence[str] = COLORS,
    counts: Sequence[int] = (2, 3, 4),
    held_out_classes: Sequence[str] = (),
    held_out_counts: Sequence[int] = (),
) -> list[Prompt]:
    """Different prompts of the six tasks, in random order.

    Args:
        split: ``train`` leaves out all held-out classes and counts; ``test`` has nothing else
            (counting alone, where only counts are held out).
        size: number of prompts.
        seed: another seed draws other prompts.
        mix: task -> weight. A task gives at most its different prompts (the single objects are
            at most 80); the others then fill up.
        classes: of `gardo.data.coco.CLASSES`.
        colors: of `gardo.data.coco.COLORS`; gray is not among the ten of the benchmark.
        counts: of the counting task, 1 or more.
        held_out_classes: a subset of ``classes``.
        held_out_counts: a subset of ``counts``.

    Raises:
        ValueError: a value out of range, or fewer different prompts than ``size``.
    """
    check_split(split, bool(held_out_classes or held_out_counts))
    check_integer("size", size, low=1)
    check_subset("classes", classes, CLASSES)
    check_subset("colors", colors, COLORS)
    check_counts("counts", counts, low=1)
    weights = _check_mix(mix)
    if split == "test" and not held_out_classes:
        weights = {"counting": 1.0}
    words = _Words(
        classes=split_values(split, "classes", classes, held_out_classes),
        colors=tuple(colors),
        counts=split_values(split, "counts", counts, held_out_counts),
    )
    capacities = {task: _RECORDS[task].capacity(words) for task in weights}
    records = []
    for task, share in allocate(size, weights, capacities).items():
        if share:
            rows = draw_distinct(capacities[task], share, seed, "geneval", split, task)
            records += [_RECORDS[task].build(words, row) for row in rows]
    return [records[i] for i in draw_distinct(len(records), len(records), seed, "order", split)]


def counting_record(name: str, count: int) -> dict[str, Any]:
    """The record of the counting task: so many and not one more."""
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
    }


@dataclass(frozen=True)
class _Words:
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def things(self) -> tuple[str, ...]:
        """Classes that may have a colour."""
        return tuple(name for name in self.classes if name != "person")


@dataclass(frozen=True)
class _Records:
    """A task: how many different prompts it has, and which is the one with a given number."""

    capacity: Callable[[_Words], int]
    build: Callable[[_Words, int], Prompt]


def _pairs(n: int) -> int:
    return n * (n - 1)


def _pair(n: int, row: int) -> tuple[int, int]:
    """The ordered pair of two different numbers below ``n`` with the number ``row``."""
    first, second = divmod(row, n - 1)
    return first, second + (second >= first)


def _single_object(words: _Words, row: int) -> Prompt:
    name = words.classes[row]
    return _prompt("single_object", with_article(name), {"class": name, "count": 1})


def _two_object(words: _Words, row: int) -> Prompt:
    first, second = (words.classes[i] for i in _pair(len(words.classes), row))
    return _prompt(
        "two_object",
        f"{with_article(first)} and {with_article(second)}",
        {"class": first, "count": 1},
        {"class": second, "count": 1},
    )


def _counting(words: _Words, row: int) -> Prompt:
    which_class, which_count = divmod(row, len(words.counts))
    name, count = words.classes[which_class], words.counts[which_count]
    objects = name if count == 1 else plural(name)
    return Prompt(f"a photo of {number_word(count)} {objects}", counting_record(name, count))


def _colors(words: _Words, row: int) -> Prompt:
    which_class, which_color = divmod(row, len(words.colors))
    name, color = words.things[which_class], words.colors[which_color]
    return _prompt(
        "colors", f"{with_article(color)} {name}", {"class": name, "count": 1, "color": color}
    )


def _position(words: _Words, row: int) -> Prompt:
    which_pair, which_position = divmod(row, len(POSITIONS))
    subject, target = (words.classes[i] for i in _pair(len(words.classes), which_pair))
    position = POSITIONS[which_position]
    return _prompt(
        "position",
        f"{with_article(subject)} {position} {with_article(target)}",
        {"class": target, "count": 1},
        {"class": subject, "count": 1, "position": [position, 0]},
    )


def _color_attr(words: _Words, row: int) -> Prompt:
    which_pair, which_colors = divmod(row, _pairs(len(words.colors)))
    names = [words.things[i] for i in _pair(len(words.things), which_pair)]
    colors = [words.colors[i] for i in _pair(len(words.colors), which_colors)]
    clauses = [
        {"class": name, "count": 1, "color": color}
        for name, color in zip(names, colors, strict=True)
    ]
    text = " and ".join(f"{with_article(c)} {n}" for n, c in zip(names, colors, strict=True))
    return _prompt("color_attr", text, *clauses)


def _prompt(tag: str, text: str, *include: Mapping[str, Any]) -> Prompt:
    return Prompt(f"a photo of {text}", {"tag": tag, "include": list(include)})


_RECORDS: dict[str, _Records] = {
    "single_object": _Records(lambda w: len(w.classes), _single_object),
    "two_object": _Records(lambda w: _pairs(len(w.classes)), _two_object),
    "counting": _Records(lambda w: len(w.classes) * len(w.counts), _counting),
    "colors": _Records(lambda w: len(w.things) * len(w.colors), _colors),
    "position": _Records(lambda w: _pairs(len(w.classes)) * len(POSITIONS), _position),
    "color_attr": _Records(lambda w: _pairs(len(w.things)) * _pairs(len(w.colors)), _color_attr),
}


def _check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(mix, Mapping):
        raise ValueError(f"mix: expected task: weight, got {mix!r}")
    for task, weight in mix.items():
        if task not in TASKS:
            raise ValueError(f"mix: expected the tasks {', '.join(TASKS)}; got {task!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
            raise ValueError(f"mix: expected a weight >= 0 for {task}, got {weight!r}")
    if not any(mix.values()):
        raise ValueError("mix: expected a positive weight, got none")
    return {task: float(mix[task]) for task in TASKS if task in mix}
