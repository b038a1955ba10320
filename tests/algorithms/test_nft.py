"""DiffusionNFT: noised samples, behaviour policy, weighted loss, and the solvers it draws with."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from gardo.algorithms.batches import MicroBatch
from gardo.algorithms.nft import (
    NFT,
    NFTData,
    add_noise,
    behaviour_decay,
    drawn_steps,
    refuse_guidance,
)
from gardo.algorithms.reference import RowVelocities
from gardo.algorithms.stats import UpdateStats
from gardo.config import NFTConfig, load_config
from gardo.distributed.process import Runtime
from gardo.families import FAMILIES
from gardo.models.adapters import BEHAVIOUR, POLICY, REFERENCE, build_adapters
from gardo.models.base import Schedule, Velocity
from gardo.planning.counts import count_epoch
from gardo.rng import generator
from gardo.sampling.plan import plan_epoch
from gardo.sampling.rollout import Rollout
from gardo.sampling.solvers import dpm2_table
from gardo.sampling.steps import step_table
from gardo.sampling.trajectory import Trajectory, inputs, like
from gardo.types import UserError
from tests.algorithms.test_algorithms import assert_equal_gradients, shaped_epoch
from tests.distributed.test_distributed import train as train_in_processes
from tests.gardo.test_training import rows, train_here
from tests.models.test_models import perturb
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "official_parity.npz"
NFT_RUN = {"algorithm.name": "nft", "sampling.same_latent": "false", "sampling.sde_window": "0"}


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


@pytest.fixture
def adapters(model, config):
    """A policy, a reference and a behaviour policy that all differ."""
    three = build_adapters(model, config.model, 0, (POLICY, REFERENCE, BEHAVIOUR))
    perturb(three.parameters(POLICY), seed=1)
    perturb(three.parameters(BEHAVIOUR), seed=2)
    return three


@pytest.fixture
def rollout(model, adapters, make_sampler):
    table = step_table(model.schedule(5, 24), CPU, kind="ode", noise_level=0.0)
    sampler = make_sampler(1.0)
    with adapters.use(BEHAVIOUR):
        drawn, fill = sampler.rollout(plan_epoch(2, 4, 2), PROMPTS, table, 0, 0, False)
        list(fill)
    return drawn


def nft_of(config, adapters, sampler, runtime, fraction=1.0, **algorithm) -> NFT:
    optimizer = torch.optim.SGD(adapters.parameters().values(), lr=0.0)
    train = config.train.model_copy(
        update={"max_grad_norm": 1e9, "timestep_fraction": fraction, "batch_size": 4}
    )
    settings = config.algorithm.model_copy(update={"name": "nft", **algorithm})
    return NFT(settings, train, sampler, adapters, optimizer, runtime)


def gradients(nft, data, index, batch_size):
    nft.train = nft.train.model_copy(update={"batch_size": batch_size})
    stats = UpdateStats(nft.algorithm.reset_judged_by)
    nft.accumulate_gradients(data, index, stats)
    found = {n: p.grad.clone() for n, p in nft.adapters.parameters().items() if p.grad is not None}
    nft.optimizer.zero_grad()
    stats.finish_update(torch.tensor(0.0))
    return found, stats.metrics(nft.runtime)


def multistep_scheduler():
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
    )


# --- the forward process --------------------------------------------------------------------------


def test_steps_are_orders_of_their_own_and_of_the_id_alone():
    whole = drawn_steps(range(6), 5, 1.0, "random", 7, 3)
    assert whole.shape == (5, 6)
    assert torch.equal(whole.sort(0).values, torch.arange(5)[:, None].expand(5, 6))
    assert len({tuple(column.tolist()) for column in whole.T}) > 1
    part = drawn_steps([4, 1], 5, 0.4, "random", 7, 3)
    assert torch.equal(part, whole[:2, [4, 1]])
    assert not torch.equal(drawn_steps(range(6), 5, 1.0, "random", 7, 4), whole)
    assert torch.equal(drawn_steps([0, 9], 5, 0.4, "first", 7, 3), torch.tensor([[0, 0], [1, 1]]))
    assert len(drawn_steps([0], 5, 0.01, "random", 0, 0)) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_noised_samples_follow_the_forward_process(rollout, batch_size):
    clean = rollout.latents[-1].clone()
    t = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    add_noise(rollout, t, batch_size, seed=5, epoch=2)
    assert torch.equal(rollout.latents[-1], clean)
    ids = rollout.plan.sample_ids.tolist()
    for row, sample in enumerate(ids):
        source = generator(5, "forward noise", 2, sample)
        noise = torch.empty(2, *clean.shape[1:]).normal_(generator=source)
        for k in range(2):
            expected = (1 - t[k, row]) * clean[row] + t[k, row] * noise[k]
            torch.testing.assert_close(rollout.latents[k, row], expected, rtol=0, atol=1e-6)


def test_noise_does_not_depend_on_the_number_of_processes(model, adapters, make_sampler):
    table = step_table(model.schedule(5, 24), CPU, kind="ode", noise_level=0.0)
    noised = {}
    for world_size in (1, 2):
        for rank in range(world_size):
            plan = plan_epoch(2, 4, 2, rank, world_size)
            sampler = make_sampler(1.0)
            drawn, fill = sampler.rollout(plan, PROMPTS, table, 0, 0, False)
            list(fill)
            ids = plan.sample_ids.tolist()
            chosen = drawn_steps(ids, 5, 0.4, "random", 0, 0)
            drawn.latents[-1] = 0.0  # other batches round other latents; here is the noise alone
            add_noise(drawn, model.schedule(5, 24).sigmas[chosen], 4, 0, 0)
            for row, sample in enumerate(ids):
                noised.setdefault(sample, []).append(drawn.latents[:2, row].clone())
    assert sorted(noised) == list(range(8))
    assert all(torch.equal(one, two) for one, two in noised.values())


# --- the update -----------------------------------------------------------------------------------


class OneVelocity:
    """A sampler whose model answers with a recorded tensor."""

    guided = False

    def __init__(self, velocity):
        self.answer = velocity

    def condition(self, prompts):
        return prompts

    def velocity(self, latents, timesteps, prompts):
        return Velocity(self.answer)


def test_recorded_loss_and_gradient(config, adapters, make_sampler, runtime):
    """Tolerances as in tests/kernels: the recording is float32."""
    with np.load(GOLDEN) as file:
        golden = {n.split("/")[1]: torch.from_numpy(file[n]) for n in file if n[:4] == "nft/"}
    n = len(golden["x0"])
    nft = nft_of(
        config,
        adapters,
        make_sampler(1.0),
        runtime,
        kl_coef=float(golden["kl_coef"]),
        nft=NFTConfig(beta=float(golden["beta"])),
    )
    velocity = golden["velocity"].clone().requires_grad_()
    nft.sampler = OneVelocity(velocity)
    drawn = Rollout(
        plan=plan_epoch(1, n, 1),
        prompts=["a"] * n,
        latents=torch.stack([golden["xt"], golden["x0"]]),
        log_prob=torch.zeros(1, n),
        table=step_table(
            Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1000.0])),
            CPU,
            kind="ode",
            noise_level=0.0,
        ),
    )
    gate = golden["gate"]
    gated = tuple(gate.nonzero().flatten().tolist())
    shaped = shaped_epoch([])
    shaped = type(shaped)(golden["advantage"], gate, gated, (len(gated),), {})
    slot = torch.arange(n)
    data = NFTData(
        drawn,
        shaped,
        RowVelocities(golden["ref_velocity"][None], slot),
        [0],
        RowVelocities(golden["old_velocity"][None], slot),
        golden["t"][None],
        golden["t"][None] * 1000,
    )
    stats = UpdateStats()
    nft.train = nft.train.model_copy(update={"batch_size": n})
    nft.accumulate_gradients(data, 0, stats)
    stats.finish_update(torch.tensor(0.0))
    metrics, kl = stats.metrics(runtime)
    assert metrics["loss/total"] == pytest.approx(float(golden["loss"]), rel=2e-5)
    assert metrics["loss/policy"] == pytest.approx(float(golden["policy_loss"]), rel=2e-5)
    assert kl == pytest.approx(float(golden["kl"]), rel=2e-5)
    worst = (velocity.grad - golden["grad"]).abs().max() / golden["grad"].abs().max()
    assert worst < 1e-5


@pytest.mark.parametrize("kl_reduction", ["gated", "batch"])
def test_gradient_does_not_depend_on_the_batch_size(
    config, runtime, adapters, make_sampler, rollout, model, kl_reduction
):
    nft = nft_of(
        config, adapters, make_sampler(1.0), runtime, 0.4, kl_coef=3.0, kl_reduction=kl_reduction
    )
    data = nft.prepare(rollout, shaped_epoch([1, 2, 6]), model.schedule(5, 24), 0, 0)
    for index in (0, 1):
        whole, (metrics, kl) = gradients(nft, data, index, 4)
        for batch_size in (1, 3):  # 3: the last batch is padded, which must add nothing
            cut, (cut_metrics, cut_kl) = gradients(nft, data, index, batch_size)
            assert_equal_gradients(whole, cut, rtol=1e-3)  # other batches round differently
            assert cut_kl == pytest.approx(kl, rel=1e-4)
            assert cut_metrics["loss/total"] == pytest.approx(metrics["loss/total"], rel=1e-5)


def test_loss_is_the_formula(config, runtime, adapters, make_sampler, rollout, model):
    sampler, schedule = make_sampler(1.0), model.schedule(5, 24)
    nft = nft_of(config, adapters, sampler, runtime, 0.4, kl_coef=2.0, nft=NFTConfig(beta=0.5))
    shaped = shaped_epoch([1, 2, 6])
    clean = rollout.latents[-1].double().clone()
    before = model.rows
    data = nft.prepare(rollout, shaped, schedule, 0, 0)
    # the behaviour policy on all samples, the reference on the gated ones, each once
    assert model.rows - before == 2 * (8 + 3)
    assert data.reference_rows == 2 * 3
    _, (metrics, kl) = gradients(nft, data, 0, 4)

    policy, divergence = 0.0, 0.0
    with torch.no_grad():
        for k in range(2):
            x, t = rollout.latents[k, :4], data.t[k, :4]
            assert torch.equal(data.timesteps[k, :4], t * 1000)
            v = {}
            for name in (POLICY, REFERENCE, BEHAVIOUR):
                with adapters.use(name):
                    out = sampler.velocity(x, data.timesteps[k, :4], rollout.prompts[:4]).cond
                    v[name] = out.double()
            for i in range(4):
                positive = 0.5 * v[POLICY][i] + 0.5 * v[BEHAVIOUR][i]
                negative = 1.5 * v[BEHAVIOUR][i] - 0.5 * v[POLICY][i]
                r = float(shaped.advantage[i]) / 10 + 0.5
                for share, velocity in ((r, positive), (1 - r, negative)):
                    error = x[i].double() - t[i].double() * velocity - clean[i]
                    policy += 5 * share * float((error**2).mean() / error.abs().mean()) / 0.5 / 8
                if i in (1, 2):
                    divergence += float((v[POLICY][i] - v[REFERENCE][i]).square().mean()) / 4
    assert metrics["loss/policy"] == pytest.approx(policy, rel=1e-4)
    assert kl == pytest.approx(divergence, rel=1e-4)
    assert metrics["loss/total"] == pytest.approx(policy + 2 * divergence, rel=1e-4)
    assert "ratio/max_abs_dev" not in metrics
    assert "clip_fraction" not in metrics


def test_padding_has_no_part(config, runtime, adapters, make_sampler, rollout, model):
    nft = nft_of(config, adapters, make_sampler(1.0), runtime, 0.2)
    data = nft.prepare(rollout, shaped_epoch([]), model.schedule(5, 24), 0, 0)
    batch = MicroBatch.take(data, nft.sampler, slice(3, 4), 4, 0.0)
    assert (batch.size, len(batch.rows)) == (1, 4)
    alone = MicroBatch.take(data, nft.sampler, slice(3, 4), 1, 0.0)
    padded, single = (float(nft.loss(data, b, 0).loss.detach()) for b in (batch, alone))
    assert padded == pytest.approx(single, rel=1e-5)


# --- the behaviour policy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "start", "most", "expected"),
    [
        (0.0, 0, 0.0, [0, 0, 0, 0]),
        (0.001, 0, 0.5, [0, 0.05, 0.1, 0.5]),
        (0.0075, 75, 0.999, [0, 0, 0.1875, 0.999]),
    ],
    ids=["type0", "type1", "type2"],
)
def test_published_decay_schedules(rate, start, most, expected):
    config = NFTConfig(decay_rate=rate, decay_start=start, decay_max=most)
    found = [behaviour_decay(config, step) for step in (0, 50, 100, 600)]
    assert found == pytest.approx(expected)


def test_behaviour_keeps_a_share_of_itself(config, runtime, adapters, make_sampler):
    nft = nft_of(config, adapters, make_sampler(1.0), runtime, nft=NFTConfig())
    old = copy.deepcopy(adapters.state_dict(BEHAVIOUR))
    policy = adapters.state_dict(POLICY)
    assert nft.finish_epoch(200) == {"behaviour/decay": 0.2}
    for name, value in adapters.state_dict(BEHAVIOUR).items():
        torch.testing.assert_close(value, 0.2 * old[name] + 0.8 * policy[name], rtol=0, atol=1e-6)
    nft.finish_epoch(0)
    assert all(torch.equal(v, policy[n]) for n, v in adapters.state_dict(BEHAVIOUR).items())


def test_rollouts_are_drawn_by_the_behaviour_policy(config, runtime, adapters, make_sampler):
    nft = nft_of(config, adapters, make_sampler(1.0), runtime)
    x, t = torch.randn(1, *nft.sampler.latent_shape), torch.tensor([500.0])
    seen = []
    with torch.no_grad(), adapters.use(nft.sampled_by):
        seen.append(nft.sampler.velocity(x, t, PROMPTS[:1]).cond)
        assert adapters.active == BEHAVIOUR
    with torch.no_grad():
        with adapters.use(BEHAVIOUR):
            seen.append(nft.sampler.velocity(x, t, PROMPTS[:1]).cond)
        seen.append(nft.sampler.velocity(x, t, PROMPTS[:1]).cond)
    assert adapters.active == POLICY
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


# --- recipes --------------------------------------------------------------------------------------


def test_published_recipe():
    config = load_config("sd35-medium-geneval-nft")
    algorithm, sampling, train = config.algorithm, config.sampling, config.train
    assert (algorithm.name, algorithm.kl_coef, algorithm.nft.beta) == ("nft", 0.04, 1.0)
    decays = [behaviour_decay(algorithm.nft, step) for step in (100, 1000)]
    assert decays == pytest.approx([0.1, 0.5])
    assert (algorithm.adv_clip, algorithm.advantage_norm, algorithm.diversity) == (
        5.0,
        "none",
        True,
    )
    assert (algorithm.gate.mode, algorithm.gate.adaptive) == ("paper", True)
    assert (algorithm.reference.kl_threshold, algorithm.reference.reset_every) == (0.15, 16)
    assert (sampling.solver, sampling.num_steps, sampling.guidance_scale) == ("dpm2", 10, 1.0)
    assert (train.timestep_fraction, train.updates_per_epoch) == (1.0, 2)
    counts = count_epoch(config, 8, FAMILIES["sd3"])
    assert counts.rows_per_sample == 1
    assert counts.rollout_rows == counts.behaviour_rows == counts.train_rows == 1152 * 10


# --- whole runs -----------------------------------------------------------------------------------


def test_run(tmp_path):
    train_here(tmp_path / "run", **NFT_RUN, **{"algorithm.reference.kl_threshold": "0.15"})
    first, second = rows(tmp_path / "run" / "metrics.jsonl")
    for row in (first, second):
        gated = round(row["gate/share"] * 16)
        # 2 of 5 steps; the behaviour policy draws and is run once more at the trained steps
        assert row["forwards/policy"] == 16 * 5 + 16 * 2 + 16 * 2
        assert row["forwards/reference"] == gated * 2
        assert "ratio/max_abs_dev" not in row
        assert row["diversity/nn_distance"] > 0
    assert first["behaviour/decay"] == pytest.approx(0.002)
    assert second["behaviour/decay"] == pytest.approx(0.004)
    assert second["grad_norm"] > 0


def test_two_processes_make_the_update_of_one(tmp_path):
    """18 samples in two updates of nine: unequal shares, and an empty batch."""
    runs = []
    for processes in (1, 2):
        # one epoch: later ones start from other roundings
        changes = {**NFT_RUN, "epochs": "1", "algorithm.nft.decay_rate": "0.1"}
        runs.append(train_in_processes(tmp_path / str(processes), processes, **changes))
    (one, weights), (two, other_weights) = runs
    for name in ("loss/policy", "loss/total", "kl", "grad_norm", "reward/count/mean"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-5), name
    assert one[0]["kl"] > 0
    moved = max(float(value.abs().max()) for value in weights.values())
    assert moved > 1e-3
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-5)


def test_second_order_rollouts_are_those_of_diffusers_solver(model, make_sampler):
    schedule, sampler = model.schedule(6, 24), make_sampler(1.0)
    table = step_table(schedule, CPU, kind="ode", noise_level=0.0, solver="dpm2")
    latents = torch.empty(7, 2, *sampler.latent_shape)
    latents[0] = sampler.initial_latents([("x", 0), ("x", 1)], seed=0)
    sampler.run(table, PROMPTS, latents)

    scheduler = multistep_scheduler()
    scheduler.set_timesteps(6)
    scheduler.sigmas, scheduler.timesteps = schedule.sigmas, schedule.timesteps
    x = latents[0]
    for i, timestep in enumerate(schedule.timesteps):
        with torch.no_grad():
            v = sampler.velocity(x, timestep.expand(2), PROMPTS).cond
        x = scheduler.step(v, timestep, x).prev_sample
        torch.testing.assert_close(latents[i + 1], x, rtol=0, atol=1e-4)
    euler = step_table(schedule, CPU, kind="ode", noise_level=0.0)
    first_order = latents.clone()
    sampler.run(euler, PROMPTS, first_order)
    assert (first_order[-1] - latents[-1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.same_latent": "true"}, "same_latent"),
        ({"algorithm.ratio_norm": "guard"}, "nft has no ratio"),
        ({"algorithm.name": "grpo", "sampling.solver": "dpm2"}, "sampling.solver"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_config("tiny", overrides=list({**NFT_RUN, **changes}.items()))


def test_guidance_is_refused(make_sampler):
    refuse_guidance(make_sampler(1.0))
    with pytest.raises(UserError, match=r"guidance_scale 1, got 3"):
        refuse_guidance(make_sampler(3.0))


# --- the solver -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 5, 10])
def test_dpm2_is_diffusers_multistep_solver(num_steps):
    """On the solver's own schedule; it computes in float32 from float32 logarithms."""
    scheduler = multistep_scheduler()
    scheduler.set_timesteps(num_steps)
    source = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 3, 3, generator=source, dtype=torch.float64).float()
    mixing = torch.randn(4, 4, generator=source)

    def velocity(x, sigma):
        return torch.einsum("ij,bjhw->bihw", mixing, x).tanh() * (1 + sigma)

    table, ours, before = dpm2_table(scheduler.sigmas, CPU), start, None
    theirs = start
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        ours, before = table.step(i, ours, velocity(ours, sigma), before)
        theirs = scheduler.step(velocity(theirs, sigma), timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_dpm2_is_exact_for_a_velocity_that_points_at_the_data():
    """A constant clean sample: every step is on the straight line to it."""
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])
    table, data = dpm2_table(sigmas, CPU), torch.full((1, 3), 2.0)
    noise = torch.tensor([[0.5, -1.0, 3.0]])
    x, before = noise, None
    for i in range(4):
        x, before = table.step(i, x, noise - data, before)
        expected = (1 - sigmas[i + 1]) * data + sigmas[i + 1] * noise
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)


def test_graph_buffers_hold_the_solvers_coefficients(model, make_sampler):
    """What a CUDA graph reads must be copied into memory of its own."""
    sampler, schedule = make_sampler(1.0), model.schedule(4, 24)
    table = step_table(schedule, CPU, kind="ode", noise_level=0.0, solver="dpm2")
    latents = torch.zeros(5, 2, *sampler.latent_shape)
    first = Trajectory(latents, torch.zeros(4, 2), None, sampler.condition(PROMPTS), table)
    buffers = like(first)
    mine, theirs = inputs(first), inputs(buffers)
    names = {f"multistep.{name}" for name in ("sigma", "carry", "new", "old")}
    assert names <= mine.keys() == theirs.keys()
    for name in names:
        assert torch.equal(mine[name], theirs[name])
        assert mine[name].data_ptr() != theirs[name].data_ptr()
