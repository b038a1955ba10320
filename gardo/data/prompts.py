"""The prompts of a run, and the order in which epochs draw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from gardo.config import PromptsConfig
from gardo.data.files import read_prompts
from gardo.data.generators import generate_prompts
from gardo.data.hub import read_hub_prompts
from gardo.rng import generator
from gardo.types import Prompt, UserError


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """Load the prompts that a configuration names, distinct and in their order.

    A path goes before a data set, and this before a generator, so that a recipe with a generator
    can be run on other prompts.

    Raises:
        UserError: missing or malformed source (with the line), no prompt, fewer than
            ``per_epoch``.
    """
    if config.path is not None:
        prompts = read_prompts(Path(config.path), config.split)
        source = f"'{config.path}'"
    elif config.dataset is not None:
        prompts = read_hub_prompts(config.dataset, config.split, config.column)
        source = f"data set '{config.dataset}'"
    elif config.generator is not None:
        prompts = generate_prompts(config.generator, config.split, config.parameters)
        source = f"prompt generator '{config.generator}'"
    else:
        raise UserError("prompts: expected prompts.path, prompts.dataset or prompts.generator")
    distinct: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        key = prompt.text, json.dumps(dict(prompt.metadata), sort_keys=True)
        distinct.setdefault(key, prompt)
    if len(distinct) < config.per_epoch:
        raise UserError(
            f"prompts.per_epoch: expected at most the {len(distinct)} distinct prompts of "
            f"{source}, got {config.per_epoch}"
        )
    return list(distinct.values())


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
