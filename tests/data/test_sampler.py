"""The order in which epochs draw prompts: distinct, reproducible, resumable, on any world size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gardo.data.prompts import PromptSampler
from gardo.sampling.plan import plan_epoch
from gardo.types import Prompt


def test_every_pass_draws_every_prompt_once_and_epochs_are_reproducible():
    prompts = [Prompt(str(i)) for i in range(12)]
    sampler = PromptSampler(prompts, per_epoch=4, seed=3)
    epochs = [sampler.indices(e) for e in range(6)]
    for first in (0, 3):
        assert Counter(i for epoch in epochs[first : first + 3] for i in epoch) == Counter(
            range(12)
        )
    assert epochs[:3] != epochs[3:]
    assert PromptSampler(prompts, 4, seed=3).indices(5) == epochs[5]
    assert PromptSampler(prompts, 4, seed=4).indices(5) != epochs[5]
    assert [p.text for p in sampler.epoch(5)] == [str(i) for i in epochs[5]]


def test_an_epoch_never_repeats_a_prompt_when_the_sizes_do_not_divide():
    sampler = PromptSampler([Prompt(str(i)) for i in range(7)], per_epoch=3, seed=0)
    for epoch in range(20):
        assert len(set(sampler.indices(epoch))) == 3


def test_a_resumed_run_draws_what_the_run_would_have_drawn():
    prompts = [Prompt(str(i)) for i in range(50)]
    whole = PromptSampler(prompts, per_epoch=6, seed=9)
    epochs = [[p.text for p in whole.epoch(e)] for e in range(30)]
    for start in (1, 8, 29):  # a sampler that never saw the epochs before
        resumed = PromptSampler(prompts, per_epoch=6, seed=9)
        assert [[p.text for p in resumed.epoch(e)] for e in range(start, 30)] == epochs[start:]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_groups_are_the_same_on_every_world_size(world_size):
    prompts = [Prompt(str(i)) for i in range(40)]
    per_epoch, group_size = 6, 4
    drawn = PromptSampler(prompts, per_epoch, seed=1).indices(5)
    groups: Counter[int] = Counter()
    for rank in range(world_size):  # each process draws by itself, then takes its samples
        assert PromptSampler(prompts, per_epoch, seed=1).indices(5) == drawn
        plan = plan_epoch(per_epoch, group_size, 2, rank, world_size)
        groups.update(drawn[i] for i in plan.prompt_index[torch.arange(len(plan.sample_ids))])
    single = plan_epoch(per_epoch, group_size, 2)
    assert groups == Counter(drawn[i] for i in single.prompt_index.tolist())
    assert set(groups.values()) == {group_size}
