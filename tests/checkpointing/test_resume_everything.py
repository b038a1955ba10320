"""A run with every key of the method on is killed and goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal

import pytest

from tests.checkpointing.test_resume import assert_same, rows
from tests.support.everything import ALGORITHMS
from tests.support.forked import Runner, arguments

RUN = {
    "seed": 3,  # with which samples are gated in most epochs
    "epochs": 5,
    "checkpoint.every": 2,
    "evaluation.every": 0,
    "prompts.group_size": 5,
    "train.learning_rate": 1e-3,
    # the first reset that is due is refused, since the window is not full
    "algorithm.reference.guard": "true",
    "algorithm.reference.guard_window": 3,
    "algorithm.reference.guard_uncertainty": 0.5,
    "algorithm.reference.guard_win_rate": 0.2,
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_killed_run_goes_on_bitwise(tmp_path, name):
    runner, settings = Runner(tmp_path / "stderr.txt"), {**RUN, **ALGORITHMS[name]}
    assert runner.run(arguments(tmp_path / "whole", **settings)) == 0, runner.said

    command = arguments(tmp_path / "run", "--resume", **settings)
    hook = {"names": ["SIGKILL"], "where": "shape", "count": 4}
    assert runner.run(command, {"name": "signals", "with": hook}) == -signal.SIGKILL
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 3  # one more than is saved
    assert runner.run(command) == 0, runner.said
    assert_same(tmp_path / "run", tmp_path / "whole")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["resumed_after_epochs"] == [2]

    # everything that is saved mattered: before the kill it had moved, after it it was used
    metrics = rows(tmp_path / "whole" / "metrics.jsonl")
    for key in ("gate/fraction", "gate/share", "cap/share", "kl/coef", "advantage/rms"):
        assert len({row[key] for row in metrics}) > 1, key
    assert len({row["reward_scale"] for row in metrics}) == 1
    later = metrics[2:]
    assert max(row["kl/gradient_share"] or 0 for row in later) > 0
    assert max(row["cap/share"] for row in later) > 0
    decided = [(row["reference/reset"], row["reference/refused"]) for row in metrics]
    assert {(1, 0), (0, 1)} <= set(decided)
