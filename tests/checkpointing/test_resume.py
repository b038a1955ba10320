"""Runs that are killed, stopped or fail, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time

import pytest
import yaml
from safetensors.torch import load_file, save

from gardo.config import load_config
from tests.support.forked import Runner, arguments

EPOCHS = 6
RUN = {
    "epochs": EPOCHS,
    "checkpoint__every": 2,
    "evaluation__every": 3,
    "train__ema": "true",
    "train__ema_every": 3,
    "algorithm__reference__reset_every": 4,
}
ALGORITHMS = {
    "grpo": {},
    "nft": {
        "algorithm__name": "nft",
        "sampling__same_latent": "false",
        "algorithm__reference__guard": "true",
    },
}
KILLS = int(os.environ.get("GARDO_KILLS", "6"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("log") / "stderr.txt")


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
        decided = [row["reference/reset"] or row["reference/refused"] for row in metrics]
        assert sum(decided) > 0
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


@pytest.mark.parametrize(
    ("hook", "done"),
    [
        ({"names": ["SIGTERM"], "where": "micro-batch", "count": 3}, 0),
        ({"names": ["SIGUSR1"], "where": "micro-batch", "count": 23}, 2),  # between two updates
        ({"names": ["SIGINT"], "where": "evaluation", "count": 2}, 3),
        ({"names": ["SIGTERM"], "where": "shape", "count": 5}, 4),
        ({"names": ["SIGTERM"], "where": "start", "count": 1}, 0),
    ],
    ids=lambda value: value["where"] if isinstance(value, dict) else "",
)
def test_a_signal_leaves_a_checkpoint_of_the_last_whole_epoch(runner, whole, tmp_path, hook, done):
    command = arguments(tmp_path / "run", "--resume", **RUN)
    code = runner.run(command, {"name": "signals", "with": hook})
    assert code == 75, runner.said
    last = runner.said.strip().splitlines()[-1]
    path = tmp_path / "run" / "checkpoints" / f"epoch_{done:04d}"
    assert last == (
        f"stopped by {hook['names'][0]} after {done} of {EPOCHS} epochs, saved in '{path}'; "
        f"continue with: python -m gardo.train --resume {tmp_path / 'run'}"
    )
    assert path.is_dir()
    assert "Traceback" not in runner.said
    # as the message says, without recipe and settings
    assert runner.run(["--resume", tmp_path / "run"]) == 0, runner.said
    assert_same(tmp_path / "run", whole["grpo"][0])


def test_without_a_snapshot_a_signal_lets_the_updates_finish(runner, whole, tmp_path):
    command = arguments(tmp_path / "run", "--resume", **RUN, checkpoint__snapshot="false")
    hook = {"names": ["SIGUSR1"], "where": "micro-batch", "count": 23}
    assert runner.run(command, {"name": "signals", "with": hook}) == 75, runner.said
    assert "after 3 of 6 epochs" in runner.said
    hook = {"names": ["SIGUSR1"], "where": "shape", "count": 2}
    assert runner.run(command, {"name": "signals", "with": hook}) == 75, runner.said
    assert "after 4 of 6 epochs" in runner.said
    assert runner.run(command) == 0, runner.said
    assert_same(tmp_path / "run", whole["grpo"][0])


def test_a_second_signal_ends_the_run_at_once(runner, tmp_path):
    hook = {"names": ["SIGTERM", "SIGINT"], "where": "micro-batch", "count": 3}
    code = runner.run(arguments(tmp_path / "run", **RUN), {"name": "signals", "with": hook})
    assert code == -signal.SIGINT
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_under_a_launcher_the_same_signal_twice_is_one(monkeypatch):
    from gardo.distributed.signals import StopRequest, StopRequested

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested, match="SIGUSR1"):
            stop.check()


def test_a_signal_ends_a_wait(monkeypatch):
    from gardo.distributed.signals import StopRequest, StopRequested

    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    started = time.perf_counter()

    def wait():
        with stop.listening(), stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(StopRequested, match="SIGTERM"):
        wait()
    assert time.perf_counter() - started < 30
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_explained_and_earlier_checkpoints_stay(runner, whole, tmp_path):
    command = arguments(tmp_path / "run", "--resume", **RUN)
    # the third file of the second checkpoint
    files = len(list((whole["grpo"][0] / "checkpoints" / "epoch_0004").iterdir()))
    hook = {"name": "disk_full", "with": {"file": files + 3}}
    assert runner.run(command, hook) == 2
    error = runner.said.strip().splitlines()[-1]
    assert error.startswith("error: output_dir")
    assert "the disk is full; free some space" in error
    assert "checkpoint.keep_last is 2" in error
    assert "Traceback" not in runner.said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0002"]
    assert runner.run(command) == 0, runner.said
    assert_same(tmp_path / "run", whole["grpo"][0])


@pytest.mark.parametrize(
    ("where", "count", "kind", "message", "done"),
    [
        ("update", 4, "oom", "error: out of GPU memory: CUDA out of memory", 3),
        ("score", 40, "unavailable", "error: reward 'clean': no server answers", 3),
    ],
)
def test_failures_leave_a_checkpoint_and_one_message(
    runner, whole, tmp_path, where, count, kind, message, done
):
    command = arguments(tmp_path / "run", "--resume", **RUN)
    hook = {"name": "fail", "with": {"where": where, "count": count, "kind": kind}}
    assert runner.run(command, hook) == 2, runner.said
    lines = runner.said.strip().splitlines()
    assert lines[-1].startswith(message)
    assert lines[-2].endswith(f"epoch_{done:04d}'")
    assert "Traceback" not in runner.said
    if kind == "oom":
        for key in ("model.gradient_checkpointing", "train.batch_size", "model.vae_slicing"):
            assert key in lines[-1]
    assert runner.run(command) == 0, runner.said
    assert_same(tmp_path / "run", whole["grpo"][0])


@pytest.fixture(scope="module")
def stopped(runner, tmp_path_factory):
    """A run with checkpoints after 2 and 3 epochs."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    hook = {"names": ["SIGTERM"], "where": "shape", "count": 4}
    command = arguments(folder, **RUN)
    assert runner.run(command, {"name": "signals", "with": hook}) == 75, runner.said
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"epoch_0002", "epoch_0003"}
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "optimizer.safetensors").write_bytes(b"\0" * 100),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "manifest.json").write_text('{"version": 1'),
        lambda path: (path / "manifest.json").write_text("[" * 100_000),
        lambda path: flip_a_bit(path / "policy.safetensors"),
    ],
    ids=["size", "missing", "manifest", "nested", "bit"],
)
def test_a_damaged_checkpoint_is_named_and_skipped(runner, whole, copy, damage):
    damage(copy / "checkpoints" / "epoch_0003")
    assert runner.run(arguments(copy, "--resume", **RUN)) == 0, runner.said
    first = runner.said.splitlines()[0]
    assert first.startswith("skipped, because it is damaged: checkpoint")
    assert "epoch_0003" in first
    assert_same(copy, whole["grpo"][0])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(path, name, change):
    """Change a JSON file of a checkpoint and its entry in the manifest."""
    value = json.loads((path / name).read_text())
    change(value)
    rewrite(path, name, json.dumps(value).encode())


