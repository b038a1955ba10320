"""Tiny detectors at random weights, saved as their repositories on the hub are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SwinConfig,
)

from gardo.data.coco import CLASSES

# COCO's own names, where GenEval has others
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
LABELS = {i: COCO_NAMES.get(name, name) for i, name in enumerate(CLASSES)}
IMAGENET = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 1 / 255,
}


def save(model: Any, folder: Path, processor: dict[str, Any], spread: float) -> Path:
    """Save a model with larger weights, so that scores, boxes and masks differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class" in name:
                parameter.mul_(spread if parameter.dim() > 1 else 0.0)
            elif "query" in name or "queries" in name:
                parameter.mul_(10.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def mask2former_folder(folder: Path, labels: dict[int, str] = LABELS, seed: int = 0) -> Path:
    """Mask2Former with a Swin backbone and the processor file of the COCO instance checkpoints."""
    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    processor = {
        **IMAGENET,
        "image_processor_type": "Mask2FormerImageProcessor",
        "ignore_index": 255,
        "do_reduce_labels": False,
        "num_labels": 80,
        "size": {"shortest_edge": 64, "longest_edge": 128},
        "size_divisor": 32,
    }
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # masks that cover a part of the image
        features = model.eval()(torch.randn(8, 3, 64, 64)).pixel_decoder_last_hidden_state
        projection = model.model.pixel_level_module.decoder.mask_projection
        projection.bias.sub_(features.mean(dim=(0, 2, 3)))
    return save(model, folder, processor, spread=40.0)


def detr_folder(folder: Path) -> Path:
    """DETR: softmax scores, and a processor that keeps the aspect ratio."""
    torch.manual_seed(1)
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 16],
            depths=[1, 1, 1, 1],
            out_features=["stage4"],
        ),
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=15,
        id2label={0: "N/A", **{i + 1: name for i, name in LABELS.items()}},
    )
    processor = {
        **IMAGENET,
        "image_processor_type": "DetrImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": 60, "longest_edge": 100},
    }
    return save(DetrForObjectDetection(config), folder, processor, spread=60.0)


def rt_detr_folder(folder: Path) -> Path:
    """RT-DETR: sigmoid scores, Pascal VOC's names, a fixed size and no normalisation."""
    torch.manual_seed(2)
    names = {"airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor"}
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=20,
        id2label={i: names.get(name, name) for i, name in LABELS.items()},
    )
    processor = {
        **IMAGENET,
        "do_normalize": False,
        "image_processor_type": "RTDetrImageProcessor",
        "size": {"height": 64, "width": 64},
    }
    return save(RTDetrForObjectDetection(config), folder, processor, spread=8.0)


FOLDERS = {"mask2former": mask2former_folder, "detr": detr_folder, "rt_detr": rt_detr_folder}
