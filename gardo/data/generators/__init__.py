"""Built-in prompts, by name: each generator is a pure function of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gardo.data.generators.counting import counting_prompts
from gardo.data.generators.geneval import geneval_prompts
from gardo.data.generators.ocr import ocr_prompts
from gardo.tiny.scenes import MAX_COUNT, NUMBERS, all_scenes
from gardo.types import Prompt, UserError


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


GENERATORS: dict[str, Callable[..., list[Prompt]]] = {
    "shapes": shapes_prompts,
    "geneval": geneval_prompts,
    "ocr": ocr_prompts,
    "counting": counting_prompts,
}


def generate_prompts(name: str, split: str, parameters: Mapping[str, Any]) -> list[Prompt]:
    """Call the generator ``name``.

    Raises:
        UserError: a parameter that it does not have, or a value that it refuses.
    """
    function = GENERATORS[name]
    known = [p for p in inspect.signature(function).parameters if p != "split"]
    for parameter in parameters:
        if parameter not in known:
            raise UserError(
                f"prompts.parameters: the generator '{name}' has no '{parameter}' "
                f"(it has: {', '.join(known) or 'none'})"
            )
    try:
        return function(split=split, **parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"prompts.parameters: generator '{name}': {error}") from error
