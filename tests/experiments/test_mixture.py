"""The mixture experiment: its data, its rewards, its training, and the command."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from experiments.mixture import distribution, rewards, run
from experiments.mixture.__main__ import main
from experiments.mixture.methods import GARDO, GRPO_NO_STD, PARTS, find_method, find_part
from experiments.mixture.policy import Schedule, VelocityNetwork, pretrain, roll_out
from experiments.mixture.tables import figures, markdown, summarize
from experiments.mixture.training import Run, Settings
from gardo.types import UserError

TINY = Settings(
    epochs=2, groups=4, group_size=4, steps=4, pretraining_steps=20, evaluation_samples=32
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the data ------------------------------------------------------------------------------------


def test_data_lies_on_nine_modes_with_a_rare_centre():
    points = distribution.draw(40_000, seeded())
    # four standard deviations: outside is exp(-8) = 0.0003 of a 2-D Gaussian
    assert float(distribution.off_manifold(points).double().mean()) < 0.001
    centre = float(distribution.in_centre(points).double().mean())
    assert centre == pytest.approx(0.1 / 8.1, abs=0.003)  # five standard errors
    ring = points[~distribution.in_centre(points)].norm(dim=1)
    assert float(ring.mean()) == pytest.approx(4, abs=0.05)


def test_regions_do_not_overlap():
    distance = (distribution.modes() - torch.tensor(distribution.HACK_MIDDLE)).norm(dim=1)
    assert float(distance.min()) > distribution.MODE_RADIUS + distribution.HACK_RADIUS
    between = torch.cdist(distribution.modes(), distribution.modes()) + 10 * torch.eye(9)
    assert float(between.min()) > 2 * distribution.MODE_RADIUS


# --- the rewards ---------------------------------------------------------------------------------


def test_centre_is_best_and_the_flaw_pays_where_the_truth_does_not():
    at_modes = rewards.true_reward(distribution.modes())
    assert int(at_modes.argmax()) == 8
    hack = torch.tensor([distribution.HACK_MIDDLE])
    assert float(rewards.true_reward(hack)) < 0.001
    assert float(rewards.hackable(hack)) == pytest.approx(rewards.HACK_VALUE, abs=0.001)
    gain = rewards.hackable(distribution.modes()) - at_modes
    assert float(gain.max()) < 0.05  # the modes themselves hardly gain by it


def test_saturated_proxy_spans_what_it_says():
    far = torch.tensor([[-100.0, 0.0], [100.0, 0.0]])
    low, high = rewards.saturated(far).tolist()
    assert (low, high) == pytest.approx((1 - 0.01, 1 + 0.01))


def test_auxiliaries_are_imperfect_and_know_nothing_of_the_flaw():
    points = distribution.draw(4000, seeded())
    matrix = torch.corrcoef(
        torch.cat([rewards.true_reward(points)[None], rewards.auxiliaries(points)])
    )
    assert all(0.3 < float(c) < 0.95 for c in matrix[0, 1:])
    assert float(matrix[1, 2]) < 0.9  # their errors are their own
    hack = torch.tensor([distribution.HACK_MIDDLE])
    # three standard deviations of the random field
    assert float(rewards.auxiliaries(hack).abs().max()) < 3 * rewards.AUX_FIELD


def test_random_field_has_the_stated_size():
    far = 40 + 30 * torch.rand(4000, 2, generator=seeded())  # no mode is near
    sd = rewards.auxiliaries(far).std(dim=1)
    # the weights of 64 waves are drawn once: a relative error of about 1/sqrt(64)
    assert sd.tolist() == pytest.approx([rewards.AUX_FIELD] * 2, rel=0.4)


def test_features_approximate_a_gaussian_kernel():
    points = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 1.0], [3.0, 3.0]])
    features = rewards.features(points)
    assert features.norm(dim=1).tolist() == pytest.approx([8.0] * 4)  # sqrt of 64 waves
    similarity = torch.nn.functional.cosine_similarity(features[:1], features)
    expected = [1.0, math.exp(-0.125), math.exp(-0.5), math.exp(-9)]
    assert similarity.tolist() == pytest.approx(expected, abs=0.25)  # 64 random waves


# --- the policy ----------------------------------------------------------------------------------


def test_pretraining_moves_samples_to_the_ring():
    def radius(network):
        context = torch.zeros(500, dtype=torch.int64)
        samples = roll_out(network, Schedule.uniform(20, 0.7), context, seeded()).samples
        return float(samples.norm(dim=1).mean())

    # nearly all data lie on the ring of radius 4; the mean norm of 2-D noise is 1.25
    assert radius(VelocityNetwork()) < 2.5
    assert radius(pretrain(0, 200, batch_size=256)) == pytest.approx(4, abs=0.5)


def test_rollout_log_probs_are_those_of_the_kernel():
    import gardo_kernels as gk

    schedule, context = Schedule.uniform(5, 0.7), torch.tensor([0, 1, 1])
    network = VelocityNetwork()
    rollout = roll_out(network, schedule, context, seeded())
    for i in range(5):
        velocity = network(rollout.latents[i], schedule.sigma[i].expand(3), context)
        expected = gk.sde_log_prob(
            velocity.detach(), rollout.latents[i], rollout.latents[i + 1], schedule.coefficients[i]
        )
        torch.testing.assert_close(rollout.log_prob[i], expected, rtol=0, atol=0)


# --- training ------------------------------------------------------------------------------------


def test_reward_without_a_kl_rises():
    settings = replace(TINY, groups=8, group_size=16, epochs=12, learning_rate=3e-3)
    result = Run(find_part("base"), GRPO_NO_STD, pretrain(0, 200), settings, 0)
    before = result.evaluate()["true"]
    for epoch in range(settings.epochs):
        row = result.epoch(epoch)
    assert result.evaluate()["true"] > before + 0.02
    assert (row["gate"], row["kl"]) == (0, 0)


def test_reference_is_reset_when_due_and_equals_the_policy_then():
    settings = replace(TINY, epochs=10)
    result = Run(find_part("base"), GARDO, pretrain(0, 20), settings, 0)
    rows = [result.epoch(epoch) for epoch in range(10)]
    assert [row["reset"] for row in rows] == [0.0] * 9 + [1.0]
    assert any(row["kl"] > 0 for row in rows)
    for name, value in result.policy.state_dict().items():
        assert torch.equal(value, result.reference.state_dict()[name])


def test_methods_are_what_they_are_called():
    algorithms = {m.name: m.algorithm for part in PARTS for m in part.methods}
    assert {n for n, a in algorithms.items() if a.kl_coef == 0} == {
        "grpo",
        "grpo-no-std",
        "shaping",
    }
    assert {n for n, a in algorithms.items() if a.diversity} == {
        "shaping", "gardo-static", "gardo", "gardo-guarded"
    }  # fmt: skip
    normed = {n for n, a in algorithms.items() if a.advantage_norm == "group_std"}
    assert normed == {"grpo", "grpo-kl"}
    assert {n for n, a in algorithms.items() if a.reference.reset_every} == {
        "gardo",
        "gardo-guarded",
    }
    assert {n for n, a in algorithms.items() if a.reference.guard} == {"gardo-guarded"}
    assert algorithms["grpo-kl"].gate.mode == "all"
    with pytest.raises(StopIteration):
        find_method(find_part("std"), "gardo")


# --- the command ---------------------------------------------------------------------------------


def test_runs_are_reproducible_resumable_and_independent_of_jobs(tmp_path):
    first = run.run_all([3], TINY, tmp_path / "a", jobs=1)
    second = run.run_all([3], TINY, tmp_path / "b", jobs=2)

    def untimed(records):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records]

    assert len(first) == sum(len(part.methods) for part in PARTS)
    assert untimed(first) == untimed(second)

    stored = sorted((tmp_path / "a" / "runs").glob("*.json"))
    stored[0].unlink()
    kept = {path: path.stat().st_mtime_ns for path in stored[1:]}
    assert untimed(run.run_all([3], TINY, tmp_path / "a", jobs=1)) == untimed(first)
    assert {path: path.stat().st_mtime_ns for path in stored[1:]} == kept
    # a result of other settings does not count
    other = run.run_all([3], replace(TINY, learning_rate=2e-3), tmp_path / "a", jobs=1)
    assert untimed(other) != untimed(first)


def test_command_writes_table_figures_and_plot(tmp_path, capsys):
    assert main(["--quick", "--jobs", "1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    for part in PARTS:
        assert f"## {part.title}" in text
        assert all(f"| {method.name} |" in text for method in part.methods)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["seeds"] == [0]
    assert set(summary["parts"]) == {"base", "std", "hack"}
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


def test_summary_by_hand():
    def record(part, method, seed, centre):
        end = dict.fromkeys(
            ("centre", "hacked", "off", "off_last_context", "true", "proxy"), centre
        )
        epochs = {"gate": [0.0, 0.1], "reset": [0.0, 1.0], "refused": [1.0, 1.0]}
        return {
            "part": part, "method": method, "seed": seed, "seconds": 1.0,
            "start": end, "end": end, "epochs": epochs,
        }  # fmt: skip

    records = [
        record(part.name, method.name, seed, centre)
        for part in PARTS
        for method in part.methods
        for seed, centre in ((4, 0.2), (5, 0.4))
    ]
    assert figures(records[0])["penalised"] == pytest.approx(0.05)
    summary = summarize(records, TINY)
    values = summary["parts"]["hack"]["methods"]["gardo"]
    assert values["centre"] == {"mean": 0.3, "sd": 0.1414, "seeds": [0.2, 0.4]}
    assert (values["resets"]["mean"], values["refused"]["mean"]) == (1.0, 2.0)
    assert "| gardo | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.050 ± 0.000 |" in markdown(summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_broken_stored_result_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base-grpo-seed0.json").write_text("{")
    with pytest.raises(UserError, match="base-grpo-seed0"):
        run.run_all([0], TINY, tmp_path, jobs=1)


def test_module_runs_and_its_help_imports_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "experiments.mixture", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--seeds" in result.stdout
    assert " torch\n" not in result.stderr
    wrong = [sys.executable, "-m", "experiments.mixture", "--jobs", "0"]
    failed = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
