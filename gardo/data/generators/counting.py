"""Counting prompts with GenEval's records, in several wordings."""

from __future__ import annotations

from collections.abc import Sequence

from gardo.data.coco import CLASSES, number_word, plural
from gardo.data.generators.geneval import counting_record
from gardo.data.generators.vocabulary import (
    check_counts,
    check_split,
    check_subset,
    draw_distinct,
    split_values,
)
from gardo.types import Prompt

WORDINGS = (
    "a photo of {}",
    "a picture of {}",
    "a photo that shows exactly {}",
    "a drawing of {}",
    "a detailed image of {} and nothing else",
    "{} seen from the front",
)


def counting_prompts(
    *,
    split: str = "train",
    size: int = 1000,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    counts: Sequence[int] = (1, 2, 3, 4, 5, 6),
    held_out_classes: Sequence[str] = (),
    held_out_counts: Sequence[int] = (),
) -> list[Prompt]:
    """Different prompts "a photo of three dogs", in random order.

    Args:
        split: ``train`` leaves out all held-out classes and counts, ``test`` has nothing else.
        size: number of prompts.
        seed: another seed draws other prompts.
        classes: of `gardo.data.coco.CLASSES`.
        counts: 1 or more; words up to ten, digits above.
        held_out_classes: a subset of ``classes``.
        held_out_counts: a subset of ``counts``.

    Raises:
        ValueError: a value out of range, or fewer different prompts than ``size``.
    """
    check_split(split, bool(held_out_classes or held_out_counts))
    check_subset("classes", classes, CLASSES)
    check_counts("counts", counts, low=1)
    classes = split_values(split, "classes", classes, held_out_classes)
    counts = split_values(split, "counts", counts, held_out_counts)
    prompts = []
    total = len(WORDINGS) * len(classes) * len(counts)
    for row in draw_distinct(total, size, seed, "counting", split):
        rest, which_wording = divmod(row, len(WORDINGS))
        which_class, which_count = divmod(rest, len(counts))
        name, count = classes[which_class], counts[which_count]
        objects = f"{number_word(count)} {name if count == 1 else plural(name)}"
        text = WORDINGS[which_wording].format(objects)
        prompts.append(Prompt(text, counting_record(name, count)))
    return prompts
