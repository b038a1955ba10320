"""The end-to-end benchmark: the same work in both, the comparison that guards it, its output."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gardo_kernels as gk
from benchmarks import epoch, official_epoch
from benchmarks.clock import STAGES, StageClock
from benchmarks.measure import measure
from benchmarks.official_epoch import OfficialEpoch
from benchmarks.our_epoch import OurEpoch
from benchmarks.verify import TOLERANCES, VerificationFailed, verify
from benchmarks.workload import build_workload, settings, store_weights
from gardo.distributed.process import Runtime
from gardo.models.architectures import architecture
from gardo.types import UserError

CPU = torch.device("cpu")
SMALL = [
    ("prompts.per_epoch", "4"),
    ("prompts.group_size", "5"),
    ("sampling.batch_size", "5"),
    ("train.batch_size", "5"),
]


def small_architecture(name):
    """The published architecture with few, narrow layers: every other shape is the real one."""
    arch = architecture(name)
    vae = {**arch.vae, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    narrow = {"num_layers": 1, "num_attention_heads": 1}
    if name == "flux1-dev":
        narrow["num_single_layers"] = 1
    else:
        narrow |= {"caption_projection_dim": 64, "dual_attention_layers": (0,)}
    return replace(arch, transformer={**arch.transformer, **narrow}, vae=vae)


def workload(model="tiny", overrides=(), random_weights=False, precision="fp32", gated=0.1):
    pairs = [*SMALL, ("precision", precision), *overrides]
    config = settings(model, random_weights=random_weights, gated=gated, overrides=pairs)
    arch = None
    if random_weights:
        arch = architecture("tiny") if model == "tiny" else small_architecture(model)
    # accelerate has one precision per process; the model's own autocast gives the working one
    return build_workload(config, Runtime("cpu"), arch, model)


@pytest.fixture(scope="module")
def tiny():
    return workload()


# --- the baseline computes the same ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("tiny", []),
        ("tiny", [("sampling.guidance_scale", "3"), ("sampling.sde_window", "0")]),
        ("sd35-medium", [("sampling.resolution", "32")]),
        ("flux1-dev", [("sampling.resolution", "32")]),
    ],
)
def test_baseline_and_library_agree(model, overrides):
    errors = verify(workload(model, overrides, random_weights=model != "tiny"))
    assert errors.keys() == TOLERANCES.keys()
    assert all(0 <= error <= TOLERANCES[name] for name, error in errors.items())
    # different code rounds differently: equal bits would mean that it was compared with itself
    assert errors["gradient"] > 0


def test_verification_leaves_the_workload_as_it_was():
    work = workload(precision="bf16")
    before = work.adapters.state_dict("policy")
    verify(work)
    assert work.model.dtype == torch.bfloat16
    assert work.model.rows == 0
    assert all(torch.equal(before[n], t) for n, t in work.adapters.state_dict("policy").items())
    assert all(p.grad is None for p in work.adapters.parameters("policy").values())


def wrong_transition(self, velocity, sample, timesteps, original=OfficialEpoch.transition):
    mean, std, spread = original(self, velocity, sample, timesteps)
    return mean, std, 1.01 * spread


def wrong_log_prob(prev, mean, spread, original=official_epoch.log_prob):
    return original(prev, mean, spread) * 1.001


def unclipped(clip_range):
    return 10.0, 10.0


@pytest.mark.parametrize(
    ("target", "name", "wrong", "said"),
    [
        (OfficialEpoch, "transition", wrong_transition, "latents"),
        (official_epoch, "log_prob", wrong_log_prob, "log_prob"),
        (official_epoch, "_pair", unclipped, "gradient"),
    ],
)
def test_a_baseline_that_does_other_work_is_refused(tiny, monkeypatch, target, name, wrong, said):
    monkeypatch.setattr(target, name, wrong)
    with pytest.raises(VerificationFailed, match=said):
        verify(tiny)


def test_a_baseline_without_reference_is_refused(tiny, monkeypatch):
    # the KL's gradient is part of the comparison, because policy and reference differ
    monkeypatch.setattr(official_epoch, "REFERENCE", "policy")
    with pytest.raises(VerificationFailed, match="gradient"):
        verify(tiny)


def test_baseline_transition_is_the_published_step(tiny):
    """Against the kernels' float64 coefficients, at the first step with sigma 1, too."""
    baseline = OfficialEpoch(tiny)
    sigmas = baseline.scheduler.sigmas
    v, x = torch.randn(2, 3, *tiny.model.latent_shape(tiny.resolution))
    for step in (0, 3, 8):
        timesteps = baseline.scheduler.timesteps[step].expand(3)
        mean, std, spread = baseline.transition(v, x, timesteps)
        coef = gk.sde_coefficients(
            sigmas[step], sigmas[step + 1], noise_level=0.7, kind="flow", sigma_max=sigmas[1]
        )
        torch.testing.assert_close(mean, coef.a * x + coef.b * v, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(spread.flatten(), coef.c.expand(3), atol=0, rtol=1e-5)
        dt = sigmas[step] - sigmas[step + 1]
        torch.testing.assert_close(std * dt.sqrt(), spread, atol=0, rtol=1e-5)


# --- what an epoch runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def epochs(tiny):
    ours, baseline = OurEpoch(tiny), OfficialEpoch(tiny)
    rows = [tiny.model.rows]
    clocks = StageClock(CPU), StageClock(CPU)
    metrics = ours.run(clocks[0])
    rows.append(tiny.model.rows)
    logged = baseline.run(clocks[1])
    rows.append(tiny.model.rows)
    return ours, baseline, clocks, (rows[1] - rows[0], rows[2] - rows[1]), (metrics, logged)


def test_forwards_of_an_epoch(epochs):
    """20 samples, 10 steps of which 4 are trained; a tenth of them gated: 2."""
    ours, baseline, _, (our_rows, their_rows), _ = epochs
    assert ours.gated_share == pytest.approx(0.1)
    assert ours.reference_rows == 2 * 4
    assert baseline.reference_rows == 20 * 4
    assert our_rows == 20 * 10 + 20 * 4 + 2 * 4
    assert their_rows == 20 * 10 + 20 * 4 + 20 * 4


def test_stages_of_an_epoch(epochs):
    _, _, (our_clock, their_clock), _, _ = epochs
    assert all(our_clock.seconds[stage] > 0 for stage in STAGES)
    # in the published order, the reference is part of the update
    assert [s for s in STAGES if their_clock.seconds[s] == 0] == ["reference"]
    assert our_clock.epoch == pytest.approx(sum(our_clock.seconds.values()))
    assert our_clock.training == our_clock.seconds["reference"] + our_clock.seconds["update"]


def test_both_log_finite_figures_of_an_update(epochs):
    metrics, logged = epochs[-1]
    assert metrics["ratio/max_abs_dev"] < 1e-3
    assert metrics["kl"] > 0
    assert logged["kl"] > 0
    assert torch.tensor([*metrics.values(), *logged.values()]).isfinite().all()


def test_every_epoch_starts_from_the_same_policy(tiny):
    ours = OurEpoch(tiny)
    first, second = (ours.run(StageClock(CPU)) for _ in range(2))
    # AdamW's state goes on, which the first update's ratios do not see
    assert first["ratio/max_abs_dev"] == second["ratio/max_abs_dev"]
    assert any(
        not torch.equal(tiny.start[n], t) for n, t in tiny.adapters.state_dict("policy").items()
    )
    tiny.restore()
    state = tiny.adapters.state_dict("policy")
    assert all(torch.equal(tiny.start[name], tensor) for name, tensor in state.items())


def test_baseline_keeps_float32_weights_and_ours_the_working_precision():
    work = workload(precision="bf16")
    baseline = OfficialEpoch(work)
    baseline.run(StageClock(CPU))
    assert baseline.transformer_dtype == torch.float32
    weight = work.model.transformer.proj_out.weight
    wide = weight.detach().clone()
    store_weights(work.model.transformer, torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.float(), wide)  # the same values, so the same model
    lora = work.adapters.parameters("policy").values()
    assert {parameter.dtype for parameter in lora} == {torch.float32}


@pytest.mark.parametrize(
    ("gated", "rows"), [(0.0, 0), (1.0, 20 * 4), (0.2, 4 * 4)], ids=["none", "all", "fifth"]
)
def test_gated_share_is_the_one_asked_for(gated, rows):
    ours = OurEpoch(workload(gated=gated))
    ours.run(StageClock(CPU))
    assert ours.reference_rows == rows


# --- random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tokens", "pooled"), [("sd35-medium", 77 + 128, 2048), ("flux1-dev", 128, 768)]
)
def test_random_weights_need_no_text_encoders(model, tokens, pooled):
    work = workload(model, [("sampling.resolution", "32")], random_weights=True)
    assert not work.encodes
    embeds = work.embeddings([*work.texts, work.texts[0]])
    assert embeds.tensors["encoder_hidden_states"].shape == (5, tokens, 4096)
    assert embeds.tensors["pooled_projections"].shape == (5, pooled)
    hidden = embeds.tensors["encoder_hidden_states"]
    assert torch.equal(hidden[0], hidden[4])
    assert not torch.equal(hidden[0], hidden[1])


