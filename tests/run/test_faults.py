"""Errors of the machine, as the user is told of them."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from gardo.config import load_config
from gardo.run.faults import explain


@pytest.fixture
def config(tmp_path):
    return load_config("tiny", overrides=[("output_dir", str(tmp_path / "run"))])


def test_a_full_disk(config, tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")
    message = str(explain(error, config))
    assert f"output_dir '{tmp_path / 'run'}': could not be written: the disk is full" in message
    assert "checkpoint.keep_last is 2, checkpoint.every 10" in message
    assert f"--resume {tmp_path / 'run'}" in message


def test_a_full_disk_that_safetensors_met(config):
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    message = str(explain(SafetensorError(told), config))
    assert "could not be written: the disk is full" in message
    assert explain(SafetensorError("invalid header"), config) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_refused_writes_are_explained_within_the_run_folder_alone(config, tmp_path, number):
    ours = OSError(number, "refused", str(tmp_path / "run" / "images" / "a.png"))
    assert "a.png' could not be written" in str(explain(ours, config))
    assert explain(OSError(number, "refused", "/elsewhere/model.bin"), config) is None
    assert explain(OSError(number, "refused"), config) is None


def test_gpu_memory_names_what_the_run_does_not_do_yet(config):
    changed = config.model_copy(deep=True)
    changed.model.vae_slicing = True
    changed.model.gradient_checkpointing = True
    changed.sampling.batch_size = changed.train.batch_size = 1
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    before, after = str(explain(error, config)), str(explain(error, changed))
    for key in ("vae_slicing", "gradient_checkpointing", "smaller batches"):
        assert key in before
        assert key not in after
    assert before.startswith("out of GPU memory: CUDA out of memory.")

    caused = RuntimeError("reward 'hpsv2' failed: OutOfMemoryError")
    caused.__cause__ = error
    assert "(reward 'hpsv2' failed)" in str(explain(caused, config))


def test_other_errors_are_left_alone(config):
    for error in (ValueError("x"), RuntimeError("x"), OSError(errno.ECONNRESET, "x")):
        assert explain(error, config) is None
