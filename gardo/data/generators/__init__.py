"""Built-in prompts, by name: each generator is a pure function of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gardo.data.generators.counting import counting_prompts
from gardo.data.generators.geneval import geneval_prompts
from gardo.data.generators.ocr import ocr_prompts
from gardo.tiny.scenes import all_scenes
from gardo.types import Prompt, UserError


def shapes_prompts(*, split: str = "train") -> list[Prompt]:
    """The 40 prompts of the embedded task; they have no held-out part."""
    if split != "train":
        raise ValueError(f"split: expected 'train', got '{split}'")
    return [Prompt(scene.prompt, scene.metadata) for scene in all_scenes()]


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
