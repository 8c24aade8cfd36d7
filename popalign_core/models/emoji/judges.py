"""Trains the two judges (builder only): an open_clip model and, independently, residual image classifiers.

The open_clip model builds preferences; the classifiers judge the assessment. They share no weights, no architecture,
no seed and no objective, and the open_clip model never saw the held-out vendor.
"""

import json
import logging
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from popalign_core.models.emoji.captions import caption
from popalign_core.models.emoji.pictures import NO_LABEL, Pictures, augmented
from popalign_core.models.emoji.roles import GENDERS, ROLES, TONES, VENDORS
from popalign_core.models.emoji.text import CONTEXT_TOKENS, write_tokenizer

HELD_OUT_VENDOR = "fluent"
NO_PERSON_CAPTION = "a photo of an object"
NO_PERSON_LABEL = "no person"
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {
        "context_length": CONTEXT_TOKENS,
        "vocab_size": 0,  # set from the tokenizer
        "width": 64,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "local",
    },
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
logger = logging.getLogger(__name__)


def _role_batch(pictures: Pictures, allowed: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures that differ in little but the group: six roles with all their people of one vendor, and some objects."""
    people = allowed & pictures.person
    labels = torch.stack([pictures.vendor[people], pictures.role[people]], dim=1).numpy()
    cells = sorted({(int(vendor), int(role)) for vendor, role in labels})
    places: list[int] = rng.choice(len(cells), 6, replace=False).tolist()
    chosen = [cells[place] for place in places]
    rows = [torch.nonzero(people & (pictures.vendor == v) & (pictures.role == r)).flatten() for v, r in chosen]
    objects = torch.nonzero(allowed & ~pictures.person).flatten()
    rows.append(objects[torch.from_numpy(rng.choice(len(objects), 6))])
    return torch.cat(rows)


def _captions(pictures: Pictures, rows: Tensor, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """A caption a picture, naming a random subset of (role, gender, tone).

    Returns: captions, and bool (n, n): whether caption j is true of picture i.
    """
    role, gender, tone = pictures.role[rows], pictures.gender[rows], pictures.tone[rows]
    person = pictures.person[rows]
    names = torch.from_numpy(rng.random((3, len(rows))) < np.array([[0.7], [0.7], [0.7]]))
    named_gender = names[1] & (gender != NO_LABEL)
    named_tone = names[2] & (tone != NO_LABEL)
    anyone = type(ROLES[0])("person", "person", "activity", 0.5)
    texts: list[str] = []
    for row in range(len(rows)):
        if not person[row]:
            texts.append(NO_PERSON_CAPTION)
            continue
        who = ROLES[int(role[row])] if names[0, row] else anyone
        texts.append(
            caption(
                who,
                GENDERS[int(gender[row])] if named_gender[row] else None,
                TONES[int(tone[row])] if named_tone[row] else None,
            )
        )

    def agrees(label: Tensor, named: Tensor) -> Tensor:
        return ~named[None, :] | (label[:, None] == label[None, :]) | (label[:, None] == NO_LABEL)

    true = agrees(role, names[0]) & agrees(gender, named_gender) & agrees(tone, named_tone)
    return texts, true & (person[:, None] == person[None, :])


def _contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric loss where several captions may be true of a picture (Radford et al. 2021, soft targets)."""
    logits = scale * image @ text.T
    target = true.float()
    by_image = -(functional.log_softmax(logits, dim=1) * target / target.sum(1, keepdim=True)).sum(1)
    by_text = -(functional.log_softmax(logits, dim=0) * target / target.sum(0, keepdim=True)).sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def _draw(pictures: Pictures, rows: Tensor, rng: torch.Generator) -> Tensor:
    copies = torch.randint(0, len(pictures.pixels), (len(rows),), generator=rng)
    return augmented(pictures.pixels[copies, rows], rng)


def train_clip_judge(pictures: Pictures, *, seconds: float, seed: int, folder: Path) -> None:
    """Fits a small open_clip model on all vendors but one and writes it in open_clip's local-directory format."""
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tokenizer = write_tokenizer(folder)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    text_config = {name: value for name, value in config["text_cfg"].items() if name != "hf_tokenizer_name"}
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text_config)
    allowed = pictures.vendor != VENDORS.index(HELD_OUT_VENDOR)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * (1 - elapsed / seconds) + 1e-6
        rows = _role_batch(pictures, allowed, rng)
        texts, true = _captions(pictures, rows, rng)
        tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT_TOKENS, return_tensors="pt").input_ids
        image, text, scale = model(_draw(pictures, rows, generator), tokens)[:3]
        loss = _contrastive_loss(image, text, scale, true)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        step += 1
        if step % 100 == 0:
            logger.info("open_clip judge %.0f s, step %d, loss %.3f", elapsed, step, loss.item())
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config_file = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config_file, indent=2))


class MultiHead(nn.Module):
    """One residual backbone with a head per question: role, gender, tone; each with a "no person" class."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNetForImageClassification(residual_config(["unused"])).resnet
        self.heads = nn.ModuleDict(
            {name: nn.Linear(160, count + 1) for name, count in (("role", len(ROLES)), ("gender", 2), ("tone", 5))}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits (n, classes + 1) a head."""
        pooled = self.backbone(pixels).pooler_output.flatten(1)
        return {name: head(pooled) for name, head in self.heads.items()}


def residual_config(labels: list[str]) -> ResNetConfig:
    """The small residual network of the second judge."""
    return ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 160],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def held_out_cells(pictures: Pictures, share: float = 0.12) -> Tensor:
    """(n,) bool: whole (vendor, role) cells kept out of the second judge's training, drawn once with a fixed seed."""
    drawn = np.random.default_rng(2026).random((len(VENDORS), len(ROLES))) < share
    cells = torch.from_numpy(drawn)
    return pictures.person & cells[pictures.vendor, pictures.role.clamp(min=0)]


def train_residual_judge(pictures: Pictures, *, seconds: float, seed: int, folder: Path) -> None:
    """Fits the second judge on all vendors, some (vendor, role) cells held out; writes one classifier per axis."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MultiHead()
    rows_allowed = torch.nonzero(~held_out_cells(pictures)).flatten()
    labels = {"role": pictures.role, "gender": pictures.gender, "tone": pictures.tone}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - elapsed / seconds) + 1e-6
        rows = rows_allowed[torch.randint(0, len(rows_allowed), (64,), generator=generator)]
        logits = model(_draw(pictures, rows, generator))
        loss = torch.zeros(())
        for name, values in logits.items():
            target = torch.where(pictures.person[rows], labels[name][rows], values.shape[1] - 1)
            loss = loss + functional.cross_entropy(values, target, ignore_index=NO_LABEL, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            logger.info("residual judge %.0f s, step %d, loss %.3f", elapsed, step, loss.item())
    model.eval()
    names = {"role": [role.wording for role in ROLES], "gender": list(GENDERS), "tone": list(TONES)}
    for axis, head in (("perceived_gender", "gender"), ("perceived_skin_tone", "tone"), ("subject", "role")):
        _save_classifier(model, head, [*names[head], NO_PERSON_LABEL], folder / axis)


def _save_classifier(model: MultiHead, head: str, labels: list[str], folder: Path) -> None:
    classifier = ResNetForImageClassification(residual_config(labels))
    classifier.resnet.load_state_dict(model.backbone.state_dict())
    classifier.classifier[1].load_state_dict(model.heads[head].state_dict())
    classifier.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
