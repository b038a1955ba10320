"""The plan of an epoch and its randomness."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gardo.rng import derive_seed, generator, normal_rows
from gardo.sampling.plan import batches, padded_rows, plan_epoch


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("prompts", "group", "updates"), [(8, 16, 2), (3, 7, 4), (1, 5, 1)])
def test_updates_train_the_same_samples_on_any_number_of_processes(
    prompts, group, updates, world_size
):
    plans = [plan_epoch(prompts, group, updates, r, world_size) for r in range(world_size)]
    reference = plan_epoch(prompts, group, updates)
    for u in range(updates):
        together = torch.cat([p.sample_ids[p.updates[u]] for p in plans]).sort().values
        assert torch.equal(together, reference.sample_ids[reference.updates[u]])
        assert all(p.update_sizes[u] == len(together) for p in plans)
    everything = torch.cat([p.sample_ids for p in plans]).sort().values
    assert torch.equal(everything, torch.arange(prompts * group))


def test_every_update_sees_all_prompts():
    plan = plan_epoch(8, 16, 2)
    for rows in plan.updates:
        assert Counter(plan.prompt_index[rows].tolist()) == Counter(list(range(8)) * 8)


def test_batches_cover_rows_and_padding_repeats_the_last():
    assert batches(slice(3, 10), 4) == [slice(3, 7), slice(7, 10)]
    assert batches(slice(3, 3), 4) == []
    assert plan_epoch(8, 16, 2).batch_size(100) == 64  # no batch is larger than an update
    assert plan_epoch(8, 16, 2).batch_size(24) == 24
    assert padded_rows(slice(7, 10), 4, torch.device("cpu")).tolist() == [7, 8, 9, 9]


def test_randomness_depends_on_every_key_and_on_nothing_else():
    seeds = {derive_seed(s, k, e) for s in range(4) for k in ("a", "b") for e in range(4)}
    assert len(seeds) == 32
    assert all(0 <= s < 2**63 for s in seeds)
    rows = normal_rows([generator(1, "noise", i) for i in range(5)], (3, 2))
    alone = normal_rows([generator(1, "noise", 4)], (3, 2))
    assert torch.equal(rows[4:], alone)
    assert abs(float(normal_rows([generator(0)], (100_000,)).std()) - 1) < 0.01
