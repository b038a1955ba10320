"""What users get wrong: one message that names the thing, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from gardo.evaluate import main
from gardo.evaluation.request import MAX_SEEDS, parse_seeds
from gardo.evaluation.sources import LORA_FILE
from gardo.types import UserError
from tests.evaluation.conftest import make_run
from tests.gardo.test_security import EVIL, Page
from tools.tiny.models import build_flux_pipeline


def refused(out, *words) -> str:
    """The message of a command line that must fail."""
    with pytest.raises(UserError) as raised:
        main([*map(str, words), "--out", str(out)])
    return str(raised.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0", "1", "7"], [0, 1, 7]),
        (["0-3"], [0, 1, 2, 3]),
        (["0,2-3", "9"], [0, 2, 3, 9]),
        (["5-5"], [5]),
    ],
)
def test_seeds(words, expected):
    assert parse_seeds(words) == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a"], "whole numbers or ranges such as 0 1 2 or 0-7, got 'a'"),
        (["-1"], "got '-1'"),
        (["1.5"], "got '1.5'"),
        (["1-"], "got '1-'"),
        ([""], "got ''"),
        (["٣"], "got '٣'"),
        (["3-1"], "from low to high, got '3-1'"),
        (["1", "0-2"], "got 1 twice"),
        ([f"0-{10**17}"], f"at most {MAX_SEEDS}"),
        (["9" * 30], "whole numbers"),
    ],
)
def test_seeds_that_are_none(words, says):
    with pytest.raises(UserError) as raised:
        parse_seeds(words)
    assert str(raised.value).startswith("--seeds: expected")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: --runs"),
        (["--runs"], "expected at least one argument"),
        (["--runs", "x", "--seed", "1"], "unrecognized arguments: --seed"),
        (["--runs", "x", "--steps", "1"], "at least 2, got '1'"),
        (["--runs", "x", "--batch_size", "0"], "at least 1, got '0'"),
        (["--runs", "x", "--guidance", "nan"], "a number of at least 0, got 'nan'"),
        (["--runs", "x", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--runs", "x", "--base", "--no_base"], "expected one of them, got both"),
        (["--runs", "./nowhere"], "--runs './nowhere': no such folder"),
        (["--runs", ""], "--runs: expected the path of a folder or a hub id, got ''"),
        (["--runs", "a" * 300], "--runs"),
        (["--runs", "some/model"], "--runs 'some/model': model.path 'some/model': no such folder"),
    ],
)
def test_command_lines(tmp_path, words, says):
    assert says in refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rewards", "strict_cuont"], "unknown reward 'strict_cuont'; did you mean"),
        (["--features", "jugde"], "unknown feature extractor 'jugde'; did you mean 'judge'?"),
        (["--prompts", "missing.txt"], "prompt file 'missing.txt' does not exist"),
        (["--recipe", "tinny"], "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["--base", "./nowhere"], "--base './nowhere': no such folder"),
        (["--names", "a", "b"], "--names: expected 1 names, one for each of --runs, got 2"),
        (["--names", "base"], "'base' is the base model"),
        (["--names", "a\nb"], "expected printable names"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--resolution", "25"], "sampling.resolution: expected a multiple of"),
    ],
)
def test_what_does_not_go_with_a_run(places, tmp_path, words, says):
    assert says in refused(tmp_path / "out", "--runs", places.run, *words)
    if "--resolution" not in words:  # what only the model can say
        assert not (tmp_path / "out").exists()


def test_a_run_that_is_none(places, tmp_path):
    near = places.run.parent / "frist"
    assert f"did you mean '{places.run}'?" in refused(tmp_path, "--runs", near)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "found none of these in it" in refused(tmp_path, "--runs", empty)
    (tmp_path / "file.txt").write_text("")
    assert "got a file" in refused(tmp_path, "--runs", tmp_path / "file.txt")


def test_a_wrong_name_beside_runs_is_no_hub_id(places, tmp_path, monkeypatch):
    monkeypatch.chdir(places.run.parents[1])
    assert "did you mean 'runs/first'?" in refused(tmp_path, "--runs", "runs/fisrt")


def test_a_run_without_export(places, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(places.run, run)
    (run / "export" / LORA_FILE).unlink()
    message = refused(tmp_path / "out", "--runs", run)
    assert "the run has no export yet" in message
    assert f"--resume {run}" in message


def test_a_run_whose_configuration_is_broken(places, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(places.run, run)
    (run / "config.yaml").write_text("epochz: 3")
    assert "unknown key 'epochz'; did you mean 'epochs'?" in refused(tmp_path, "--runs", run)


def test_contenders_of_different_bases(places, tmp_path):
    flux, copy = tmp_path / "flux", tmp_path / "copy"
    build_flux_pipeline(seed=0).save_pretrained(flux)
    shutil.copytree(places.pipeline, copy)
    other = make_run(tmp_path / "runs" / "other", **{"model.path": str(copy)})
    message = refused(tmp_path / "out", "--runs", places.run, other)
    assert "expected contenders of one base model" in message
    assert str(copy) in message
    assert "--base PATH" in message
    message = refused(tmp_path / "out", "--runs", places.run, flux)
    assert "a FluxPipeline against a StableDiffusion3Pipeline" in message
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "shift": 1.5}))
    message = refused(tmp_path / "out", "--runs", places.run, copy)
    assert "scheduler/scheduler_config.json: shift 1.5 against 3.0" in message


def test_adapters_that_do_not_fit(places, tmp_path):
    flux = tmp_path / "flux"
    build_flux_pipeline(seed=0).save_pretrained(flux)
    words = ["--prompts", places.prompts, "--recipe", places.run / "config.yaml"]
    message = refused(tmp_path / "out", "--runs", places.lora, "--base", flux, *words)
    assert f"{LORA_FILE} does not fit the base model '{flux}'" in message
    weights = load_file(places.lora / LORA_FILE)

    def changed(name, content):
        folder = tmp_path / name
        folder.mkdir()
        if isinstance(content, bytes):
            (folder / LORA_FILE).write_bytes(content)
        else:
            save_file(content, folder / LORA_FILE)
        return refused(tmp_path / "out", "--runs", folder, *words)

    assert "cannot be read" in changed("half", (places.lora / LORA_FILE).read_bytes()[:500])
    assert "empty" in changed("none", {})
    odd = {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}
    assert "'text_encoder.x.lora_A.weight'" in changed("text", {**weights, **odd})
    wide = {name: torch.zeros(2, 7) if ".lora_A." in name else t for name, t in weights.items()}
    assert "has shape [2, 7]" in changed("wide", wide)


def test_weights_that_are_not_numbers(places, tmp_path):
    folder = tmp_path / "nan"
    folder.mkdir()
    weights = load_file(places.lora / LORA_FILE)
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, folder / LORA_FILE)
    words = ["--recipe", places.run / "config.yaml", "--prompts", places.prompts]
    message = refused(tmp_path / "out", "--runs", folder, *words)
    assert "'nan' drew an image that is not finite (prompt 'two red circles', seed 0)" in message


def test_what_nobody_says(places, tmp_path):
    words = ["--runs", places.moved_pipeline]
    message = refused(tmp_path, *words)
    assert message.startswith("--prompts, --rewards, --guidance: expected a value")
    words += ["--prompts", places.prompts, "--rewards", "judge", "--guidance", 1]
    assert "others are compared with it, or --no_base" in refused(tmp_path, *words)
    lora = ["--runs", places.lora, "--no_base", *words[2:]]
    assert "is weights for one" in refused(tmp_path, *lora)
    assert "got weights without a pipeline" in refused(tmp_path, *words, "--base", places.lora)


def test_prompts_that_a_reward_cannot_judge(places, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two red circles\na photo of a dog\n")
    message = refused(tmp_path / "out", "--runs", places.run, "--prompts", prompts)
    assert f"{prompts}, line 2" in message
    assert "a photo of a dog" in message


def test_an_out_folder_that_is_a_file(places, tmp_path):
    (tmp_path / "out").write_text("")
    message = refused(tmp_path / "out", "--runs", places.run)
    assert f"--out '{tmp_path / 'out'}'" in message


def test_several_processes(places, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused(tmp_path / "out", "--runs", places.run)


def test_help_is_quick_and_needs_no_torch():
    started = time.perf_counter()
    command = [sys.executable, "-m", "gardo.evaluate", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    assert result.returncode == 0
    assert "--kl_seeds" in result.stdout
    code = "import sys; import gardo.evaluate; print('torch' in sys.modules)"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert probe.stdout.strip() == "False"
    # the limit is 1 s; twice that leaves room for a busy machine
    assert seconds < 2.0, f"--help took {seconds:.2f} s"


def test_a_mistake_ends_the_process_with_code_2_and_without_traceback(tmp_path):
    command = [sys.executable, "-m", "gardo.evaluate", "--runs", "./nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --runs './nowhere': no such folder")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evil", EVIL)
def test_text_of_others_is_text_in_the_page(places, tmp_path, evil):
    """Prompts, names and folders: no tag, attribute or link comes of them, in HTML or Markdown."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": f"two {evil}"}) + "\n")
    out = tmp_path / "out"
    folder = tmp_path / evil.replace("/", "_")
    shutil.copytree(places.moved_pipeline, folder)
    words = ["--runs", folder, "--names", f"name {evil}", "--prompts", prompts, "--no_base"]
    words += ["--rewards", "jpeg_compressibility", "--guidance", 1, "--seeds", 0, "--steps", 2]
    assert main([*map(str, words), "--out", str(out)]) == 0
    page = Page((out / "evaluation.html").read_text(encoding="utf-8"))
    allowed = """html head meta title style body main h1 h2 p div table thead tbody tr th td ul li
        img br span dl dt dd""".split()
    assert page.tags <= set(allowed)
    assert page.comments == []
    assert f"two {evil}" in page.text
    assert f"name {evil}" in page.text
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "action")
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    markdown = (out / "evaluation.md").read_text(encoding="utf-8")
    assert "<" not in markdown.replace("\\<", "")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "prompts.jsonl", folder.name}
