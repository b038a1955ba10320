"""Built-in prompts, by name: each generator is a pure function of its parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gardo.config import GENERATORS
from gardo.types import Prompt, UserError


def generate_prompts(name: str, split: str, parameters: Mapping[str, Any]) -> list[Prompt]:
    """Call the generator ``name``.

    Raises:
        UserError: a parameter that it does not have, or a value that it refuses.
    """
    module, _, attribute = GENERATORS[name].partition(":")
    function: Callable[..., list[Prompt]] = getattr(importlib.import_module(module), attribute)
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
