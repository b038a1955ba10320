"""One, two and three processes: the same rewards, advantages, gates and updates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gardo.sampling.plan import plan_epoch
from gardo.types import UserError
from tests.gardo.test_training import SHORT

HERE = Path(__file__).parent
# 18 samples in two updates of 9: unequal shares, and a process without a second batch
SETTINGS = {
    **SHORT,
    "prompts.per_epoch": "3",
    "prompts.group_size": "6",
    "sampling.batch_size": "4",
    "train.batch_size": "4",
    "sampling.max_ratio_deviation": "null",
    "evaluation.every": "0",
    "algorithm.gate.mode": "all",  # every sample passes the reference
    "algorithm.kl_coef": "0.5",
    "train.learning_rate": "1e-3",
}


def torchrun(processes, *arguments, timeout=240, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=HERE.parent.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def train(folder, processes, **changes):
    settings = {**SETTINGS, "output_dir": str(folder), **changes}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    result = torchrun(processes, "-m", "gardo.train", "tiny", *overrides)
    assert result.returncode == 0, result.stderr
    text = (folder / "metrics.jsonl").read_text()
    weights = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    return [json.loads(line) for line in text.splitlines()], weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_of_one(alone, processes, tmp_path):
    metrics, weights = train(tmp_path / "run", processes)
    expected_metrics, expected_weights = alone
    assert len(metrics) == len(expected_metrics)
    for row, expected in zip(metrics, expected_metrics, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if name.startswith(("time/", "forwards/")) or name == "images_per_second":
                continue
            # the ratio of the first update is rounding alone
            close = pytest.approx(expected[name], rel=1e-4, abs=1e-5)
            assert row[name] == close, name
    assert weights.keys() == expected_weights.keys()
    moved = 0.0
    for name, value in weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=1e-5)
        moved = max(moved, float(expected_weights[name].abs().max()))
    assert moved > 1e-3


def test_group_statistics_are_the_same_bits(tmp_path):
    results = {}
    for count in (1, 2, 3):
        output = tmp_path / f"{count}.safetensors"
        script = str(HERE / "shape_in_processes.py")
        result = torchrun(count, script, str(output), PYTHONPATH=os.pathsep.join(sys.path))
        assert result.returncode == 0, result.stderr
        results[count] = load_file(output)
    for name, value in results[1].items():
        assert torch.equal(value, results[2][name]), name
        assert torch.equal(value, results[3][name]), name
    assert results[1]["advantage"].abs().max() > 0


def test_an_error_of_one_process_ends_all_with_its_message(tmp_path):
    module = tmp_path / "failing_reward.py"
    module.write_text(
        "import os\n"
        "import torch\n"
        "def score(images, prompts, metadata):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('the scorer of rank 1 broke')\n"
        "    return torch.zeros(len(images))\n"
    )
    settings = {**SETTINGS, "output_dir": str(tmp_path / "run")}
    settings |= {"rewards.proxy": "failing_reward:score", "evaluation.max_prompts": "1"}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    started = time.monotonic()
    result = torchrun(
        2, "-m", "gardo.train", "tiny", *overrides,
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )  # fmt: skip
    assert result.returncode != 0
    assert "the scorer of rank 1 broke" in result.stderr
    assert time.monotonic() - started < 90


def test_every_process_gets_as_many_batches():
    for world_size in (1, 2, 3, 5):
        plans = [plan_epoch(3, 6, 2, rank, world_size) for rank in range(world_size)]
        size = plans[0].batch_size(4)
        assert {plan.batch_size(4) for plan in plans} == {size}
        for update in (0, 1):
            cut = [plan.batches(update, size) for plan in plans]
            assert len({len(slices) for slices in cut}) == 1
            for plan, slices in zip(plans, cut, strict=True):
                rows = [i for s in slices for i in range(s.start, s.stop)]
                assert rows == list(range(plan.updates[update].start, plan.updates[update].stop))
    everyone = torch.cat([plan_epoch(3, 6, 2, rank, 5).sample_ids for rank in range(5)])
    assert sorted(everyone.tolist()) == list(range(18))


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UserError, match=r"at least 20 samples, one per process \(10\)"):
        plan_epoch(3, 6, 2, 0, 10)
