"""CLIP's loading and sharing, and the rewards that are CLIP as transformers saves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards import backbones
from gardo.rewards.aesthetic import HEAD_NAME
from gardo.rewards.backbones import clip_backbone
from gardo.rewards.pretrained import compute_dtype, load_pretrained, load_weights
from gardo.rewards.registry import build_reward
from gardo.types import UserError
from tests.rewards import tiny_models as tm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tm.clip_folder(tmp_path_factory.mktemp("clip"))


def copy(folder: Path, target: Path, without: str = "") -> Path:
    shutil.copytree(folder, target)
    if without:
        (target / without).unlink()
    return target


def direct(folder: Path, batch: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Normalised embeddings one at a time, with transformers' own processor and methods."""
    model = CLIPModel.from_pretrained(folder).eval()
    words = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        seen = [
            model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output[0]
            for picture in tm.pictures(batch)
        ]
        read = [
            model.get_text_features(input_ids=tm.clip_words(words, prompt)).pooler_output[0]
            for prompt in prompts
        ]
    normalised = [torch.stack(parts) for parts in (seen, read)]
    normalised = [part / part.norm(dim=1, keepdim=True) for part in normalised]
    return normalised[0], normalised[1], model.logit_scale.exp().item()


@pytest.mark.parametrize("side", [32, 48, 101])
def test_features_are_those_of_transformers(folder: Path, side: int) -> None:
    clip = clip_backbone(str(folder))
    batch = tm.images(side=side)
    seen, read, scale = direct(folder, batch, tm.PROMPTS)
    torch.testing.assert_close(clip.image_features(batch), seen, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.text_features(tm.PROMPTS), read, rtol=0, atol=1e-5)
    assert clip.logit_scale == pytest.approx(scale)
    assert clip.dimension == 24


def test_one_instance_for_all(folder: Path, tmp_path: Path) -> None:
    head = tmp_path / HEAD_NAME
    torch.save(published_head(24).state_dict(), head)
    first = clip_backbone(str(folder))
    assert clip_backbone(str(folder), torch.device("cpu"), "fp32") is first
    assert clip_backbone(str(folder), dtype="bf16") is not first
    assert build_reward("clipscore", path=str(folder)).clip is first  # type: ignore[attr-defined]
    aesthetic = build_reward("aesthetic", path=str(folder), head=str(head))
    assert aesthetic.clip is first  # type: ignore[attr-defined]


def test_each_text_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clip_backbone(str(folder), dtype=torch.float32)
    clip._texts.clear()
    encoded: list[str] = []
    encode = clip._encode
    monkeypatch.setattr(clip, "_encode", lambda text: (encoded.append(text), encode(text))[1])
    first = clip.text_features(["one", "two", "one"])
    again = clip.text_features(["two", "three"])
    assert encoded == ["one", "two", "three"]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[0])
    monkeypatch.setattr(backbones, "MAX_CACHED_TEXTS", 3)
    assert torch.equal(clip.text_features(["one", "four"])[0], first[0])
    assert set(clip._texts) == {"one", "four"}
    assert clip.text_features([]).shape == (0, 24)


def test_half_precision(folder: Path) -> None:
    full = clip_backbone(str(folder)).image_features(tm.images())
    half = clip_backbone(str(folder), dtype="bf16").image_features(tm.images())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.02)
    torch.testing.assert_close(half.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)
    assert compute_dtype(None, "cuda") == torch.float16
    assert compute_dtype(None, "cuda", "bf16") == torch.bfloat16
    assert compute_dtype(None, "cpu") == torch.float32
    with pytest.raises(UserError, match="dtype: expected fp32, fp16 or bf16, got 'int8'"):
        compute_dtype("int8", "cpu")


def test_clipscore_is_the_cosine(folder: Path) -> None:
    reward = build_reward("clipscore", path=str(folder))
    seen, read, _ = direct(folder, tm.images(), tm.PROMPTS)
    torch.testing.assert_close(tm.score(reward), (seen * read).sum(1), rtol=0, atol=1e-5)
    tm.check_reward(reward)


