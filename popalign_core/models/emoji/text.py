"""The emoji model's tokenizer and its two small CLIP text encoders (builder only).

The tokenizer is a real CLIP byte-level BPE whose merges make every word of the captions one token. Any other word
falls apart into known letters, so it is seen by the model and never vanishes.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from popalign_core.models.emoji.roles import ROLES

CONTEXT_TOKENS = 24
FRAME_WORDS = (
    "a an the of with and in on at photo picture drawing emoji portrait best quality skinned man woman men women"
)
TONE_WORDS = "light medium dark"


def caption_words() -> list[str]:
    """Every word of the training captions, once, in a stable order."""
    text = " ".join([FRAME_WORDS, TONE_WORDS, *(role.wording for role in ROLES)])
    return list(dict.fromkeys(re.findall(r"[a-z]+", text)))


def _merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The word's pieces after byte-pair encoding: the pair of the lowest rank is merged, everywhere, until none is."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        left, right = min(pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
        if (left, right) not in ranks:
            break
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == (left, right):
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json and merges.txt for the caption words and loads them as a CLIPTokenizer."""
    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], int] = {}
    for word in caption_words():
        while len(pieces := _merged(word, merges)) > 1:
            # Ranked behind what makes the words before, which so stay as they are.
            merges[pieces[0], pieces[1]] = len(merges)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=CONTEXT_TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained encoders, 64 and 128 wide; SDXL reads the last but one layer of each, and the second's projection."""

    def config(width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=64,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="gelu",
        )

    return CLIPTextModel(config(64, 3)), CLIPTextModelWithProjection(config(128, 3))
