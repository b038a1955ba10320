"""GenEval's rules: from the objects that were detected in an image to its scores.

Everything here is a pure function of plain data. The verdict ``official`` is that of GenEval's
evaluation (github.com/djghosh13/geneval), ``strict`` and ``soft`` are those of the reward server
that Flow-GRPO trains with (github.com/yifan123/reward-server).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gardo.data.coco import CLASSES, COLORS, POSITIONS, TASKS

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Clause:
    """What a record asks of one class.

    Attributes:
        name: one of GenEval's 80 classes.
        count: how many; in an exclusion, how many are too many.
        color: the colour of all of them.
        position: (relation, index of an earlier clause): where all of them are, seen from its
            objects.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Record:
    """The metadata of a prompt: a task and clauses, all of which must hold."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Detection:
    """An object that a detector found.

    Attributes:
        name: its class.
        score: confidence in [0, 1].
        box: (left, top, right, bottom) in pixels.
        mask: ``[H, W]`` bool, None where the detector gives none.
    """

    name: str
    score: float
    box: Box
    mask: Tensor | None = None


@dataclass(frozen=True)
class Limits:
    """The constants of the evaluation, with GenEval's values.

    Attributes:
        confidence: detections count above this.
        counting_confidence: the same for the counting task.
        max_objects: the most confident ones of a class that are kept.
        nms: an object that overlaps a more confident one of its class by this much (intersection
            over union) is dropped; 1 keeps all.
        position: share of the two objects' sizes by which their centres must be apart.
    """

    confidence: float = 0.3
    counting_confidence: float = 0.9
    max_objects: int = 16
    nms: float = 1.0
    position: float = 0.1

    def confidence_of(self, tag: str) -> float:
        """The confidence above which detections count in a task."""
        return self.counting_confidence if tag == "counting" else self.confidence


@dataclass(frozen=True)
class Verdict:
    """What the rules say of an image.

    Attributes:
        official: GenEval's verdict: at least the objects asked for, and none excluded.
        strict: exactly as many objects as asked for.
        soft: mean over what is asked of how nearly it is met; 1 when strict, below 0 when there
            are more than twice the objects.
    """

    official: bool
    strict: bool
    soft: float


def parse_record(metadata: Mapping[str, Any]) -> Record:
    """Read a metadata record ``{"tag": ..., "include": [...], "exclude": [...]}``.

    Raises:
        ValueError: not such a record; the message says what was expected.
    """
    tag = metadata.get("tag")
    if tag not in TASKS:
        raise ValueError(f"metadata: tag: expected one of {', '.join(TASKS)}; got {tag!r}")
    include = _parse_clauses("include", metadata.get("include"))
    if not include:
        raise ValueError("metadata: include: expected at least one clause, got none")
    return Record(tag, include, _parse_clauses("exclude", metadata.get("exclude", [])))


def select_objects(
    detections: Iterable[Detection], tag: str, limits: Limits
) -> dict[str, list[Detection]]:
    """The objects of each class that count, the most confident first; classes without are absent.

    Confidence first, then the number of objects, then overlap, as GenEval does.
    """
    threshold = limits.confidence_of(tag)
    candidates: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            candidates.setdefault(detection.name, []).append(detection)
    return {
        name: _suppress(some[: limits.max_objects], limits.nms) for name, some in candidates.items()
    }


def colored_objects(
    record: Record, objects: Mapping[str, Sequence[Detection]]
) -> dict[int, Sequence[Detection]]:
    """The objects whose colours `judge` asks for, by the index of their clause."""
    found = {i: objects.get(c.name, ())[: c.count] for i, c in enumerate(record.include) if c.color}
    return {i: some for i, some in found.items() if len(some) == record.include[i].count}


def judge(
    record: Record,
    objects: Mapping[str, Sequence[Detection]],
    colors: Mapping[int, Sequence[str]],
    limits: Limits,
) -> Verdict:
    """Judge an image by its record.

    Args:
        record: what is asked for.
        objects: from `select_objects`.
        colors: the colours of the objects of `colored_objects`.
        limits: of them, ``position`` is used.
    """
    strict, soft = _flow_grpo(record, objects, colors, limits)
    return Verdict(_official(record, objects, colors, limits), strict, soft)


def relative_position(box: Box, target: Box, threshold: float) -> set[str]:
    """Where a box is, seen from another: of left of, right of, above and below.

    The offset of the centres is first shortened, in each direction, by ``threshold`` times both
    sizes; a direction counts when more than half of the whole offset is left of it.
    """
    offsets, directions = [], []
    for axis in (0, 1):
        sizes = abs(box[axis + 2] - box[axis]) + abs(target[axis + 2] - target[axis])
        offset = (box[axis] + box[axis + 2] - target[axis] - target[axis + 2]) / 2
        offsets.append(offset)
        directions.append(math.copysign(max(abs(offset) - threshold * sizes, 0.0), offset))
    if all(abs(direction) < 1e-3 for direction in directions):
        return set()
    length = math.hypot(*offsets)
    dx, dy = directions[0] / length, directions[1] / length
    relations = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {relation for relation, share in relations.items() if share > 0.5}


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes that include their last row and column of pixels."""
    both = (
        *(max(a, b) for a, b in zip(first[:2], second[:2], strict=True)),
        *(min(a, b) for a, b in zip(first[2:], second[2:], strict=True)),
    )
    intersection = _area(both)
    union = _area(first) + _area(second) - intersection
    return intersection / union if union else 0.0


