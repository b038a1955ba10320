"""Dumps of a batch: whole or not at all, readable without gardo, bounded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gardo.algorithms.dump import write_dump


def batch():
    latents = torch.arange(24.0).reshape(6, 2, 2)
    log_prob = torch.zeros(6)
    latents[4, 1, 0], log_prob[1] = torch.nan, -torch.inf
    return {"latents": latents, "log_prob": log_prob, "gate": torch.ones(6, dtype=torch.bool)}


ROWS = {"prompts": list("abcdef"), "sample_ids": [10, 11, 12, 13, 14, 15]}


def test_a_small_batch_is_written_whole(tmp_path):
    tensors = batch()
    written = write_dump(tmp_path / "new" / "x", tensors, ROWS, {"epoch": 3, "loss": torch.nan})
    assert written == tmp_path / "new" / "x.safetensors"
    loaded = load_file(written)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) or n == "latents" for n, t in tensors.items())
    assert torch.equal(loaded["latents"].nan_to_num(7), tensors["latents"].nan_to_num(7))
    facts = json.loads((tmp_path / "new" / "x.json").read_text())
    assert facts == {
        "epoch": 3,
        "loss": None,
        "rows": 6,
        "rows_kept": 6,
        "rows_not_finite": 2,
        "tensors_not_finite": ["latents", "log_prob"],
        **ROWS,
    }
    assert sorted(p.name for p in written.parent.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize(
    ("largest", "kept"), [(0, [1]), (2 * 21, [1, 4]), (3 * 21 + 20, [0, 1, 4])]
)
def test_a_large_batch_is_cut_to_the_rows_that_are_not_finite(tmp_path, largest, kept):
    # a row: 4 + 1 float32 and a bool
    written = write_dump(tmp_path / "x", batch(), ROWS, {}, largest)
    loaded = load_file(written)
    assert len(loaded["latents"]) == len(kept)
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["sample_ids"] == [ROWS["sample_ids"][i] for i in kept]
    assert facts["prompts"] == [ROWS["prompts"][i] for i in kept]
    assert facts["rows_kept"] == len(kept)


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_dump(tmp_path / "x", batch(), ROWS, {})
    assert list(tmp_path.iterdir()) == []
