"""The ablation: its settings, its statistics, and the command on the smallest runs."""

import json
import sys

import pytest

from experiments import training_runs
from experiments.ablation import __main__ as command
from experiments.ablation import methods, run
from experiments.ablation.results import markdown, summarize
from experiments.training_runs import TrainingRun, train_all
from gardo.config import load_config
from gardo.run.metrics import read_metrics
from gardo.types import UserError

SMALLEST = run.Scale(epochs=1, groups=2, group_size=2, kl_coefs=(0.1,), evaluations=1, prompts=2)
SMALLEST_TRAINING = {
    "epochs": "1",
    "prompts.group_size": "2",
    "evaluation.max_prompts": "1",
    "evaluation.num_steps": "2",
    "evaluation.grid_images": "0",
}


def test_settings_are_every_method_at_every_coefficient():
    names = [s.name for s in methods.settings((0.1, 1.0))]
    assert len(names) == len(set(names))
    swept = sum(m.swept for m in methods.METHODS)
    assert len(names) == 2 * swept + len(methods.METHODS) - swept
    assert "grpo" in names
    assert "gardo-0.1" in names
    assert "gardo-1" in names


def test_every_setting_is_a_valid_recipe_of_the_same_size(tmp_path):
    tasks = run.tasks([3], run.FULL, tmp_path)
    configs = {t.setting.name: t.run.config for t in tasks}
    assert (
        len({(c.epochs, c.prompts.per_epoch, c.prompts.group_size) for c in configs.values()}) == 1
    )
    assert len({c.train.learning_rate for c in configs.values()}) == 1
    assert configs["grpo"].algorithm.kl_coef == 0
    plain = configs[f"grpo-kl-{run.FULL.kl_coefs[1]:g}"].algorithm
    assert (plain.gate.mode, plain.reference.reset_every) == ("all", 0)
    assert plain.kl_coef == run.FULL.kl_coefs[1]
    ours = configs[f"gardo-{run.FULL.kl_coefs[1]:g}"].algorithm
    recipe = load_config("tiny").algorithm
    assert ours.model_copy(update={"kl_coef": recipe.kl_coef}) == recipe


# --- statistics -----------------------------------------------------------------------------------


def record(method, coef, seed, proxy, strict):
    def figures(proxy, strict):
        return dict.fromkeys(run.MEASURED, 0.5) | {"proxy": proxy, "strict": strict}

    start = figures(1.0, 0.6)
    return {
        "method": method,
        "kl_coef": coef,
        "setting": method if coef is None else f"{method}-{coef:g}",
        "seed": seed,
        "scale": {"epochs": 1, "groups": 2, "group_size": 2, "prompts": 2},
        "start": start,
        "end": figures(proxy, strict),
        "gated": 0.1,
        "resets": 0,
        "seconds": 2.0,
    }


RECORDS = [
    record("grpo", None, 0, 1.5, 0.2),
    record("grpo", None, 1, 1.7, 0.4),
    record("gardo", 0.1, 0, 1.3, 0.55),
    record("gardo", 0.1, 1, 1.4, 0.59),
    record("gardo", 1.0, 0, 1.1, 0.7),
    record("gardo", 1.0, 1, 1.1, 0.6),
    record("grpo-kl", 0.1, 0, 0.9, 0.6),  # in no figure better than the one above
    record("grpo-kl", 0.1, 1, 1.2, 0.5),
]


def test_statistics_over_seeds():
    summary = summarize(RECORDS)
    grpo = summary["settings"]["grpo"]
    assert grpo["proxy"] == {
        "mean": pytest.approx(1.6),
        "sd": pytest.approx(0.02**0.5, abs=1e-4),
        "seeds": [1.5, 1.7],
    }
    assert (grpo["hacked"], grpo["runs"]) == (2, 2)
    # the proxy rose in both, and in one of them the accuracy fell
    assert summary["settings"]["gardo-1"]["hacked"] == 0
    assert summary["settings"]["grpo-kl-0.1"]["hacked"] == 1
    frontier = {name for name, row in summary["settings"].items() if row["frontier"]}
    assert frontier == {"grpo", "gardo-0.1", "gardo-1"}


