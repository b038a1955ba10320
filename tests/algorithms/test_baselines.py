"""Baselines are the same code with parts off; every combination runs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import gardo_kernels as gk
from gardo.algorithms.grpo import GRPO, TrainingData, sampling_noise
from gardo.algorithms.reference import reference_pass
from gardo.algorithms.shaping import Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY
from gardo.rewards.scoring import RewardSet
from gardo.run.folder import RunFolder
from gardo.sampling.plan import plan_epoch
from gardo.sampling.steps import step_table
from gardo.trainer import Trainer
from gardo.types import UserError
from tests.algorithms.test_algorithms import book_of, shaped_epoch
from tests.gardo.test_training import SHORT, rows
from tests.models.test_models import perturb
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")
STEPS = [1, 3]

# the overrides of docs/algorithms.md
STATIC = {"algorithm.reference.kl_threshold": "0", "algorithm.reference.reset_every": "0"}
GRPO_BASELINE = {
    "algorithm.kl_coef": "0",
    "algorithm.diversity": "false",
    "algorithm.advantage_norm": "group_std",
}
METHODS = {
    "grpo": GRPO_BASELINE,
    "grpo-kl": {
        **GRPO_BASELINE,
        "algorithm.kl_coef": "0.1",
        "algorithm.gate.mode": "all",
        **STATIC,
    },
    "gardo": {},
    "gardo-kl-on-all": {"algorithm.gate.mode": "all"},
    "gardo-static-reference": STATIC,
    "gardo-no-diversity": {"algorithm.diversity": "false"},
    "gardo-with-std": {"algorithm.advantage_norm": "group_std"},
    "multi-reward": {**GRPO_BASELINE, "rewards.proxy": "{count: 1.0, clean: 0.5, shape_fit: 0.5}"}
    | {"rewards.aux": "[]"},
    "grpo-guard": {**GRPO_BASELINE, "algorithm.ratio_norm": "guard"},
    "grpo-fast": {**GRPO_BASELINE, "sampling.sde_window": "2", "train.timestep_fraction": "1.0"},
}


def one_epoch(folder, **changes):
    smallest = {"epochs": "1", "prompts.per_epoch": "2", "evaluation.every": "0"}
    smallest |= {"evaluation.max_prompts": "1", "evaluation.grid_images": "0"}
    settings = {**SHORT, "output_dir": str(folder), **smallest, **changes}
    run = load_config("tiny", overrides=list(settings.items()))
    Trainer(run, Runtime("cpu", threads=1)).train(RunFolder.create(run))
    (row,) = rows(folder / "metrics.jsonl")
    return row


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
@pytest.mark.parametrize("name", METHODS)
def test_methods(tmp_path, name, algorithm):
    changes = METHODS[name]
    if algorithm == "nft":
        changes = {**changes, "algorithm.name": "nft", "sampling.same_latent": "false"}
        if name == "grpo-guard":
            pytest.skip("DiffusionNFT has no ratio to normalise; the configuration refuses it")
    row = one_epoch(tmp_path / "run", **changes)
    assert row["grad_norm"] > 0
    gated = {"0": 0.0, "0.1": 1.0}.get(changes.get("algorithm.kl_coef"))
    if name == "gardo-kl-on-all":
        gated = 1.0
    if gated is not None:
        assert row["gate/share"] == gated
    assert row["forwards/reference"] == round(row["gate/share"] * 8) * 2
    if algorithm == "grpo":
        assert row["ratio/max_abs_dev"] == 0.0


@pytest.mark.parametrize(
    ("gate", "static", "diversity", "norm", "ratio_norm"),
    [
        c
        for n, c in enumerate(
            product(
                ("paper", "official", "all", "off"),
                (False, True),
                (False, True),
                ("none", "group_std", "global_std"),
                ("none", "guard"),
            )
        )
        if n % 13 == 0  # of 96: every value of every part
    ],
)
def test_combinations(tmp_path, gate, static, diversity, norm, ratio_norm):
    changes = {
        "algorithm.gate.mode": gate,
        "algorithm.diversity": str(diversity).lower(),
        "algorithm.advantage_norm": norm,
        "algorithm.ratio_norm": ratio_norm,
        **(STATIC if static else {"algorithm.reference.reset_every": "1"}),
    }
    row = one_epoch(tmp_path / "run", **changes)
    assert row["grad_norm"] > 0
    assert row["reference/reset"] == int(not static)


# --- a weighted proxy -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("count", {"count": 1.0}),
        ("{count: 2, clean: -0.5}", {"count": 2.0, "clean": -0.5}),
        ("[count, clean]", {"count": 1.0, "clean": 1.0}),
        ("count,clean", {"count": 1.0, "clean": 1.0}),
    ],
)
def test_proxy_is_a_name_or_weights(text, weights):
    overrides = [("rewards.proxy", text), ("rewards.aux", "shape_fit")]
    rewards = load_config("tiny", overrides=overrides).rewards
    assert rewards.proxy_weights == weights
    assert rewards.proxy_name == ("count" if text == "count" else "proxy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{count: 0}", "weight other than 0"),
        ("{count: much}", "weight other than 0"),
        ("[count, count]", "different reward names"),
        ("{}", "expected a reward's name"),
        ("{count: 1, clean: 1}", "'clean' is the proxy"),
    ],
)
def test_wrong_proxies_are_named(text, message):
    with pytest.raises(UserError, match=message):
        load_config("tiny", overrides=[("rewards.proxy", text)])


def test_weighted_sum_is_what_is_trained_on(config):
    config.rewards.proxy = {"count": 2.0, "artifact": 0.5}  # of artifacts, less is better
    config.rewards.aux = ["clean"]
    config.algorithm.diversity = False
    settings = {"features": None, "max_missing_share": 0.2}
    rewards = RewardSet(config.rewards.model_copy(update={**settings, "eval": []}), CPU)
    nan = float("nan")
    shaped = Shaper(config.algorithm, rewards)(
        book_of(
            count=[1.0, 0.0, 0.5, 0.2, 0.3, 0.1, 0.4, 0.6],
            artifact=[0.2, 0.4, 0.0, nan, 0.6, 0.8, 1.0, 0.2],
            clean=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        ),
        plan_epoch(2, 4, 2),
        Runtime("cpu"),
    )
    # samples alternate between the two prompts; the fourth is missing a reward
    total = torch.tensor([1.9, -0.2, 1.0, nan, 0.3, -0.2, 0.3, 1.1])
    even, odd = total[::2].mean(), total[1::2].nanmean()
    expected = torch.stack([total[::2] - even, total[1::2] - odd], 1).flatten().nan_to_num(0.0)
    torch.testing.assert_close(shaped.advantage, expected, rtol=0, atol=1e-6)
    assert shaped.metrics["reward/proxy/mean"] == pytest.approx(float(total.nanmean()), abs=1e-6)
    assert shaped.metrics["reward/proxy/missing"] == 1 / 8
    assert shaped.metrics["reward/artifact/mean"] == pytest.approx(3.2 / 7)


# --- GRPO-Guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "cps", "dance"])
def test_normalised_ratio_is_the_published_expression(kind):
    """exp((log-prob difference + squared shift of the mean / (2 c^2)) * c), in float64."""
    source = torch.Generator().manual_seed(0)
    x, v, v_old, z = (torch.randn(3, 4, 5, generator=source) for _ in range(4))
    v = v_old + 0.1 * (v - v_old)
    coef = gk.sde_coefficients(torch.tensor(0.8), torch.tensor(0.7), 0.7, kind, sigma_max=0.9)
    mean, old_mean = coef.a * x + coef.b * v, coef.a * x + coef.b * v_old
    prev = old_mean + coef.c * z
    c = float(coef.c)

    def log_prob(m):  # without the constant
        return -(prev - m).double().square().flatten(1).mean(1) / (2 * c**2)

    shift = (mean - old_mean).double().square().flatten(1).mean(1) / (2 * c**2)
    expected = torch.exp((log_prob(mean) - log_prob(old_mean) + shift) * c)
    assert (expected - 1).abs().max() > 1e-3
    out = gk.grpo_loss(v, x, prev, torch.zeros(3), torch.ones(3), coef, noise=z)
    torch.testing.assert_close(out.ratio.double(), expected, rtol=0, atol=2e-6)


def test_normalised_loss_by_hand():
    """log ratio = mean(z * (m - m_old)) with m = 2 x + v and c = 1."""
    one = torch.tensor(1.0)
    coef = gk.SDECoefficients(
        a=2 * one, b=one, c=one, scale=one / 2, offset=0 * one, kl=one / 2, std=one, kind="flow"
    )
    ratio = torch.tensor([1.3, 1.3, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x, z = torch.full((4, 2), 0.25), torch.tensor([[1.0, -1.0]]).expand(4, 2)
    v = z * ratio.log()[:, None]
    prev = 2 * x + z  # of a velocity of 0
    arguments = v, x, prev, torch.zeros(4), advantage, coef, (0.2, 0.1)
    out = gk.grpo_loss(*arguments, noise=z, reduction="sum")
    torch.testing.assert_close(out.ratio, ratio)
    # max(-A r, -A clip): -1.1, 1.3, -0.5, 0.8
    assert float(out.policy_loss) == pytest.approx(0.5)


@pytest.fixture
def rollout(model, adapters, make_sampler):
    perturb(adapters.parameters(POLICY))
    table = step_table(model.schedule(5, 24), CPU, kind="flow", noise_level=0.7)
    drawn, fill = make_sampler(2.0).rollout(plan_epoch(2, 4, 2), PROMPTS, table, 3, 1, False)
    list(fill)
    return drawn


def test_noise_of_the_rollout_is_drawn_again(rollout, make_sampler):
    sampler = make_sampler(2.0)
    noise = sampling_noise(rollout, STEPS, sampler.latent_shape, seed=3, epoch=1)
    for k, step in enumerate(STEPS):
        with torch.no_grad():
            v = sampler.velocity(
                rollout.latents[step], rollout.table.timesteps[step].expand(8), rollout.prompts
            ).guided
        c = rollout.table.coefficients[step]
        prev = c.a * rollout.latents[step] + c.b * v + c.c * noise[k]
        torch.testing.assert_close(rollout.latents[step + 1], prev, rtol=0, atol=1e-4)


def test_gradient_of_the_normalised_ratio_is_that_of_the_reweighted_policy_gradient(
    config, adapters, make_sampler, rollout, model
):
    """On policy: grad of mean(-A * z . mean) / -dt, plus the KL's, which is not reweighted."""
    sampler, runtime = make_sampler(2.0), Runtime("cpu")
    config.algorithm.ratio_norm = "guard"
    config.algorithm.kl_coef = 0.5
    train = config.train.model_copy(update={"batch_size": 3, "max_grad_norm": 1e9})
    optimizer = torch.optim.SGD(adapters.parameters().values(), lr=0.0)
    grpo = GRPO(config.algorithm, train, sampler, adapters, optimizer, runtime)
    shaped = shaped_epoch([1, 2])
    sizes = (-model.schedule(5, 24).sigmas.diff())[STEPS].tolist()
    noise = sampling_noise(rollout, STEPS, sampler.latent_shape, 3, 1)
    reference = reference_pass(sampler, adapters, rollout, [1, 2], STEPS)
    data = TrainingData(rollout, shaped, reference, STEPS, noise=noise, step_sizes=sizes)
    stats = UpdateStats()
    grpo.accumulate_gradients(data, 0, stats)
    found = {n: p.grad.clone() for n, p in adapters.parameters().items()}
    optimizer.zero_grad()
    stats.finish_update(torch.tensor(0.0))
    metrics, _ = stats.metrics(runtime)
    # other batch sizes than in the rollout round differently
    assert metrics["ratio/max_abs_dev"] < 1e-5

    loss = torch.zeros(())
    for k, step in enumerate(STEPS):
        v = sampler.velocity(
            rollout.latents[step, :4], rollout.table.timesteps[step].expand(4), rollout.prompts[:4]
        ).guided
        c = rollout.table.coefficients[step]
        shift = (noise[k, :4] * c.b * v).flatten(1).mean(1)
        loss = loss - (shaped.advantage[:4] * shift).mean() / sizes[k] / 2
        squares = (v - reference.rows(k, torch.arange(4))).square().flatten(1).mean(1)
        loss = loss + 0.5 * (c.b**2 / (2 * c.c**2)) * squares[1:3].mean() / 2
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in adapters.parameters().values())
    for name, parameter in adapters.parameters().items():
        assert (parameter.grad - found[name]).abs().max() <= 1e-3 * largest, name
