"""``algorithm.compat: official``: what the published code does differently, together and alone.

``tests/golden`` holds 40 epochs of rewards with what the published gate made of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gardo_kernels as gk
from gardo.algorithms.adaptive_reference import AdaptiveReference
from gardo.algorithms.grpo import GRPO, TrainingData
from gardo.algorithms.penalty import penalised
from gardo.algorithms.reference import reference_pass
from gardo.algorithms.shaping import ShapedEpoch, Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.config import AlgorithmConfig, load_config
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY
from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.sampling.plan import plan_epoch
from gardo.sampling.steps import step_table
from gardo.types import UserError
from tests.models.test_models import perturb
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "official_parity.npz"
NAMES = ("count", "shape_fit", "clean")


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN) as file:
        return {n.split("/")[1]: torch.from_numpy(file[n]) for n in file if n.startswith("gate/")}


def settings(*overrides: tuple[str, str]):
    return load_config("tiny", overrides=[("algorithm.diversity", "false"), *overrides])


def shaper_of(config) -> Shaper:
    rewards = RewardSet(config.rewards.model_copy(update={"eval": [], "features": None}), CPU)
    return Shaper(config.algorithm, rewards)


def book_of(proxy, aux) -> ScoreBook:
    book = ScoreBook()
    book.add(dict(zip(NAMES, (proxy, *aux), strict=True)), None)
    return book


# --- the gate -------------------------------------------------------------------------------------


def test_40_recorded_epochs(recorded, runtime):
    shaper, plan = shaper_of(settings(("algorithm.compat", "official"))), plan_epoch(4, 12, 2)
    for epoch in range(40):
        shaped = shaper(book_of(recorded["proxy"][epoch], recorded["aux"][epoch]), plan, runtime)
        mask = recorded["mask"][epoch]
        assert torch.equal(shaped.gate, mask[plan.sample_ids])
        assert shaped.metrics["gate/fraction"] == float(recorded["fraction"][epoch])
        assert shaped.metrics["gate/threshold"] == pytest.approx(
            float(recorded["threshold"][epoch]), rel=1e-12
        )
        gap = recorded["rank_gap"][epoch].double()
        assert shaped.metrics["uncertainty/mean"] == pytest.approx(float(gap[gap >= 0].mean()))
        assert shaped.gated_per_update == (int(mask[:24].sum()), int(mask[24:].sum()))


def test_the_paper_gates_other_samples(recorded, runtime):
    shaper, plan = shaper_of(settings()), plan_epoch(4, 12, 2)
    both = total = 0
    for epoch in range(40):
        shaped = shaper(book_of(recorded["proxy"][epoch], recorded["aux"][epoch]), plan, runtime)
        both += int((shaped.gate & recorded["mask"][epoch]).sum())
        total += len(shaped.gated_rows)
    assert total > 40
    assert both == 0  # over-rated is never under-rated


TIED = {"proxy": [1.0, 1.0, 0.0, 0.0], "aux": [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]}


@pytest.mark.parametrize(
    ("mode", "ties", "uncertainty"),
    [
        # by hand, without the division by the number of others for ordinal ties. Win rates with
        # ties halved: proxy 5/6 5/6 1/6 1/6; aux 1/6 5/6 5/6 1/6 and 1/6 5/6 1/6 5/6
        ("paper", "half", [4 / 6, 0, -2 / 6, -2 / 6]),
        ("official", "half", [-4 / 6, 0, 2 / 6, 2 / 6]),
        # descending ranks in sample order: proxy 1 2 3 4; aux 3 1 2 4 and 3 1 4 2
        ("official", "ordinal", [-2, 1, 0, 1]),
        # ascending: proxy 3 4 1 2; aux 1 3 4 2 and 1 3 2 4
        ("paper", "ordinal", [2, 1, -2, -1]),
        ("paper", "auto", [4 / 6, 0, -2 / 6, -2 / 6]),
        ("official", "auto", [-2, 1, 0, 1]),
    ],
)
def test_sign_and_ties_switch_apart(runtime, monkeypatch, mode, ties, uncertainty):
    if ties != "auto":
        monkeypatch.setattr(AlgorithmConfig, "gate_ties", ties)
    config = settings(
        ("algorithm.gate.mode", mode),
        ("algorithm.gate.adaptive", "false"),
        ("algorithm.gate.fraction", "0.5"),
    )
    proxy, aux = torch.tensor(TIED["proxy"]), torch.tensor(TIED["aux"])
    shaped = shaper_of(config)(book_of(proxy, aux), plan_epoch(2, 2, 1), runtime)
    expected = torch.tensor(uncertainty, dtype=torch.float64)
    eligible = expected[expected >= 0]
    threshold = float(eligible.quantile(0.5))
    assert shaped.metrics["uncertainty/mean"] == pytest.approx(float(eligible.mean()))
    assert shaped.metrics["gate/threshold"] == pytest.approx(threshold)
    assert torch.equal(shaped.gate, expected > threshold + 1e-12)
    # whatever the gate looks at, the advantage is of the rewards as they are
    torch.testing.assert_close(shaped.advantage, torch.tensor([0.5, 0.5, -0.5, -0.5]))


@pytest.mark.parametrize(("share_of", "gated"), [("nonnegative", 1), ("all", 2)])
def test_what_the_fraction_is_a_share_of(runtime, share_of, gated):
    config = settings(
        ("algorithm.gate.share_of", share_of),
        ("algorithm.gate.adaptive", "false"),
        ("algorithm.gate.fraction", "0.2"),
    )
    # U from high to low, half of it negative: a fifth of ten samples is two, of five one
    proxy = torch.arange(10.0)
    shaped = shaper_of(config)(
        book_of(proxy, torch.stack([-proxy, -proxy])), plan_epoch(5, 2, 1), runtime
    )
    assert shaped.gated_rows == tuple(range(10 - gated, 10))


# --- the KL ---------------------------------------------------------------------------------------


@pytest.fixture
def rollout(model, adapters, make_sampler):
    perturb(adapters.parameters(POLICY))
    table = step_table(
        model.schedule(5, 24), CPU, kind="flow", noise_level=0.7, kl_scale="official"
    )
    drawn, fill = make_sampler(1.0).rollout(plan_epoch(2, 4, 2), PROMPTS, table, 0, 0, False)
    list(fill)
    return drawn


def shaped_with(*gated: int) -> ShapedEpoch:
    gate = torch.zeros(8, dtype=torch.bool)
    gate[list(gated)] = True
    counts = int(gate[:4].sum()), int(gate[4:].sum())
    return ShapedEpoch(torch.zeros(8), gate, gated, counts, {})


def kl_of_rows(sampler, rollout, reference, step):
    """Each sample's KL in the published scale: 2 std^2 without the step size."""
    coef = rollout.table.coefficients[step]
    with torch.no_grad():
        v = sampler.velocity(
            rollout.latents[step], rollout.table.timesteps[step].expand(8), rollout.prompts
        ).cond
    squares = (coef.b * (v - reference.rows(0, torch.arange(8)))).square().flatten(1).mean(1)
    return squares / (2 * coef.std**2)


