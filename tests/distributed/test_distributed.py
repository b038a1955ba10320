"""One, two and three processes: the same rewards, advantages, gates and updates."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gardo.checkpointing.checkpoint import Checkpoint
from gardo.sampling.plan import plan_epoch, shared_batches
from gardo.types import UserError
from tests.gardo.test_training import SHORT
from tests.support import warm

HERE = Path(__file__).parents[1] / "support"
# 18 samples in two updates of 9: unequal shares, and a process without a second batch
SETTINGS = {
    **SHORT,
    "prompts.per_epoch": "3",
    "prompts.group_size": "6",
    "sampling.batch_size": "4",
    "train.batch_size": "4",
    "health.ratio": "null",
    "evaluation.every": "0",
    "algorithm.gate.mode": "all",  # every sample passes the reference
    "algorithm.kl_coef": "0.5",
    "train.learning_rate": "1e-3",
}


def torchrun(processes, *arguments, nodes=1, wait=True, timeout=240, **environment):
    """Run by torchrun: what has finished or, not waited for, the launcher of one of the nodes."""
    python = warm.python()
    command = [python, "-m", "torch.distributed.run"]
    command += ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), *RENDEZVOUS]
    command += ["--nproc_per_node", str(processes), *arguments]
    launcher = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parent.parent,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHON_EXEC": python,  # of the processes that it starts
            **environment,
        },
    )
    if not wait:
        return launcher
    try:
        out, err = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # its processes with it
        raise
    return subprocess.CompletedProcess(command, launcher.returncode, out, err)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


RENDEZVOUS = [
    *("--rdzv_backend", "c10d", "--rdzv_id", "test"),
    *("--rdzv_endpoint", f"localhost:{free_port()}"),
]


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
    for advantage in ("advantage", "0/advantage", "1/advantage"):
        assert results[1][advantage].abs().max() > 0
    # with the keys of the method that are off by default
    assert not torch.equal(results[1]["advantage"], results[1]["0/advantage"])


FAILING = """
import os
import torch
calls = 0
def score(images, prompts, metadata):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 7:  # of the evaluation and one epoch
        raise RuntimeError("the scorer of rank 1 broke")
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize(
    ("nodes", "variables"), [(1, {"ACCELERATE_USE_FSDP": "true"}), (2, {})], ids=["fsdp", "nodes"]
)
def test_an_error_of_one_process_ends_all_and_the_main_one_saves(nodes, variables, tmp_path):
    (tmp_path / "failing_reward.py").write_text(FAILING)
    settings = {**SETTINGS, "output_dir": str(tmp_path / "run"), "epochs": "40"}
    settings |= {"rewards.proxy": "failing_reward:score", "checkpoint.every": "0"}
    settings |= {"evaluation.max_prompts": "2", "train.updates_per_epoch": "2"}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    variables = {**variables, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    started = time.monotonic()
    launchers = [
        torchrun(
            2 // nodes, "-m", "gardo.train", "tiny", *overrides,
            nodes=nodes, wait=False, **variables,
        )
        for _ in range(nodes)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=240)[1] for launcher in launchers]
    assert all(launcher.returncode != 0 for launcher in launchers)
    assert time.monotonic() - started < 120
    # the message of the process that failed, and what the main one made of it
    assert sum("RuntimeError: the scorer of rank 1 broke\n\n" in text for text in said) == 1, said
    (line,) = [x for text in said for x in text.splitlines() if x.startswith("process 1 failed:")]
    assert line.endswith("RuntimeError: the scorer of rank 1 broke")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert checkpoint.name == f"epoch_{done:04d}"
    assert done > 0
    saved = Checkpoint.open(checkpoint)
    saved.verify()
    assert saved.epoch == done


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


@pytest.mark.parametrize("count", [1, 8, 9, 25])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_one_process_are_dealt_out(count, processes):
    alone, idle = shared_batches(count, 4)
    assert idle == 0
    dealt = [shared_batches(count, 4, rank, processes) for rank in range(processes)]
    assert sorted((s for mine, _ in dealt for s in mine), key=lambda s: s.start) == alone
    assert {len(mine) + idle for mine, idle in dealt} == {-(-len(alone) // processes)}


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UserError, match=r"at least 20 samples, one per process \(10\)"):
        plan_epoch(3, 6, 2, 0, 10)
