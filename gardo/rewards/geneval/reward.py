"""The geneval reward: whether the objects that a record asks for are in the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.backbones import CLIP_LARGE, CLIP_LARGE_BACKBONE, clip_backbone
from gardo.rewards.base import Backbone, Reward, RewardSpec
from gardo.rewards.geneval.colors import ColorClassifier, crop_object
from gardo.rewards.geneval.detector import MASK2FORMER_SMALL, load_detector
from gardo.rewards.geneval.rules import (
    Detection,
    Limits,
    Record,
    Verdict,
    colored_objects,
    judge,
    parse_record,
    select_objects,
)
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import check_batch, to_bytes
from gardo.types import RewardOutput

MODES = ("soft", "strict", "official")


class GenEvalReward(Reward):
    """GenEval's rules on the objects that a detector finds; needs the prompts' records.

    The details ``soft``, ``strict`` and ``official`` are the three scores of `rules.Verdict`.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(None, 1.0), batch_size=8)
    backbones = (Backbone("Mask2Former Swin-S", 4 * 0.07e9), CLIP_LARGE_BACKBONE)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        mode: str = "soft",
        detector: str = MASK2FORMER_SMALL,
        detector_revision: str | None = None,
        detector_dtype: str = "fp32",
        clip: str = CLIP_LARGE,
        clip_revision: str | None = None,
        clip_dtype: str | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        nms_threshold: float = 1.0,
        position_threshold: float = 0.1,
    ) -> None:
        """Load the detector and CLIP.

        Args:
            device: where both compute.
            mode: which of soft, strict and official is the score. Flow-GRPO trains on soft.
            detector: hub id or folder of an object detection checkpoint.
            detector_revision: its hub revision.
            detector_dtype: fp32, fp16 or bf16; thresholds as high as 0.9 want precise scores.
            clip: hub id or folder of CLIP, shared with the other rewards that use it.
            clip_revision: its hub revision.
            clip_dtype: None: fp16 on CUDA, fp32 on the CPU.
            threshold: see `rules.Limits`, as the following.
            counting_threshold: confidence in the counting task.
            max_objects: of a class.
            nms_threshold: 1 keeps all objects.
            position_threshold: share of the objects' sizes.

        Raises:
            UserError: a checkpoint that cannot be loaded or is of another kind.
            ValueError: a parameter out of range.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
        if isinstance(max_objects, bool) or not isinstance(max_objects, int) or max_objects < 1:
            raise ValueError(f"max_objects: expected an integer >= 1, got {max_objects!r}")
        for key, value in {
            "threshold": threshold,
            "counting_threshold": counting_threshold,
            "nms_threshold": nms_threshold,
            "position_threshold": position_threshold,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{key}: expected a number in [0, 1], got {value!r}")
        self.mode = mode
        self.limits = Limits(
            threshold, counting_threshold, max_objects, nms_threshold, position_threshold
        )
        self.detector = load_detector(detector, device, detector_dtype, detector_revision)
        self.colors = ColorClassifier(clip_backbone(clip, device, clip_dtype, clip_revision))
        self.classes = frozenset(self.detector.names.values())

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score as `Reward.score`.

        Raises:
            ValueError: a prompt without a record that can be judged.
        """
        check_batch(images, prompts)
        records = [self._record(m) for _, m in zip(prompts, metadata, strict=True)]
        safe, finite = finite_images(images)
        # bytes, as a file would have them: the pixels that the detector and CLIP see are the same
        safe = (to_bytes(safe) / 255).float().to(self.detector.device)
        verdicts = self._judge(safe, records)
        details = {
            mode: torch.tensor(
                [float(getattr(verdict, mode)) for verdict in verdicts], device=images.device
            ).where(finite, torch.nan)
            for mode in MODES
        }
        return RewardOutput(details[self.mode], details)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        try:
            self._record(metadata)
        except ValueError as error:
            return str(error)
        return None

    def _record(self, metadata: Mapping[str, Any]) -> Record:
        record = parse_record(metadata)
        for clause in (*record.include, *record.exclude):
            if clause.name not in self.classes:
                raise ValueError(f"the detector does not know the class '{clause.name}'")
        for clause in record.include:
            if clause.count > self.limits.max_objects:
                raise ValueError(
                    f"count: expected at most max_objects = {self.limits.max_objects}, "
                    f"got {clause.count}"
                )
        return record

    def _judge(self, images: Tensor, records: Sequence[Record]) -> list[Verdict]:
        lowest = min(self.limits.confidence, self.limits.counting_confidence)
        objects = [
            select_objects(found, record.tag, self.limits)
            for found, record in zip(self.detector(images, lowest), records, strict=True)
        ]
        colors = self._name_colors(images, records, objects)
        return [
            judge(record, found, named, self.limits)
            for record, found, named in zip(records, objects, colors, strict=True)
        ]

    def _name_colors(
        self,
        images: Tensor,
        records: Sequence[Record],
        objects: Sequence[Mapping[str, Sequence[Detection]]],
    ) -> list[dict[int, list[str]]]:
        """The colours that each record asks for, all objects of the batch in one go."""
        crops, names, wanted, places = [], [], [], []
        for row, record in enumerate(records):
            for index, found in colored_objects(record, objects[row]).items():
                clause = record.include[index]
                for detection in found:
                    crops.append(crop_object(images[row], detection))
                    names.append(clause.name)
                    wanted.append(clause.color or "")
                    places.append((row, index))
        colors: list[dict[int, list[str]]] = [{} for _ in records]
        for (row, index), color in zip(places, self.colors(crops, names, wanted), strict=True):
            colors[row].setdefault(index, []).append(color)
        return colors
