"""LAION aesthetic predictor v2 (Schuhmann 2022): CLIP ViT-L/14 and a small head that predicts a rating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .clip_backbone import ClipBackbone
from .files import fill_module, find_file, read_weights
from .heads import rating_head
from .preprocess import check_inputs

HEAD_FILES = ("sac+logos+ava1-l14-linearMSE.safetensors", "*linearMSE.safetensors", "*linearMSE.pth")


class Aesthetic:
    """Predicted rating, about 1 to 10; ordinary pictures score 4 to 6.5. Ignores the prompt.

    The features are normalized and the head is a stack of linear layers without activations, in evaluation mode (its
    dropout would make the score random). The head runs in float32 whatever the precision of the backbone.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(self, backbone: ClipBackbone, head: nn.Module) -> None:
        """A CLIP ViT-L/14 with OpenAI's weights, and the head from `load_head`."""
        self.backbone = backbone
        self.head = head
        # The authors take OpenAI's own transform, which rounds an odd margin, not that of transformers.
        self.preprocessing = replace(backbone.preprocessing, crop="round")

    @property
    def module(self) -> nn.Module:
        """The weights of backbone and head, for moving them between devices."""
        return nn.ModuleList([self.backbone.module, self.head])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), unbounded, for images (B, 3, H, W) in [0, 1]."""
        check_inputs(images, prompts)
        features = F.normalize(self.backbone.image_features(images, self.preprocessing), dim=-1)
        device = next(self.head.parameters()).device
        return self.head(features.to(device)).squeeze(-1).to(images.device)


def load_head(path: str | Path, width: int, device: str | torch.device | None = None) -> nn.Module:
    """The head for features of `width` from the authors' .pth, its safetensors conversion, or the folder of either."""
    file = find_file(path, HEAD_FILES, "aesthetic head")
    weights = {name.removeprefix("layers."): tensor for name, tensor in read_weights(file).items()}
    first = weights.get("0.weight")
    if first is not None and first.ndim == 2 and first.shape[1] != width:
        raise InputError(
            f"aesthetic head {file.name!r} reads features of width {first.shape[1]}, this CLIP gives {width}: "
            "the published head needs CLIP ViT-L/14."
        )
    with torch.device("meta"):
        head = rating_head(width)
    return fill_module(head, weights, f"aesthetic head {file.name!r}", device, torch.float32)


def feature_width(backbone: ClipBackbone) -> int:
    """Width D of the backbone's projected image features, measured on one black image."""
    size = backbone.preprocessing.size
    with torch.no_grad():
        return int(backbone.pixel_features(torch.zeros(1, 3, size, size)).shape[-1])
