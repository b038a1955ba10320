"""Runs whose numbers go wrong: updates left out, dumps, alarms and collapse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gardo.algorithms.nonfinite import update_if_finite
from gardo.algorithms.stats import UpdateStats
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.run.health import Outcome
from gardo.run.progress import EpochProgress
from gardo.trainer import Trainer
from tests.checkpointing.test_resume import edit, rows, tensors
from tests.distributed.test_distributed import torchrun
from tests.support.forked import SMALLEST, Runner, arguments

RUN = {
    "epochs": 3,
    "checkpoint__every": 1,
    "train__ema": "true",
    "train__ema_every": 2,
    "prompts__group_size": 4,
    "train__batch_size": 2,
}
NFT = {"algorithm__name": "nft", "sampling__same_latent": "false"}
GUARD = {"algorithm__ratio_norm": "guard"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("log") / "stderr.txt")


def fault(*updates, what="loss", rank=0):
    arguments = {"updates": [list(update) for update in updates], "what": what, "rank": rank}
    return {"name": "not_finite", "with": arguments}


def without_health(folder):
    """Rows of metrics without what tells that an update was tried."""
    told = ("health/", "forwards/policy", "alarms")
    return [
        {k: v for k, v in row.items() if not k.startswith(told)}
        for row in rows(folder / "metrics.jsonl")
    ]


# --- updates that are left out


@pytest.mark.parametrize(
    ("what", "changes"),
    [("loss", {}), ("gradient", {}), ("loss", NFT)],
    ids=["loss", "grad", "nft"],
)
def test_a_run_goes_on_as_if_the_update_had_not_been(runner, tmp_path, what, changes):
    skipped, spared = tmp_path / "skipped", tmp_path / "spared"
    assert runner.run(arguments(skipped, **RUN, **changes), fault((1, 0), what=what)) == 0
    assert f"epoch 1, update 0: left out: a {what} that is not finite (1 in a row" in runner.said
    hook = {"name": "leave_out", "with": {"updates": [[1, 0]]}}
    assert runner.run(arguments(spared, **RUN, **changes), hook) == 0, runner.said
    # policy, reference, average and optimizer, bit for bit
    for epoch in ("epoch_0002", "epoch_0003"):
        ours, theirs = (tensors(f / "checkpoints" / epoch) for f in (skipped, spared))
        assert {"policy.safetensors", "ema.safetensors", "optimizer.safetensors"} <= ours.keys()
        assert ours == theirs
    assert without_health(skipped) == without_health(spared)
    counted = [row["health/skipped_updates"] for row in rows(skipped / "metrics.jsonl")]
    assert counted == [0, 1, 0]
    assert all(row["health/skipped_in_a_row"] == 0 for row in rows(skipped / "metrics.jsonl"))


def test_an_epoch_without_an_update_has_no_figures_and_no_reset(runner, tmp_path):
    run = tmp_path / "run"
    assert runner.run(arguments(run, **RUN), fault((1, 0), (1, 1))) == 0, runner.said
    row = rows(run / "metrics.jsonl")[1]
    assert row["health/skipped_updates"] == row["health/skipped_in_a_row"] == 2
    assert row["loss/policy"] is row["kl"] is row["grad_norm"] is None
    assert row["reference/reset"] == 0
    first, second = (
        tensors(run / "checkpoints" / name)["policy.safetensors"]
        for name in ("epoch_0002", "epoch_0003")
    )
    assert first != second
    assert "--resume" not in runner.said


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, {"next_latents", "ratio"}),
        (GUARD, {"next_latents", "ratio", "noise"}),
        (NFT, {"clean_latents", "behaviour_velocity", "t"}),
    ],
    ids=["grpo", "guard", "nft"],
)
def test_too_many_in_a_row_end_the_run_with_a_dump(runner, tmp_path, what, changes, own):
    run = tmp_path / "run"
    broken = [(1, 0), (1, 1), (2, 0)]
    assert runner.run(arguments(run, **RUN, **changes), fault(*broken, what=what)) == 2
    lines = runner.said.strip().splitlines()
    path = run / "failures" / "epoch_0002_update_0_rank_0"
    assert lines[-1].startswith(
        "error: 3 updates in a row were left out, the last one (epoch 2, update 0) for a "
        f"{what} that is not finite. Its batch is in '{path}.safetensors'"
    )
    assert "Try a smaller train.learning_rate" in lines[-1]
    assert "(3 in a row, stops at 3)" in runner.said
    assert "Traceback" not in runner.said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["epoch_0001", "epoch_0002"]
    assert [p.name for p in path.parent.rglob(".*")] == []

    dump, facts = load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())
    assert [facts[k] for k in ("epoch", "update", "rank", "world_size")] == [2, 0, 0, 1]
    assert facts["found_again"] is True
    assert facts["parameters_not_finite"] > 0
    # backward reaches the last block first
    assert ".3." in facts["first_parameters_not_finite"][0]
    assert (facts["loss"] == "nan") == (what == "loss")
    # the second of the update's two batches, 2 of 4 samples
    assert facts["rows"] == facts["rows_kept"] == len(facts["prompts"]) == 2
    assert facts["sample_ids"] == [2, 3]
    shape = dump["latents"].shape
    assert shape[0] == 2
    assert len(shape) == 4
    assert dump["velocity"].shape == shape
    assert dump["advantage"].shape == dump["gate"].shape == dump["timesteps"].shape == (2,)
    assert own <= dump.keys()
    assert ("noise" in dump) == (changes is GUARD)
    if "log_prob" in dump:  # the weights are those that sampled
        torch.testing.assert_close(dump["log_prob"], dump["old_log_prob"], rtol=0, atol=1e-5)

    # the fault gone, the run goes on from its checkpoint
    assert runner.run(arguments(run, "--resume", **RUN, **changes)) == 0, runner.said
    assert len(rows(run / "metrics.jsonl")) == 3


def test_a_streak_goes_on_after_a_resume(runner, tmp_path):
    run = tmp_path / "run"
    first = {**RUN, "epochs": 2}
    assert runner.run(arguments(run, **first), fault((1, 0), (1, 1))) == 0, runner.said
    assert runner.run(arguments(run, "--resume", **RUN), fault((2, 0))) == 2
    assert "error: 3 updates in a row were left out" in runner.said


def test_the_limit_is_a_key(runner, tmp_path):
    command = arguments(tmp_path / "run", **RUN, health__max_skipped_in_a_row=1)
    assert runner.run(command, fault((0, 1))) == 2
    assert "error: 1 update was left out, the last one (epoch 0, update 1)" in runner.said
    assert (tmp_path / "run" / "checkpoints" / "epoch_0000").is_dir()


# --- the loss scaler of fp16


class AsHalf(torch.autograd.Function):
    """Gradients that overflow as float16 does."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient.half().float()


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.inf


