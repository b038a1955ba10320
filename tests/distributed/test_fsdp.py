"""FSDP2 on CPUs: what one process does, done by several that each hold a part of the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gardo.distributed.process import Runtime
from gardo.distributed.sharding import refuse_with_sharding, sharding_plugin
from gardo.sampling.graph import use_graphs
from gardo.types import UserError
from tests.checkpointing.test_resume import rows
from tests.distributed.test_distributed import HERE, torchrun
from tests.support.forked import arguments
from tests.support.train_in_processes import run
from tools.tiny.models import build_flux_pipeline

CASES = {
    "lora": {"evaluation.every": 1},
    "full": {
        "model.full_finetune": "true",
        "model.gradient_checkpointing": "true",
        "train.learning_rate": 1e-5,
    },
    "nft": {"algorithm.name": "nft", "sampling.same_latent": "false", "train.ema": "false"},
    "half": {
        "epochs": 1,
        "precision": "bf16",
        "algorithm.gate.mode": "all",
        "train.fused_optimizer": "true",
    },
    "flux": {
        "epochs": 1,
        "sampling.resolution": 24,
        "sampling.guidance_scale": 3.5,
        "algorithm.gate.mode": "all",
        # what an untrained model draws differs little, and has no shapes
        "rewards.proxy": "{jpeg_incompressibility: 100}",
        "train.adam_eps": 1e-5,
    },
}
GROUPS = {
    "flux": {"policy", "reference", "ema", "optimizer"},
    "lora": {"policy", "reference", "ema", "optimizer"},
    "full": {"policy", "reference", "ema", "optimizer"},
    "nft": {"policy", "reference", "old", "optimizer"},
}


def launch(folder, cases, processes=2, fsdp=True):
    """Run cases one after the other in the same processes."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {}
    result = torchrun(
        processes,
        str(HERE / "train_in_processes.py"),
        str(path),
        timeout=560,
        PYTHONPATH=os.pathsep.join([str(HERE.parents[1]), *sys.path]),
        **environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def case(folder, name, resume=None, **changes):
    return {
        "folder": str(folder),
        "settings": {**CASES[name], **changes},
        "resume": None if resume is None else str(resume),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Which model a case trains, where it is not the recipe's."""
    path = tmp_path_factory.mktemp("flux")
    build_flux_pipeline(seed=0).save_pretrained(path)
    return {"flux": {"model.path": str(path)}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("alone")
    for name in ("lora", "full", "nft", "flux"):
        run(case(folder / name, name, **models.get(name, {})))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("sharded")
    launch(folder, [case(folder / name, name, **models.get(name, {})) for name in CASES])
    return folder


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicated")
    launch(folder, [case(folder / name, name) for name in ("lora", "half")], fsdp=False)
    return folder


def checkpoint(run_folder):
    """The tensors after the last epoch."""
    folder = max((run_folder / "checkpoints").iterdir())
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def furthest(ours, theirs):
    """The largest difference of two groups of tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for group, tensors in theirs.items():
        assert furthest(ours[group], tensors) <= tolerance, group
    # the policy was trained, by more than what is allowed to differ
    assert furthest(theirs["policy"], theirs["reference"]) > 5 * tolerance


@pytest.mark.parametrize("name", ["lora", "full", "nft", "flux"])
def test_sharded_processes_do_what_one_does(alone, sharded, name):
    ours, theirs = (load_file(f / name / "seen.safetensors") for f in (sharded, alone))
    assert ours.keys() == theirs.keys()
    for epoch in range(CASES[name].get("epochs", 2)):
        for figure in ("scores", "advantage"):
            key = f"{epoch}/{figure}"
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
        assert torch.equal(ours[f"{epoch}/gate"], theirs[f"{epoch}/gate"])
        assert theirs[f"{epoch}/gate"].sum() > 0
    state = checkpoint(sharded / name)
    assert state.keys() == GROUPS[name]
    assert_close(state, checkpoint(alone / name), 1e-6 if name == "full" else 1e-5)
    for row, expected in zip(
        rows(sharded / name / "metrics.jsonl"), rows(alone / name / "metrics.jsonl"), strict=True
    ):
        assert row.keys() == expected.keys()
        for figure, value in expected.items():
            if isinstance(value, float) and not figure.startswith("forwards/"):
                assert row[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure


def test_every_process_makes_as_many_forwards_however_the_gate_falls(sharded):
    uneven = False
    for name in CASES:
        seen = load_file(sharded / name / "seen.safetensors")
        first, second = seen["forwards"].tolist()
        assert first == second > 0
        counts = [value.tolist() for key, value in seen.items() if key.endswith("/gated_rows")]
        uneven |= any(0 in count and sum(count) for count in counts)
    assert uneven  # a process without a gated row took part in the reference pass of the other


def test_gradients_are_reduced_once_per_update(sharded, replicated):
    def reductions(folder):
        first, second = load_file(folder / "seen.safetensors")["reductions"].tolist()
        assert first == second
        return first

    def measured(folder):
        """Gradients of the KL: of gated samples, where the policy is no longer the reference."""
        return sum(1 for row in rows(folder / "metrics.jsonl") if row["kl/gradient_share"])

    # an update has 2 batches, each trained at 2 steps; the policy's gradient is measured on as many
    # at one step in each of 2 epochs, the KL's on the few that are gated
    updates, backwards, blocks = 2 * 2, 4, 4
    lora, full = (measured(sharded / name) for name in ("lora", "full"))
    assert measured(replicated / "lora") == lora
    # in one bucket, but for the first time in two
    assert reductions(replicated / "lora") == updates + 2 + lora + 1
    assert reductions(sharded / "lora") == (updates + 2 + lora) * blocks
    # fully fine-tuned, no process keeps the whole gradients of blocks, last norm and the rest
    assert reductions(sharded / "full") == (updates * backwards + 2 * 2 + full) * (blocks + 2)


def test_layouts_agree_in_half_precision(sharded, replicated):
    # nothing is cast while it is gathered or reduced; two summands have one order
    ours, theirs = checkpoint(sharded / "half"), checkpoint(replicated / "half")
    assert ours.keys() == theirs.keys()
    for group, tensors in theirs.items():
        assert furthest(ours[group], tensors) <= 1e-6, group


@pytest.mark.parametrize("layout", ["sharded", "replicated"])
def test_evaluation_is_shared_and_has_the_bits_of_one_process(alone, layout, request):
    folder = request.getfixturevalue(layout) / "lora"
    ours, theirs = (rows(f / "evaluation.jsonl") for f in (folder, alone / "lora"))
    assert [r["name"] for r in ours] == ["start", "during", "end"]
    assert ours[0] == theirs[0]
    pictures = [f / "images" / "epoch_0000.png" for f in (folder, alone / "lora")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_checkpoint_is_resumed_on_any_layout(sharded, alone, tmp_path):
    for source, name in (("sharded", "lora"), ("alone", "lora"), ("sharded", "full")):
        origin = (sharded if source == "sharded" else alone) / name
        shutil.copytree(origin, tmp_path / f"{source}-{name}")
        shutil.copytree(origin, tmp_path / f"{source}-{name}-alone")
    first = "checkpoints/epoch_0001"
    launch(
        tmp_path,
        [
            case(tmp_path / f, f.split("-")[1], tmp_path / f / first)
            for f in ("sharded-lora", "alone-lora", "sharded-full")
        ],
    )
    for name in ("lora", "full"):
        # the same layout: the same bits
        ours, theirs = checkpoint(tmp_path / f"sharded-{name}"), checkpoint(sharded / name)
        for group, tensors in theirs.items():
            assert furthest(ours[group], tensors) == 0, (name, group)
        assert rows(tmp_path / f"sharded-{name}" / "metrics.jsonl") == rows(
            sharded / name / "metrics.jsonl"
        )
    assert_close(checkpoint(tmp_path / "alone-lora"), checkpoint(alone / "lora"), 1e-5)
    for name, tolerance in (("lora", 1e-5), ("full", 1e-6)):
        folder = tmp_path / f"sharded-{name}-alone"
        run(case(folder, name, folder / first))
        assert_close(checkpoint(folder), checkpoint(alone / name), tolerance)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_exports_are_those_of_one_process(sharded, alone, name):
    ours, theirs = (
        {p.relative_to(f / name): p for p in sorted((f / name / "export").rglob("*.safetensors"))}
        for f in (sharded, alone)
    )
    assert ours.keys() == theirs.keys()
    (relative,) = ours
    weights, expected = load_file(ours[relative]), load_file(theirs[relative])
    assert furthest(weights, expected) <= 1e-5
    if name == "full":
        from diffusers import SD3Transformer2DModel

        again = SD3Transformer2DModel.from_pretrained(ours[relative].parent)
        assert torch.equal(again.proj_out.weight, weights["proj_out.weight"])
        config, expected = (
            json.loads((f[relative].parent / "config.json").read_text()) for f in (ours, theirs)
        )
        assert config == expected


def test_accelerate_launches_a_sharded_run(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"]
    command += ["--fsdp_version=2", "--num_processes=2", "--mixed_precision=no"]
    result = subprocess.run(
        [*command, "-m", "gardo.train", *arguments(tmp_path / "run", "tiny", epochs=1)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=HERE.parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["sharded"]) == (2, True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP_VERSION: expected 2, got '1'; FSDP1 is not supported"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "FSDP_RESHARD_AFTER_FORWARD: expected true"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS: expected false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "model.gradient_checkpointing"),
    ],
)
def test_options_that_do_not_go_with_sharding_are_refused(variables, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        sharding_plugin({"ACCELERATE_USE_FSDP": "true", **variables})
    assert sharding_plugin(variables) is None


def test_the_plugin_leaves_weights_to_every_process(monkeypatch):
    # accelerate launch sets it, and transformers would then load no weights of text encoders and
    # reward models on any process but the first
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    environment = {"ACCELERATE_USE_FSDP": "True", "FSDP_RESHARD_AFTER_FORWARD": "TRUE"}
    plugin = sharding_plugin(environment)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"


def test_graphs_and_compiled_blocks_need_whole_weights():
    gpu = torch.device("cuda")
    assert use_graphs("auto", gpu, sharded=False)
    assert not use_graphs("auto", gpu, sharded=True)
    with pytest.raises(UserError, match="whole weights on each GPU"):
        use_graphs("on", gpu, sharded=True)
    refuse_with_sharding(compiled=False)
    with pytest.raises(UserError, match="model.compile: not with FSDP"):
        refuse_with_sharding(compiled=True)


def test_one_process_needs_no_agreement():
    runtime = Runtime("cpu")
    assert not runtime.sharded
    assert runtime.forwards(3) == 3
