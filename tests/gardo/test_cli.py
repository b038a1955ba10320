"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import yaml

from gardo import cli
from gardo.config import recipe_names
from gardo.train import main


def run(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gardo.train", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_help_is_quick_and_needs_no_torch():
    started = time.perf_counter()
    result = run("--help")
    seconds = time.perf_counter() - started
    assert result.returncode == 0
    assert "--algorithm.gate.fraction" in result.stdout
    assert "--device auto|cpu|cuda  (default: auto; on resume changes rounding)" in result.stdout
    code = "import sys; import gardo.train; print('torch' in sys.modules)"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert probe.stdout.strip() == "False"
    # the limit is 1 s; twice that leaves room for a busy machine
    assert seconds < 2.0, f"--help took {seconds:.2f} s"


def test_list_and_print_config():
    listed = run("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == recipe_names()
    printed = run("tiny", "--print-config", "--train.learning_rate", "1e-5", "--seed=7")
    config = yaml.safe_load(printed.stdout)
    assert (config["train"]["learning_rate"], config["seed"]) == (1e-5, 7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nosuch"], "unknown recipe 'nosuch'"),
        (["tiny", "extra"], "unrecognized arguments: extra"),
        (["--epochz", "3"], "did you mean 'epochs'?"),
        (["--epochs"], "--epochs: expected a value"),
        (["--epochs", "--seed", "3"], "--epochs: expected a value"),
        (["--config"], "expected one argument"),
        (["--config", "missing.yaml"], "'missing.yaml' does not exist"),
        (["--model.path", "./missing"], "model.path './missing': no such folder"),
        (["--model.path", "."], "expected a diffusers pipeline folder with model_index.json"),
        (["--prompts.per_epoch", "41"], "expected at most the 40 distinct prompts"),
        (["--prompts.group_size", "0"], "prompts.group_size: expected greater than or equal to 2"),
        (["--rewards.proxy", "cuont"], "unknown reward 'cuont'; did you mean 'count'?"),
        (["--rewards.proxy", "no.module:fn"], "no module named 'no.module'"),
        (["--rewards.features", "jugde"], "jugde"),
        (["--rewards.parameters", "{judge2: {a: 1}}"], "'judge2' is not among the rewards"),
        (["--rewards.parameters.count.nope", "1"], "rewards.parameters.count"),
        (["--sampling.resolution", "25"], "sampling.resolution: expected a multiple of"),
        (["--sampling.max_ratio_deviation", "1e-3"], "renamed to health.ratio"),
        (
            ["--algorithm.gate.ties", "half"],
            "algorithm.gate.ties: gone; this is what algorithm.compat gardo does: leave it out",
        ),
        (["--algorithm.gate.ties", "ordinal"], "gone; only algorithm.compat official does that"),
        (["--sampling.cuda_graph", "on"], "sampling.cuda_graph"),
        (["--precision", "fp16", "--device", "cpu"], "precision: fp16 needs a GPU"),
        (["--model.lora.targets", "nothing"], "model.lora.targets: no module"),
        (["--output_dir", "full"], "expected an empty or new folder"),
        (["--output_dir", "full", "--overwrite", "true"], "not a run folder"),
        (["--output_dir", "file.txt"], "output_dir 'file.txt': expected a folder"),
        (["--output_dir", "/proc/gardo"], "output_dir '/proc/gardo': "),
        (
            ["--prompts.path", "bad.jsonl"],
            "prompt file 'bad.jsonl', line 2: expected a JSON object",
        ),
        (
            ["--prompts.path", "scene.txt", "--prompts.per_epoch=1"],
            "count: ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments, expected, tmp_path, monkeypatch, capsys
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file.txt").write_text("a file")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one red circle"}\n{"prompt": 3}\n')
    (tmp_path / "scene.txt").write_text("a cat on a mat\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    short = [] if "--epochs" in arguments else ["--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["gardo.train", *arguments, *short])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    message = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert message[-1].startswith("error: ")
    assert expected in message[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_ends_the_process_with_code_2_and_without_traceback(tmp_path):
    result = run("--epochz", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: unknown key 'epochz'; did you mean 'epochs'? (see --help for all keys)\n"
    )
    assert result.stdout == ""
