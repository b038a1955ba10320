"""The SD3 model, its adapters, and the sampler on them."""

from __future__ import annotations

import pytest
import torch

import gardo_kernels as gk
from gardo.algorithms.ema import EMA
from gardo.config import load_config
from gardo.models.adapters import POLICY, REFERENCE, build_adapters
from gardo.models.loading import load_model
from gardo.rng import generator
from gardo.sampling.plan import plan_epoch
from gardo.sampling.steps import sde_window, step_table
from gardo.types import UserError
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")


def velocity(sampler, latents):
    with torch.no_grad():
        return sampler.velocity(latents, torch.full((len(latents),), 500.0), [PROMPTS[0]] * 2).cond


def perturb(parameters, seed=0):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampler_without_noise_equals_the_pipeline(model, make_sampler, guidance_scale):
    sampler = make_sampler(guidance_scale)
    table = step_table(model.schedule(5, 24), CPU, kind="ode", noise_level=0.0)
    latents = torch.empty(6, 2, *sampler.latent_shape)
    latents[0] = sampler.initial_latents([("x", 0), ("x", 1)], seed=1)
    sampler.run(table, PROMPTS, latents)
    expected = model.pipeline(
        list(PROMPTS),
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=latents[0].clone(),
        max_sequence_length=model.max_sequence_length,
        output_type="latent",
    ).images
    torch.testing.assert_close(latents[-1], expected, rtol=1e-5, atol=1e-5)
    images = model.decode(latents[-1])
    reference = model.pipeline.vae.decode(
        expected / model.pipeline.vae.config.scaling_factor + model.pipeline.vae.config.shift_factor
    ).sample
    torch.testing.assert_close(images, (reference / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_the_schedule_is_the_pipelines_own(model):
    schedule = model.schedule(10, 24)
    model.pipeline.scheduler.set_timesteps(10)
    assert torch.equal(schedule.sigmas, model.pipeline.scheduler.sigmas)
    assert torch.equal(schedule.timesteps, model.pipeline.scheduler.timesteps)
    assert schedule.sigmas[0] == 1.0
    # shifted twice, once by the constructor: 1/1000 -> 3/1002 -> this
    shifted = 3 * (3 / 1002) / (1 + 2 * (3 / 1002))
    assert float(schedule.sigmas[-2]) == pytest.approx(shifted, rel=1e-5)


def test_rows_are_counted_with_guidance_as_two(model, make_sampler):
    x = torch.zeros(2, *make_sampler().latent_shape)
    velocity(make_sampler(), x)
    assert model.rows == 2
    velocity(make_sampler(3.0), x)
    assert model.rows == 6


def test_frozen_weights_stay_frozen_and_adapters_are_float32(model, adapters):
    trainable = {n for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name and ".policy." in name for name in trainable)
    assert len(trainable) == len(adapters.parameters(POLICY))
    assert all(p.dtype == torch.float32 for p in adapters.parameters(REFERENCE).values())
    assert not model.transformer.training


def test_adapters_start_equal_and_stay_independent(adapters, make_sampler):
    sampler = make_sampler()
    x = torch.randn(2, *sampler.latent_shape, generator=generator(0))
    base = velocity(sampler, x)
    perturb(adapters.parameters(POLICY))
    with adapters.use(REFERENCE):
        assert torch.equal(velocity(sampler, x), base)
    moved = velocity(sampler, x)
    assert (moved - base).abs().max() > 1e-3

    adapters.copy(POLICY, REFERENCE)
    with adapters.use(REFERENCE):
        assert torch.equal(velocity(sampler, x), moved)
    perturb(adapters.parameters(POLICY), seed=1)
    with adapters.use(REFERENCE):
        assert torch.equal(velocity(sampler, x), moved)


def test_switching_keeps_the_policy_trainable(adapters, make_sampler):
    with adapters.use(REFERENCE):
        pass
    sampler = make_sampler()
    out = sampler.velocity(torch.ones(2, *sampler.latent_shape), torch.ones(2), PROMPTS).cond
    out.sum().backward()
    gradients = {n: p.grad for n, p in adapters.parameters(POLICY).items()}
    # B starts at zero, so A has no gradient yet; the last block's context output is not used
    assert any(g is not None and g.abs().max() > 0 for n, g in gradients.items() if "lora_B" in n)
    assert all(p.grad is None for p in adapters.parameters(REFERENCE).values())


def test_adapter_state_round_trip_and_mismatch(adapters):
    state = adapters.state_dict(POLICY)
    perturb(adapters.parameters(POLICY))
    adapters.load_state_dict(POLICY, state)
    for name, parameter in adapters.parameters(POLICY).items():
        assert torch.equal(parameter, state[name])
    name = next(iter(state))
    with pytest.raises(ValueError, match="1 tensors missing"):
        adapters.load_state_dict(POLICY, {k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="expected shape"):
        adapters.load_state_dict(POLICY, {**state, name: state[name][:, :1]})


def test_lora_is_seeded(config):
    def weights(seed):
        model = load_model(config.model, CPU, "fp32")
        return build_adapters(model, config.model, seed).state_dict(POLICY)

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_full_finetuning_keeps_a_separate_reference(config, embeddings, model, make_sampler):
    full = config.model.model_copy(update={"full_finetune": True})
    copies = build_adapters(model, full, seed=0)
    sampler = make_sampler()
    x = torch.randn(2, *sampler.latent_shape, generator=generator(0))
    base = velocity(sampler, x)
    perturb(copies.parameters(POLICY))
    assert not torch.equal(velocity(sampler, x), base)
    with copies.use(REFERENCE):
        assert torch.equal(velocity(sampler, x), base)
    assert not any(p.requires_grad for p in copies.parameters(REFERENCE).values())


def test_ema_averages_and_swaps_exactly(adapters, config):
    train = config.train.model_copy(update={"ema_decay": 0.75, "ema_every": 2})
    ema = EMA(adapters.parameters(), train)
    name, parameter = next(iter(adapters.parameters().items()))
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    ema.step()
    assert torch.equal(ema.average[name], start)  # not due yet
    ema.step()
    torch.testing.assert_close(ema.average[name], start + 0.25)
    live = parameter.detach().clone()
    with ema.swapped_in():
        assert torch.equal(parameter, ema.average[name])
    assert torch.equal(parameter, live)
    restored = EMA(adapters.parameters(), train)
    restored.load_state_dict(ema.state_dict())
    assert restored.steps == 2
    assert torch.equal(restored.average[name], ema.average[name])


@pytest.mark.parametrize("kind", ["flow", "cps", "dance"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_stored_log_probs_are_reproduced_exactly_in_training(
    adapters, make_sampler, model, kind, guidance_scale
):
    perturb(adapters.parameters(POLICY))
    sampler = make_sampler(guidance_scale)
    table = step_table(model.schedule(6, 24), CPU, kind=kind, noise_level=0.7)
    rollout, fill = sampler.rollout(plan_epoch(2, 4, 2), PROMPTS, table, 0, 0, False)
    batches = list(fill)
    assert batches == [slice(0, 4), slice(4, 8)]
    for rows in batches:
        for step in table.trainable:
            timesteps = table.timesteps[step].expand(4)
            x = rollout.latents[step, rows]
            v, v_uncond, scale = sampler.velocity(x, timesteps, rollout.prompts[rows])
            log_prob = gk.sde_log_prob(
                v,
                x,
                rollout.latents[step + 1, rows],
                table.coefficients[step],
                velocity_uncond=v_uncond,
                guidance_scale=scale,
            )
            assert v.requires_grad
            assert torch.equal(log_prob.detach(), rollout.log_prob[step, rows])


def test_a_sample_does_not_depend_on_batch_size_or_rank(make_sampler, model):
    table = step_table(model.schedule(4, 24), CPU, kind="flow", noise_level=0.7)

    def samples(batch_size, rank=0, world=1):
        plan = plan_epoch(2, 5, 2, rank, world)
        rollout, fill = make_sampler(batch_size=batch_size).rollout(
            plan, PROMPTS, table, seed=3, epoch=1, same_latent=False
        )
        list(fill)
        return {int(i): rollout.latents[:, k] for k, i in enumerate(plan.sample_ids)}

    whole = samples(5)
    for part in (samples(4), samples(3, 0, 2) | samples(3, 1, 2)):
        assert part.keys() == whole.keys()
        for i, trajectory in part.items():
            assert torch.equal(trajectory[0], whole[i][0])
            torch.testing.assert_close(trajectory, whole[i], rtol=1e-4, atol=1e-5)


def test_same_latent_shares_the_start_within_a_group_only(make_sampler, model):
    table = step_table(model.schedule(4, 24), CPU, kind="flow", noise_level=0.7)
    rollout, fill = make_sampler().rollout(plan_epoch(2, 2, 1), PROMPTS, table, 0, 0, True)
    list(fill)
    start, end = rollout.latents[0], rollout.latents[-1]
    assert torch.equal(start[0], start[2])
    assert not torch.equal(start[0], start[1])
    assert not torch.equal(end[0], end[2])


def test_window_puts_noise_on_its_steps_only(model, config):
    sampling = config.sampling.model_copy(update={"sde_window": 2, "sde_window_range": (1, 6)})
    windows = [sde_window(sampling, 0, epoch) for epoch in range(50)]
    assert {w.start for w in windows} == {1, 2, 3, 4}
    assert all(len(w) == 2 for w in windows)
    schedule = model.schedule(10, 24)
    table = step_table(schedule, CPU, kind="flow", noise_level=0.7, window=range(3, 5))
    assert table.stochastic == (3, 4)
    assert [c.kind for c in table.coefficients].count("ode") == 8
    assert sde_window(sampling.model_copy(update={"sde_window": 0}), 0, 0) is None
    # fewer steps than the window or its range: both end with the schedule
    short = sampling.model_copy(update={"num_steps": 3, "sde_window": 4})
    assert sde_window(short, 0, 0) == range(3)
    late = sampling.model_copy(update={"num_steps": 5, "sde_window_range": (4, 9)})
    assert sde_window(late, 0, 0) == range(3, 5)


def test_the_last_step_is_not_trained(model):
    table = step_table(model.schedule(10, 24), CPU, kind="flow", noise_level=0.7)
    assert table.stochastic == tuple(range(10))
    assert table.trainable == tuple(range(9))
    cps = step_table(model.schedule(10, 24), CPU, kind="cps", noise_level=0.7)
    assert cps.stochastic == tuple(range(9))  # no noise at all in its last step


def test_wrong_pipeline_class_and_resolution_are_refused(tmp_path, model):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    config = load_config("tiny", overrides=[("model.path", str(tmp_path))])
    with pytest.raises(UserError, match="expected a StableDiffusion3Pipeline or FluxPipeline, got"):
        load_model(config.model, CPU, "fp32")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="malformed model_index.json"):
        load_model(config.model, CPU, "fp32")
    with pytest.raises(UserError, match=r"expected a multiple of 4 .* got 25"):
        model.latent_shape(25)


def test_coefficients_carry_the_kl_scale(model):
    exact, official = (
        step_table(model.schedule(10, 24), CPU, kind="flow", noise_level=0.7, kl_scale=scale)
        for scale in ("exact", "official")
    )
    dt = float(model.schedule(10, 24).sigmas[4] - model.schedule(10, 24).sigmas[5])
    ratio = float(official.coefficients[4].kl / exact.coefficients[4].kl)
    assert ratio == pytest.approx(dt, rel=1e-5)  # c^2 = std^2 * dt
