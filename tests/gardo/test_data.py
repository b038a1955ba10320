"""Prompt files, the order of prompts, and the plan of an epoch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gardo.config import PromptsConfig
from gardo.data.prompts import PromptSampler, load_prompts, read_prompt_file
from gardo.runtime.rng import derive_seed, generator, normal_rows
from gardo.sampling.plan import batches, padded_rows, plan_epoch
from gardo.types import Prompt, UserError


def test_text_and_jsonl_files(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("\ufeffone red circle\n\n  two blue squares \r\n", encoding="utf-8")
    assert [p.text for p in read_prompt_file(text)] == ["one red circle", "two blue squares"]
    records = tmp_path / "p.jsonl"
    records.write_text('{"tag": "counting", "prompt": "a dog", "include": [{"class": "dog"}]}\n')
    (prompt,) = read_prompt_file(records)
    assert prompt.text == "a dog"
    assert prompt.metadata == {"tag": "counting", "include": [{"class": "dog"}]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "at least one prompt"),
        ("a.txt", b"ok\n\xff\xfe\n", "line 2: expected UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2: expected a JSON object"),
        ("a.jsonl", b'["x"]\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"prompt": " "}\n', "non-empty string"),
        ("a.csv", b"x\n", "expected a .txt or .jsonl file"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        read_prompt_file(tmp_path / name)
    assert expected in str(caught.value)


def test_duplicate_prompts_count_once(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\n")
    config = PromptsConfig(path=str(file), per_epoch=2)
    assert [p.text for p in load_prompts(config)] == ["a", "b"]
    with pytest.raises(UserError, match="at most the 2 distinct prompts"):
        load_prompts(config.model_copy(update={"per_epoch": 3}))


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("prompts", "group", "updates"), [(8, 16, 2), (3, 5, 4), (1, 2, 1)])
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
