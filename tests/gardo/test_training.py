"""Whole runs of the embedded recipe, made short."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.run.folder import RunFolder
from gardo.sampling.steps import step_table
from gardo.train import train
from gardo.trainer import Trainer
from tests.support import warm

SHORT = {
    "epochs": "2",
    "device": "cpu",
    "threads": "1",
    "prompts.per_epoch": "4",
    "prompts.group_size": "4",
    "sampling.batch_size": "8",
    "sampling.num_steps": "5",
    "sampling.sde_window": "0",
    "train.timestep_fraction": "0.4",
    "train.batch_size": "8",
    "evaluation.max_prompts": "4",
    "evaluation.samples_per_prompt": "2",
    "evaluation.num_steps": "4",
    "evaluation.grid_images": "6",
    "evaluation.every": "1",
}
CONTRACT_METRICS = """
epoch reward/count/mean reward/count/std gate/share gate/fraction uncertainty/mean
diversity/nn_distance kl loss/policy loss/total ratio/max_abs_dev clip_fraction grad_norm
reference/reset time/rollout time/update forwards/policy forwards/reference images_per_second
""".split()


def command_line(folder, **changes):
    settings = {**SHORT, "output_dir": str(folder), **changes}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    return ["-m", "gardo.train", "tiny", *overrides]


def run(folder, python=None, **changes):
    result = subprocess.run(
        [python or warm.python(), *command_line(folder, **changes)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result


def train_here(folder, **changes):
    """A run in this process, which spares the imports."""
    settings = {**SHORT, "output_dir": str(folder), **changes}
    train(load_config("tiny", overrides=list(settings.items())))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def comparable(row):
    """A row of metrics without what the clock decides."""
    return {k: v for k, v in row.items() if not k.startswith("time/") and k != "images_per_second"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run(folder, sys.executable)


def test_run_folder_is_complete(finished):
    folder, result = finished
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.jsonl",
        "summary.json",
        "report.html",
        "export/pytorch_lora_weights.safetensors",
        "images/epoch_0000.png",
        "images/epoch_0001.png",
        "images/epoch_0002.png",
    } <= files
    assert "ETA" in result.stderr
    assert load_config(str(folder / "config.yaml")).output_dir == str(folder)
    assert [r["name"] for r in rows(folder / "evaluation.jsonl")] == ["start", "during", "end"]


def test_details_of_rewards_are_shown(tmp_path):
    name = "tests.rewards.toys:batch_size"  # with a detail, twice its score
    train_here(tmp_path / "run", **{"epochs": "1", "rewards.eval": name, "rewards.aux": name})
    shown = f"{name}/twice"
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        for row in rows(tmp_path / "run" / file):
            assert row[f"reward/{shown}/mean"] == 2 * row[f"reward/{name}/mean"]
    assert shown in (tmp_path / "run" / "report.html").read_text()
    assert f"| {shown} |" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_metrics_hold_the_contract(finished):
    metrics = rows(finished[0] / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [0, 1]
    for row in metrics:
        assert set(CONTRACT_METRICS) <= row.keys()
        assert row["ratio/max_abs_dev"] == 0.0
        gated = round(row["gate/share"] * 16)
        # 2 of the 5 steps are trained; guidance is off, so a row is a sample
        assert row["forwards/reference"] == gated * 2
        assert row["forwards/policy"] == 16 * 5 + 16 * 2


def test_same_seed_same_run_and_another_seed_differs(finished, tmp_path):
    run(tmp_path / "again")
    run(tmp_path / "other", seed="43")
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        first = [comparable(r) for r in rows(finished[0] / name)]
        assert first == [comparable(r) for r in rows(tmp_path / "again" / name)]
        assert first != [comparable(r) for r in rows(tmp_path / "other" / name)]
    first, again = (
        load_file(folder / "export" / "pytorch_lora_weights.safetensors")
        for folder in (finished[0], tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("ema", ["false", "true"])
def test_export_in_plain_diffusers_equals_the_policy(tmp_path, ema):
    from diffusers import StableDiffusion3Pipeline

    from gardo.tiny import pipeline_path

    settings = {
        **SHORT,
        "output_dir": str(tmp_path / "run"),
        "train.ema": ema,
        "train.ema_every": "1",
        "train.learning_rate": "1e-2",
    }
    config = load_config("tiny", overrides=list(settings.items()))
    trainer = Trainer(config, Runtime("cpu"))
    folder = RunFolder.create(config)
    trainer.train(folder)

    prompts = ["three red circles", "two blue squares"]
    embeds = trainer.embeddings(prompts).tensors
    start = trainer.sampler.initial_latents([("t", 0), ("t", 1)], seed=0)

    def images(pipe):
        return pipe(
            prompt_embeds=embeds["encoder_hidden_states"],
            pooled_prompt_embeds=embeds["pooled_projections"],
            num_inference_steps=5,
            guidance_scale=1.0,
            latents=start.clone(),
            output_type="pt",
        ).images

    live = images(trainer.model.pipeline)
    expected = live
    if trainer.ema is not None:
        with trainer.ema.swapped_in():
            expected = images(trainer.model.pipeline)
        assert not torch.equal(expected, live)

    pipe = StableDiffusion3Pipeline.from_pretrained(
        pipeline_path(), dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    base = images(pipe)
    pipe.load_lora_weights(folder.export)
    with_lora = images(pipe)
    assert (with_lora - base).abs().max() > 1e-3  # it was not silently ignored
    assert torch.equal(with_lora, expected)

    # and our own sampler draws what the pipeline draws
    table = step_table(trainer.model.schedule(5, 24), start.device, kind="ode", noise_level=0)
    latents = torch.empty(6, *start.shape)
    latents[0] = start
    trainer.sampler.run(table, prompts, latents)
    torch.testing.assert_close(trainer.model.decode(latents[-1]), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm.kl_coef": "0", "algorithm.diversity": "false"},  # GRPO
        {
            "algorithm.gate.mode": "all",
            "algorithm.reference.kl_threshold": "0",
            "algorithm.reference.reset_every": "0",
            "algorithm.diversity": "false",
        },  # GRPO + KL
        {"algorithm.compat": "official", "algorithm.advantage_norm": "global_std"},
        {"sampling.guidance_scale": "2.0", "sampling.sde": "cps", "sampling.same_latent": "true"},
        {"sampling.sde_window": "2", "train.timestep_fraction": "1.0", "sampling.sde": "dance"},
        {"sampling.batch_size": "5", "train.batch_size": "3", "train.updates_per_epoch": "3"},
        {"model.full_finetune": "true", "train.learning_rate": "1e-4"},
        {"algorithm.gate.scope": "group", "algorithm.kl_reduction": "batch"},
    ],
    ids=["grpo", "grpo-kl", "official", "cfg-cps", "window-dance", "odd-batches", "full", "group"],
)
def test_parts_switch_on_and_off(tmp_path, changes):
    train_here(tmp_path / "run", **{**changes, "epochs": "1", "evaluation.every": "0"})
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    if changes.get("algorithm.kl_coef") == "0":
        assert row["forwards/reference"] == 0
        assert row["gate/share"] == 0
    if changes.get("algorithm.gate.mode") == "all":
        assert row["gate/share"] == 1.0
        assert row["forwards/reference"] == 16 * 2
    if "sampling.batch_size" not in changes:  # other batch sizes round differently
        assert row["ratio/max_abs_dev"] == 0.0


@pytest.mark.parametrize("full_finetune", ["false", "true"])
def test_half_precision_keeps_the_ratio_and_the_reference_exact(tmp_path, full_finetune):
    # one update per epoch: the policy that trains is the one that sampled, and the reference
    run(
        tmp_path / "run",
        **{
            "precision": "bf16",
            "model.full_finetune": full_finetune,
            "epochs": "1",
            "algorithm.gate.mode": "all",
            "train.updates_per_epoch": "1",
        },
    )
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["ratio/max_abs_dev"] == 0.0
    assert row["kl"] == 0.0
    assert row["grad_norm"] > 0


def test_reference_follows_the_policy_when_asked(tmp_path):
    train_here(
        tmp_path / "run",
        **{
            "algorithm.reference.reset_every": "1",
            "epochs": "2",
            "algorithm.gate.mode": "all",
            "train.updates_per_epoch": "1",
        },
    )
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["reference/reset"] == 1
        assert row["kl"] == 0.0  # the reference is the policy that sampled


def test_base_export_when_nothing_is_trained(tmp_path):
    train_here(tmp_path / "run", epochs="0")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
