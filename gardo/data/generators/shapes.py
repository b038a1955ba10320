"""The prompts of the embedded task."""

from __future__ import annotations

from collections.abc import Sequence

from gardo.tiny.scenes import MAX_COUNT, NUMBERS, all_scenes
from gardo.types import Prompt


def shapes_prompts(
    *, split: str = "train", counts: Sequence[int] = range(1, MAX_COUNT + 1)
) -> list[Prompt]:
    """The prompts of the embedded task, eight for each count; they have no held-out part."""
    if split != "train":
        raise ValueError(f"split: expected 'train', got '{split}'")
    known = range(1, len(NUMBERS) + 1)
    if not counts or any(count not in known for count in counts):
        raise ValueError(f"counts: expected numbers from 1 to {len(NUMBERS)}, got {counts}")
    return [Prompt(scene.prompt, scene.metadata) for scene in all_scenes(list(counts))]