def test_pickscore_is_the_logit(folder: Path, tmp_path: Path) -> None:
    reward = build_reward("pickscore", path=str(folder))
    model = CLIPModel.from_pretrained(folder).eval()
    words = CLIPTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        tm.pictures(tm.images()), return_tensors="pt"
    )["pixel_values"]
    tokens = words(tm.PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(tm.score(reward), logits, rtol=0, atol=1e-4)
    tm.check_reward(reward, tolerance=1e-4)
    # the published model has its tokenizer and preprocessing elsewhere
    bare = copy(folder, tmp_path / "bare")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    apart = build_reward("pickscore", path=str(bare), processor=str(folder))
    assert torch.equal(tm.score(apart), tm.score(reward))


def published_head(width: int) -> nn.Module:
    """The aesthetic predictor's module: its keys are layers.{0,2,4,6,7}.{weight,bias}."""

    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [(width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
            self.layers = nn.ModuleDict(
                {str(i): nn.Linear(*s) for i, s in zip((0, 2, 4, 6, 7), sizes, strict=True)}
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers.values():
                x = layer(x)
            return x

    torch.manual_seed(3)
    return Published()


def test_aesthetic_is_the_head_on_the_normalised_embedding(folder: Path, tmp_path: Path) -> None:
    head = published_head(24)
    torch.nn.init.normal_(head.layers["0"].weight)  # so that images differ by more than the noise
    file = tmp_path / HEAD_NAME
    torch.save(head.state_dict(), file)
    assert len(torch.load(file, weights_only=True)) == 10
    reward = build_reward("aesthetic", path=str(folder), head=str(tmp_path))
    seen, _, _ = direct(folder, tm.images(), ["one"])
    with torch.no_grad():
        expected = head(seen)[:, 0]
    torch.testing.assert_close(tm.score(reward), expected, rtol=0, atol=1e-5)
    assert not reward.spec.needs_prompt
    tm.check_reward(reward)


def test_a_wrong_head_is_refused(folder: Path, tmp_path: Path) -> None:
    state = published_head(24).state_dict()

    def build(**changes: Tensor | None) -> None:
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        torch.save(changed, file)
        build_reward("aesthetic", path=str(folder), head=str(file))

    with pytest.raises(UserError, match="lacks weights: 'layers.7.bias'"):
        build(**{"layers.7.bias": None})
    with pytest.raises(UserError, match="holds unknown weights: 'layers.9.bias'"):
        build(**{"layers.9.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"expected shape \[1024, 24\], got \[1024, 768\]"):
        build(**{"layers.0.weight": torch.zeros(1024, 768)})
    with pytest.raises(UserError, match="fetch it with `curl"):
        build_reward("aesthetic", path=str(folder), head=str(tmp_path / "none.pth"))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "ran"), "w"))  # type: ignore[return-value]

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_weights(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_weights(tmp_path / "text.pt")


# --- what can go wrong with a checkpoint


def test_a_missing_folder() -> None:
    with pytest.raises(UserError, match="'./nowhere': no such folder"):
        clip_backbone("./nowhere")
    with pytest.raises(UserError, match="'clip': no such folder"):
        clip_backbone("clip")


def test_a_repository_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'no-such/repository': AutoConfig cannot be loaded"):
        clip_backbone("no-such/repository")


def test_a_gated_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoConfig

    def refuse(*args: object, **kwargs: object) -> None:
        gated = GatedRepoError.__new__(GatedRepoError)  # as the hub raises it, without a response
        raise OSError("You are trying to access a gated repo.") from gated

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match="'some/model' is gated: accept its licence at https://"):
        clip_backbone("some/model")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "AutoConfig cannot be loaded"),
        ("model.safetensors", "CLIPModel cannot be loaded"),
        ("tokenizer.json", "expected a tokenizer of"),
        ("preprocessor_config.json", "preprocessor_config.json cannot be loaded"),
    ],
)
def test_a_missing_file(folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    path = copy(folder, tmp_path / "clip", without=missing)
    with pytest.raises(UserError, match=message):
        clip_backbone(str(path))


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "clip")
    state = load_file(path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of the weights of CLIPModel"):
        clip_backbone(str(path))


def test_another_architecture(tmp_path: Path) -> None:
    path = tm.dinov3_folder(tmp_path / "dino")
    with pytest.raises(UserError, match="expected a checkpoint of type 'clip', got 'dinov3_vit'"):
        clip_backbone(str(path))
    with pytest.raises(UserError, match="expected a checkpoint of type 'bert'"):
        load_pretrained("BertModel", "bert", str(path), torch.float32)


def test_an_unsupported_preprocessing_step(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "clip")
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "resample": 1}))
    with pytest.raises(UserError, match="preprocessor_config.json: resample: expected 2"):
        clip_backbone(str(path))
