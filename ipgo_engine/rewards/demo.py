"""Rewards of the embedded demo model: its small CLIP, and a held-out judge with another image tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Reward
from .clip import ClipScore
from .clip_backbone import ClipBackbone, cosine
from .precision import GradientScale
from .preprocess import Preprocessing, check_inputs

_SIZE = 128  # both image towers were trained on pictures of this size


class DemoClip(ClipScore):
    """Cosine similarity of picture and prompt, in [-1, 1], by the CLIP whose text tower conditions the demo model.

    It knows small pictures of emoji and nothing else.
    """

    name = "demo-clip"


class DemoJudge:
    """Cosine similarity, in [-1, 1], of a convolutional image tower with the same text features.

    Never optimized in the demonstration: it shows when an optimizer only fools the small CLIP.
    """

    name = "demo-judge"
    differentiable = True

    def __init__(self, tower: nn.Module, texts: ClipBackbone) -> None:
        """`tower` maps pictures (B, 3, 128, 128) in [0, 1] to the space of `texts`."""
        self.tower = tower
        self.texts = texts
        self.preprocessing = Preprocessing(size=_SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)

    @property
    def module(self) -> nn.Module:
        """The weights of both towers, for moving them between devices."""
        return nn.ModuleList([self.tower, self.texts.module])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) for images (B, 3, H, W) in [0, 1]."""
        check_inputs(images, prompts)
        weight, pixels = next(self.tower.parameters()), self.preprocessing(images)
        scale = GradientScale() if weight.dtype == torch.float16 and pixels.requires_grad else None
        pixels = scale.enter(pixels) if scale else pixels
        features = self.tower(pixels.to(weight)).float()
        features = scale.leave(features) if scale else features
        return cosine(features.to(images.device), self.texts.text_features(prompts))


def load_demo(name: str, device: str | torch.device | None, dtype: torch.dtype | None) -> Reward:
    """`"demo-clip"` or `"demo-judge"`: the weights ship with the package, nothing is downloaded."""
    from .. import demo

    try:
        model, tokenizer = demo.load_clip()
        model = model.to(device=device, dtype=dtype)
        tower = demo.load_judge().to(device=device, dtype=dtype) if name == "demo-judge" else None
    except (OSError, KeyError) as error:
        raise InputError(f"reward {name!r} needs the embedded demo model, which is not complete: {error}.") from error
    texts = _backbone(model, tokenizer)
    return DemoClip(texts) if tower is None else DemoJudge(tower, texts)


def _backbone(model: Any, tokenizer: Any) -> ClipBackbone:
    def image_tower(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def text_tower(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").input_ids
        # Causal attention: the padding behind the end token, at which the tower is read, changes nothing.
        return model.text_projection(model.text_model(input_ids=tokens.to(model.logit_scale.device)).pooler_output)

    preprocessing = Preprocessing(size=_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    return ClipBackbone(model, image_tower, text_tower, preprocessing)
