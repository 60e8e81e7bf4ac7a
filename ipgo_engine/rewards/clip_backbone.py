"""A CLIP model as rewards use it: features of pixels and of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .precision import GradientScale
from .preprocess import Preprocessing

_CACHED_PROMPTS = 4096


class ClipBackbone:
    """A frozen CLIP: two towers, what its pixels go through before, and its tokenizer.

    `module` holds the weights; `image_tower` maps preprocessed pixels (B, 3, S, S) to projected features (B, D), and
    `text_tower` maps prompts to (B, D) or is None in a vision-only file. Features come out float32, not normalized.
    """

    def __init__(
        self,
        module: nn.Module,
        image_tower: Callable[[Tensor], Tensor],
        text_tower: Callable[[Sequence[str]], Tensor] | None,
        preprocessing: Preprocessing,
        logit_scale: float | None = None,
    ) -> None:
        """The towers are functions of `module`, so that moving the module moves them.

        `logit_scale` is the file's own, before any rounding (in bfloat16 its exponential is off by a hundredth); None
        for a vision tower alone.
        """
        self.module = module
        self.preprocessing = preprocessing
        self.logit_scale = logit_scale
        self._image_tower = image_tower
        self._text_tower = text_tower
        self._texts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.module.parameters()).dtype

    def image_features(self, images: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
        """Features (B, D) of images (B, 3, H, W) in [0, 1], differentiable; on the images' device."""
        pixels = (preprocessing or self.preprocessing)(images)
        return self.pixel_features(pixels).to(images.device)

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of pixels that are preprocessed already."""
        scale = GradientScale() if self.dtype == torch.float16 and pixels.requires_grad else None
        pixels = scale.enter(pixels) if scale else pixels
        features = self._image_tower(pixels.to(device=self.device, dtype=self.dtype)).float()
        return scale.leave(features) if scale else features

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of the prompts, without gradients; every prompt is encoded once and remembered.

        One at a time: beside others its last bits differ, and so would a resumed run, which asks in other groups.
        """
        if self._text_tower is None:
            raise InputError("these CLIP weights hold the vision tower only: scoring a prompt needs the text tower.")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if len(self._texts) + len(new) > _CACHED_PROMPTS:
            self._texts.clear()
            new = list(dict.fromkeys(prompts))
        with torch.no_grad():
            self._texts |= {prompt: self._text_tower([prompt])[0].float().cpu() for prompt in new}
        return torch.stack([self._texts[prompt] for prompt in prompts])


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarity (B,) of matching rows; the epsilon is that of `torch.nn.functional.normalize`."""
    return (F.normalize(images, dim=-1) * F.normalize(texts.to(images.device), dim=-1)).sum(dim=-1)
