"""The built-in prompts by the name that ``prompts.generator`` gives them, each a Python path."""

from __future__ import annotations

GENERATORS = {
    "shapes": "gardo.data.generators.shapes:shapes_prompts",
    "geneval": "gardo.data.generators.geneval:geneval_prompts",
    "ocr": "gardo.data.generators.ocr:ocr_prompts",
    "counting": "gardo.data.generators.counting:counting_prompts",
}