def test_gain_that_keeps_the_accuracy():
    methods_of = summarize(RECORDS)["methods"]
    assert methods_of["grpo"] == {"kept_gain": None, "kept_at": None}
    # 0.57 is within the tolerance of 0.6 and has gained more than the other coefficient
    assert methods_of["gardo"] == {"kept_gain": pytest.approx(0.35), "kept_at": 0.1}
    assert methods_of["grpo-kl"] == {"kept_gain": None, "kept_at": None}


def test_one_seed_has_no_deviation():
    summary = summarize([r for r in RECORDS if r["seed"] == 0])
    assert summary["settings"]["grpo"]["proxy"]["sd"] is None
    assert "| grpo |  | 1.500 | 0.200 |" in markdown(summary)
    json.dumps(summary)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("warm_runs")
def test_runs_are_kept_and_other_settings_refused(tmp_path):
    first = TrainingRun(tmp_path / "a", SMALLEST_TRAINING)
    train_all([first, TrainingRun(tmp_path / "b", {**SMALLEST_TRAINING, "seed": "7"})], jobs=2)
    assert first.finished()
    assert first.epochs_done() == 1
    assert "seed: 7" in (tmp_path / "b" / "config.yaml").read_text()
    written = (tmp_path / "a" / "metrics.jsonl").stat().st_mtime_ns
    train_all([first], jobs=1)
    assert (tmp_path / "a" / "metrics.jsonl").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="expected a run with the experiment's settings"):
        train_all([TrainingRun(tmp_path / "a", {**SMALLEST_TRAINING, "seed": "8"})], jobs=1)


def test_failing_run_is_named_with_its_reason(tmp_path, monkeypatch):
    broken = TrainingRun(tmp_path / "broken", SMALLEST_TRAINING)
    monkeypatch.setattr(training_runs, "POLL_SECONDS", 0.05)
    script = "import sys; print('error: no such thing'); sys.exit(2)"
    monkeypatch.setattr(TrainingRun, "command", [sys.executable, "-c", script])
    with pytest.raises(UserError, match=r"broken: error: no such thing \(see .*broken.log\)"):
        train_all([broken], jobs=1)


def test_a_run_is_a_process_of_the_python_that_runs_this(tmp_path):
    command = TrainingRun(tmp_path / "a", SMALLEST_TRAINING).command
    assert command[:3] == [sys.executable, "-m", "gardo.train"]


@pytest.mark.usefixtures("warm_runs")
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", SMALLEST)
    kept = tuple(m for m in methods.METHODS if m.name in ("grpo", "gardo"))
    monkeypatch.setattr(run, "settings", lambda coefs: methods.settings(coefs, kept))
    assert command.main(["--quick", "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    table = capsys.readouterr().out
    assert "| grpo |" in table
    assert "| gardo | 0.1 |" in table
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(summary["settings"]) == {"grpo", "gardo-0.1"}
    assert summary["settings"]["grpo"]["gated"]["mean"] == 0
    evaluated = {
        name: read_metrics(tmp_path / "out" / "runs" / f"{name}-seed0" / "evaluation.jsonl")
        for name in ("grpo", "gardo-0.1")
    }
    assert [row["name"] for row in evaluated["grpo"]] == ["start", "end"]
    assert [row["name"] for row in evaluated["gardo-0.1"]] == ["end"]
    assert summary["start"]["proxy"]["mean"] == pytest.approx(
        evaluated["grpo"][0]["reward/count/mean"], abs=1e-4
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 3
    assert page.count("data:image/png") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "--seeds: expected different numbers from 0"),
        (["--seeds", "-1"], "--seeds: expected"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(arguments)