def run_full_models():
    """Whole epochs on narrow layers, with the recipes' guidance and precision."""
    results = {}
    for model in ("sd35-medium", "flux1-dev"):
        overrides = [*SMALL, ("sampling.resolution", "32"), ("sampling.num_steps", "4")]
        overrides += [("model.max_sequence_length", "8")]
        config = settings(model, random_weights=True, gated=0.2, overrides=overrides)
        arch = small_architecture(model)
        results[model] = measure(config, model, arch, baseline=True, warmup=0, repeats=1)
    print(json.dumps(results))


def test_full_models_run_the_whole_epoch():
    # in a process of its own: accelerate has one precision per process, and theirs is bf16
    code = "from tests.benchmarks import test_epoch as t; t.run_full_models()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for model, trained, rows in (("sd35-medium", 3, 2), ("flux1-dev", 2, 1)):
        result = results[model]
        gated = round(20 * result["gated_share"])
        assert 1 <= gated <= 6
        assert result["precision"] == "bf16"
        assert result["trained_steps"] == trained
        assert result["reference_rows"] == gated * trained * rows
        assert result["baseline_reference_rows"] == 20 * trained * rows
        assert [entry["variant"] for entry in result["sampling"]] == ["baseline", "eager"]
        assert result["ratio"]["epoch"] > 0


