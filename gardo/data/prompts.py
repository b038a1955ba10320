"""Prompts from files or built-in generators, and the order in which epochs draw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from gardo.config import PromptsConfig
from gardo.runtime.rng import generator
from gardo.tiny.scenes import all_scenes
from gardo.types import Prompt, UserError


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """Load the prompts that a configuration names, distinct and in file order.

    Raises:
        UserError: missing or malformed file (with the line), no prompt, fewer than ``per_epoch``.
    """
    if config.path is not None:
        prompts = read_prompt_file(Path(config.path))
        source = f"prompt file '{config.path}'"
    else:
        prompts = [Prompt(scene.prompt, scene.metadata) for scene in all_scenes()]
        source = f"prompt generator '{config.generator}'"
    distinct = list(
        {(p.text, json.dumps(dict(p.metadata), sort_keys=True)): p for p in prompts}.values()
    )
    if len(distinct) < config.per_epoch:
        raise UserError(
            f"prompts.per_epoch: expected at most the {len(distinct)} distinct prompts of "
            f"{source}, got {config.per_epoch}"
        )
    return distinct


def read_prompt_file(path: Path) -> list[Prompt]:
    """Read a ``.txt`` file (a prompt a line) or ``.jsonl`` (objects with ``prompt`` and metadata).

    Raises:
        UserError: the file is missing, empty, not UTF-8, of another kind or malformed.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file '{path}': expected a .txt or .jsonl file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file '{path}' does not exist") from None
    except OSError as error:
        raise UserError(f"prompt file '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"prompt file '{path}', line {line}: expected UTF-8 text") from None
    prompts = []
    for number, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            try:
                prompts.append(
                    _parse_record(row) if path.suffix == ".jsonl" else Prompt(row.strip())
                )
            except ValueError as error:
                raise UserError(f"prompt file '{path}', line {number}: {error}") from None
    if not prompts:
        raise UserError(f"prompt file '{path}': expected at least one prompt, got an empty file")
    return prompts


def _parse_record(line: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object ({error.msg} at column {error.colno})") from None
    text = record.pop("prompt", None) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('expected a JSON object with a non-empty string "prompt"')
    return Prompt(text, record)


class PromptSampler:
    """Draws P distinct prompts per epoch; a pure function of seed and epoch.

    All prompts are shuffled anew for every pass and the pass is cut into epochs, so that every
    prompt is drawn about equally often. What does not fill an epoch waits for another pass.
    """

    def __init__(self, prompts: Sequence[Prompt], per_epoch: int, seed: int) -> None:
        self.prompts = list(prompts)
        self.per_epoch = per_epoch
        self.seed = seed

    def indices(self, epoch: int) -> list[int]:
        """Indices of the prompts of an epoch, ``per_epoch`` of them, all different."""
        epochs_per_pass = len(self.prompts) // self.per_epoch
        which_pass, position = divmod(epoch, epochs_per_pass)
        order = torch.randperm(
            len(self.prompts), generator=generator(self.seed, "prompts", which_pass)
        )
        start = position * self.per_epoch
        return order[start : start + self.per_epoch].tolist()

    def epoch(self, epoch: int) -> list[Prompt]:
        """The prompts of an epoch."""
        return [self.prompts[i] for i in self.indices(epoch)]
