"""One map from names to objects with a state is all that a checkpoint needs to know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gardo.checkpointing.checkpoint import CheckpointFolder, TrainingState
from gardo.checkpointing.parts import Counter, Part, restore, separate
from gardo.checkpointing.state_tensors import to_host


class Stub:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def parts(weights, value, empty, rows):
    return {
        "weights": Part(lambda: weights, lambda state: weights.update(state)),
        "optimizer": Stub(empty),
        "health": Stub(value),
        "scaler": Stub(None),
        "rows": Counter(rows, "count"),
    }


def test_tensors_and_values_find_their_way_through_a_checkpoint(tmp_path):
    rows = SimpleNamespace(count=7)
    saved = parts({"x": torch.arange(3.0)}, {"base": {"kl": 0.5}, "reached": []}, {}, rows)
    tensors, values = separate(saved)
    assert (list(tensors), list(values)) == (["weights", "optimizer"], ["health", "scaler", "rows"])
    folder = CheckpointFolder(tmp_path)
    groups = {name: to_host(group) for name, group in tensors.items()}
    folder.save(TrainingState(3, groups, values), "epochs: 3\n")

    weights, other = {"x": torch.zeros(3)}, SimpleNamespace(count=0)
    new = parts(weights, {"base": {}}, {}, other)
    restore(new, folder.newest(print).load())
    assert torch.equal(weights["x"], torch.arange(3.0))
    assert new["health"].state == {"base": {"kl": 0.5}, "reached": []}
    assert (new["optimizer"].state, new["scaler"].state, other.count) == ({}, None, 7)


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        (["weights"], ["health", "scaler", "rows"], "expected tensors of optimizer, weights, got"),
        (["weights", "optimizer"], ["health", "rows"], "no 'scaler' in state.json"),
    ],
)
def test_what_is_missing_is_named(tensors, values, message):
    state = TrainingState(1, {name: {} for name in tensors}, dict.fromkeys(values, 1))
    with pytest.raises(ValueError, match=message):
        restore(parts({}, {"base": 0}, {}, SimpleNamespace(count=0)), state)
