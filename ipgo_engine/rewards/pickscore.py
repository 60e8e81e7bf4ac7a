"""PickScore v1 (Kirstain et al. 2023): CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .backbones import load_clip
from .clip_backbone import ClipBackbone, cosine
from .preprocess import check_inputs

FEATURES = 1024  # of ViT-H/14


class PickScore:
    """exp(logit scale) times the cosine similarity, as the authors' example: about 16 to 24 for ordinary images."""

    name = "pickscore"
    differentiable = True

    def __init__(self, backbone: ClipBackbone) -> None:
        """A backbone from `backbones.load_clip` on the authors' folder (transformers CLIPModel)."""
        if backbone.logit_scale is None:
            raise InputError("PickScore weights: these hold the vision tower only, scoring a prompt needs the whole.")
        self.backbone = backbone
        self._scale = math.exp(backbone.logit_scale)

    @property
    def module(self) -> nn.Module:
        """The weights, for moving them between devices."""
        return self.backbone.module

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) for images (B, 3, H, W) in [0, 1]; prompts are cut at 77 tokens and keep their end token."""
        check_inputs(images, prompts)
        texts = self.backbone.text_features(prompts)
        return self._scale * cosine(self.backbone.image_features(images), texts)


def load_pickscore(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> PickScore:
    """From the authors' folder. Any CLIP would give plausible scores: one of another size is an `InputError`."""
    backbone = load_clip(path, device, dtype)
    found = backbone.module.get_parameter("visual_projection.weight").shape[0]
    if found != FEATURES:
        raise InputError(
            f"PickScore weights: {str(path)!r} is another CLIP, with {found} features instead of {FEATURES}."
        )
    return PickScore(backbone)