# --- clock ----------------------------------------------------------------------------------------


def test_clock_sums_and_finds_the_peak(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("benchmarks.clock.time.perf_counter", lambda: next(ticks))
    clock = StageClock(CPU)
    for name in ("sample", "sample", "update"):
        with clock.stage(name):
            pass
    assert clock.seconds["sample"] == 3.0
    assert (clock.rollout, clock.training, clock.epoch) == (3.0, 4.0, 7.0)


def test_clock_measures_memory():
    clock = StageClock(CPU, memory=True)
    with clock.stage("decode"):
        first = torch.ones(2**20)
        del first
        second, third = torch.ones(2**19), torch.ones(2**19)
        del second, third
    assert clock.peak_bytes["decode"] == 2**22  # 4 MiB once, and once more in two halves


# --- the command line -----------------------------------------------------------------------------

OPTIONS = "--model tiny --prompts 2 --group-size 5 --batch-size 5 --steps 5 --repeats 1 --warmup 0"
SHORT = OPTIONS.split()


def test_json_output(capsys):
    assert epoch.main([*SHORT, "--baseline", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    theirs, ours = result["baseline"]["seconds"], result["ours"]["seconds"]
    assert result["ratio"]["epoch"] == pytest.approx(theirs["epoch"] / ours["epoch"])
    assert result["ratio"]["training"] == pytest.approx(theirs["update"] / ours["training"])
    assert "reference" not in result["ratio"]
    assert ours["training"] == pytest.approx(ours["reference"] + ours["update"])
    assert result["ours"]["peak_mib"]["update"] > 0
    assert result["errors"]["gradient"] <= TOLERANCES["gradient"]
    assert result["samples"] == 10
    assert result["baseline_reference_rows"] == 10 * 4
    assert result["reference_rows"] == round(10 * result["gated_share"]) * 4


def test_text_output_without_baseline(capsys):
    assert epoch.main([*SHORT, "--random-weights"]) == 0
    out = capsys.readouterr().out
    assert "tiny (random weights, recipe tiny)" in out
    assert "| epoch |" in out
    assert "ratio" not in out
    assert "eager" in out
    assert "CPU sampling alone is timed eagerly" in out


def test_failed_verification_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(OfficialEpoch, "transition", wrong_transition)
    assert epoch.main([*SHORT, "--baseline"]) == 1
    captured = capsys.readouterr()
    assert "error: the baseline differs from the library in latents" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model sd36", "--model: expected one of sd35-medium, flux1-dev, tiny, got 'sd36'"),
        ("--model tiny --gated 0.7", "--gated: expected 0, 1 or a share up to 0.4, got 0.7"),
        ("--model tiny --precision fp16", "--precision: expected fp32 or bf16, got 'fp16'"),
        ("--model tiny --repeats 0", "--repeats: expected a number of at least 1, got 0"),
        ("--model tiny --prompts 0", "prompts.per_epoch"),
        ("--model tiny --cuda-graph on --prompts 2 --group-size 2", "needs a CUDA device"),
        (
            "--model tiny --baseline --group-size 3 --batch-size 8",
            "samples of an update that fill no training batch: expected 0, got 4",
        ),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        epoch.main(options.split())
