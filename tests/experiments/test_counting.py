"""The counting experiment: its statistics, and the command on the smallest runs."""

import json

import pytest

from experiments.counting import __main__ as command
from experiments.counting import run
from experiments.counting.results import markdown, summarize
from gardo.data.generators import generate_prompts
from gardo.types import UserError


def test_ranges_cover_every_count_once():
    counts = [count for part in run.RANGES.values() for count in part]
    assert counts == list(run.COUNTS)
    assert max(run.TRAINED) + 1 == min(run.RANGES["unseen"])


def test_prompts_of_chosen_counts():
    prompts = generate_prompts("shapes", "train", {"counts": [6, 9]})
    assert len(prompts) == 16
    assert {p.text.split()[0] for p in prompts} == {"six", "nine"}
    assert len(generate_prompts("shapes", "train", {})) == 40
    for wrong in ([], [0], [10], ["two"]):
        with pytest.raises(UserError, match="counts: expected numbers from 1 to 9"):
            generate_prompts("shapes", "train", {"counts": wrong})


def record(method, seed, *accuracy):
    return {
        "method": method,
        "seed": seed,
        "accuracy": {str(c): a for c, a in zip(run.COUNTS, accuracy, strict=True)},
    }


def test_statistics():
    records = [
        record("base", None, 1, 1, 1, 1, 0.5, 0.1, 0, 0, 0),
        record("grpo", 0, 1, 1, 1, 1, 0.5, 0.2, 0.1, 0.1, 0),
        record("grpo", 1, 1, 1, 1, 1, 1, 0.4, 0.1, 0.3, 0),
        record("gardo", 0, *[0.5] * 9),
        record("gardo", 1, *[0.7] * 9),
    ]
    summary = summarize(records, run.QUICK)
    assert summary["seeds"] == [0, 1]
    grpo = summary["methods"]["grpo"]
    assert grpo["counts"]["6"]["mean"] == pytest.approx(0.3)
    assert grpo["ranges"]["unseen"]["seeds"] == pytest.approx([0.05, 0.15])
    assert grpo["ranges"]["trained"]["seeds"] == pytest.approx([0.15, 0.25])
    assert summary["methods"]["base"]["ranges"]["pretrained"] == {
        "mean": 0.9,
        "sd": None,
        "seeds": [0.9],
    }
    assert summary["methods"]["gardo"]["ranges"]["unseen"]["sd"] == pytest.approx(0.1414, abs=1e-4)
    assert "| grpo | 0.950 ± 0.071 | 0.200 ± 0.071 | 0.100 ± 0.071 |" in markdown(summary)


@pytest.mark.usefixtures("warm_runs")
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", run.Scale(epochs=1, group_size=2, images=1))
    out = tmp_path / "out"
    arguments = ["--quick", "--out", str(out), "--jobs", "2"]
    assert command.main(arguments) == 0
    assert "## By count" in capsys.readouterr().out
    summary = json.loads((out / "results.json").read_text())
    assert set(summary["methods"]) == {"base", "grpo", "gardo"}
    assert (out / "counting.png").stat().st_size > 1000
    # measured once: a stored accuracy is taken, a damaged one is named
    stored = out / "accuracy" / "gardo-seed0.json"
    stored.write_text(stored.read_text().replace('"9": ', '"9": 1e-3, "x": '))
    command.main(arguments)
    again = json.loads((out / "results.json").read_text())
    assert again["methods"]["gardo"]["counts"]["9"]["mean"] == 0.001
    stored.write_text("{")
    with pytest.raises(UserError, match="gardo-seed0.json: expected a stored result"):
        command.main(arguments)
