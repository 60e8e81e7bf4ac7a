"""CLIP score (Radford et al. 2021, Hessel et al. 2021): how well an image matches its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .clip_backbone import ClipBackbone, cosine
from .preprocess import check_inputs


class ClipScore:
    """Cosine similarity of image and prompt in [-1, 1], with any CLIP.

    With OpenAI's ViT-L/14 ordinary pairs score 0.15 to 0.35. Not multiplied by 100 or by the logit scale.
    """

    name = "clip"
    differentiable = True

    def __init__(self, backbone: ClipBackbone) -> None:
        """A backbone from `backbones.load_clip`, with both towers."""
        self.backbone = backbone

    @property
    def module(self) -> nn.Module:
        """The weights, for moving them between devices."""
        return self.backbone.module

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) in [-1, 1] for images (B, 3, H, W) in [0, 1]; prompts are cut at the tokenizer's limit (77)."""
        check_inputs(images, prompts)
        texts = self.backbone.text_features(prompts)
        return cosine(self.backbone.image_features(images), texts)