def _official(
    record: Record,
    objects: Mapping[str, Sequence[Detection]],
    colors: Mapping[int, Sequence[str]],
    limits: Limits,
) -> bool:
    groups: list[Sequence[Detection] | None] = []
    for index, clause in enumerate(record.include):
        found = objects.get(clause.name, ())[: clause.count]
        matched = len(found) == clause.count
        if matched and clause.color:
            matched = all(color == clause.color for color in colors[index])
        if matched and clause.position:
            matched = _placed(clause.position, found, groups, limits)
        groups.append(found if matched else None)
    excluded = any(len(objects.get(c.name, ())) >= c.count for c in record.exclude)
    return None not in groups and not excluded


def _flow_grpo(
    record: Record,
    objects: Mapping[str, Sequence[Detection]],
    colors: Mapping[int, Sequence[str]],
    limits: Limits,
) -> tuple[bool, float]:
    """Strict and soft score. Exclusions play no part: the counts are exact already."""
    parts: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for index, clause in enumerate(record.include):
        found = objects.get(clause.name, ())
        parts.append(_nearness(clause.count, len(found)))
        matched = len(found) == clause.count
        if not matched and (clause.color or clause.position):
            parts.append(0.0)
        if matched and clause.color:
            right = sum(color == clause.color for color in colors[index])
            parts.append(_nearness(clause.count, right))
            matched = right == clause.count
        if matched and clause.position:
            matched = _placed(clause.position, found, groups, limits)
            if not matched:
                parts.append(0.0)
            # The server adds this 1 wherever it could compare positions, even after the 0: two
            # objects in the wrong places score (1 + 1 + 0 + 1) / 4.
            if groups[clause.position[1]] is not None:
                parts.append(1.0)
        groups.append(found if matched else None)
    return None not in groups, sum(parts) / len(parts)


def _nearness(expected: int, got: int) -> float:
    return 1 - abs(expected - got) / expected


def _placed(
    position: tuple[str, int],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    limits: Limits,
) -> bool:
    """Whether every object stands in the relation to every object of the target clause."""
    relation, index = position
    targets = groups[index]
    return targets is not None and all(
        relation in relative_position(one.box, target.box, limits.position)
        for one in found
        for target in targets
    )


def _suppress(ranked: list[Detection], threshold: float) -> list[Detection]:
    if threshold == 1:
        return ranked
    kept: list[Detection] = []
    for detection in ranked:
        if all(overlap(better.box, detection.box) < threshold for better in kept):
            kept.append(detection)
    return kept


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)


def _parse_clauses(key: str, clauses: Any) -> tuple[Clause, ...]:
    if not isinstance(clauses, Sequence) or isinstance(clauses, str):
        raise ValueError(f"metadata: {key}: expected a list of clauses, got {clauses!r}")
    return tuple(
        _parse_clause(f"metadata: {key}[{i}]", i, clause) for i, clause in enumerate(clauses)
    )


def _parse_clause(where: str, index: int, clause: Any) -> Clause:
    if not isinstance(clause, Mapping):
        raise ValueError(f"{where}: expected an object, got {clause!r}")
    name, count = clause.get("class"), clause.get("count")
    if name not in CLASSES:
        raise ValueError(f"{where}: class: expected one of GenEval's 80 classes, got {name!r}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: count: expected an integer >= 1, got {count!r}")
    color = clause.get("color")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where}: color: expected one of {', '.join(COLORS)}; got {color!r}")
    return Clause(name, count, color, _parse_position(where, index, clause.get("position")))


def _parse_position(where: str, index: int, position: Any) -> tuple[str, int] | None:
    if position is None:
        return None
    if (
        not isinstance(position, Sequence)
        or len(position) != 2
        or position[0] not in POSITIONS
        or position[1] not in range(index)
    ):
        raise ValueError(
            f"{where}: position: expected [{' | '.join(POSITIONS)}, index of an earlier clause], "
            f"got {position!r}"
        )
    return str(position[0]), int(position[1])
