"""Runs that are killed, stopped or fail, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from tests.gardo.forked import Runner, arguments

EPOCHS = 6
RUN = {
    "epochs": EPOCHS,
    "checkpoint__every": 2,
    "evaluation__every": 3,
    "train__ema": "true",
    "train__ema_every": 3,
    "algorithm__reference__reset_every": 4,
}
ALGORITHMS = {"grpo": {}, "nft": {"algorithm__name": "nft", "sampling__same_latent": "false"}}
KILLS = int(os.environ.get("GARDO_KILLS", "6"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("log") / "stderr.txt")
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """Per algorithm, a run that was never stopped, and its seconds."""
    done = {}
    for name, changes in ALGORITHMS.items():
        folder = tmp_path_factory.mktemp("whole") / name
        started = time.perf_counter()
        assert runner.run(arguments(folder, **RUN, **changes)) == 0, runner.said
        done[name] = folder, time.perf_counter() - started
    return done


def rows(path):
    """Rows of metrics without what the clock decides."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        | {"images_per_second": None}
        for line in path.read_text().splitlines()
    ]


def tensors(checkpoint):
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if "safetensors" in name}


def contents(folder):
    """Everything in a run folder that must not depend on how often the run was stopped."""
    index = folder / "images" / "index.json"
    weights = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    return {
        "metrics": rows(folder / "metrics.jsonl"),
        "evaluation": rows(folder / "evaluation.jsonl"),
        "index": json.loads(index.read_text()),
        "images": {p.name: p.read_bytes() for p in folder.glob("images/*.png")},
        # the order of the file's header is random
        "export": {name: weights[name].numpy().tobytes() for name in sorted(weights)},
        "checkpoints": {p.name: tensors(p) for p in (folder / "checkpoints").iterdir()},
        "leftovers": [str(p) for p in folder.rglob(".*")],
    }


def assert_same(folder, reference):
    ours, theirs = contents(folder), contents(reference)
    for part, value in theirs.items():
        assert ours[part] == value, f"{part} differs in {folder}"


def test_the_whole_run_exercises_what_is_saved(whole):
    for folder, _ in whole.values():
        metrics = rows(folder / "metrics.jsonl")
        assert len({row["gate/fraction"] for row in metrics}) > 1
        assert 0 < sum(row["reference/reset"] for row in metrics) < EPOCHS
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"epoch_0004", "epoch_0006"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_killed_run_goes_on_bitwise(runner, whole, tmp_path, algorithm):
    reference, _ = whole[algorithm]
    seconds = min(s for _, s in whole.values())  # the first run takes longer
    draw = random.Random(f"kills {algorithm}")
    kills, runs, killed_at = 0, 0, []
    wanted = KILLS if algorithm == "grpo" else KILLS // 2
    while kills < wanted:
        folder = tmp_path / str(runs)
        command = arguments(folder, "--resume", **RUN, **ALGORITHMS[algorithm])
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            if kills >= wanted:
                code = runner.run(command)
            elif kills % 3 == 2:  # within a checkpoint, between two operations on files
                hook = {"name": "die_while_saving", "with": {"operation": draw.randint(1, 50)}}
                code = runner.run(command, hook)
                killed_at.append("saving")
            else:
                pid = runner.start(command)
                delay = draw.uniform(0, seconds)
                time.sleep(delay)
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
                code = runner.wait()
                killed_at.append(f"{delay:.2f} s")
            kills += code == -signal.SIGKILL
        assert code == 0, f"after kills at {killed_at}: {runner.said}"
        assert_same(folder, reference)
        runs += 1
    print(f"{algorithm}: {kills} kills in {runs} runs: {killed_at}")
