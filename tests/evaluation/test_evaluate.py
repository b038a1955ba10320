"""The command as a whole, on runs, exports and pipelines of the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gardo.evaluation.cache import decode_png
from gardo.evaluation.drawing import shared_noise
from gardo.evaluation.metrics import mean_pairwise_distance
from gardo.families import FAMILIES
from gardo.rewards.registry import build_features, build_reward
from gardo.rng import generator, normal_rows
from gardo.tiny.scenes import parse_prompt
from tests.evaluation import counting
from tests.evaluation.conftest import PROMPTS, evaluate, files, make_run
from tests.support import warm
from tests.support.tiny import save_pipeline


@pytest.fixture(scope="module")
def compared(places, tmp_path_factory):
    """A run and a fine-tuned pipeline with the base, on two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = ["--runs", places.run, places.moved_pipeline, "--base", "--prompts", places.prompts]
    return out, words, evaluate(out, *words)


def test_every_statistic_is_there(compared):
    out, _, data = compared
    assert list(data["contenders"]) == ["base", "first", "moved pipeline"]
    names = {"count", "shape_fit", "clean", "judge", "strict_count", "artifact"}
    assert {n: r["role"] for n, r in data["rewards"].items()} == {
        "count": "proxy",
        "shape_fit": "auxiliary",
        "clean": "auxiliary",
        "judge": "held out",
        "strict_count": "held out",
        "artifact": "held out",
    }
    for name, column in data["contenders"].items():
        assert column["reward"].keys() == names
        for estimate in column["reward"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert column["diversity"]["value"] > 0
        if name == "base":
            assert (column["win_rate"], column["gap"], column["kl"]) == ({}, None, None)
        else:
            assert column["win_rate"].keys() == names | {"proxy"}
            assert column["kl"]["value"] > 0
            assert -1 <= column["gap"]["low"] <= column["gap"]["high"] <= 1
    assert len(data["images"]) == len(PROMPTS) * 2
    markdown = (out / "evaluation.md").read_text()
    for label in ("win rate against the base", "| gap", "| diversity", "| KL to the base"):
        assert label in markdown


def test_statistics_follow_from_the_images(compared):
    """Score the PNGs independently and redo means, win rates, gap and diversity by hand."""
    from PIL import Image

    out, _, data = compared
    parameters = {"count": {"color_weight": 5.0}}
    scores, features = {}, {}
    for name in data["contenders"]:
        pixels = [
            np.asarray(Image.open(out / row["contenders"][name]["file"])) for row in data["images"]
        ]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        features[name] = build_features("judge")(images)
        texts = [row["prompt"] for row in data["images"]]
        metadata = [parse_prompt(text).metadata for text in texts]
        for reward in data["rewards"]:
            built = build_reward(reward, **parameters.get(reward, {}))
            scores[name, reward] = built.score(images, texts, metadata).scores.double()
    for name, column in data["contenders"].items():
        rates = {}
        for reward, facts in data["rewards"].items():
            mine, base = scores[name, reward], scores["base", reward]
            # scores of a batch of another size differ in rounding
            assert column["reward"][reward]["value"] == pytest.approx(float(mine.mean()), rel=1e-4)
            sign = 1 if facts["higher_is_better"] else -1
            won = ((sign * mine > sign * base) + 0.5 * (mine == base)).double()
            rates[reward] = float(won.mean())
        groups = torch.tensor([PROMPTS.index(row["prompt"]) for row in data["images"]])
        expected = float(mean_pairwise_distance(features[name], groups))
        assert column["diversity"]["value"] == pytest.approx(expected, rel=1e-4)
        if name == "base":
            continue
        for reward, rate in rates.items():
            assert column["win_rate"][reward]["value"] == pytest.approx(rate, abs=1e-12)
        held_out = np.mean([rates[r] for r in ("judge", "strict_count", "artifact")])
        assert column["gap"]["value"] == pytest.approx(rates["count"] - held_out, abs=1e-12)


@pytest.mark.parametrize("batch_size", [4, 3, 1])
def test_images_do_not_depend_on_the_others(compared, places, tmp_path, batch_size):
    """Other contenders, another order and more seeds: the same bytes of the base and the run.

    With another batch size matrix products round differently, by 1e-5 of the range of a pixel.
    """
    out, _, data = compared
    other = tmp_path / "other"
    words = ["--runs", places.lora, "--recipe", places.run / "config.yaml", "--no_kl"]
    words += ["--prompts", places.prompts, "--seeds", 5, 1, 0, "--batch_size", batch_size]
    again = evaluate(other, *words)
    # the LoRA export of the run is the run
    for mine, theirs in (("base", "base"), ("first", "adapter")):
        found = files(other, theirs, again)
        assert len(set(found.values())) == len(found) == 9
        for key, image in files(out, mine, data).items():
            if batch_size == 4:  # as before
                assert found[key] == image
            levels = (decode_png(found[key]) - decode_png(image)).abs() * 255
            assert levels.max() <= 1.01
            assert (levels > 0).float().mean() < 0.01


def test_the_noise_itself():
    """A function of prompt and seed alone: equal whatever the batch holds, else different."""
    texts, seeds = ["a", "b", "a"], [0, 0, 1]
    rows = normal_rows(shared_noise("latent", texts, seeds), (2, 3))
    for text, seed, row in zip(texts, seeds, rows, strict=True):
        alone = normal_rows(shared_noise("latent", [text], [seed]), (2, 3))
        assert torch.equal(alone[0], row)
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 3
    assert not torch.equal(rows, normal_rows(shared_noise("kl", texts, seeds), (2, 3)))


def test_kinds_of_the_same_weights_agree(compared, places, tmp_path):
    """A run of full fine-tuning, its exported transformer, and the whole pipeline."""
    out, _, data = compared
    words = ["--runs", places.full, places.full / "export", "--prompts", places.prompts, "--no_kl"]
    again = evaluate(tmp_path / "out", *words, "--names", "run", "export")
    expected = files(out, "moved pipeline", data)
    assert files(tmp_path / "out", "run", again) == expected
    assert files(tmp_path / "out", "export", again) == expected
    assert expected != files(out, "base", data)


def test_images_are_those_of_training_s_own_sampler(compared, places):
    """The base's image of a prompt and seed, drawn here with plain diffusers."""
    from diffusers import StableDiffusion3Pipeline
    from PIL import Image

    out, _, data = compared
    pipe = StableDiffusion3Pipeline.from_pretrained(places.pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for name in ("base", "first"):
        if name == "first":
            pipe.load_lora_weights(str(places.run / "export"))
        row = data["images"][1]
        source = generator(row["seed"], "evaluate", "latent", row["prompt"])
        latents = torch.randn(1, 4, 12, 12, generator=source)
        image = pipe(
            row["prompt"],
            latents=latents,
            num_inference_steps=2,
            guidance_scale=1.0,
            max_sequence_length=8,
            output_type="np",
        ).images[0]
        found = np.asarray(Image.open(out / row["contenders"][name]["file"])).astype(float)
        # one level of 255 for rounding to 8 bits, and for other batch sizes
        assert np.abs(found - image * 255).max() <= 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_a_contender_has_not_moved(places, tmp_path, family):
    """KL exactly 0, every image a tie; and the families all work."""
    words = ["--prompts", places.prompts, "--rewards", "judge"]
    if family != "sd3":  # of which the other runs are
        base = tmp_path / family
        save_pipeline(family, base)
        changes = {"model.path": str(base), "sampling.resolution": "24"}
        run = make_run(tmp_path / "runs" / family, **changes)
        data = evaluate(tmp_path / "out", "--runs", run, base, *words, "--names", "run", "same")
        assert data["contenders"]["run"]["kl"]["value"] > 0
    else:
        words += ["--runs", places.run, "builtin:tiny", "--names", "run", "same"]
        data = evaluate(tmp_path / "out", *words)
    same = data["contenders"]["same"]
    assert same["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert {rate["value"] for rate in same["win_rate"].values()} == {0.5}
    assert same["gap"]["value"] == 0.0


def test_an_own_base_says_where_it_is(compared, places, tmp_path):
    """A copy of the base elsewhere gives the same images; the run's own path need not exist."""
    out, _, data = compared
    copy = tmp_path / "copy"
    shutil.copytree(places.pipeline, copy)
    run = tmp_path / "run"
    shutil.copytree(places.run, run)
    text = (run / "config.yaml").read_text().replace("builtin:tiny", "/nowhere/at/all")
    (run / "config.yaml").write_text(text)
    words = ["--runs", run, "--base", copy, "--prompts", places.prompts, "--no_kl"]
    again = evaluate(tmp_path / "out", *words)
    assert files(tmp_path / "out", "run", again) == files(out, "first", data)


def test_a_run_of_an_earlier_version(compared, places, tmp_path):
    """No image depends on keys of training that are gone, whatever they say."""
    out, _, data = compared
    run = tmp_path / "run"
    shutil.copytree(places.run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["algorithm"] |= {"kl_when_ungated": "all", "kl_reduction": "microbatch"}
    config["algorithm"]["gate"]["ties"] = "ordinal"
    config["algorithm"]["reference"]["judged_by"] = "update"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--runs", run, "--prompts", places.prompts, "--no_kl"]
    words += ["--recipe", run / "config.yaml"]
    again = evaluate(tmp_path / "out", *words)
    assert files(tmp_path / "out", "run", again) == files(out, "first", data)


def test_hub_ids(compared, places, tmp_path, monkeypatch):
    """A repository with a pipeline and one with LoRA weights, in the hub's local cache."""
    from huggingface_hub import constants

    def repository(name: str, content: Path) -> None:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(content, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)

    repository("someone/moved", places.moved_pipeline)
    repository("someone/adapter", places.lora)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    out, _, data = compared
    words = ["--runs", "someone/moved", "someone/adapter", "--recipe", places.run / "config.yaml"]
    again = evaluate(tmp_path / "out", *words, "--prompts", places.prompts, "--no_kl")
    found = again["contenders"]["moved"]["hashes"]["model"]
    assert found == "someone/moved@0123456789abcdef0123456789abcdef01234567"
    mine = files(tmp_path / "out", "moved", again)
    assert mine == files(out, "moved pipeline", data)
    assert files(tmp_path / "out", "adapter", again) == files(out, "first", data)


def test_without_base_and_without_a_run(places, tmp_path):
    words = ["--runs", places.moved_pipeline, "--no_base", "--prompts", places.prompts]
    data = evaluate(
        tmp_path / "out", *words, "--rewards", "judge,clean", "--guidance", 1.5, "--seeds", 3
    )
    (column,) = data["contenders"].values()
    assert column["reward"].keys() == {"judge", "clean"}
    assert (column["win_rate"], column["gap"], column["kl"]) == ({}, None, None)
    assert {r["role"] for r in data["rewards"].values()} == {"held out"}
    assert data["settings"]["guidance_scale"] == 1.5
    assert any("diversity" in note for note in data["notes"])


def test_defaults_are_the_first_run_s(places, tmp_path):
    data = evaluate(tmp_path / "out", "--runs", places.run, "--no_kl")
    assert data["settings"]["seeds"] == [0, 1]
    assert data["settings"]["prompts"] == 3
    assert data["images"][0]["prompt"] == "one red circle"
    assert data["settings"]["sampler"].startswith("2 Euler steps")


def test_options_change_what_they_say(places, tmp_path):
    cache = ["--cache", tmp_path / "cache", "--prompts", places.prompts, "--seeds", 0]
    words = ["--runs", places.run, *cache, "--no_base", "--rewards", "clean", "--features", "none"]
    first = evaluate(tmp_path / "0", *words)
    different = {}
    for options in (
        ("--steps", 3), ("--guidance", 2.0), ("--resolution", 16), ("--precision", "bf16"),
    ):  # fmt: skip
        data = evaluate(tmp_path / str(options[0]), *words, *options)
        different[options[0]] = files(tmp_path / str(options[0]), "first", data)
    plain = files(tmp_path / "0", "first", first)
    for option, images in different.items():
        assert images.keys() == plain.keys()
        assert images != plain, option
    few = evaluate(tmp_path / "few", *words, "--max_prompts", 1)
    assert len(few["images"]) == 1
    assert few["contenders"]["first"]["diversity"] is None


def test_a_second_call_only_reads(compared, places, tmp_path, monkeypatch, capfd):
    out, words, data = compared
    before = {p: p.stat().st_mtime_ns for p in (out / "cache").rglob("*.*")}

    def refuse(*_):
        raise AssertionError("a model was loaded although everything is there")

    monkeypatch.setattr("gardo.evaluation.policies.load_model", refuse)
    assert evaluate(out, *words) == data
    assert {p: p.stat().st_mtime_ns for p in (out / "cache").rglob("*.*")} == before
    assert "nothing to do (6 are there)" in capfd.readouterr().err


def test_what_is_lost_is_made_again(compared, places, tmp_path, capfd):
    """Images, records and a KL that are gone or damaged: the same files again."""
    out, words, _ = compared
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    wanted = {name: (out / name).read_bytes() for name in ("evaluation.json", "evaluation.md")}
    kept = {p.relative_to(copy): p.read_bytes() for p in sorted((copy / "cache").rglob("*.*"))}
    for number, path in enumerate(kept):
        if number % 3 == 0:
            (copy / path).unlink()
        elif number % 7 == 0:
            (copy / path).write_bytes(kept[path][:100])
    evaluate(copy, *words)
    assert {name: (copy / name).read_bytes() for name in wanted} == wanted
    for path, content in kept.items():
        assert (copy / path).read_bytes() == content, path
    assert "is damaged and is made again" in capfd.readouterr().err


def command(out: Path, *words) -> list[str]:
    return ["-m", "gardo.evaluate", *map(str, words), "--out", str(out)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_evaluation_goes_on(places, tmp_path, number, code):
    words = ["--runs", places.run, "--prompts", places.prompts, "--seeds", "0-3", "--rewards",
             "judge", "--steps", "8", "--batch_size", 1]  # fmt: skip
    out = tmp_path / "killed"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    python = sys.executable if number == signal.SIGKILL else warm.python()
    process = subprocess.Popen(
        [python, *command(out, *words)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("cache/*/*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert b"Traceback" not in told
    if code == 75:
        assert b"the same command goes on" in told
    drawn = {p: p.stat().st_mtime_ns for p in out.glob("cache/*/[0-9a-f]*.png")}
    assert 4 <= len(drawn) < 2 * 3 * 4
    assert not (out / "evaluation.json").exists()
    records = {p: p.stat().st_mtime_ns for p in drawn if p.with_suffix(".json").exists()}
    evaluate(out, *words)
    # what was drawn was not drawn again
    assert {p: p.stat().st_mtime_ns for p in records} == records
    evaluate(tmp_path / "whole", *words)
    for name in ("evaluation.json", "evaluation.md", "evaluation.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("reward", "asked"),
    [("reward", 4), ("Remote", 3)],  # what is computed here is computed in full batches
)
def test_scores_are_kept_and_made_again_when_asked(places, tmp_path, reward, asked):
    words = ["--runs", places.run, "--no_base", "--prompts", places.prompts, "--seeds", 0]
    words += ["--cache", tmp_path / "cache", "--rewards", f"tests.evaluation.counting:{reward}"]
    counting.calls.clear()
    first = evaluate(tmp_path / "a", *words, "--batch_size", 2)
    assert sum(counting.calls) == asked
    again = evaluate(tmp_path / "b", *words, "--batch_size", 2)
    assert again["contenders"] == first["contenders"]
    assert sum(counting.calls) == asked
    evaluate(tmp_path / "c", *words, "--batch_size", 2, "--rescore")
    assert sum(counting.calls) == 2 * asked


def test_missing_scores_are_missing_and_asked_for_again(places, tmp_path):
    words = ["--runs", places.run, "--prompts", places.prompts, "--seeds", "0-3", "--no_kl",
             "--rewards", "tests.evaluation.counting:sometimes"]  # fmt: skip
    counting.fail_next = True
    data = evaluate(tmp_path / "out", *words)
    name = "tests.evaluation.counting:sometimes"
    assert sum(column["missing"][name] for column in data["contenders"].values()) == 1
    assert "images without a score" in (tmp_path / "out" / "evaluation.md").read_text()
    data = evaluate(tmp_path / "out", *words)
    assert sum(column["missing"][name] for column in data["contenders"].values()) == 0
    # each image's score is 1: every comparison a tie
    assert data["contenders"]["first"]["win_rate"][name]["value"] == 0.5


def test_two_runs_with_other_proxies(places, tmp_path):
    """Each gap is that of the run's own proxy; rewards that any was trained on are not held out."""
    other = make_run(
        tmp_path / "runs" / "weighted",
        **{"rewards.proxy": "{judge: 0.5, artifact: 1.0}", "rewards.eval": "strict_count"},
    )
    data = evaluate(
        tmp_path / "out", "--runs", places.run, other, "--prompts", places.prompts, "--no_kl"
    )
    roles = {name: facts["role"] for name, facts in data["rewards"].items()}
    assert [n for n, r in roles.items() if r == "proxy"] == ["count", "judge", "artifact"]
    assert [n for n, r in roles.items() if r == "held out"] == ["strict_count"]
    for name in ("first", "weighted"):
        column = data["contenders"][name]
        rates = {n: e["value"] for n, e in column["win_rate"].items()}
        assert column["gap"]["value"] == pytest.approx(rates["proxy"] - rates["strict_count"])
    rates = data["contenders"]["first"]["win_rate"]
    assert rates["proxy"] == rates["count"]
    # artifact is better when lower, so it is subtracted
    won = []
    for row in data["images"]:
        mine, base = (row["contenders"][n]["scores"] for n in ("weighted", "base"))
        total, reference = (0.5 * s["judge"] - s["artifact"] for s in (mine, base))
        won.append((total > reference) + 0.5 * (total == reference))
    found = data["contenders"]["weighted"]["win_rate"]["proxy"]["value"]
    assert found == pytest.approx(np.mean(won), abs=1e-12)


def test_html_has_a_row_per_prompt_and_seed(compared, places):
    out, words, data = compared
    page = (out / "evaluation.html").read_text()
    assert page.count("<img") == len(data["images"]) * 3
    assert page.count('src="data:image/png;base64,') == len(data["images"]) * 3
    shorter = out.parent / "shorter"
    shutil.copytree(out, shorter)
    evaluate(shorter, *words, "--rows", 2)
    page = (shorter / "evaluation.html").read_text()
    assert page.count("<img") == 2 * 3
    assert "The first 2 of 6 rows" in page


def test_after_a_real_training(tmp_path):
    """Train, then evaluate the run folder, as the documentation says."""
    from gardo.config import load_config
    from gardo.train import train
    from tests.support.forked import SMALLEST

    run = tmp_path / "runs" / "mine"
    changes = {"epochs": "1", "output_dir": str(run), "rewards.eval": "judge"}
    settings = {**SMALLEST, **changes}
    train(load_config("tiny", overrides=[(k, str(v)) for k, v in settings.items()]))
    data = evaluate(tmp_path / "out", "--runs", run, "--base")
    column = data["contenders"]["mine"]
    assert column["kl"]["value"] > 0
    assert column["gap"] is not None
    assert json.loads((run / "summary.json").read_text())["recipe"] == "tiny"