def rewrite(path, name, data):
    (path / name).write_bytes(data)
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))


def reshape(path):
    tensors = load_file(path / "policy.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name].T.contiguous()
    rewrite(path, "policy.safetensors", save(tensors))


def drop_tensor(path):
    tensors = load_file(path / "optimizer.safetensors")
    del tensors[min(tensors)]
    rewrite(path, "optimizer.safetensors", save(tensors))


def drop_group(path):
    edit(path, "manifest.json", lambda m: m["files"].pop("reference.safetensors"))


CHECKPOINT = "checkpoints/epoch_0003"


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [
        (None, {"train__learning_rate": 0.1, "seed": 7}, "seed (42 there, 7 asked for), train.lea"),
        (None, {"epochs": 2}, "epochs: the checkpoint"),
        (None, {"overwrite": "true"}, "--resume: goes on with a run, which --overwrite"),
        (None, {"checkpoint__keep_best": "evaluation/x"}, "checkpoint.keep_best: 'evaluation/x'"),
        (reshape, {}, "adapter 'policy': 'transformer_blocks.0."),
        (drop_tensor, {}, "optimizer: expected exp_avg, exp_avg_sq, step for each of"),
        (drop_group, {}, "expected tensors of ema, optimizer, policy, reference, got those of"),
        (
            lambda path: edit(path, "manifest.json", lambda m: m.update(version=2)),
            {},
            "expected format version 1, got 2",
        ),
        (
            lambda path: edit(path, "manifest.json", lambda m: m["files"].update({"../x": 1})),
            {"": "damaged"},
            "malformed manifest.json",
        ),
        (
            lambda path: edit(path, "state.json", lambda s: s.pop("shaper")),
            {},
            "no 'shaper' in state.json",
        ),
        (
            lambda path: (path.parents[1] / "metrics.jsonl").write_text('{"epoch": 0}\n'),
            {},
            "expected the epochs 0 to 2",
        ),
        (
            lambda path: rewrite(path, "config.yaml", b"epochz: 3\n"),
            {},
            "unknown key 'epochz'",
        ),
        (
            lambda path: rewrite(path, "policy.safetensors", pickle.dumps({"a": 1})),
            {"": "damaged"},
            "policy.safetensors",
        ),
    ],
)
def test_what_cannot_be_resumed_is_one_message(runner, copy, change, command, message):
    if change is not None:
        change(copy / CHECKPOINT)
    before = files(copy)
    if "" in command:  # by its path, or it would be skipped
        code = runner.run(["--resume", copy / CHECKPOINT])
    else:
        code = runner.run(arguments(copy, "--resume", **{**RUN, **command}))
    said = runner.said.strip().splitlines()
    assert code == 2, runner.said
    assert said[-1].startswith("error: ")
    assert message in said[-1]
    assert "Traceback" not in runner.said
    assert files(copy) == before


