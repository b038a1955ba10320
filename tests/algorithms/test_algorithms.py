"""Shaping, the gated reference pass, the update and the adaptive reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import gardo_kernels as gk
from gardo.algorithms.grpo import GRPO, TrainingData
from gardo.algorithms.reference import reference_pass, trained_steps
from gardo.algorithms.shaping import ShapedEpoch, Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY
from gardo.rewards.scoring import RewardSet, ScoreBook, reward_metrics
from gardo.sampling.plan import plan_epoch
from gardo.sampling.steps import step_table
from tests.models.test_models import perturb
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")
STEPS = [1, 3]


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


@pytest.fixture
def rollout(model, adapters, make_sampler):
    """Eight samples of a policy that has moved away from its reference."""
    perturb(adapters.parameters(POLICY))
    table = step_table(model.schedule(5, 24), CPU, kind="flow", noise_level=0.7)
    rollout, fill = make_sampler(2.0).rollout(plan_epoch(2, 4, 2), PROMPTS, table, 0, 0, False)
    list(fill)
    return rollout


def shaped_epoch(gated: list[int]) -> ShapedEpoch:
    gate = torch.zeros(8, dtype=torch.bool)
    gate[gated] = True
    advantage = torch.linspace(-1, 1, 8)[torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])]
    per_update = (int(gate[:4].sum()), int(gate[4:].sum()))
    return ShapedEpoch(advantage, gate, tuple(gated), per_update, {})


def gradients_of_update(
    config, runtime, adapters, sampler, rollout, shaped, reference, index=0, **train
):
    optimizer = torch.optim.SGD(adapters.parameters().values(), lr=0.0)
    settings = config.train.model_copy(update={"max_grad_norm": 1e9, **train})
    grpo = GRPO(config.algorithm, settings, sampler, adapters, optimizer, runtime)
    stats = UpdateStats()
    grpo.accumulate_gradients(TrainingData(rollout, shaped, reference, STEPS), index, stats)
    found = {n: p.grad.clone() for n, p in adapters.parameters().items() if p.grad is not None}
    optimizer.zero_grad()
    stats.finish_update(torch.tensor(0.0))
    return found, stats.metrics(runtime)


def assert_equal_gradients(a, b, rtol):
    assert a.keys() == b.keys()
    largest = max(float(g.abs().max()) for g in a.values())
    assert largest > 0
    for name in a:
        assert (a[name] - b[name]).abs().max() <= rtol * largest, name


def test_gated_pass_equals_full_pass_and_mask(
    config, runtime, model, adapters, make_sampler, rollout
):
    sampler, gated = make_sampler(2.0), [1, 2, 6]
    shaped = shaped_epoch(gated)
    before = model.rows
    only_gated = reference_pass(sampler, adapters, rollout, gated, STEPS)
    gated_rows = model.rows - before
    everything = reference_pass(sampler, adapters, rollout, range(8), STEPS)
    all_rows = model.rows - before - gated_rows
    # a share f of the samples costs f of the forwards; guidance runs two rows per sample
    assert gated_rows == 2 * len(gated) * len(STEPS)
    assert gated_rows == all_rows * len(gated) // 8

    for index in (0, 1):
        results = [
            gradients_of_update(
                config, runtime, adapters, sampler, rollout, shaped, ref, index, batch_size=4
            )
            for ref in (only_gated, everything)
        ]
        (grad_a, (metrics_a, kl_a)), (grad_b, (metrics_b, kl_b)) = results
        assert kl_a > 0
        assert kl_a == pytest.approx(kl_b, rel=1e-6)
        assert metrics_a["loss/total"] == pytest.approx(metrics_b["loss/total"], rel=1e-6)
        assert_equal_gradients(grad_a, grad_b, rtol=1e-6)


def test_reference_pass_packs_rows_and_steps_into_full_batches(
    model, adapters, make_sampler, rollout, monkeypatch
):
    sampler, sizes = make_sampler(1.0, batch_size=4), []
    original = type(model).velocity

    def record(self, latents, *args):
        sizes.append(len(latents))
        return original(self, latents, *args)

    monkeypatch.setattr(type(model), "velocity", record)
    reference = reference_pass(sampler, adapters, rollout, [1, 2, 6], STEPS)
    assert sizes == [4, 2]  # 3 rows x 2 steps
    assert reference_pass(sampler, adapters, rollout, [], STEPS) is None
    # each slot holds its own row: compare with a pass over one row alone
    alone = reference_pass(sampler, adapters, rollout, [6], STEPS)
    rows = torch.tensor([6])
    for step_index in range(2):
        torch.testing.assert_close(
            reference.rows(step_index, rows), alone.rows(step_index, rows), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kl_reduction", ["gated", "batch"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_gradient_does_not_depend_on_the_batch_size(
    config, runtime, adapters, make_sampler, rollout, batch_size, kl_reduction
):
    sampler, shaped = make_sampler(2.0), shaped_epoch([1, 2, 6])
    config.algorithm.kl_reduction = kl_reduction
    config.algorithm.kl_coef = 10.0
    reference = reference_pass(sampler, adapters, rollout, shaped.gated_rows, STEPS)
    whole, (metrics, kl) = gradients_of_update(
        config, runtime, adapters, sampler, rollout, shaped, reference, batch_size=4
    )
    cut, (cut_metrics, cut_kl) = gradients_of_update(
        config, runtime, adapters, sampler, rollout, shaped, reference, batch_size=batch_size
    )
    # another batch size rounds matrix products differently: float32 noise in the ratio
    assert_equal_gradients(whole, cut, rtol=1e-3)
    assert cut_kl == pytest.approx(kl, rel=1e-5)
    # the last batch of 3 is padded with two repeated rows that must add nothing
    assert cut_metrics["loss/policy"] == pytest.approx(metrics["loss/policy"], abs=1e-6)


def test_update_is_the_formula(config, runtime, adapters, make_sampler, rollout):
    """The weighted micro-batches add up to mean policy loss + kl_coef * mean KL of the gated."""
    sampler, shaped = make_sampler(2.0), shaped_epoch([1, 2, 6])
    reference = reference_pass(sampler, adapters, rollout, shaped.gated_rows, STEPS)
    config.algorithm.kl_coef = 2.0
    _, (metrics, kl) = gradients_of_update(
        config, runtime, adapters, sampler, rollout, shaped, reference, batch_size=2
    )
    policy, divergence = 0.0, 0.0
    with torch.no_grad():
        for k, step in enumerate(STEPS):
            rows = torch.arange(4)
            x = rollout.latents[step, rows]
            v, v_uncond, _ = sampler.velocity(
                x, rollout.table.timesteps[step].expand(4), rollout.prompts[:4]
            )
            guided = (v_uncond + 2.0 * (v - v_uncond)).double()
            c = rollout.table.coefficients[step]
            squares = (guided - reference.rows(k, rows).double()).square().flatten(1).mean(1)
            kl_rows = float(c.b) ** 2 / (2 * float(c.c) ** 2) * squares
            divergence += float(kl_rows[shaped.gate[:4]].mean()) / len(STEPS)
            policy += float(-shaped.advantage[:4].mean()) / len(STEPS)  # ratio is 1
    assert kl == pytest.approx(divergence, rel=1e-4)
    assert metrics["loss/policy"] == pytest.approx(policy, rel=1e-3)
    assert metrics["loss/total"] == pytest.approx(policy + 2.0 * divergence, rel=1e-3)


def test_without_a_gated_sample_only_the_policy_loss_is_left(
    config, runtime, adapters, make_sampler, rollout
):
    sampler = make_sampler(2.0)
    _, (metrics, kl) = gradients_of_update(
        config, runtime, adapters, sampler, rollout, shaped_epoch([]), None, batch_size=4
    )
    assert kl is None
    assert metrics["kl"] == 0.0
    assert metrics["loss/total"] == metrics["loss/policy"]


def test_one_update_without_gate_leaves_the_other_updates_gate_alone(
    config, runtime, adapters, make_sampler, rollout
):
    shaped = shaped_epoch([6, 7])  # both in the second update
    reference = reference_pass(make_sampler(2.0), adapters, rollout, [6, 7], STEPS)
    results = [
        gradients_of_update(
            config,
            runtime,
            adapters,
            make_sampler(2.0),
            rollout,
            shaped,
            reference,
            i,
            batch_size=4,
        )[1][1]
        for i in (0, 1)
    ]
    assert results[0] is None
    assert results[1] > 0


def test_first_update_is_on_policy_exactly(config, runtime, adapters, make_sampler, rollout):
    _, (metrics, _) = gradients_of_update(
        config, runtime, adapters, make_sampler(2.0), rollout, shaped_epoch([]), None, batch_size=4
    )
    assert metrics["ratio/max_abs_dev"] == 0.0
    assert metrics["clip_fraction"] == 0.0


# --- shaping -------------------------------------------------------------------------------------


def book_of(**scores: list[float]) -> ScoreBook:
    book = ScoreBook()
    values = {name: torch.tensor(v) for name, v in scores.items()}
    half = len(next(iter(values.values()))) // 2
    book.add({n: v[:half] for n, v in values.items()}, None)
    book.add({n: v[half:] for n, v in values.items()}, None)
    return book


def shaper_of(config, **changes) -> Shaper:
    update = {"eval": [], "features": None, "max_missing_share": 0.5}
    rewards = RewardSet(config.rewards.model_copy(update=update), CPU)
    algorithm = copy.deepcopy(config.algorithm)
    algorithm.diversity = False
    for name, value in changes.items():
        setattr(algorithm, name, value)
    return Shaper(algorithm, rewards)


def test_a_hacked_sample_is_gated_and_an_honest_one_is_not(config, runtime):
    plan = plan_epoch(2, 4, 2)
    book = book_of(
        count=[1.0, 0.2, 0.9, 0.3, 0.1, 0.4, 0.5, 0.6],
        # agree with the proxy, but for sample 0 (hacked) and the order of the last two
        shape_fit=[0.0, 0.3, 0.9, 0.4, 0.2, 0.5, 0.7, 0.6],
        clean=[0.1, 0.3, 0.9, 0.4, 0.2, 0.5, 0.7, 0.6],
    )
    # U = 1 for sample 0, 0 for the last, negative for all others: the quantile is 0.9
    shaped = shaper_of(config)(book, plan, runtime)
    assert shaped.gated_rows == (0,)
    assert shaped.gated_per_update == (1, 0)
    # samples alternate between the two prompts: group means are 0.625 and 0.375
    expected = torch.tensor([0.375, -0.175, 0.275, -0.075, -0.525, 0.025, -0.125, 0.225])
    torch.testing.assert_close(shaped.advantage, expected, rtol=0, atol=1e-6)
    assert shaped.metrics["gate/share"] == 1 / 8
    assert shaped.metrics["reward/count/mean"] == pytest.approx(0.5)


def test_no_kl_means_no_gate_but_the_uncertainty_is_still_reported(config, runtime):
    book = book_of(count=[1.0, 0.0] * 4, shape_fit=[0.0, 1.0] * 4, clean=[0.0, 1.0] * 4)
    shaped = shaper_of(config, kl_coef=0.0)(book, plan_epoch(2, 4, 2), runtime)
    assert not shaped.gate.any()
    assert shaped.metrics["uncertainty/mean"] > 0


def test_missing_scores_are_masked_and_counted(config, runtime):
    nan = float("nan")
    book = book_of(
        count=[0.1, 0.2, nan, 0.4, 0.5, 0.6, 0.7, 0.8],
        shape_fit=[0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.6, 0.7],
        clean=[0.5] * 8,
    )
    shaped = shaper_of(config)(book, plan_epoch(2, 4, 2), runtime)
    assert shaped.metrics["reward/count/missing"] == 1 / 8
    assert shaped.advantage[2] == 0
    assert not shaped.gate[2]
    assert shaped.advantage.isfinite().all()
    even = torch.tensor([0.1, 0.5, 0.7])
    assert float(shaped.advantage[0]) == pytest.approx(float(0.1 - even.mean()), abs=1e-6)


def test_the_fraction_adapts_before_the_gate_is_drawn(config, runtime):
    shaper, plan = shaper_of(config), plan_epoch(2, 4, 2)
    reference, names = gk.AdaptiveFraction(0.1), ("count", "shape_fit", "clean")
    for scale in (1.0, 0.5, 2.0):
        generator = torch.Generator().manual_seed(int(scale * 10))
        scores = torch.rand(3, 8, generator=generator) * scale
        shaped = shaper(book_of(**dict(zip(names, scores.tolist(), strict=True))), plan, runtime)
        win = gk.win_rate(scores.double())
        uncertainty = win[0] - win[1:].mean(0)
        fraction = reference.update(float(uncertainty[uncertainty >= 0].mean()))
        assert shaped.metrics["gate/fraction"] == fraction
        threshold = torch.quantile(uncertainty[uncertainty >= 0], 1 - fraction)
        assert torch.equal(shaped.gate, (uncertainty > threshold) & (uncertainty >= 0))
    restored = shaper_of(config)
    restored.load_state_dict(shaper.state_dict())
    assert restored.fraction.fraction == shaper.fraction.fraction


def test_reward_metrics_of_no_score_are_not_numbers():
    metrics = reward_metrics("x", torch.tensor([float("nan")]))
    assert metrics["reward/x/missing"] == 1.0
    assert metrics["reward/x/mean"] != metrics["reward/x/mean"]


# --- which steps are trained ----------------------------------------------------------------------


def test_trained_steps(model):
    table = step_table(model.schedule(10, 24), CPU, kind="flow", noise_level=0.7)
    assert trained_steps(table, 0.89, "first", 0) == list(range(8))  # as the official recipes
    assert trained_steps(table, 1.0, "first", 0) == list(range(9))  # never the last step
    drawn = [tuple(trained_steps(table, 0.4, "random", seed)) for seed in range(30)]
    assert all(len(set(d)) == 4 and list(d) == sorted(d) and max(d) < 9 for d in drawn)
    assert {s for d in drawn for s in d} == set(range(9))
    window = replace(table, stochastic=(3, 4), trainable=(3, 4))
    assert trained_steps(window, 1.0, "random", 0) == [3, 4]
    assert trained_steps(window, 0.1, "random", 0) in ([3], [4])


def test_official_setting_is_reachable():
    config = load_config("tiny", overrides=[("algorithm.compat", "official")])
    assert config.algorithm.kl_reduction == "microbatch"
