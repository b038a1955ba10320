"""Checkpoint folders: whole or not at all, whatever moment a process ends at."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from gardo.checkpointing.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpoint,
    TrainingState,
)
from gardo.checkpointing.parts import NamedOptimizer
from gardo.checkpointing.state_tensors import to_host
from gardo.types import UserError


def state(epoch):
    tensors = {
        "policy": {"a.weight": torch.full((2, 3), float(epoch)), "b": torch.tensor([1.5])},
        "optimizer": {},
        "half": {"h": torch.tensor([epoch], dtype=torch.bfloat16)},
    }
    return TrainingState(epoch, tensors, {"shaper": {"fraction": 0.1 + epoch / 3, "history": []}})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    path = CheckpointFolder(tmp_path).save(state(7), "seed: 1\n", 0.25)
    checkpoint = Checkpoint.open(path)
    loaded = checkpoint.load()
    assert (path.name, checkpoint.epoch, checkpoint.score) == ("epoch_0007", 7, 0.25)
    assert checkpoint.read("config.yaml") == b"seed: 1\n"
    assert loaded.values == state(7).values
    assert loaded.tensors.keys() == state(7).tensors.keys()
    for group, tensors in state(7).tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name], tensor)
    with pytest.raises(ValueError, match=r"expected tensors of policy, got those of half, opt"):
        loaded.check_groups(["policy"])


@pytest.mark.parametrize(
    ("keep_last", "best", "scores", "kept"),
    [
        (2, None, [1, 5, 2, 3], [3, 4]),
        (1, "max", [1, 5, 2, 3], [2, 4]),
        (1, "min", [1, 5, 2, 3], [1, 4]),
        (1, "max", [2, 5, 5, None], [2, 4]),  # the first of two equals
        (1, "max", [None, None, None, None], [4]),
        (3, "max", [9, 1, 1, 1], [1, 2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep_last, best, scores, kept):
    folder = CheckpointFolder(tmp_path, keep_last, best and "metric", best or "max")
    for epoch, score in enumerate(scores, start=1):
        folder.save(state(epoch), "", score)
    assert names(tmp_path) == [f"epoch_{epoch:04d}" for epoch in kept]


def test_scores_of_another_metric_do_not_count(tmp_path):
    CheckpointFolder(tmp_path, 1, "old").save(state(1), "", 9.0)
    folder = CheckpointFolder(tmp_path, 1, "new")
    folder.save(state(2), "", 1.0)
    folder.save(state(3), "", 0.5)
    assert names(tmp_path) == ["epoch_0002", "epoch_0003"]


def test_a_process_killed_at_any_operation_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """The third and fourth save with keep_last 2, killed before each operation on a name."""
    deaths = 0
    for operation in range(1, 60):
        place = tmp_path / str(operation)
        folder = CheckpointFolder(place, 2)
        for epoch in (1, 2):
            folder.save(state(epoch), "")
        pid = os.fork()
        if pid == 0:
            _die_at(operation)
            for epoch in (3, 4):
                CheckpointFolder(place, 2).save(state(epoch), "")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        told = []
        newest = folder.newest(told.append)
        assert newest is not None
        assert told == []  # what is there under a checkpoint's name is whole
        for path in folder.all():
            Checkpoint.open(path).load()
        assert newest.epoch in (2, 3, 4)
        assert len(folder.all()) >= 2
        folder.discard_after(newest.epoch)
        assert all(name.startswith("epoch_") for name in names(place))
        if os.waitstatus_to_exitcode(status) == 0:
            break
        deaths += 1
    assert deaths > 20
    assert newest.epoch == 4


def _die_at(operation):
    calls = 0

    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.fsync, os.replace, os.unlink = wrap(os.fsync), wrap(os.replace), wrap(os.unlink)
    shutil.rmtree = wrap(shutil.rmtree)


def test_an_unwritable_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), "")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(state(2), "")
    assert names(tmp_path) == ["epoch_0001"]


def test_an_epoch_is_saved_anew(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), "old")
    (tmp_path / "epoch_0001" / "policy.safetensors").write_bytes(b"")
    folder.save(state(1), "new")
    assert folder.newest(print).read("config.yaml") == b"new"
    assert names(tmp_path) == ["epoch_0001"]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.newest(print) is None
    folder.save(state(1), "")
    (tmp_path / "epoch_0001" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*manifest.json is missing"):
        folder.newest(print)


def test_another_version_is_not_skipped(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), "")
    manifest = folder.save(state(2), "") / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 9}))
    with pytest.raises(UserError, match="expected format version 1, got 9") as caught:
        folder.newest(print)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert names(tmp_path) == ["epoch_0001", "epoch_0002"]


def test_an_unreadable_file_is_not_taken_for_damage(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(state(1), "")
    (path / "state.json").unlink()
    (path / "state.json").mkdir()  # reading it fails, also for root
    with pytest.raises(UserError, match=r"state.json cannot be read: Is a directory") as caught:
        folder.newest(print)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("fused", [None, True])
def test_an_optimizer_goes_on_from_its_packed_state(fused):
    def build():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    def steps(parameters, optimizer, first, last):
        for i in range(first, last):
            for p in parameters:
                p.grad = torch.sin(p.detach() * (i + 1))
            optimizer.step()

    whole, optimizer = build()
    steps(whole, optimizer, 0, 5)

    half, first = build()
    steps(half, first, 0, 2)
    packed = to_host(NamedOptimizer(first, ["x", "layer.y"]).state_dict())
    assert set(packed) >= {"x/exp_avg", "layer.y/exp_avg_sq", "layer.y/step"}
    resumed, second = build()
    for p, q in zip(resumed, half, strict=True):
        p.data.copy_(q)
    NamedOptimizer(second, ["x", "layer.y"]).load_state_dict(packed)
    steps(resumed, second, 2, 5)
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))

    for wrong, message in (
        ({**packed, "z/step": packed["x/step"]}, "'z/step': no such parameter"),
        ({**packed, "x/exp_avg": torch.zeros(2, 3)}, "expected shape (3, 2), got (2, 3)"),
        ({"x/step": packed["x/step"]}, "for each of 2 parameters, got 1 tensors"),
    ):
        with pytest.raises(ValueError) as caught:
            NamedOptimizer(second, ["x", "layer.y"]).load_state_dict(wrong)
        assert message in str(caught.value)