def test_where_there_is_nothing_to_resume(runner, copy, tmp_path):
    for path, message in (
        ("tiny", "--resume 'tiny': no such run folder or checkpoint"),
        (tmp_path, "no checkpoint in this folder"),
    ):
        assert runner.run(["--resume", path]) == 2
        assert message in runner.said
    elsewhere = shutil.copytree(copy / CHECKPOINT, tmp_path / "alone")
    assert runner.run(["--resume", elsewhere]) == 2
    assert "this one lies elsewhere" in runner.said
    assert runner.run(["--resume", copy, "--output_dir", tmp_path / "other"]) == 2
    assert "goes on in the run's own folder" in runner.said

    shutil.rmtree(copy / "checkpoints")
    before = files(copy)
    assert runner.run(arguments(copy, "--resume", **RUN, seed=7)) == 2
    assert "seed (42 there, 7 asked for)" in runner.said
    (copy / "summary.json").write_text("{}")
    assert runner.run(arguments(copy, "--resume", **RUN)) == 2
    assert "is finished and has no checkpoint" in runner.said
    (copy / "summary.json").unlink()
    assert files(copy) == before


def test_an_earlier_checkpoint_and_more_epochs(runner, whole, copy):
    before = arguments(copy, "--resume", copy / "checkpoints" / "epoch_0002", **RUN)
    assert runner.run([*before, "--epochs=3"]) == 0, runner.said
    assert [row["epoch"] for row in rows(copy / "metrics.jsonl")] == [0, 1, 2]
    assert [row["name"] for row in rows(copy / "evaluation.jsonl")] == ["start", "end"]
    # the evaluation after 3 epochs was the last one, and is not in a run of 6
    assert runner.run(arguments(copy, "--resume", **RUN)) == 0, runner.said
    assert_same(copy, whole["grpo"][0])


