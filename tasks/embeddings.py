"""Embeddings of prompts, encoded once a workspace: later shards, workers and runs read them."""

from collections.abc import Sequence

from popalign_core.models.text_to_image import TextToImageModel
from storage.layout import Workspace
from storage.prompt_embeddings import read_embeddings, write_embeddings

UNCONDITIONAL = ""


def provide_embeddings(workspace: str, model: TextToImageModel, texts: Sequence[str]) -> None:
    """Gives the model the embeddings of these prompts, and of none, from the workspace; encodes and keeps the rest."""
    encoder = model.prompts
    missing = encoder.unknown([UNCONDITIONAL, *texts])
    if not missing:
        return
    place = Workspace.open(workspace)
    encoder.add(read_embeddings(place, encoder.digest, missing))
    if new := encoder.unknown(missing):
        write_embeddings(place, encoder.digest, encoder.arrays(new))