@pytest.fixture
def scaled(tmp_path):
    """A trainer whose accelerator scales losses, on the CPU, with an epoch to train on."""
    settings = {**SMALLEST, "output_dir": tmp_path / "run"}
    config = load_config("tiny", overrides=[(k, str(v)) for k, v in settings.items()])
    trainer = Trainer(config, Runtime("cpu"))
    trainer.progress = EpochProgress(1, "x", enabled=False)
    accelerator = trainer.runtime.accelerator
    accelerator.scaler = trainer.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    accelerator.native_amp = True
    before = accelerator.state._mixed_precision
    accelerator.state._mixed_precision = "fp16"
    trainer.optimizer._accelerate_step_called = False
    trainer.optimizer._optimizer_original_step_method = trainer.optimizer.optimizer.step
    from accelerate.optimizer import patch_optimizer_step

    trainer.optimizer._optimizer_patched_step_method = patch_optimizer_step(
        trainer.optimizer, trainer.optimizer.optimizer.step
    )
    prompts = trainer.prompt_sampler.epoch(0)
    rollout, book = trainer.roll_out_and_score(0, prompts)
    shaped = trainer.shaper(book, rollout.plan, trainer.runtime)
    data = trainer.algorithm.prepare(rollout, shaped, trainer.schedule, 0, 0)
    yield trainer, data
    accelerator.state._mixed_precision = before