def test_settings_that_change_rounding_alone_are_told(runner, copy):
    changes = {"train__batch_size": 2, "model__vae_slicing": "true"}
    command = arguments(copy, "--resume", **{**RUN, **changes})
    assert runner.run(command) == 0, runner.said
    assert runner.said.splitlines()[:2] == [
        "model.vae_slicing differs from the run's: results are equal up to rounding",
        "train.batch_size differs from the run's: results are equal up to rounding",
    ]
    config = load_config(str(copy / "config.yaml"))
    assert config.train.batch_size == 2


def make_former(run, bound=1e-3, ties="auto"):
    """Give a run the settings as an earlier version wrote them."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sampling"]["max_ratio_deviation"] = bound
    config["health"]["ratio"] = 0.01
    config["algorithm"]["compat"] = "paper"  # as gardo was called
    del config["algorithm"]["diversity_scale"]
    config["algorithm"]["kl_when_ungated"] = "none"
    config["algorithm"]["gate"]["ties"] = ties
    config["algorithm"]["reference"]["judged_by"] = "epoch"
    text = yaml.safe_dump(config)
    (run / "config.yaml").write_text(text)
    rewrite(run / CHECKPOINT, "config.yaml", text.encode())


@pytest.mark.parametrize("bound", [1e-3, None])
def test_a_run_of_an_earlier_version_goes_on_with_keys_that_are_gone(runner, whole, copy, bound):
    make_former(copy, bound)
    assert runner.run(["--resume", copy, "--epochs", 6]) == 0, runner.said
    assert_same(copy, whole["grpo"][0])
    kept = load_config(str(copy / "config.yaml")).health.ratio
    assert kept == (0.01 if bound is None else bound)


def test_compat_on_top_of_a_run_of_an_earlier_version_is_another_setting(runner, copy):
    make_former(copy)
    assert runner.run(["--resume", copy, "--algorithm.compat", "official"]) == 2
    message = "is a run with other settings: algorithm.compat ('gardo' there, 'official' asked for)"
    assert f"'{copy}' {message}. " in runner.said


def test_a_run_of_an_earlier_version_with_what_is_gone_needs_that_version(runner, copy):
    make_former(copy, ties="ordinal")
    before = files(copy)
    for command in (["--resume", copy], arguments(copy, "--resume", **RUN)):
        assert runner.run(command) == 2
        assert runner.said.strip().splitlines()[-1] == (
            f"error: '{copy / CHECKPOINT / 'config.yaml'}': algorithm.gate.ties: gone; only "
            "algorithm.compat official does that; if an earlier version made this run with such "
            "settings, it needs that version to go on"
        )
    assert files(copy) == before


def test_the_best_checkpoint_is_kept(runner, tmp_path):
    settings = {**RUN, "checkpoint__every": 1, "checkpoint__keep_last": 1}
    best = {"checkpoint__keep_best": "reward/count/mean", "checkpoint__best": "min"}
    assert runner.run(arguments(tmp_path / "run", **settings, **best)) == 0, runner.said
    proxy = [row["reward/count/mean"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"epoch_{proxy.index(min(proxy)) + 1:04d}", "epoch_0006"}

    held_out = {"checkpoint__keep_best": "evaluation/reward/artifact/mean", "evaluation__every": 1}
    assert runner.run(arguments(tmp_path / "other", **{**settings, **held_out})) == 0, runner.said
    scores = [row["reward/artifact/mean"] for row in rows(tmp_path / "other" / "evaluation.jsonl")]
    kept = {p.name for p in (tmp_path / "other" / "checkpoints").iterdir()}
    assert kept == {f"epoch_{scores.index(max(scores[1:])):04d}", "epoch_0006"}

    wrong = {"checkpoint__keep_best": "reward/cuont/mean"}
    assert runner.run(arguments(tmp_path / "wrong", **settings, **wrong)) == 2
    assert "no metric 'reward/cuont/mean'; did you mean 'reward/count/mean'?" in runner.said


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(copy, monkeypatch):
    from gardo.checkpointing import resume
    from gardo.types import UserError

    # root may write anywhere, so the system's answer is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        resume.find_resume_point(copy, print)
