"""Memory and speed options of a recipe: they change cost, not results."""

from __future__ import annotations

import pytest
import torch

from gardo.algorithms.reference import reference_pass
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY, build_adapters
from gardo.models.attention import JointAttention, set_attention_backend
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import load_model
from gardo.run.folder import RunFolder
from gardo.sampling.plan import plan_epoch
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.trainer import Trainer
from gardo.types import UserError
from tests.gardo.test_training import SHORT
from tests.models.test_models import perturb
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")


def tiny(**overrides):
    return load_config("tiny", overrides=[(f"model.{k}", str(v)) for k, v in overrides.items()])


def velocities(model):
    embeds = EmbeddingTable(model, PROMPTS)(PROMPTS)
    latents = torch.randn(2, *model.latent_shape(24), generator=torch.Generator().manual_seed(0))
    return model.velocity(latents, torch.tensor([500.0, 900.0]), embeds, None, 1.0).cond


@pytest.fixture(scope="module")
def expected():
    return velocities(load_model(tiny().model, CPU, "fp32")).detach()


def test_attention_through_the_dispatcher_equals_diffusers_own(expected):
    model = load_model(tiny(attention_backend="sdpa").model, CPU, "fp32")
    processors = model.transformer.attn_processors.values()
    assert {type(p) for p in processors} == {JointAttention}
    torch.testing.assert_close(velocities(model), expected, rtol=0, atol=1e-6)
    set_attention_backend(model.transformer, "_native_math")
    torch.testing.assert_close(velocities(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "'flash' cannot be used here: .*flash-attn"),
        ("xformers", "'xformers' cannot be used here: .*xformers"),
        ("fast", "expected one of sdpa, .*native.*, got 'fast'"),
    ],
)
def test_an_attention_backend_that_is_not_there_is_named(name, message):
    with pytest.raises(UserError, match=message):
        load_model(tiny(attention_backend=name).model, CPU, "fp32")


def test_compiled_blocks_compute_the_same(expected):
    model = load_model(tiny(compile=True).model, CPU, "fp32")
    torch.testing.assert_close(velocities(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_image_decoder_has_a_precision_of_its_own(name):
    config = tiny() if name == "fp32" else tiny(vae_dtype=name)
    model = load_model(config.model, CPU, "bf16")
    assert model.pipeline.vae.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    assert model.transformer.dtype == torch.bfloat16
    images = model.decode(torch.zeros(2, *model.latent_shape(24)))
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_tiling_and_slicing_decode_the_same_small_images():
    plain = load_model(tiny().model, CPU, "fp32")
    sliced = load_model(tiny(vae_tiling=True, vae_slicing=True).model, CPU, "fp32")
    latents = torch.randn(3, *plain.latent_shape(24), generator=torch.Generator().manual_seed(1))
    assert sliced.pipeline.vae.use_slicing
    assert sliced.pipeline.vae.use_tiling
    torch.testing.assert_close(sliced.decode(latents), plain.decode(latents), rtol=0, atol=1e-5)


def test_offloaded_trajectories_are_the_same(model, embeddings, config):
    adapters = build_adapters(model, config.model, seed=0)
    perturb(adapters.parameters(POLICY))
    table = step_table(model.schedule(4, 24), CPU, kind="flow", noise_level=0.7)
    results = []
    for offload in (False, True):
        sampler = Sampler(model, embeddings, 24, 2.5, 4, offload=offload)
        rollout, fill = sampler.rollout(plan_epoch(2, 5, 2), PROMPTS, table, 0, 0, False)
        list(fill)
        reference = reference_pass(sampler, adapters, rollout, [1, 7], [0, 2])
        rows = torch.tensor([3, 9])
        results.append((rollout.latents_at(2, rows), rollout.log_prob, reference.velocity))
    for kept, offloaded in zip(*results, strict=True):
        assert torch.equal(kept, offloaded)


@pytest.mark.parametrize(
    "option",
    [
        {"train.fused_optimizer": "true"},
        {"model.gradient_checkpointing": "true"},
        {"sampling.offload_trajectories": "true"},
        {"model.attention_backend": "sdpa", "model.vae_slicing": "true"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_run_with_the_option_learns_the_same(option, tmp_path):
    def weights(name, **changes):
        settings = {**SHORT, **changes, "epochs": "1", "output_dir": str(tmp_path / name)}
        config = load_config("tiny", overrides=list(settings.items()))
        trainer = Trainer(config, Runtime("cpu"))
        trainer.train(RunFolder.create(config))
        return trainer.adapters.state_dict(POLICY)

    plain, changed = weights("plain"), weights("changed", **option)
    for name, value in plain.items():
        torch.testing.assert_close(changed[name], value, rtol=1e-3, atol=2e-5)