@pytest.mark.parametrize(
    ("kl_reduction", "weights"),
    [
        # samples 0, 1 and 2 of the first update's four are gated, in micro-batches of two
        ("gated", [1 / 3, 1 / 3, 1 / 3, 0]),
        ("batch", [1 / 4, 1 / 4, 1 / 4, 0]),
        ("microbatch", [1 / 4, 1 / 4, 1 / 2, 0]),
    ],
)
def test_averages_of_the_kl(
    config, runtime, adapters, make_sampler, rollout, kl_reduction, weights
):
    sampler, shaped, step = make_sampler(1.0), shaped_with(0, 1, 2), 2
    config.algorithm.kl_coef, config.algorithm.kl_reduction = 3.0, kl_reduction
    train = config.train.model_copy(update={"batch_size": 2})
    optimizer = torch.optim.SGD(adapters.parameters().values(), lr=0.0)
    grpo = GRPO(config.algorithm, train, sampler, adapters, optimizer, runtime)
    everyone = reference_pass(sampler, adapters, rollout, range(8), [step])
    reference = reference_pass(sampler, adapters, rollout, (0, 1, 2), [step])
    stats = UpdateStats(judged_by="update")
    grpo.accumulate_gradients(TrainingData(rollout, shaped, reference, [step]), 0, stats)
    stats.finish_update(torch.tensor(0.0))
    metrics, judged = stats.metrics(runtime)
    kl = kl_of_rows(sampler, rollout, everyone, step)[:4]
    term = float((kl * torch.tensor(weights)).sum())
    assert judged == pytest.approx(term, rel=1e-4)
    # without advantages the loss is the KL term alone
    assert metrics["loss/total"] == pytest.approx(3.0 * term, rel=1e-4)
    assert metrics["kl"] == pytest.approx(float(kl[:3].mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "when", "kl_reduction", "expected", "per_update"),
    [
        ("paper", "none", "gated", (5,), (0, 1)),
        ("paper", "all", "gated", (0, 1, 2, 3, 5), (4, 1)),
        ("paper", "all", "microbatch", (0, 1, 2, 3, 5, 6, 7), (4, 3)),
        ("off", "all", "microbatch", (5,), (0, 1)),  # switched off is not without a gated sample
    ],
)
def test_who_is_penalised_where_none_is_gated(
    config, runtime, monkeypatch, mode, when, kl_reduction, expected, per_update
):
    monkeypatch.setattr(AlgorithmConfig, "kl_when_ungated", when)
    config.algorithm.kl_reduction = kl_reduction
    gate = torch.zeros(8, dtype=torch.bool)
    gate[5] = True
    shaped = ShapedEpoch(torch.zeros(8), gate, (5,), (0, 1), {}, mode=mode)
    found = penalised(config.algorithm, 2, shaped, plan_epoch(2, 4, 2), runtime)
    assert found.gated_rows == expected
    assert found.gated_per_update == per_update
    assert found.gate.nonzero().flatten().tolist() == list(expected)


