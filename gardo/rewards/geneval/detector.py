"""Finds objects with any object detection or mask classification model of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.data.coco import CLASSES
from gardo.rewards.geneval.rules import Detection
from gardo.rewards.preprocess import FILTERS, resize_bytes, to_bytes
from gardo.rewards.pretrained import compute_dtype, load_part, load_pretrained
from gardo.types import UserError

MASK2FORMER_SMALL = "facebook/mask2former-swin-small-coco-instance"
MAX_DETECTIONS = 100  # of an image, as in mmdetection's configuration of Mask2Former

MASK_MODELS = {
    "mask2former": "Mask2FormerForUniversalSegmentation",
    "maskformer": "MaskFormerForInstanceSegmentation",
}
# COCO's and Pascal VOC's names of GenEval's classes, without spaces.
_ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "hairdryer": "hair drier",
    "doughnut": "donut",
}


@dataclass(frozen=True)
class _Plan:
    """How images of one size are made ready: resized to ``size``, padded to ``padded``."""

    size: tuple[int, int]
    padded: tuple[int, int]


class Detector:
    """A frozen detector with its preprocessing on the device.

    Attributes:
        names: class index of the model -> GenEval's name; other classes are ignored.
        has_masks: whether its detections have masks.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device | str) -> None:
        """Take over a loaded model and its image processor.

        Raises:
            UserError: no class of the model has a name that GenEval knows.
        """
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = processor
        self.device = torch.device(device)
        self.has_masks = model.config.model_type in MASK_MODELS
        self.names = geneval_names(model.config.id2label)
        if not self.names:
            labels = [str(label) for label in model.config.id2label.values()][:5]
            raise UserError(
                "the detector knows none of GenEval's classes; expected a checkpoint trained on "
                f"COCO, got the classes {', '.join(labels)}, ..."
            )
        self._plans: dict[tuple[int, int], _Plan] = {}

    @torch.inference_mode()
    def __call__(self, images: Tensor, min_score: float) -> list[list[Detection]]:
        """Detect the objects of each image.

        Args:
            images: ``[B, 3, H, W]`` float in [0, 1], on any device.
            min_score: detections with a higher confidence are returned.

        Returns:
            for each image its detections in any order; masks are on this detector's device.
        """
        if not len(images):
            return []
        pixels, pixel_mask = self.preprocess(images)
        options = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        outputs = self.model(pixel_values=pixels.to(self.model.dtype), **options)
        height, width = images.shape[-2:]
        if self.has_masks:
            plan = self._plan(height, width)
            return [
                self._from_masks(*pair, plan, (height, width), min_score)
                for pair in zip(
                    outputs.class_queries_logits.float(),
                    outputs.masks_queries_logits.float(),
                    strict=True,
                )
            ]
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        sizes = torch.tensor([[height, width]] * len(images), device=self.device)
        found = self.processor.post_process_object_detection(
            outputs, threshold=min_score, target_sizes=sizes
        )
        return [self._from_boxes(one, height, width) for one in found]

    def preprocess(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Resize, normalise and pad as the checkpoint's image processor does.

        Args:
            images: ``[B, 3, H, W]`` float in [0, 1].

        Returns:
            ``[B, 3, h, w]`` float32, and ``[B, h, w]`` int64 with 1 at pixels of the image, None
            without padding; both on this detector's device.
        """
        plan = self._plan(*images.shape[-2:])
        return self._apply(images.to(self.device), plan)

    def _apply(self, images: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        p = self.processor
        pixels = resize_bytes(to_bytes(images), plan.size, FILTERS[int(p.resample)])
        pixels = pixels.float() * p.rescale_factor
        if p.do_normalize:
            mean = torch.tensor(p.image_mean, device=pixels.device)[:, None, None]
            std = torch.tensor(p.image_std, device=pixels.device)[:, None, None]
            pixels = (pixels - mean) / std
        down, right = plan.padded[0] - plan.size[0], plan.padded[1] - plan.size[1]
        if not (down or right):
            return pixels, None
        mask = torch.ones(len(images), *plan.size, dtype=torch.int64, device=pixels.device)
        return F.pad(pixels, (0, right, 0, down)), F.pad(mask, (0, right, 0, down))

    def _plan(self, height: int, width: int) -> _Plan:
        """Ask the processor once for each size of images what it makes of them."""
        if (height, width) not in self._plans:
            generator = torch.Generator().manual_seed(0)
            probe = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
            told = self.processor(images=[probe.numpy()], return_tensors="pt")
            expected = told["pixel_values"]
            padded = (expected.shape[-2], expected.shape[-1])
            size = padded
            if "pixel_mask" in told:
                inside = told["pixel_mask"][0]
                size = int(inside[:, 0].sum()), int(inside[0].sum())
            plan = _Plan(size, padded)
            got, _ = self._apply(probe.permute(2, 0, 1)[None] / 255, plan)
            # two bytes of 255 over a standard deviation of 0.22; other steps differ by far more
            if got.shape != expected.shape or (got - expected).abs().max() > 0.04:
                raise UserError(
                    f"the detector's {type(self.processor).__name__} does more than resize, "
                    "normalise and pad, which is all that this reward can do on the device"
                )
            self._plans[height, width] = plan
        return self._plans[height, width]

    def _from_boxes(self, found: Mapping[str, Tensor], height: int, width: int) -> list[Detection]:
        limit = torch.tensor([width, height, width, height], device=found["boxes"].device)
        boxes = found["boxes"].clamp(min=0).minimum(limit).tolist()
        return [
            Detection(self.names[label], score, (box[0], box[1], box[2], box[3]))
            for label, score, box in zip(
                found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True
            )
            if label in self.names
        ]

    def _from_masks(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        plan: _Plan,
        size: tuple[int, int],
        min_score: float,
    ) -> list[Detection]:
        """Instances as mmdetection makes them of ``[Q, C + 1]`` and ``[Q, h, w]`` logits.

        The score is the class's probability times the mean probability of the mask's pixels.
        """
        probabilities = class_logits.softmax(dim=-1)[:, :-1]
        classes = probabilities.shape[1]
        top = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
        # the mask can only lower the score, so the others need no masks in full size
        likely = top.indices[top.values > min_score].tolist()
        detections = []
        for index in likely:
            query, label = divmod(index, classes)
            if label not in self.names:
                continue
            logits = _full_size(mask_logits[query], plan, size)
            mask = logits > 0
            inside = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
            score = float(probabilities[query, label] * inside)
            if score > min_score:
                detections.append(Detection(self.names[label], score, mask_box(mask), mask))
        return detections


def load_detector(
    path: str = MASK2FORMER_SMALL,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = "fp32",
    revision: str | None = None,
) -> Detector:
    """Load an object detection, Mask2Former or MaskFormer checkpoint.

    Args:
        path: hub id or folder with ``config.json``, weights and ``preprocessor_config.json``.
        device: where it computes.
        dtype: fp32, fp16 or bf16.
        revision: hub revision.

    Raises:
        UserError: a file or package that is missing, a model of another kind or without GenEval's
            classes.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    kind = load_part("AutoConfig", path, revision).model_type
    class_names = {**MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, **MASK_MODELS}
    if kind not in class_names:
        raise UserError(
            f"'{path}': expected an object detection, Mask2Former or MaskFormer checkpoint, got "
            f"one of type '{kind}'"
        )
    if kind in MASK_MODELS and importlib.util.find_spec("scipy") is None:
        # transformers builds the loss of these models, too, and that needs it
        raise UserError(f"'{path}': {kind} needs the package 'scipy': pip install 'gardo[geneval]'")
    processor = load_part("AutoImageProcessor", path, revision)
    dtype = compute_dtype(dtype, device)
    model = load_pretrained(class_names[kind], kind, path, dtype, revision)
    return Detector(model, processor, device)


def geneval_names(labels: Mapping[int, str]) -> dict[int, str]:
    """Class index -> GenEval's name, for the labels that mean one of its classes.

    >>> geneval_names({0: "Potted_Plant", 1: "mouse", 2: "sky"})
    {0: 'potted plant', 1: 'computer mouse'}
    """
    known = {name.replace(" ", ""): name for name in CLASSES} | _ALIASES
    plain = {
        index: "".join(c for c in str(label).lower() if c.isalnum())
        for index, label in labels.items()
    }
    return {int(index): known[label] for index, label in plain.items() if label in known}


def mask_box(mask: Tensor) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a mask ``[H, W]``, zeros for an empty one.

    Right and bottom are one past the last pixel, as in mmdetection.
    """
    if not mask.any():
        return 0.0, 0.0, 0.0, 0.0
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _full_size(logits: Tensor, plan: _Plan, size: tuple[int, int]) -> Tensor:
    """Enlarge ``[h, w]`` to the model's input, cut the padding off, resize to the image."""

    def resize(image: Tensor, to: tuple[int, int]) -> Tensor:
        if image.shape[-2:] == to:
            return image
        return F.interpolate(image, to, mode="bilinear", align_corners=False)

    enlarged = resize(logits[None, None], plan.padded)
    return resize(enlarged[..., : plan.size[0], : plan.size[1]], size)[0, 0]
