"""The planner against hand-computed figures, against real tensors and against the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gardo import cli
from gardo.config import load_config
from gardo.families import FAMILIES
from gardo.models.adapters import build_adapters
from gardo.models.architectures import (
    architecture,
    architecture_of,
    build_transformer,
    count_parameters,
)
from gardo.plan import main, plan
from gardo.planning.advice import advise
from gardo.planning.counts import count_epoch
from gardo.planning.estimate import Planner
from gardo.planning.memory import CONTEXT_BYTES, FRAGMENTATION, GIB, reward_items
from gardo.planning.rates import GPU, find_gpu
from gardo.planning.simulation import StorageTracker, simulate, transformer_inputs
from gardo.types import UserError

# --- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "transformer", "checkpoint"),
    [
        # billions, as published on the model cards and in the checkpoints' index files; the
        # checkpoints of SD3.5 hold a table of positions that is no parameter
        ("sd35-medium", 2.243, 2.47),
        ("sd35-large", 8.057, 8.146),
        ("flux1-dev", 11.901, 11.901),
    ],
)
def test_published_parameter_counts(name, transformer, checkpoint):
    counts = count_parameters(architecture(name))
    assert counts.transformer == pytest.approx(transformer * 1e9, rel=5e-4)
    assert counts.transformer + counts.buffers == pytest.approx(checkpoint * 1e9, rel=5e-4)
    assert counts.vae == pytest.approx(83.8e6, rel=1e-3)
    # T5-XXL's encoder 4.762 B, CLIP-L 0.124 B, CLIP bigG 0.695 B
    encoders = 4.762e9 + 0.124e9 + (0.0 if name == "flux1-dev" else 0.695e9)
    assert counts.text_encoders == pytest.approx(encoders, rel=1e-3)


def test_lora_parameters_by_hand(medium):
    # SD3.5-Medium, rank 32 on square projections of 1536: each costs 32 * 2 * 1536. 24 blocks of
    # 8 projections, but the last block has no to_add_out.
    assert medium.sample.trainable == (24 * 8 - 1) * 32 * 2 * 1536


def test_architecture_of_a_folder_is_that_of_its_files(tiny_costs):
    config, _ = tiny_costs
    arch = architecture_of(config.model)
    text_tokens = arch.prompt_shapes(0)["encoder_hidden_states"][0]  # CLIP's, without T5's
    assert (arch.name, arch.family, arch.vae_scale, text_tokens) == ("tiny", "sd3", 2, 8)


def test_unknown_architectures_are_named():
    config = load_config("tiny", overrides=[("model.path", "someone/some-model")])
    with pytest.raises(UserError, match="'someone/some-model': its architecture is not tabulated"):
        architecture_of(config.model)
    with pytest.raises(UserError, match="unknown architecture 'sd15'"):
        architecture("sd15")


# --- simulation against real tensors -------------------------------------------------------------


@pytest.fixture(scope="module")
def medium():
    """A planner of the full-size model; building it takes some seconds."""
    return Planner(load_config("sd35-medium-geneval"), 1)


@pytest.fixture(scope="module")
def tiny_costs():
    config = load_config("tiny")
    return config, simulate(config, architecture("tiny"))


@pytest.fixture
def real_tiny():
    """The tiny transformer with adapters and random weights on the CPU, and its inputs."""
    config, arch = load_config("tiny"), architecture("tiny")
    transformer = build_transformer(arch).requires_grad_(False)
    holder = SimpleNamespace(transformer=transformer, family="sd3")
    build_adapters(holder, config.model, seed=0)
    shapes = transformer_inputs(arch, 1, 24, config, torch.float32)
    return transformer, {name: torch.randn(t.shape) for name, t in shapes.items()}


def test_flops_equal_a_count_of_layers(tiny_costs, real_tiny, monkeypatch):
    transformer, inputs = real_tiny
    counted = []

    def count(layer, _, out):
        kernel = layer.weight[0].numel()  # inputs of one output
        counted.append(2 * out.numel() * kernel)

    for layer in transformer.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(count)
    attention = F.scaled_dot_product_attention

    def count_attention(query, key, value, *args, **kwargs):
        batch, heads, tokens, width = query.shape
        counted.append(4 * batch * heads * tokens * key.shape[2] * width)
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count_attention)
    with torch.no_grad():
        transformer(**inputs, return_dict=False)
    assert sum(counted) == tiny_costs[1].forward_flops


def test_saved_activations_equal_what_autograd_keeps(tiny_costs, real_tiny):
    transformer, inputs = real_tiny
    weights = {t.untyped_storage().data_ptr() for t in (*transformer.parameters(),)}
    weights |= {t.untyped_storage().data_ptr() for t in transformer.buffers()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transformer(**inputs, return_dict=False)
    given = {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept = sum(size for pointer, (size, _) in saved.items() if pointer not in given)
    # the simulation also counts what references, not autograd, keep alive until the forward ends
    assert tiny_costs[1].saved_bytes == pytest.approx(kept, rel=0.15)


def test_backward_of_frozen_weights_costs_about_a_forward(tiny_costs):
    # gradients of inputs cost a forward; those of weights are needed for the adapters alone
    costs = tiny_costs[1]
    assert 0.9 < costs.backward_flops / costs.forward_flops < 1.3


def test_guidance_doubles_the_sample_but_not_the_row(tiny_costs):
    one = tiny_costs[1]
    guided = load_config("tiny", overrides=[("sampling.guidance_scale", "4.5")])
    two = simulate(guided, architecture("tiny"))
    assert two.forward_flops == one.forward_flops
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.05)


def test_tracker_follows_live_and_highest_bytes():
    known = torch.empty(100, device="meta")
    with StorageTracker([known]) as tracker:
        first = known + 1
        assert tracker.live == 400
        view = first.view(10, 10)
        known.view(10, 10)
        assert tracker.live == 400  # views are no memory
        second = first.double()
        assert tracker.live == 1200
        del first
        assert tracker.live == 1200  # the view holds it
        del view, second
        assert tracker.live == 0
    assert tracker.peak == 1200


# --- counts --------------------------------------------------------------------------------------


def test_padding_is_counted():
    config = load_config(
        "tiny",
        overrides=[
            ("prompts.per_epoch", "5"),
            ("prompts.group_size", "5"),
            ("train.updates_per_epoch", "2"),
            ("sampling.batch_size", "8"),
            ("train.batch_size", "5"),
        ],
    )
    counts = count_epoch(config, 1, FAMILIES["sd3"])
    # updates of 12 and 13 samples: batches of 8 take 2 + 2, batches of 5 take 3 + 3
    assert (counts.rollout_batches, counts.padded_rollout) == (4, 7)
    assert (counts.train_batches, counts.padded_train) == (6, 5)
    assert counts.rollout_rows == 32 * 10


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        ([], 0.05),  # a tenth of the half with U >= 0
        ([("algorithm.gate.share_of", "all")], 0.1),
        ([("algorithm.gate.anchor", "base")], 0.1),  # at first, of what the base drew
        ([("algorithm.gate.mode", "all")], 1.0),
        ([("algorithm.gate.mode", "off")], 0.0),
        ([("algorithm.kl_coef", "0")], 0.0),
    ],
)
def test_reference_rows_follow_the_gate(overrides, share):
    counts = count_epoch(load_config("sd35-medium-ocr", overrides=overrides), 8, FAMILIES["sd3"])
    assert counts.gated_share == share
    assert counts.reference_rows == round(1152 * share) * 8 * 2


def test_counts_equal_those_of_a_run(tmp_path):
    from gardo.distributed.process import Runtime
    from gardo.run.folder import RunFolder
    from gardo.trainer import Trainer

    small = {
        "output_dir": str(tmp_path / "run"),
        "epochs": "1",
        "device": "cpu",
        "prompts.per_epoch": "3",
        "prompts.group_size": "3",
        "sampling.num_steps": "4",
        "sampling.sde_window": "0",
        "sampling.sde_window_range": "null",
        "sampling.guidance_scale": "2.0",
        "sampling.batch_size": "4",
        "train.batch_size": "3",
        "algorithm.gate.mode": "all",
        "evaluation.max_prompts": "1",
        "evaluation.num_steps": "2",
        "evaluation.grid_images": "0",
    }
    config = load_config("tiny", overrides=list(small.items()))
    counts = count_epoch(config, 1, FAMILIES["sd3"])
    folder = RunFolder.create(config)
    Trainer(config, Runtime("cpu")).train(folder)
    row = json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["forwards/reference"] == counts.reference_rows
    planned = counts.rollout_rows + counts.train_rows
    check = counts.rollout_batch * counts.rows_per_sample * counts.num_steps
    # a run may look at one rollout batch again, to compare log-probs before the first update
    assert planned <= row["forwards/policy"] <= planned + check


# --- memory and time -----------------------------------------------------------------------------


def test_memory_by_hand(medium):
    items = {item.name: item.bytes for item in medium.memory(medium.config).items}
    latent = 4 * 16 * 64 * 64
    assert items["trajectories"] == 1152 * 11 * latent
    assert items["reference velocities"] == 58 * 8 * latent
    assert items["LoRA of policy and reference"] == 2 * 4 * 18776064
    assert items["gradients and AdamW"] == 3 * 4 * 18776064
    assert items["average of the weights"] == 4 * 18776064
    assert items["transformer, bf16"] == 2 * (2243171520 + 226492416)
    assert items["image decoder"] == 4 * 83819683
    # 77 CLIP and 128 T5 tokens of 4096 numbers, and 2048 pooled ones
    embedding = 2 * (205 * 4096 + 2048)
    assert medium.memory(medium.config).embedding_bytes == embedding


def test_rewards_share_backbones_and_servers_bring_their_own():
    # aesthetic and clipscore: CLIP ViT-L; imagereward: BLIP; ocr: none; dinov3
    usual = load_config("sd35-medium-ocr", overrides=[("rewards.eval", "clipscore")])
    assert {i.name: i.bytes for i in reward_items(usual)} == {
        "CLIP ViT-L/14": 0.86e9,
        "BLIP-L": 0.9e9,
        "DINOv3 ViT-L/16": 0.6e9,
    }
    remote = ("rewards.servers", "{imagereward: [http://localhost:8000]}")
    served = load_config("sd35-medium-ocr", overrides=[("rewards.eval", "clipscore"), remote])
    assert "BLIP-L" not in {i.name for i in reward_items(served)}


def test_a_users_reward_declares_its_backbone_too(tmp_path, monkeypatch):
    (tmp_path / "planned_reward.py").write_text(
        "from gardo.rewards.base import Backbone\n"
        "def score(images, prompts, metadata): ...\n"
        "score.backbones = (Backbone('own', 5e9), Backbone('CLIP ViT-L/14', 0.86e9))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = {"proxy": "planned_reward:score", "aux": "[deqa]", "eval": "clipscore"}
    pairs = [(f"rewards.{key}", value) for key, value in rewards.items()]
    items = reward_items(load_config("tiny", overrides=pairs))
    assert {i.name: i.bytes for i in items} == {
        "CLIP ViT-L/14": 0.86e9,
        "mPLUG-Owl2": 16.4e9,
        "own": 5e9,
    }
    with pytest.raises(UserError, match="unknown reward 'clipscor'; did you mean 'clipscore'"):
        reward_items(load_config("tiny", overrides=[("rewards.proxy", "clipscor")]))


def test_stages_add_up(medium):
    config, memory = medium.config, medium.memory(medium.config)
    held = sum(item.bytes for item in memory.items)
    working = memory.stages["training"] - CONTEXT_BYTES
    activations = 9 * (medium.sample.saved_bytes + medium.sample.train_transient_bytes)
    assert working == pytest.approx((held + activations) * (1 + FRAGMENTATION))
    assert memory.peak == max(memory.stages.values())
    assert config.model.gradient_checkpointing is False


def test_options_save_what_they_promise(medium):
    def stages(**overrides):
        keys = [(k.replace("__", "."), v) for k, v in overrides.items()]
        return medium.memory(load_config("sd35-medium-geneval", overrides=keys)).stages

    usual = stages()
    checkpointed = stages(model__gradient_checkpointing="true")
    sliced = stages(model__vae_slicing="true")
    offloaded = stages(sampling__offload_trajectories="true")
    assert checkpointed["training"] < usual["training"] / 2
    assert sliced["decoding"] < usual["decoding"]
    # eight ninths of 0.75 GiB an image, in float32
    saved = (usual["decoding"] - sliced["decoding"]) / (1 + FRAGMENTATION)
    assert saved / GIB == pytest.approx(8 * 0.75, rel=0.1)
    trajectories = (1152 - 9) * 11 * 4 * 65536
    gone = (usual["training"] - offloaded["training"]) / (1 + FRAGMENTATION)
    assert gone == pytest.approx(trajectories + 58 * 8 * 4 * 65536)


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
@pytest.mark.parametrize("size", [24, 48, 80])
def test_single_gpu_recipes_fit_their_gpu(medium, task, size):
    config = load_config(f"sd35-medium-{task}-1gpu-{size}gb")
    # the base recipe has the same model; a tenth stays free, as the estimate is not measured
    assert medium.memory(config).peak < 0.9 * size * GIB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35-large-geneval", "flux1-dev-hps"])
def test_eight_gpu_recipes_fit_80_gb(name):
    config = load_config(name)
    assert Planner(config, 8).memory(config).peak < 0.9 * 80 * GIB


def test_time_is_flops_over_the_assumed_rate(medium):
    gpu = GPU("some", 80, half=100, single=10)
    rates = medium.tabulated_rates(gpu, utilization=0.5)
    assert rates.forward == pytest.approx(50e12 / medium.sample.forward_flops)
    times = medium.time(rates)
    assert times.stages["rollout"] == pytest.approx(1152 * 10 * 2 / rates.forward)
    assert times.epoch == pytest.approx(sum(times.stages.values()))
    assert "50%" in rates.source
    assert "not measured" in rates.source


def test_gpus_are_found_by_name_or_memory():
    assert find_gpu("H100", None).memory == 80
    assert find_gpu(None, 24).name == "rtx4090"
    assert find_gpu(None, 100).name == "h200"
    assert find_gpu(None, None).name == "h100"
    with pytest.raises(UserError, match="unknown GPU 'h10'; did you mean"):
        find_gpu("h10", 80)


# --- advice --------------------------------------------------------------------------------------


def stages_of(training):
    """A model of memory in which training alone matters."""

    def stages(config):
        return {"loading, with text encoders": 1, "rollout": 2, "decoding": 2} | {
            "training": training(config)
        }

    return stages


def test_advice_prefers_smaller_batches_and_keeps_them_equal():
    stages = stages_of(lambda c: 10 * c.train.batch_size + 5)
    advice = advise(load_config("sd35-medium-ocr"), stages, limit=70)
    assert [str(c) for c in advice.changes] == ["--sampling.batch_size 6", "--train.batch_size 6"]
    assert advice.fits
    assert (advice.config.sampling.batch_size, advice.config.train.batch_size) == (6, 6)


def test_advice_takes_back_what_is_not_needed():
    stages = stages_of(lambda c: (1 if c.model.gradient_checkpointing else 100) * 9)
    advice = advise(load_config("sd35-medium-ocr"), stages, limit=50)
    assert [c.key for c in advice.changes] == ["model.gradient_checkpointing"]


def test_advice_admits_defeat():
    advice = advise(load_config("sd35-medium-ocr"), stages_of(lambda c: 1000), limit=50)
    assert not advice.fits


def test_advice_of_a_real_model_fits(medium):
    limit = 30 * GIB
    advice = advise(medium.config, lambda c: medium.memory(c).stages, limit)
    assert advice.fits
    assert medium.memory(advice.config).peak <= limit < medium.memory(medium.config).peak


# --- the command line ----------------------------------------------------------------------------


def test_text_is_readable_in_80_columns(capsys):
    assert main(["tiny", "--gpus", "2", "--memory", "24"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("2 x rtx4090 of 24 GB", "rollout", "reference", "training", "FITS", "estimates"):
        assert word in text


def test_full_size_json(capsys):
    assert main(["sd35-medium-ocr", "--gpus=8", "--memory", "24", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["samples"] == 1152
    assert result["counts"]["samples_per_process"] == 144
    assert result["memory"]["limit"] == 24 * GIB
    assert result["memory"]["fits"] is False
    assert result["fits_with_changes"] is True
    assert {"key", "value", "reason"} == result["changes"][0].keys()
    assert "not measured" in result["time"]["source"]


def test_what_does_not_fit_says_what_to_change(capsys, medium, monkeypatch):
    monkeypatch.setattr("gardo.planning.estimate.Planner", lambda config, gpus: medium)
    main(["sd35-medium-geneval", "--memory", "24"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "DOES NOT FIT; it does with\n  --" in text
    main(["sd35-medium-geneval", "--memory", "12"])
    assert "Use a larger GPU or a smaller model." in " ".join(capsys.readouterr().out.split())


def test_measured_rates_say_so():
    made = plan(load_config("tiny", overrides=[("device", "cpu")]), measure=True)
    assert made.rates.source.startswith("measured on this machine (CPU")
    assert min(made.time.stages.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "0"], "--gpus: expected a whole number of at least 1, got '0'"),
        (["--gpus", "100"], "--gpus: expected at most the 64 samples of an update, got 100"),
        (["--memory", "much"], "--memory: expected a positive number, got 'much'"),
        (["--gpu", "h10"], "--gpu: unknown GPU 'h10'"),
        (["--utilization", "2"], "--utilization: expected a share of at most 1, got '2'"),
        (["--epochz", "3"], "unknown key 'epochz'; did you mean 'epochs'?"),
        (["nosuch"], "unknown recipe 'nosuch'"),
        (["--model.path", "a/b"], "model.path 'a/b': its architecture is not tabulated"),
        (["--model.path", "./a"], "model.path './a': no such folder"),
        (["--model.lora.targets", "nothing"], "model.lora.targets: no module"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gardo.plan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    message = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert message[-1].startswith("error: ")
    assert expected in message[-1]


def test_help_lists_the_options_and_needs_no_torch():
    code = (
        "import sys\nfrom gardo.plan import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"
    for word in ("--gpus N", "--memory GB", "--measure", "--json", "--train.batch_size"):
        assert word in done.stdout
