"""Detectors of three families: preprocessing, decoding, class names, mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor

from gardo.data.coco import CLASSES
from gardo.rewards.geneval.detector import geneval_names, load_detector, mask_box
from gardo.types import UserError
from tests.rewards.tiny_detectors import FOLDERS, mask2former_folder
from tests.rewards.tiny_models import clip_folder, images, pictures


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory):
    return FOLDERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def detector(folder):
    return load_detector(str(folder))


def rectangles(count=4, height=48, width=64):
    return images(count, 64)[:, :, :height, :width].contiguous()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (96, 96), (60, 40), (31, 97), (56, 200)])
def test_preprocessing_equals_the_image_processor(folder, detector, height, width):
    batch = F.interpolate(images(3, 64), (height, width), mode="bilinear")
    batch = (batch * 255).round() / 255
    got, mask = detector.preprocess(batch)
    processor = AutoImageProcessor.from_pretrained(folder)
    expected = processor(images=pictures(batch), return_tensors="pt")
    torch.testing.assert_close(got, expected["pixel_values"], rtol=0, atol=1e-3)
    if mask is not None:
        assert torch.equal(mask, expected["pixel_mask"])


def test_padding_equals_the_image_processor(tmp_path):
    folder = mask2former_folder(tmp_path)
    file = folder / "preprocessor_config.json"
    padded = {**json.loads(file.read_text()), "pad_size": {"height": 96, "width": 128}}
    file.write_text(json.dumps(padded))
    detector = load_detector(str(folder))
    batch = rectangles()
    got, mask = detector.preprocess(batch)
    expected = AutoImageProcessor.from_pretrained(folder)(pictures(batch), return_tensors="pt")
    assert got.shape[-2:] == (96, 128)
    torch.testing.assert_close(got, expected["pixel_values"], rtol=0, atol=1e-3)
    assert torch.equal(mask, expected["pixel_mask"])
    for found in detector(batch, 0.2):
        assert all(d.mask.shape == (48, 64) for d in found)


def test_unknown_steps_of_preprocessing_are_refused(tmp_path):
    folder = mask2former_folder(tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_rescale": False}))
    detector = load_detector(str(folder))
    with pytest.raises(UserError, match="does more than resize, normalise and pad"):
        detector(rectangles(), 0.3)


def as_rows(found):
    return sorted((d.name, round(d.score, 4), tuple(round(e, 2) for e in d.box)) for d in found)


def test_a_sample_is_detected_the_same_in_any_batch(detector):
    batch = rectangles()
    together = detector(batch, 0.1)
    assert len(together) == 4
    assert sum(map(len, together)) > 4
    for i in range(4):
        alone = detector(batch[i : i + 1], 0.1)[0]
        assert len(alone) == len(together[i])
        for one, other in zip(alone, together[i], strict=True):
            assert one.name == other.name
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.box == pytest.approx(other.box, abs=0.05)
    assert detector(batch[:0], 0.1) == []


def test_the_threshold_only_removes(detector):
    everything, some = (detector(rectangles(), score) for score in (0.05, 0.3))
    for low, high in zip(everything, some, strict=True):
        assert as_rows(high) == as_rows([d for d in low if d.score > 0.3])
        for d in low:
            left, top, right, bottom = d.box
            assert 0 <= left <= right <= 64
            assert 0 <= top <= bottom <= 48
            assert d.name in CLASSES


def test_masks_are_decoded_as_in_mmdetection(tmp_path):
    """Against numpy on all queries and classes at once, in full size."""
    detector = load_detector(str(mask2former_folder(tmp_path)))
    batch = rectangles(2)
    pixels, _ = detector.preprocess(batch)
    with torch.no_grad():
        out = detector.model(pixel_values=pixels)
    for i, found in enumerate(detector(batch, 0.2)):
        probabilities = out.class_queries_logits[i].softmax(-1)[:, :-1].numpy()
        full = F.interpolate(out.masks_queries_logits[i][None], pixels.shape[-2:], mode="bilinear")
        logits = F.interpolate(full, (48, 64), mode="bilinear")[0].double().numpy()
        masks = logits > 0
        quality = (masks / (1 + np.exp(-logits))).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        ranked = np.argsort(-probabilities, axis=None)[:100]
        expected = []
        for query, label in zip(*np.unravel_index(ranked, probabilities.shape), strict=True):
            score = probabilities[query, label] * quality[query]
            if score > 0.2:
                rows, columns = np.nonzero(masks[query])
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                expected.append((CLASSES[label], score, box, masks[query]))
        assert len(found) == len(expected) > 2
        for got, (name, score, box, mask) in zip(found, expected, strict=True):
            assert got.name == name
            assert got.score == pytest.approx(score, abs=1e-5)
            assert got.box == box
            assert np.array_equal(got.mask.numpy(), mask)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(tmp_path, dtype):
    folder = str(mask2former_folder(tmp_path))
    full = load_detector(folder)(rectangles(), 0.0)
    half = load_detector(folder, dtype=dtype)(rectangles(), 0.0)
    for a, b in zip(full, half, strict=True):
        best, other = (max(found, key=lambda d: d.score) for found in (a, b))
        assert best.score == pytest.approx(other.score, abs=0.05)


def test_boxes_of_masks():
    mask = torch.zeros(10, 12, dtype=torch.bool)
    assert mask_box(mask) == (0, 0, 0, 0)
    mask[3:6, 4:9] = True
    assert mask_box(mask) == (4, 3, 9, 6)
    mask[9, 11] = True
    assert mask_box(mask) == (4, 3, 12, 10)


def test_class_names_of_coco_and_pascal_voc():
    coco = "person bicycle mouse remote keyboard tv couch".split()
    assert list(geneval_names(dict(enumerate(coco))).values()) == [
        *("person", "bicycle", "computer mouse", "tv remote", "computer keyboard", "tv", "couch"),
    ]
    voc = {3: "aeroplane", 5: "tvmonitor", 7: "pottedplant", 8: "diningtable", 9: "motorbike"}
    named = {3: "airplane", 5: "tv", 7: "potted plant", 8: "dining table", 9: "motorcycle"}
    assert geneval_names(voc) == named
    others = {0: "N/A", 1: "sky-other", 2: "LABEL_2", 3: "wine_glass"}
    assert geneval_names(others) == {3: "wine glass"}


def test_all_of_genevals_classes_are_found(detector):
    assert sorted(detector.names.values()) == sorted(CLASSES)


def test_a_detector_of_other_classes_is_refused(tmp_path):
    folder = mask2former_folder(tmp_path, {0: "crack", 1: "dent"})
    with pytest.raises(UserError, match="knows none of GenEval's classes.*crack, dent"):
        load_detector(str(folder))


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected an object detection.*got one of type 'clip'"):
        load_detector(str(clip_folder(tmp_path)))
    with pytest.raises(UserError, match="no such folder"):
        load_detector(str(tmp_path / "nowhere"))
