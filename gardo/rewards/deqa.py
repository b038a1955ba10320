"""DeQA-Score: image quality as the expected level that mPLUG-Owl2 would name."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.base import Backbone, Reward, RewardSpec
from gardo.rewards.mplug_owl2 import (
    AbstractorSizes,
    LanguageSizes,
    MPlugOwl2,
    VisionSizes,
    sizes,
)
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import ImageTransform, check_batch
from gardo.rewards.pretrained import (
    compute_dtype,
    load_folder,
    load_part,
    load_shards,
    load_state,
    load_transform,
    shared,
)
from gardo.types import RewardOutput, UserError

DEQA = "zhiyuanyou/DeQA-Score-Mix3"
# The question that the model was trained on; the image stands between the two parts.
BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}


class DeQAReward(Reward):
    """Expected quality, 1 (bad) to 5 (excellent) (You et al., arXiv 2501.11561).

    The softmax over the five level words as next token weighs their values. The prompt does not
    matter. No code from the checkpoint is run.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(
        value_range=(1.0, 5.0), needs_prompt=False, batch_size=16
    )
    backbones = (Backbone("mPLUG-Owl2", 2 * 8.2e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = DEQA,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        processor: str | None = None,
    ) -> None:
        """Load DeQA-Score.

        Args:
            device: where it computes.
            path: hub id or folder of the full model (not of the LoRA weights).
            dtype: fp32, fp16 or bf16; None: fp16 on CUDA, fp32 on CPU.
            revision: hub revision.
            processor: hub id or folder of tokenizer and preprocessing; None: ``path``.

        Raises:
            UserError: a file is missing, or its weights are not those of the model, each of them.
        """
        compute = compute_dtype(dtype, device)
        self.device = torch.device(device)
        key = ("deqa", path, revision, processor, str(self.device), compute)
        self.scorer = shared(
            key, lambda: load_deqa(path, revision, processor, self.device, compute)
        )

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        if not len(images):
            return RewardOutput(torch.zeros(0, device=images.device))
        safe, finite = finite_images(images.to(self.device))
        scores = self.scorer.quality(safe).where(finite, torch.nan)
        return RewardOutput(scores.to(images.device))


@dataclass(frozen=True)
class DeQAScorer:
    """The loaded model and what it is asked.

    Attributes:
        model: in eval mode on its device.
        transform: of square images.
        before, after: token ids around the image.
        levels: token ids of the five levels, in the order of ``LEVELS``.
    """

    model: MPlugOwl2
    transform: ImageTransform
    before: Tensor
    after: Tensor
    levels: Tensor

    def quality(self, images: Tensor) -> Tensor:
        """Expected level ``[B]`` float32 of finite images in [0, 1]."""
        pixels = self.transform(pad_to_square(images, self.transform.mean))
        pixels = pixels.to(self.model.lm_head.weight.dtype)
        chances = self.model(self.before, pixels, self.after)[:, self.levels].softmax(dim=1)
        return chances @ torch.tensor(list(LEVELS.values()), device=chances.device)


def pad_to_square(images: Tensor, color: Sequence[float]) -> Tensor:
    """Centre images on a square of a colour, given in [0, 1] and cut to a whole byte."""
    height, width = images.shape[-2:]
    side = max(height, width)
    if height == width:
        return images
    left, top = (side - width) // 2, (side - height) // 2
    edges = (left, side - width - left, top, side - height - top)
    channels = [
        F.pad(images[:, i], edges, value=int(value * 255) / 255) for i, value in enumerate(color)
    ]
    return torch.stack(channels, dim=1)


def load_deqa(
    path: str,
    revision: str | None,
    processor: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> DeQAScorer:
    """Load model, tokenizer and preprocessing.

    Raises:
        UserError: see `DeQAReward`.
    """
    folder = load_folder(path, revision)
    files = load_folder(processor) if processor else folder
    words = _load_tokenizer(files)
    model = _load_model(folder, path, dtype)

    def ids(text: str) -> list[int]:
        found: list[int] = words(text, add_special_tokens=False)["input_ids"]
        return found

    levels = [ids(level)[:1] for level in LEVELS]
    known = {i for level in levels for i in level} - {words.unk_token_id}
    vocabulary = len(model.lm_head.weight)
    if len(known) != len(LEVELS) or max(known) >= vocabulary:
        raise UserError(
            f"'{files}': expected a tokenizer in which {', '.join(LEVELS)} begin with five "
            f"different tokens below {vocabulary}, got {levels}"
        )

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    return DeQAScorer(
        model=model.to(device).eval().requires_grad_(False),
        transform=load_transform(str(files)),
        before=tensor([words.bos_token_id, *ids(BEFORE)]),
        after=tensor(ids(AFTER)),
        levels=tensor([level[0] for level in levels]),
    )


def _load_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():  # transformers converts a tokenizer.model
        for package in ("sentencepiece", "google.protobuf"):
            try:
                importlib.import_module(package)
            except ModuleNotFoundError:
                name = package.removeprefix("google.")
                raise UserError(
                    f"'{folder}': reading its tokenizer.model needs the package '{name}': "
                    "pip install 'gardo[rewards]'"
                ) from None
    return load_part("LlamaTokenizer", str(folder))


def _load_model(folder: Path, path: str, dtype: torch.dtype) -> MPlugOwl2:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        visual = config.get("visual_config") or {}
        parts = (
            sizes(LanguageSizes, config),
            sizes(VisionSizes, visual.get("visual_model", {})),
            sizes(AbstractorSizes, visual.get("visual_abstractor", {})),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"'{path}': config.json cannot be read: {error}") from None
    if kind != "mplug_owl2":
        raise UserError(f"'{path}': expected a checkpoint of type 'mplug_owl2', got '{kind}'")
    if config.get("rope_scaling") or config.get("attention_bias"):
        raise UserError(f"'{path}': rope_scaling and attention_bias: expected none of them")
    with torch.device("meta"):  # 8 billion parameters: no memory for what is replaced at once
        model = MPlugOwl2(*parts)
    state = {
        key: tensor.to(dtype)
        for key, tensor in load_shards(folder).items()
        if not re.search(r"rotary_emb\.inv_freq$", key)  # older files hold what follows from theta
    }
    load_state(model, state, folder, assign=True)
    return model
