"""A run of two processes that a signal stops, resumed by two processes and by one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpointing.test_resume import assert_same, rows
from tests.support import warm
from tests.support.forked import Runner, arguments

ROOT = Path(__file__).parents[2]
RUN = {
    "epochs": 4,
    "checkpoint__every": 3,
    "prompts__group_size": 4,
    "train__batch_size": 2,
    "health__ratio": "null",
    "algorithm__reference__reset_every": 3,
}


def launch(python, arguments):
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, "-m", "gardo.train", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
    )


@pytest.mark.slow
def test_processes_stop_together_and_any_number_of_them_goes_on(tmp_path):
    whole, run, alone = tmp_path / "whole", tmp_path / "run", tmp_path / "alone"
    process = launch(sys.executable, arguments(whole, **RUN))
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said

    process = launch(warm.python(), arguments(run, **RUN))
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # the launcher hands it on to both
    said = process.communicate(timeout=120)[0]
    assert said.count("stopped by SIGTERM after") == 1, said
    # the signal's own and, if an epoch was complete before all stopped, that one's
    checkpoint = max((run / "checkpoints").iterdir())
    assert checkpoint.name in ("epoch_0001", "epoch_0002", "epoch_0003")
    shutil.copytree(run, alone)

    process = launch(warm.python(), arguments(run, "--resume", **RUN))
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert_same(run, whole)

    # one process draws the same samples; sums are taken in another order
    runner = Runner(tmp_path / "stderr.txt")
    assert runner.run(arguments(alone, "--resume", **RUN)) == 0, runner.said
    for ours, theirs in zip(
        rows(alone / "metrics.jsonl"), rows(whole / "metrics.jsonl"), strict=True
    ):
        for key in ("reward/count/mean", "reward/clean/std", "gate/share", "gate/fraction"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
    resumed = json.loads((alone / "summary.json").read_text())["resumed_after_epochs"]
    assert resumed == [int(checkpoint.name.removeprefix("epoch_"))]
