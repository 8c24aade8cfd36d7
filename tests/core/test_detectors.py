"""Object detectors of transformers: tiny ones with random weights, of the class and file format of published ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from popalign_core.errors import ModelNotUsable
from popalign_core.models.detectors import BoxDetector, check_detector

LABELS = {0: "N/A", 1: "person", 2: "bicycle"}


NAMES = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}


def save_rt_detr(place: Path) -> None:
    """As `PekingU/rtdetr_v2_*`, in small."""
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 8, 8],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=6,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        **NAMES,
    )
    RTDetrV2ForObjectDetection(config).save_pretrained(place)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(place)


def save_yolos(place: Path) -> None:
    """As `hustvl/yolos-*`, in small."""
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 48],
        patch_size=16,
        num_detection_tokens=6,
        **NAMES,
        use_mid_position_embeddings=False,
    )
    YolosForObjectDetection(config).save_pretrained(place)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(place)


@pytest.fixture(scope="module", params=[save_yolos, save_rt_detr])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("detector")
    request.param(place)
    return place


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)


def test_boxes_are_those_of_the_library_for_one_image_at_a_time(folder: Path) -> None:
    detector = BoxDetector(str(folder), "person", min_confidence=0.0, device="cpu", batch_size=2)
    found = detector.find(IMAGES)
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    persons = 0
    for image, boxes in zip(IMAGES, found, strict=True):
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        (result,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 96)])
        expected = [
            (box.numpy(), float(score))
            for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True)
            if label == 1
        ]
        persons += len(expected)
        assert len(boxes) == len(expected)
        for box, (corners, score) in zip(boxes, expected, strict=True):
            corners = np.clip(corners, 0, [96, 64, 96, 64])
            assert [box.left, box.top, box.right, box.bottom] == pytest.approx(corners, abs=0.51)
            assert box.confidence == pytest.approx(score, abs=1e-5)
    assert persons
    assert not BoxDetector(str(folder), "person", min_confidence=1.0, device="cpu").find(IMAGES)[0]


def test_a_detector_without_the_class_is_refused_by_name(folder: Path) -> None:
    check_detector(str(folder), "person")
    with pytest.raises(ModelNotUsable, match=r"detects no face.*N/A, person, bicycle"):
        check_detector(str(folder), "face")
    with pytest.raises(ModelNotUsable, match=r"no folder \./nowhere of a detector \(detection\.faces\)"):
        check_detector("./nowhere", "face")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotUsable, match="pickled weights"):
        check_detector(str(tmp_path), "person")
