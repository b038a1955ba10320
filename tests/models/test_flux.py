"""The Flux family on a tiny random pipeline of the real classes."""

from __future__ import annotations

import json

import pytest
import torch

from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.models.embeddings import EmbeddingTable
from gardo.models.flux import FluxModel
from gardo.models.loading import load_model
from gardo.run.folder import RunFolder
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.trainer import Trainer
from gardo.types import UserError
from tests.gardo.test_training import SHORT
from tests.support.tiny import PROMPTS
from tools.tiny.models import build_flux_pipeline

CPU = torch.device("cpu")
SIDE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    build_flux_pipeline(seed=0).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    config = load_config("tiny", overrides=[("model.path", str(folder))])
    return load_model(config.model, CPU, "fp32")


def pipeline_output(pipe, embeds, start, output_type="latent", guidance_scale=3.5):
    return pipe(
        prompt_embeds=embeds["encoder_hidden_states"],
        pooled_prompt_embeds=embeds["pooled_projections"],
        height=SIDE,
        width=SIDE,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=start.clone(),
        output_type=output_type,
    ).images


def test_family_is_recognised(model):
    assert isinstance(model, FluxModel)
    assert model.latent_shape(SIDE) == (36, 16)
    with pytest.raises(UserError, match="expected a multiple of 4"):
        model.latent_shape(26)


def test_sampler_without_noise_equals_the_pipeline(model):
    embeddings = EmbeddingTable(model, PROMPTS)
    sampler = Sampler(model, embeddings, SIDE, guidance_scale=3.5, batch_size=2)
    assert not sampler.guided
    schedule = model.schedule(5, SIDE)
    table = step_table(schedule, CPU, kind="ode", noise_level=0.0)
    latents = torch.empty(6, 2, *sampler.latent_shape)
    latents[0] = sampler.initial_latents([("x", 0), ("x", 1)], seed=1)
    sampler.run(table, PROMPTS, latents)
    embeds = embeddings(PROMPTS).tensors
    expected = pipeline_output(model.pipeline, embeds, latents[0])
    assert torch.equal(schedule.sigmas, model.pipeline.scheduler.sigmas)
    torch.testing.assert_close(latents[-1], expected, rtol=1e-5, atol=1e-5)
    images = pipeline_output(model.pipeline, embeds, latents[0], "pt")
    torch.testing.assert_close(model.decode(latents[-1]), images, rtol=0, atol=1e-5)
    # the scale reaches the transformer
    other = pipeline_output(model.pipeline, embeds, latents[0], guidance_scale=1.0)
    assert (other - expected).abs().max() > 1e-5
    assert model.rows == 2 * 5


def test_training_and_export(folder, tmp_path):
    from diffusers import FluxPipeline

    settings = {
        **SHORT,
        "output_dir": str(tmp_path / "run"),
        "model.path": str(folder),
        "sampling.resolution": str(SIDE),
        "sampling.guidance_scale": "3.5",
        "sampling.same_latent": "true",
        "train.learning_rate": "1e-2",
        "algorithm.gate.mode": "all",
    }
    config = load_config("tiny", overrides=list(settings.items()))
    trainer = Trainer(config, Runtime("cpu"))
    run = RunFolder.create(config)
    trainer.train(run)
    rows = [json.loads(r) for r in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(r["ratio/max_abs_dev"] == 0.0 for r in rows)
    assert rows[1]["kl"] > 0

    embeds = trainer.embeddings(PROMPTS).tensors
    start = trainer.sampler.initial_latents([("t", 0), ("t", 1)], seed=0)
    policy = pipeline_output(trainer.model.pipeline, embeds, start, "pt")
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    base = pipeline_output(pipe, embeds, start, "pt")
    pipe.load_lora_weights(run.export)
    assert torch.equal(pipeline_output(pipe, embeds, start, "pt"), policy)
    assert not torch.equal(base, policy)
