"""TensorBoard and W&B get what the JSON lines get, and never decide whether a run goes on."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest

from gardo.config import load_config
from gardo.run import trackers
from gardo.run.folder import RunFolder
from gardo.run.trackers import Trackers, check_trackers
from gardo.train import train
from gardo.types import UserError
from tests.support.forked import SMALLEST


def make_config(folder, *names, **changes):
    settings = {**SMALLEST, "output_dir": str(folder), "trackers": ",".join(names), **changes}
    return load_config("tiny", overrides=[(key, str(value)) for key, value in settings.items()])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(row, prefix=""):
    return {prefix + k: v for k, v in row.items() if isinstance(v, int | float) and k != "epoch"}


class Recorder:
    """Stands for a tracker of accelerate."""

    def __init__(self, fails_at=None):
        self.logged, self.finished, self.fails_at = [], 0, fails_at

    def log(self, values, step):
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    monkeypatch.setattr("gardo.run.trackers._start_tensorboard", lambda *_: recorder)
    return recorder


def test_a_missing_package_is_one_message_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError) as refused:
            train(make_config(tmp_path / "run", name))
        assert f"'{name}' needs the package" in str(refused.value)
        assert f"pip install 'gardo[{name}]'" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_same_name_is_not_the_package(monkeypatch):
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(trackers, "find_spec", lambda name: folder)
    with pytest.raises(UserError, match="needs the package 'wandb'"):
        check_trackers(["wandb"])


def test_wrong_names_and_modes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="trackers: expected 'tensorboard' or 'wandb', got 'mlfow'"):
        make_config(tmp_path, "mlfow")
    package = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    monkeypatch.setattr(trackers, "find_spec", lambda name: package)
    monkeypatch.setenv("WANDB_MODE", "onlien")
    with pytest.raises(UserError, match="WANDB_MODE: expected offline, online, .* got 'onlien'"):
        check_trackers(["wandb"])


def test_a_run_logs_every_number_of_its_json_lines(tmp_path, recorder):
    train(make_config(tmp_path, "tensorboard", epochs=2, **{"evaluation.every": 1}))
    metrics, evaluations = rows(tmp_path / "metrics.jsonl"), rows(tmp_path / "evaluation.jsonl")
    assert len(metrics) == 2
    assert len(evaluations) == 3
    expected = [(row["epoch"], numbers(row)) for row in metrics]
    assert [entry for entry in recorder.logged if "loss/total" in entry[1]] == expected
    held_out = [(row["epoch"], numbers(row, "evaluation/")) for row in evaluations]
    for _, values in held_out:
        del values["evaluation/time/evaluate"]  # the clock is not of the evaluation
    assert [entry for entry in recorder.logged if "loss/total" not in entry[1]] == held_out
    steps = [step for step, _ in recorder.logged]
    assert steps == sorted(steps)  # W&B ignores what comes for an earlier step
    assert recorder.finished == 1


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, recorder):
    recorder.fails_at = 1
    said = []
    config = make_config(tmp_path, "tensorboard")
    with Trackers(config, RunFolder(tmp_path), 0, said.append) as opened:
        for epoch in range(4):
            opened.log({"epoch": epoch, "kl": 0.5})
    assert recorder.logged == [(0, {"kl": 0.5})]
    assert len(said) == 1
    assert "tensorboard failed and is left out" in said[0]
    assert "No space left on device" in said[0]


def test_a_resumed_run_logs_the_evaluation_that_it_does_not_repeat(tmp_path, recorder):
    lines = [{"epoch": epoch, "name": "x", "accuracy": epoch / 10} for epoch in (0, 2, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluation.jsonl").write_text(text)
    config = make_config(tmp_path, "tensorboard")
    Trackers(config, RunFolder(tmp_path), 4, print).close()
    assert recorder.logged == [(4, {"evaluation/accuracy": 0.4})]


def test_only_the_main_process_tracks(tmp_path, recorder):
    config = make_config(tmp_path, "tensorboard")
    with Trackers(config, RunFolder(tmp_path, is_main=False), 0, print) as opened:
        opened.log({"epoch": 0, "kl": 0.5})
    assert (recorder.logged, recorder.finished) == ([], 0)


@pytest.fixture
def fake_wandb(monkeypatch):
    """The part of W&B's interface that accelerate calls."""
    fake = types.ModuleType("wandb")
    fake.inits, fake.logged = [], []

    class Error(Exception):
        pass

    class Run:
        config = types.SimpleNamespace(update=lambda *a, **k: None)

        def log(self, values, step=None, **options):
            fake.logged.append((step, values))

        def finish(self):
            fake.logged.append("finished")

    def init(**options):
        fake.inits.append(options)
        if options["mode"] == "online":
            raise Error("no route\nto host")
        fake.run = Run()
        fake.config = Run.config
        return fake.run

    fake.Error, fake.init, fake.Settings = Error, init, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_stays_offline_and_keeps_its_run_over_a_resume(tmp_path, fake_wandb):
    config = make_config(tmp_path, "wandb")
    folder, again = RunFolder(tmp_path), RunFolder(tmp_path)
    (tmp_path / "evaluation.jsonl").touch()
    again.set_clock(folder.clock(), 3)
    for start, opened in ((0, folder), (3, again)):
        with Trackers(config, opened, start, print) as tracked:
            tracked.log({"epoch": start, "kl": 0.5, "name": "text", "missing": None})
    first, second = fake_wandb.inits
    assert (first["mode"], first["project"], first["dir"]) == ("offline", "gardo", str(tmp_path))
    assert first["id"] == second["id"]
    assert (first["settings"].console, first["settings"].save_code) == ("off", False)
    assert fake_wandb.logged == [(0, {"kl": 0.5}), "finished", (3, {"kl": 0.5}), "finished"]
    other = RunFolder(tmp_path / "other")
    Trackers(config, other, 0, print).close()
    assert fake_wandb.inits[-1]["id"] != first["id"]


def test_wandb_that_cannot_start_is_one_message(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    config = make_config(tmp_path, "wandb")
    with pytest.raises(UserError) as refused:
        Trackers(config, RunFolder(tmp_path), 0, print)
    message = "trackers: wandb cannot start (WANDB_MODE online): no route to host"
    assert str(refused.value) == message


def test_tensorboard_shows_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, "tensorboard")
    for start, value in ((0, 0.1), (2, 0.3)):  # the second one stands for a resumed run
        (tmp_path / "evaluation.jsonl").touch()
        with Trackers(config, RunFolder(tmp_path), start, print) as tracked:
            for epoch in range(start, 4):
                tracked.log({"epoch": epoch, "kl": value, "reward/count/mean": -1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"kl", "reward/count/mean"}
    found = [(event.step, event.value) for event in events.Scalars("kl")]
    # TensorBoard keeps float32: 1e-7 of the value
    assert found == [(s, pytest.approx(v, rel=1e-6)) for s, v in enumerate((0.1, 0.1, 0.3, 0.3))]


def test_wandb_itself_writes_offline_and_no_secret(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "GARDO_REWARD_TOKEN"):
        monkeypatch.setenv(name, "0123456789abcdef" * 2 + "01234567")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = make_config(tmp_path, "wandb")
    with Trackers(config, RunFolder(tmp_path), 0, print) as tracked:
        tracked.log({"epoch": 0, "kl": 0.25})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if b"0123456789abcdef" in path.read_bytes()]