def test_kl_scale():
    s, t = torch.tensor(0.8), torch.tensor(0.6)
    exact, official = (
        gk.sde_coefficients(s, t, 0.7, sigma_max=0.9, kl_scale=scale).kl
        for scale in ("exact", "official")
    )
    # the published variance lacks the step size
    assert float(official / exact) == pytest.approx(0.2, rel=1e-5)


# --- the reset ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("judged_by", "judged"), [("epoch", 0.5), ("update", 0.8)])
def test_which_kl_judges(runtime, judged_by, judged):
    """Two updates of two micro-batches, with KL terms 0.8 and 0.2 and one gated sample each."""
    stats = UpdateStats(judged_by)
    one = torch.ones(())
    for kls in ((0.8, 0.0), (0.0, 0.2)):
        for kl in kls:
            # of two samples one is gated
            out = gk.NFTLoss(one, one, one * kl)
            stats.add(out, size=1, gated=int(kl > 0), kl_weight=2.0, clip_range=0.0)
        stats.finish_update(one)
    assert stats.metrics(runtime)[1] == pytest.approx(judged)


def test_no_gated_sample_judges_nothing(runtime):
    stats = UpdateStats("update")
    out = gk.NFTLoss(torch.ones(()), torch.ones(()), torch.zeros(()))
    stats.add(out, size=1, gated=0, kl_weight=0.0, clip_range=0.0)
    stats.finish_update(torch.ones(()))
    assert stats.metrics(runtime)[1] is None


def test_reset_after_more_than_15_epochs():
    """The published loop resets before epoch E once E minus the epoch of the last is above 15."""
    config = settings(("algorithm.compat", "official"))
    reference = AdaptiveReference(config.algorithm.reference)
    ours = [epoch + 1 for epoch in range(50) if reference.update(None)]
    published, last = [], 0
    for epoch in range(51):
        if epoch - last > 15:
            published.append(epoch)
            last = epoch
    assert ours == published == [16, 32, 48]


# --- the switch -----------------------------------------------------------------------------------

OFFICIAL = {
    "kl_scale": "official",
    "kl_reduction": "microbatch",
    "kl_when_ungated": "none",
    "gate.mode": "official",
    "gate.ties": "ordinal",
    "gate.share_of": "nonnegative",
    "reference.judged_by": "update",
}


TOGGLES = {  # what compat alone sets
    "kl_when_ungated": "kl_when_ungated",
    "gate.ties": "gate_ties",
    "reference.judged_by": "reset_judged_by",
}


def chosen(config) -> dict[str, str]:
    found = {}
    for name in OFFICIAL:
        value = config.algorithm
        for part in TOGGLES.get(name, name).split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def test_one_key_switches_all():
    assert chosen(load_config("tiny", overrides=[("algorithm.compat", "official")])) == OFFICIAL
    config = load_config("sd35-medium-geneval", overrides=[("algorithm.compat", "official")])
    assert chosen(config) == OFFICIAL
    assert config.algorithm.reference.reset_every == 16
    nft = [("algorithm.compat", "official"), ("algorithm.name", "nft")]
    config = load_config("tiny", overrides=[*nft, ("sampling.same_latent", "false")])
    assert chosen(config) == {**OFFICIAL, "kl_when_ungated": "all"}


@pytest.mark.parametrize("name", ["kl_scale", "gate.mode"])
def test_each_key_switches_alone(name):
    alone = chosen(load_config("tiny", overrides=[(f"algorithm.{name}", OFFICIAL[name])]))
    with_it = {"gate.ties": "ordinal"} if name == "gate.mode" else {}
    assert alone == {**chosen(load_config("tiny")), name: OFFICIAL[name], **with_it}


@pytest.mark.parametrize("name", ["kl_scale", "kl_reduction", "gate.mode"])
def test_each_key_switches_back_alone_out_of_the_official_set(name):
    plain = chosen(load_config("tiny"))[name]
    overrides = [("algorithm.compat", "official"), (f"algorithm.{name}", plain)]
    assert chosen(load_config("tiny", overrides=overrides)) == {**OFFICIAL, name: plain}


def test_averages_of_micro_batches_are_those_of_the_published_code_alone():
    with pytest.raises(UserError, match=r"algorithm.kl_reduction: microbatch.*compat official"):
        load_config("tiny", overrides=[("algorithm.kl_reduction", "microbatch")])


@pytest.mark.parametrize("name", TOGGLES)
@pytest.mark.parametrize("compat", ["gardo", "official"])
def test_toggles_are_no_keys(name, compat):
    overrides = [("algorithm.compat", compat), (f"algorithm.{name}", OFFICIAL[name])]
    holds = compat == "official" or name == "kl_when_ungated"
    paper = name == "reference.judged_by"
    advice = (
        f"this is what algorithm.compat {compat} does: leave it out"
        if holds
        else f"only algorithm.compat {'paper or ' * paper}official does that"
    )
    message = f"^algorithm.{name}: gone; {advice}$"
    with pytest.raises(UserError, match=message):
        load_config("tiny", overrides=overrides)
