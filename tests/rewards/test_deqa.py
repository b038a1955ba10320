"""DeQA-Score: each part of mPLUG-Owl2 against transformers or a formula, then the score."""

from __future__ import annotations

import json
import math
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards.base import Reward
from gardo.rewards.deqa import AFTER, BEFORE, pad_to_square
from gardo.rewards.mplug_owl2 import AbstractorSizes, LanguageSizes, MPlugOwl2, VisionSizes
from gardo.rewards.registry import build_reward
from gardo.types import UserError
from tests.rewards import tiny_models as tm

LANGUAGE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": tm.SIDE,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
ABSTRACTOR = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_learnable_queries": 5,
    "layer_norm_eps": 1e-6,
}
LEVELS = ("excellent", "good", "fair", "poor", "bad")


def tokenizer() -> LlamaTokenizer:
    """Characters, and a token for each level word's beginning, as LLaMA has the whole words."""
    starts = [f"\u2581{level[0]}" for level in LEVELS]
    characters = ["\u2581", "\n", "?", ":", ".", *string.ascii_letters]
    pieces = ["<unk>", "<s>", "</s>", *characters, *starts]
    merges = [("\u2581", start[1]) for start in starts]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


@pytest.fixture(scope="module")
def model() -> MPlugOwl2:
    words = len(tokenizer())
    built = MPlugOwl2(
        LanguageSizes(**LANGUAGE, vocab_size=words),
        VisionSizes(**VISION),
        AbstractorSizes(**ABSTRACTOR),
    )
    tm.randomise(built, seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in built.named_buffers():
        assert name.endswith("pos_embed")
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return built.eval()


@pytest.fixture(scope="module")
def folder(model: MPlugOwl2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: sharded safetensors with an index, config.json, tokenizer, preprocessing."""
    path = tmp_path_factory.mktemp("deqa")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    keys = sorted(state)
    shards = {"model-00001-of-00002.safetensors": keys[::2]}
    shards["model-00002-of-00002.safetensors"] = keys[1::2]
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, path / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "mplug_owl2",
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM"},
        "vocab_size": len(tokenizer()),
        "rope_scaling": None,
        "attention_bias": False,
        **LANGUAGE,
        "visual_config": {"visual_model": VISION, "visual_abstractor": ABSTRACTOR},
    }
    (path / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(path)
    processor = {"crop_size": tm.SIDE, "do_center_crop": True, "resample": 3, "size": tm.SIDE}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    (path / "modeling_mplug_owl2.py").write_text("raise SystemExit('code of a checkpoint ran')")
    return path


@pytest.fixture
def restored(model: MPlugOwl2) -> Iterator[MPlugOwl2]:
    """The model, put back afterwards."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    yield model
    model.load_state_dict(state)


def test_the_vision_tower_is_clips_with_another_order_of_projections(model: MPlugOwl2) -> None:
    vision = model.model.vision_model
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act="quick_gelu")).eval()
    state = vision.state_dict()
    renamed = {
        "embeddings.class_embedding": state["embeddings.cls_token"][0, 0],
        "embeddings.position_embedding.weight": state["embeddings.position_embedding"][0],
        "embeddings.patch_embedding.weight": state["embeddings.patch_embed.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = state[f"embeddings.pre_layernorm.{kind}"]
        renamed[f"post_layernorm.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(2):
            old = new = f"encoder.layers.{i}"
            mixed = state[f"{old}.self_attn.query_key_value.{kind}"]
            # heads outermost, then query, key and value
            for letter, part in zip("qkv", mixed.unflatten(0, (4, 3, 8)).unbind(1), strict=True):
                renamed[f"{new}.self_attn.{letter}_proj.{kind}"] = part.flatten(0, 1)
            renamed[f"{new}.self_attn.out_proj.{kind}"] = state[f"{old}.self_attn.dense.{kind}"]
            renamed[f"{new}.layer_norm1.{kind}"] = state[f"{old}.input_layernorm.{kind}"]
            renamed[f"{new}.layer_norm2.{kind}"] = state[f"{old}.post_attention_layernorm.{kind}"]
            for layer in ("fc1", "fc2"):
                renamed[f"{new}.mlp.{layer}.{kind}"] = state[f"{old}.mlp.{layer}.{kind}"]
    clip.load_state_dict(renamed)
    pixels = torch.randn(2, 3, tm.SIDE, tm.SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = clip.post_layernorm(clip(pixel_values=pixels).last_hidden_state)
        torch.testing.assert_close(vision(pixels), expected, rtol=0, atol=1e-4)


def test_the_abstractor_follows_its_formula(model: MPlugOwl2) -> None:
    abstractor = model.model.visual_abstractor
    state = abstractor.state_dict()
    patches = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(1))[0]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["query_embeds"][0]
    for i in range(2):
        at = f"encoder.layers.{i}.crossattention"
        x = norm(x, f"{at}.norm1")
        source = torch.cat([x, norm(patches, f"{at}.normk")])
        places = [state[f"{at}.attention.{k}_pos_embed"] for k in "qk"]
        q = linear(x + places[0], f"{at}.attention.query")
        k = linear(source + torch.cat(places), f"{at}.attention.key")
        v = linear(source, f"{at}.attention.value")
        heads = [
            (q[:, part] @ k[:, part].T / math.sqrt(16)).softmax(1) @ v[:, part]
            for part in (slice(0, 16), slice(16, 32))
        ]
        x = x + linear(torch.cat(heads, 1), f"{at}.output.out_proj")
        y = norm(x, f"{at}.output.norm2")
        mlp = f"{at}.output.mlp"
        gated = F.silu(linear(y, f"{mlp}.w1")) * linear(y, f"{mlp}.w3")
        x = x + linear(norm(gated, f"{mlp}.ffn_ln", 1e-6), f"{mlp}.w2")
    expected = torch.cat([linear(x, "visual_fc"), state["vit_eos"][0]])
    with torch.no_grad():
        torch.testing.assert_close(abstractor(patches[None])[0], expected, rtol=0, atol=1e-4)


def inputs(model: MPlugOwl2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, pixels, tokens, and the embedded sequence that they make (6 tokens of image)."""
    before, after = torch.tensor([1, 9, 4]), torch.tensor([7, 7, 12, 30])
    pixels = torch.randn(2, 3, tm.SIDE, tm.SIDE, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        seen = model.model.visual_abstractor(model.model.vision_model(pixels))
        texts = [model.model.embed_tokens(ids).expand(2, -1, -1) for ids in (before, after)]
    return before, pixels, after, torch.cat([texts[0], seen, texts[1]], dim=1)


def test_with_equal_modalities_the_language_model_is_llama(restored: MPlugOwl2) -> None:
    state = restored.state_dict()
    for key in state:
        if ".multiway.1." in key:
            state[key].copy_(state[key.replace(".multiway.1.", ".multiway.0.")])
    before, pixels, after, embedded = inputs(restored)
    llama = LlamaForCausalLM(LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer()))).eval()
    llama.load_state_dict(
        {
            key.replace(".multiway.0.", "."): tensor
            for key, tensor in state.items()
            if ".multiway.1." not in key and "vis" not in key
        }
    )
    with torch.no_grad():
        expected = llama(inputs_embeds=embedded).logits[:, -1]
        got = restored(before, pixels, after)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_the_image_has_norms_keys_and_values_of_its_own(model: MPlugOwl2) -> None:
    """The first layer on its own: what each token gets, one token at a time."""
    *_, embedded = inputs(model)
    layer, state = model.model.layers[0], model.model.layers[0].state_dict()
    seen = [3 <= i < 9 for i in range(embedded.shape[1])]

    def norm(x: Tensor, name: str, of_image: bool) -> Tensor:
        weight = state[f"{name}.multiway.{int(of_image)}.weight"]
        return x / (x.square().mean() + 1e-5).sqrt() * weight

    def turned(x: Tensor, place: int) -> Tensor:
        out = x.clone()
        for i in range(6):  # width 12: pairs (i, i + 6)
            angle = place / 10000 ** (i / 6)
            out[i] = x[i] * math.cos(angle) - x[i + 6] * math.sin(angle)
            out[i + 6] = x[i + 6] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    x = embedded[0]
    rows = [norm(x[i], "input_layernorm", seen[i]) for i in range(len(x))]
    last = len(x) - 1
    query = (state["self_attn.q_proj.weight"] @ rows[last]).unflatten(0, (4, 12))
    kv = {
        name: [
            (state[f"self_attn.{name}_proj.multiway.{int(seen[i])}.weight"] @ rows[i]).unflatten(
                0, (2, 12)
            )
            for i in range(len(x))
        ]
        for name in "kv"
    }
    read = []
    for head in range(4):
        keys = [turned(kv["k"][i][head // 2], i) for i in range(len(x))]
        q = turned(query[head], last)
        weights = torch.stack([q @ key / math.sqrt(12) for key in keys]).softmax(0)
        read.append(sum(w * kv["v"][i][head // 2] for i, w in enumerate(weights)))
    h = x[last] + state["self_attn.o_proj.weight"] @ torch.cat(read)
    y = norm(h, "post_attention_layernorm", False)
    gated = F.silu(state["mlp.gate_proj.weight"] @ y) * (state["mlp.up_proj.weight"] @ y)
    expected = h + state["mlp.down_proj.weight"] @ gated

    captured: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, out: captured.append(out))
    before, pixels, after, _ = inputs(model)
    with torch.no_grad():
        model(before, pixels, after)
    hook.remove()
    torch.testing.assert_close(captured[0][0, last], expected, rtol=0, atol=1e-4)


# --- the reward


@pytest.fixture(scope="module")
def reward(folder: Path) -> Reward:
    return build_reward("deqa", path=str(folder))


def test_the_score_is_the_expected_level(reward: Reward, folder: Path, model: MPlugOwl2) -> None:
    words = LlamaTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    before, after = (
        torch.tensor(words(text)["input_ids"]) for text in (BEFORE, AFTER)
    )  # a start token in front of each
    assert before[0] == after[0] == words.bos_token_id
    levels = [words(level)["input_ids"][1] for level in LEVELS]
    expected = []
    with torch.no_grad():
        for picture in tm.pictures(tm.images()):
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            chances = model(before, pixels, after[1:])[0, levels].softmax(0)
            expected.append(chances @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    torch.testing.assert_close(tm.score(reward), torch.stack(expected), rtol=0, atol=1e-4)
    assert reward.spec.value_range == (1.0, 5.0)
    assert not reward.spec.needs_prompt


def test_any_batch(reward: Reward) -> None:
    tm.check_reward(reward, tolerance=1e-4)


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (30, 30)])
def test_other_shapes_are_centred_on_a_square(size: tuple[int, int]) -> None:
    image = tm.images(1, 41)[:, :, : size[0], : size[1]]
    color = (0.48145466, 0.4578275, 0.40821073)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(c * 255) for c in color))
    square.paste(tm.pictures(image)[0], ((side - size[1]) // 2, (side - size[0]) // 2))
    got = tm.pictures(pad_to_square(image, color))[0]
    assert got.tobytes() == square.tobytes()


def changed(folder: Path, target: Path, **changes: object) -> str:
    """A copy of the folder with other entries in its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_wrong_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a checkpoint of type 'mplug_owl2', got 'llama'"):
        build_reward("deqa", path=changed(folder, tmp_path / "a", model_type="llama"))
    with pytest.raises(UserError, match="lacks weights: 'model.layers.2.input_layernorm"):
        build_reward("deqa", path=changed(folder, tmp_path / "b", num_hidden_layers=3))
    with pytest.raises(UserError, match="holds unknown weights: 'model.layers.1.input_layernorm"):
        build_reward("deqa", path=changed(folder, tmp_path / "c", num_hidden_layers=1))
    with pytest.raises(UserError, match="rope_scaling and attention_bias"):
        build_reward("deqa", path=changed(folder, tmp_path / "d", rope_scaling={"type": "linear"}))
    part = changed(folder, tmp_path / "e")
    (Path(part) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="no 'model-00002-of-00002.safetensors' in it"):
        build_reward("deqa", path=part)
    bare = changed(folder, tmp_path / "f")
    for file in Path(bare).glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match="no model.safetensors or pytorch_model.bin in it"):
        build_reward("deqa", path=bare)
    words = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3}, merges=[])
    words.save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="five different tokens"):
        build_reward("deqa", path=str(folder), processor=str(tmp_path / "words"))


def test_a_tokenizer_of_sentencepiece_names_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(folder, tmp_path / "a")
    (Path(path) / "tokenizer.json").rename(Path(path) / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package 'sentencepiece': pip install 'gardo\["):
        build_reward("deqa", path=path)
