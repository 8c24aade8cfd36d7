"""Scorers of image quality: tiny random models of the published classes and file formats, against their libraries."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_scorers import clip_folder, dino_folder, inception_file, llava_folder
from transformers import AutoProcessor, CLIPModel, Dinov2Model, LlavaForConditionalGeneration

from popalign_core.config import parse_config
from popalign_core.errors import InvalidInput, ModelNotUsable, UnknownName
from popalign_core.models.converted_scorers import convert_scorer
from popalign_core.models.image_scores import QUESTION
from popalign_core.models.scorers import check_scorers, load_scorer, scorer_id
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.quality_config import SCORERS, parse_scorer

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
TEXTS = ["a photo of a nurse", "a photo of a cook", "a photo of a nurse", "a judge", "a judge"]


def pictures() -> list[Image.Image]:
    return [Image.fromarray(image) for image in IMAGES]


@torch.inference_mode()
def test_pickscore_is_the_logit_of_each_image_and_its_own_text(tmp_path: Path) -> None:
    source = clip_folder(tmp_path)
    model, processor = CLIPModel.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)
    expected = [
        model(**processor(images=picture, text=[text], return_tensors="pt", truncation=True)).logits_per_image.item()
        for picture, text in zip(pictures(), TEXTS, strict=True)
    ]
    scorer = load_scorer("pickscore", source, "cpu")
    scorer.batch_size = 2
    assert scorer.scores(IMAGES, TEXTS) == pytest.approx(expected, rel=2e-3)
    assert np.std(expected) > 100 * 2e-3 * np.mean(np.abs(expected)) / 100  # they differ by more than the tolerance


def test_a_converted_preference_score_is_100_times_the_cosine(tmp_path: Path) -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    (tmp_path / "tiny-hps.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-hps")
    model.eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    convert_scorer("hps", tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "hps", "tiny-hps")
    found = load_scorer("hps", str(tmp_path / "hps"), "cpu").scores(IMAGES, TEXTS)
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(picture) for picture in pictures()]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("tiny-hps")(TEXTS), normalize=True)
    assert found == pytest.approx((100 * (images * texts).sum(dim=1)).numpy(), abs=0.05)


def test_converted_linear_layers_rate_as_the_published_predictor_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = ZeroShotClassifier("emoji-clip", device="cpu")
    layers = torch.nn.Sequential(
        torch.nn.Linear(clip.width, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    ).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "linearMSE.pth")
    convert_scorer("aesthetics", tmp_path / "linearMSE.pth", tmp_path / "aesthetics", "emoji-clip")
    found = load_scorer("aesthetics", str(tmp_path / "aesthetics"), "cpu").scores(IMAGES, TEXTS)
    with torch.inference_mode():
        assert found == pytest.approx(layers(clip.image_features(IMAGES))[:, 0].numpy(), rel=1e-5)


@torch.inference_mode()
def test_vqa_is_the_probability_of_yes_whatever_else_is_asked_in_the_batch(tmp_path: Path) -> None:
    source = llava_folder(tmp_path)
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(source).eval(),
        AutoProcessor.from_pretrained(source),
    )
    tokens = {
        word: sorted({processor.tokenizer(spelled, add_special_tokens=False).input_ids[0] for spelled in spellings})
        for word, spellings in {"yes": ("yes", "Yes", " yes", " Yes"), "no": ("no", "No", " no", " No")}.items()
    }
    expected = []
    for picture, text in zip(pictures(), TEXTS, strict=True):
        asked = f"USER: <image>\n{QUESTION.format(text)} ASSISTANT:"
        inputs = processor(text=asked, images=picture, max_length=None, return_tensors="pt")
        shares = model(**inputs).logits[0, -1].softmax(dim=-1)
        yes, no = (float(shares[tokens[word]].sum()) for word in ("yes", "no"))
        expected.append(yes / (yes + no))
    scorer = load_scorer("vqa", source, "cpu")
    scorer.batch_size = 3
    found = scorer.scores(IMAGES, TEXTS)
    assert found == pytest.approx(expected, abs=2e-3)
    assert np.ptp(expected) > 0.01


@torch.inference_mode()
def test_dinov2_features_are_of_the_whole_image_squeezed(tmp_path: Path) -> None:
    source = dino_folder(tmp_path)
    wide = np.random.default_rng(1).integers(0, 256, (3, 40, 60, 3), np.uint8)
    model, processor = Dinov2Model.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)
    squeezed = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in wide]
    pixels = processor(squeezed, return_tensors="pt", do_resize=False, do_center_crop=False).pixel_values
    found = load_scorer("dinov2", source, "cpu").features(wide)
    assert found == pytest.approx(model(pixels).last_hidden_state[:, 0].numpy(), abs=0.02)


@torch.inference_mode()
def test_clip_vision_features_have_length_one_and_are_the_librarys(tmp_path: Path) -> None:
    source = clip_folder(tmp_path)
    model, processor = CLIPModel.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)
    expected = model.get_image_features(**processor(images=pictures(), return_tensors="pt")).pooler_output.numpy()
    found = load_scorer("clip_vision", source, "cpu").features(IMAGES)
    assert found == pytest.approx(expected / np.linalg.norm(expected, axis=1, keepdims=True), abs=5e-3)


@torch.inference_mode()
def test_inception_features_are_those_of_the_converted_network(tmp_path: Path, monkeypatch) -> None:
    network = inception_file(tmp_path / "published.pth", monkeypatch)
    convert_scorer("inception", tmp_path / "published.pth", tmp_path / "inception")
    found = load_scorer("inception", str(tmp_path / "inception"), "cpu").features(IMAGES[:2])
    expected = network(torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2))[0].numpy()
    assert found.shape == (2, 2048)
    np.testing.assert_array_equal(found, expected)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InvalidInput, match="weights alone"):
        convert_scorer("hps", tmp_path / "evil.pt", tmp_path / "hps")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="pickscore"):
        parse_scorer("picksore")
    with pytest.raises(InvalidInput, match="hps=FOLDER"):
        parse_scorer("hps")
    with pytest.raises(InvalidInput, match="twice"):
        parse_config({"quality": {"scorers": ["hps=a", "hps=b"]}})
    with pytest.raises(ModelNotUsable, match=r"quality\.scorers: hps"):
        check_scorers({"hps": "./nowhere"})
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelNotUsable, match="pickled"):
        check_scorers({"pickscore": str(tmp_path)})


def test_who_scored_is_named_by_kind_and_weights(tmp_path: Path) -> None:
    first, second = clip_folder(tmp_path / "a", seed=0), clip_folder(tmp_path / "b", seed=1)
    assert scorer_id("pickscore", first) != scorer_id("pickscore", second)
    assert set(SCORERS) == {"pickscore", "hps", "aesthetics", "vqa", "dinov2", "clip_vision", "inception"}