def patched(monkeypatch, trainer, wrap):
    original = type(trainer.algorithm).loss

    def loss(self, *args):
        out = original(self, *args)
        return out._replace(loss=wrap(out.loss))

    monkeypatch.setattr(type(trainer.algorithm), "loss", loss)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.adapters.parameters().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_scale_that_is_too_large_is_lowered_and_no_failure(scaled, monkeypatch):
    trainer, data = scaled
    patched(monkeypatch, trainer, AsHalf.apply)
    before, said = weights(trainer), []
    trainer.health.attach(Path(), said.append)
    made, stats = False, UpdateStats()
    scaler = trainer.runtime.accelerator.scaler
    while not made:  # 2^17 is above what a float16 holds
        assert same(weights(trainer), before)
        assert trainer.optimizer.state_dict()["state"] == {}
        made = update_if_finite(trainer.algorithm, trainer.health, 0, data, 0, stats)
    assert 1 <= scaler.get_scale() < 2.0**17
    assert len(said) == round(17 - torch.tensor(scaler.get_scale()).log2().item())
    assert all("by the loss scaler" in line for line in said)
    assert not same(weights(trainer), before)
    assert trainer.health.skipped_in_a_row == 0
    metrics = trainer.health.observe(0, {}, None)
    assert metrics["health/scaled_down"] == len(said)
    assert metrics["health/skipped_updates"] == 0


def test_gradients_that_no_scale_saves_are_failures(scaled, monkeypatch):
    trainer, data = scaled
    patched(monkeypatch, trainer, Broken.apply)
    before, outcomes = weights(trainer), []
    for _ in range(20):
        outcomes.append(trainer.algorithm.update(data, 0, UpdateStats()))
    assert outcomes == [Outcome.SCALED_DOWN] * 17 + [Outcome.BAD_GRADIENT] * 3
    assert same(weights(trainer), before)


def test_a_loss_that_is_not_finite_leaves_the_scale_alone(scaled, monkeypatch):
    trainer, data = scaled
    patched(monkeypatch, trainer, lambda loss: loss * torch.inf)
    before = weights(trainer)
    assert trainer.algorithm.update(data, 0, UpdateStats()) is Outcome.BAD_LOSS
    # and the scaler is ready for the next one
    assert trainer.algorithm.update(data, 1, UpdateStats()) is Outcome.BAD_LOSS
    assert trainer.runtime.accelerator.scaler.get_scale() == 2.0**17
    assert same(weights(trainer), before)


# --- alarms in a run


COLLAPSING = {
    "epochs": 4,
    "checkpoint__every": 0,
    "sampling__sde_window": 1,
    "sampling__sde_window_range": "[0,1]",
    "sampling__num_steps": 3,
    "prompts__group_size": 6,
    "health__patience": 1,
}


def test_a_collapse_is_told_once_and_is_in_the_metrics(runner, tmp_path):
    run, hook = tmp_path / "run", {"name": "collapse", "with": {"epoch": 2}}
    assert runner.run(arguments(run, **COLLAPSING), hook) == 0, runner.said
    for name in ("diversity", "image_variance"):
        (line,) = (line for line in runner.said.splitlines() if f"alarm {name}" in line)
        assert line.startswith(f"epoch 2: alarm {name}: ")
        assert "at or below health." in line
    metrics = rows(run / "metrics.jsonl")
    assert [{"diversity", "image_variance"} <= set(row["alarms"]) for row in metrics] == [
        *(False, False),
        *(True, True),
    ]
    assert all(row["health/alarms"] == len(row["alarms"]) for row in metrics)
    assert metrics[3]["diversity/image_variance"] < 0.01 * metrics[0]["diversity/image_variance"]


