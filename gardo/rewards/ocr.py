"""How much of the text that a prompt quotes can be read in the image.

The formula is Flow-GRPO's (``flow_grpo/ocr.py``, arXiv 2505.05470); the reader is RapidOCR, whose
wheel carries its models.
"""

from __future__ import annotations

import os
import queue
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import check_batch, to_bytes
from gardo.types import RewardOutput, UserError

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
MAX_DEFAULT_WORKERS = 8


class OCRReward(Reward):
    """``1 - distance / length`` of the quoted text; 1 where the image contains it.

    Safe to call from several threads.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))

    def __init__(
        self,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        min_confidence: float = 0.5,
        upside_down: bool = False,
    ) -> None:
        """Load the reader.

        Args:
            device: ignored, the reader computes on the CPU.
            workers: images read at the same time, each by a thread with about 250 MB of memory;
                None: one for each CPU that this process may use, at most 8.
            min_confidence: lines that the reader is less sure of are dropped; 0.5 is also what
                Flow-GRPO's reader uses.
            upside_down: turn lines that stand on their head; Flow-GRPO does not.

        Raises:
            UserError: the packages of the extra ``ocr`` are not installed.
            ValueError: a parameter out of range.
        """
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers: expected an integer >= 1, got {workers!r}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence: expected a number in [0, 1], got {min_confidence}")
        # a reader keeps state while it reads, so each thread borrows one of its own
        self._readers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(workers):
            self._readers.put(_load_reader(min_confidence, upside_down))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score as `Reward.score`; the detail ``exact`` is 1 where the image contains the text.

        Raises:
            ValueError: a prompt without a quoted text.
        """
        check_batch(images, prompts)
        targets = [normalise(_target(prompt)) for prompt in prompts]
        safe, finite = finite_images(images)
        pixels = to_bytes(safe).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        texts = [normalise(text) for text in self._pool.map(self._read, pixels)]
        values = [text_score(text, target) for text, target in zip(texts, targets, strict=True)]
        scores = torch.tensor(values, dtype=torch.float32, device=images.device)
        exact = torch.tensor(
            [float(target in text) for text, target in zip(texts, targets, strict=True)],
            device=images.device,
        )
        return RewardOutput(scores, {"exact": exact}).map(lambda v: v.where(finite, torch.nan))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        try:
            _target(prompt)
        except ValueError as error:
            return str(error)
        return None

    def _read(self, pixels: Any) -> str:
        """All lines of an image ``[H, W, 3]`` uint8, from top to bottom, put together."""
        reader = self._readers.get()
        try:
            result = reader(pixels[:, :, ::-1])  # it expects blue, green, red
        finally:
            self._readers.put(reader)
        # an image in which no text is found gives a result without texts
        return "".join(getattr(result, "txts", None) or ())


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of quotes, ``"..."`` or ``“...”``; None without a pair."""
    found = _QUOTED.search(prompt)
    return None if found is None else found[1] if found[1] is not None else found[2]


def normalise(text: str) -> str:
    """Without spaces and in lower case, as texts are compared."""
    return text.replace(" ", "").lower()


def text_score(text: str, target: str) -> float:
    """``1 - d / len(target)``.

    ``d`` is 0 where ``text`` contains the target, else their Levenshtein distance, at most
    ``len(target)``. Both are normalised; ``target`` is not empty.
    """
    distance = 0 if target in text else edit_distance(text, target)
    return 1.0 - min(distance, len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions of a character.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
            diagonal, row[j] = row[j], best
    return row[-1]


def _target(prompt: str) -> str:
    text = quoted_text(prompt)
    if text is None:
        raise ValueError('expected a text in quotes, "..." or “...”, got none')
    if not normalise(text):
        raise ValueError("expected a text in quotes, got nothing between them")
    return text


def _load_reader(min_confidence: float, upside_down: bool) -> Any:
    try:
        import onnxruntime  # noqa: F401  # rapidocr imports it when it reads its first image
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"the reward 'ocr' needs the package '{error.name}': pip install 'gardo[ocr]'"
        ) from None
    threads = "EngineConfig.onnxruntime.{}_op_num_threads"
    return RapidOCR(
        params={
            "Global.text_score": min_confidence,
            "Global.use_cls": upside_down,
            "Global.log_level": "error",
            threads.format("intra"): 1,
            threads.format("inter"): 1,
        }
    )
