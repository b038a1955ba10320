"""Rewards that a vision-language model gives through an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Backbone, Reward, RewardSpec
from gardo.rewards.chat import ChatClient, encode_png
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import check_batch, resize_bytes, to_bytes
from gardo.types import RewardOutput, UserError

LOCAL_ENDPOINT = "http://127.0.0.1:8000/v1"  # where vLLM and SGLang serve unless told otherwise


class ChatReward(Reward):
    """Asks a model about each image and reads a number from its answer.

    An answer without exactly one number where it is expected is a missing score (NaN); the detail
    ``unparsed`` is 1 there and 0 elsewhere. An endpoint that does not answer ends the run
    (`RewardUnavailable`): no failure is ever a score of 0.
    """

    name: ClassVar[str]
    max_tokens: ClassVar[int] = 512
    side: ClassVar[int | None] = None

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 16,
        api_key_env: str | None = None,
        image_size: int | None = None,
    ) -> None:
        """Connect to an endpoint; nothing is sent before the first image.

        Args:
            url: base URL, such as ``http://127.0.0.1:8000/v1``.
            model: name under which the endpoint serves the model.
            timeout: seconds that one answer may take.
            retries: further attempts after a failure that may pass.
            concurrency: images that are asked about at the same time.
            api_key_env: environment variable that holds the key; None for an endpoint without one.
            image_size: side in pixels to resize images to; None: as the model was published.

        Raises:
            UserError: httpx is missing, or the variable is not set.
            ValueError: a number out of range.
        """
        for name, number in (("concurrency", concurrency), ("image_size", image_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.client = ChatClient(self.name, url, model, timeout, retries, api_key_env)
        self.concurrency = concurrency
        self.image_size = image_size or self.side

    @abstractmethod
    def question(self, prompt: str) -> str:
        """The text that goes with an image."""

    @abstractmethod
    def parse(self, answer: str) -> float:
        """The score in an answer; NaN where there is none."""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        safe, finite = finite_images(images)
        pixels = to_bytes(safe)
        if self.image_size is not None:
            pixels = resize_bytes(pixels, (self.image_size, self.image_size), "bicubic")
        pixels = pixels.permute(0, 2, 3, 1).cpu()
        rows = finite.nonzero().flatten().tolist()

        def ask(row: int) -> float:
            png = encode_png(pixels[row])
            return self.parse(self.client.ask(self.question(prompts[row]), png, self.max_tokens))

        scores = torch.full((len(images),), torch.nan)
        unparsed = torch.zeros(len(images))
        if rows:
            threads = ThreadPoolExecutor(min(self.concurrency, len(rows)))
            try:
                scores[rows] = torch.tensor(list(threads.map(ask, rows)))
            finally:  # after an error nothing more is asked
                threads.shutdown(cancel_futures=True)
            unparsed[rows] = scores[rows].isnan().float()
        return RewardOutput(scores, {"unparsed": unparsed}).map(lambda v: v.to(images.device))


class UnifiedRewardReward(ChatReward):
    """UnifiedReward's rating of alignment and quality, 1 to 5 (Wang et al., arXiv 2503.05236).

    Asked in the model's published form. flow_grpo divides the rating by 5.
    """

    name = "unifiedreward"
    side = 512  # as flow_grpo sends it
    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(1.0, 5.0), remote=True)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        url: str = LOCAL_ENDPOINT,
        model: str = "UnifiedReward-7b-v1.5",
        **options: Any,
    ) -> None:
        """Connect to the endpoint; ``options`` are those of `ChatReward`."""
        super().__init__(url, model, **options)

    def question(self, prompt: str) -> str:
        return UNIFIED_REWARD_QUESTION.format(prompt=prompt)

    def parse(self, answer: str) -> float:
        # the model may quote the rating on its way to it; two different ones are no answer
        found = set(re.findall(r"Final Score\**:\**\s*\**(\d+(?:\.\d+)?)", answer))
        score = float(found.pop()) if len(found) == 1 else math.nan
        return score if 1.0 <= score <= 5.0 else math.nan


class HPSv3Reward(ChatReward):
    """HPSv3's preference score mu (Ma et al., arXiv 2508.03789), about -5 to 15.

    With ``url`` an endpoint gives it as the only thing in its answer; without, the package
    ``hpsv3`` computes it in process.
    """

    name = "hpsv3"
    max_tokens = 32
    spec: ClassVar[RewardSpec] = RewardSpec(batch_size=16)
    backbones = (Backbone("Qwen2-VL-7B", 2 * 8.29e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        url: str | None = None,
        model: str = "HPSv3",
        path: str | None = None,
        **options: Any,
    ) -> None:
        """Connect to an endpoint or load the package.

        Args:
            device: where the package computes.
            url: base URL of an endpoint; None: the package ``hpsv3``.
            model: name under which the endpoint serves the model.
            path: checkpoint file for the package; None: it downloads its own.
            options: those of `ChatReward`, with a URL only.

        Raises:
            UserError: neither a URL nor the package.
        """
        self.package: Any = None
        if url is not None:
            super().__init__(url, model, **options)
            self.spec = replace(self.spec, remote=True)  # type: ignore[misc]
            return
        if options:
            raise ValueError(f"{min(options)}: is for an endpoint; expected url as well")
        try:
            from hpsv3 import HPSv3RewardInferencer
        except ModuleNotFoundError:
            raise UserError(
                "reward 'hpsv3': expected a parameter url (an OpenAI-compatible endpoint that "
                "answers with the score) or the package: pip install hpsv3"
            ) from None
        self.package = HPSv3RewardInferencer(device=str(device), checkpoint_path=path)

    def question(self, prompt: str) -> str:
        return prompt

    def parse(self, answer: str) -> float:
        number = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*", answer)
        return float(number[1]) if number else math.nan

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        if self.package is None:
            return super().score(images, prompts, metadata)
        from PIL import Image

        check_batch(images, prompts)
        scores = torch.full((len(images),), torch.nan, device=images.device)
        safe, finite = finite_images(images)
        rows = finite.nonzero().flatten()
        if len(rows):
            pixels = to_bytes(safe[rows]).permute(0, 2, 3, 1).cpu().numpy()
            with torch.inference_mode():
                rated = self.package.reward(
                    prompts=[prompts[row] for row in rows.tolist()],
                    image_paths=[Image.fromarray(picture) for picture in pixels],
                )
            mu = rated[:, 0] if rated.ndim == 2 else rated  # beside it is sigma
            scores[rows] = mu.detach().float().to(images.device)
        return RewardOutput(scores)


# The wording that the model is published and trained with; another one lowers its agreement.
UNIFIED_REWARD_QUESTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task "
    "is to evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess "
    "how well this image aligns with the provided caption. Consider the accuracy of depicted "
    "objects, their relationships, and attributes as described in the caption.\n2. Overall Image "
    "Quality: Examine the visual quality of this image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score "
    "from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
