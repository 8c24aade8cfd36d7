"""Features in which two sets of images are compared, by the networks that published distances are made with."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.nn.functional import normalize
from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingTypeStubs]
    FeatureExtractorInceptionV3,
)
from transformers import AutoImageProcessor, CLIPModel, Dinov2Model

from popalign_core.errors import ModelNotUsable
from popalign_core.models.preprocessing import stacked
from popalign_core.models.pretrained import load_network, load_processor


class DinoFeatures:
    """The class token of DINOv2, for FD-DINOv2 (Stein et al. 2023, who take ViT-L/14)."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: folder or hub id of a Dinov2Model. Raises: ModelNotUsable."""
        self.device, self.batch_size = device, batch_size
        self.model = load_network(Dinov2Model, source, device, "DINOv2")
        processor = load_processor(AutoImageProcessor, source, "DINOv2")
        # Squeezed and not cropped, as there.
        self.settings = {"do_center_crop": False, "size": dict(processor.crop_size)}
        self.processor = processor

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, dims). images: uint8 (n, h, w, 3)."""
        parts: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            part = stacked(images[start : start + self.batch_size], self.device)
            pixels = self.processor(part, return_tensors="pt", device=self.device, **self.settings).pixel_values
            parts.append(self.model(pixels.to(self.device)).pooler_output.float().cpu())
        return torch.cat(parts).numpy()


class ClipVisionFeatures:
    """Unit image features of CLIP, for CMMD (Jayasumana et al. 2024, who take ViT-L/14 at 336 pixels)."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: folder or hub id of a CLIP model of transformers. Raises: ModelNotUsable."""
        self.device, self.batch_size = device, batch_size
        self.model = load_network(CLIPModel, source, device, "CLIP's image encoder")
        self.processor = load_processor(AutoImageProcessor, source, "CLIP's image encoder")

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, dims) of length 1. images: uint8 (n, h, w, 3)."""
        parts: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            part = stacked(images[start : start + self.batch_size], self.device)
            pixels = self.processor(part, return_tensors="pt", device=self.device).pixel_values
            pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            parts.append(normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(parts).numpy()


class InceptionFeatures:
    """The 2048 features of the Inception network of FID and KID, as torch-fidelity rebuilds it."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: a folder with its weights in `model.safetensors`. Raises: ModelNotUsable."""
        self.device, self.batch_size = device, batch_size
        path = Path(source) / "model.safetensors"
        # torch-fidelity only takes a file of torch: it is made here, of checked tensors, and never touches the disk.
        file = BytesIO()
        try:
            torch.save(load_file(path), file)
            file.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)  # pyright: ignore[reportArgumentType]
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelNotUsable(f"{path} does not hold the weights of FID's Inception network: {error}") from error
        self.model = network.to(device)

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, 2048). images: uint8 (n, h, w, 3)."""
        parts: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            part = stacked(images[start : start + self.batch_size], self.device)
            parts.append(self.model(part)[0].cpu())
        return torch.cat(parts).numpy()