def test_a_collapse_stops_the_run_with_a_checkpoint(runner, tmp_path):
    run, hook = tmp_path / "run", {"name": "collapse", "with": {"epoch": 2}}
    stopping = {**COLLAPSING, "health__stop_on": "image_variance,kl"}
    # in two parts: what it is measured by is the first epoch of all
    first = {**stopping, "epochs": 2}
    assert runner.run(arguments(run, **first)) == 0, runner.said
    assert runner.run(arguments(run, "--resume", **stopping), hook) == 2
    lines = runner.said.strip().splitlines()
    assert lines[-1].startswith("error: stopped by health.stop_on: alarm image_variance: ")
    assert f"--resume {run}" in lines[-1]
    assert lines[-2].endswith("epoch_0003'")
    assert "Traceback" not in runner.said
    assert len(rows(run / "metrics.jsonl")) == 3
    # while it lasts, each further epoch ends the same way
    assert runner.run(arguments(run, "--resume", **stopping), hook) == 2
    assert len(rows(run / "metrics.jsonl")) == 4
    # as the message says: the alarm off, the run goes on
    on = {**stopping, "health__stop_on": "kl", "health__image_variance": "null", "epochs": 5}
    assert runner.run(arguments(run, "--resume", **on), hook) == 0, runner.said
    assert len(rows(run / "metrics.jsonl")) == 5


def test_a_checkpoint_without_the_level_is_refused(runner, tmp_path):
    run = tmp_path / "run"
    assert runner.run(arguments(run, **{**RUN, "epochs": 1})) == 0, runner.said
    edit(run / "checkpoints" / "epoch_0001", "state.json", lambda state: state.pop("health"))
    assert runner.run(arguments(run, "--resume", **RUN)) == 2
    assert "epoch_0001': no 'health' in state.json" in runner.said


# --- several processes

SHARED = {**RUN, "health__ratio": "null"}


def train_together(processes, folder, hook, **environment):
    command = [str(a) for a in arguments(folder, **SHARED)]
    return torchrun(
        processes, "-m", "tests.support.forked", json.dumps(hook), *command, **environment
    )


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_processes_leave_out_the_same_updates(tmp_path, what):
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        # of two processes only the second one meets it
        hook = fault((1, 0), what=what, rank=processes - 1)
        result = train_together(processes, folder, hook)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("epoch 1, update 0: left out") == 1
        weights = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
        results.append((rows(folder / "metrics.jsonl"), weights))
    (alone, expected), (together, got) = results
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["health/skipped_updates"] == theirs["health/skipped_updates"]
        assert ours["alarms"] == theirs["alarms"]
        for name in ("loss/total", "diversity/image_variance"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
        # Adam's first steps turn the rounding of tiny gradients into steps of the learning rate:
        # 2e-4 on some processors
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "environment"),
    [("loss", {}), ("gradient", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})],
    ids=["ddp", "fsdp2"],
)
def test_all_processes_end_with_the_message_and_the_dump_of_one(tmp_path, what, environment):
    hook = fault((0, 1), (1, 0), (1, 1), what=what, rank=1)
    result = train_together(2, tmp_path / "run", hook, **environment)
    assert result.returncode != 0
    path = tmp_path / "run" / "failures" / "epoch_0001_update_1_rank_1"
    message = "3 updates in a row were left out, the last one (epoch 1, update 1) for a"
    assert result.stderr.count(f"error: {message} {what} that is not finite") == 2, result.stderr
    assert result.stderr.count(f"Its batch is in '{path}.safetensors'") == 2
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".json"] == [f"{path.name}.json"]
    facts = json.loads(Path(f"{path}.json").read_text())
    assert (facts["rank"], facts["world_size"], facts["found_again"]) == (1, 2, True)
    # the last block is the first that backward reaches, also where gradients are shards of a mean
    assert ".3.attn.to_out" in facts["first_parameters_not_finite"][0]
    assert load_file(f"{path}.safetensors").keys() >= {"latents", "velocity", "log_prob"}
    assert (tmp_path / "run" / "checkpoints" / "epoch_0001").is_dir()
