"""Human Preference Score v2 (Wu et al. 2023): CLIP ViT-H/14 fine-tuned on human choices; v2.0 and v2.1.

The two versions are different checkpoints of one architecture and their scores do not compare. Figures from the
authors' repository, averaged over their benchmark and multiplied by 100: Stable Diffusion v1.4 has 26.95 (v2.0) and
25.35 (v2.1), SDXL Base 0.9 has 27.73 and 30.63.

Preprocessing is not CLIP's: their evaluation turns the picture into a float tensor first, fits the *longer* side into
224 pixels and fills the rest with black, so nothing is cropped away. Measured against their package with torchvision
0.26: the same tensor bit for bit, and scores within 1e-6. Before version 0.17 torchvision resized float tensors without
antialiasing, which moves pixels of pictures of 512 and more by 4 to 5 steps of 8 bits on average; scores published
with those versions differ accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from .backbones import load_clip
from .clip_backbone import ClipBackbone, cosine
from .files import find_file
from .preprocess import Preprocessing, check_inputs

Version = Literal["v2.0", "v2.1"]
VIT_H_14 = {"model_cfg": {"quick_gelu": False, "vision_cfg": {"width": 1280, "head_width": 80, "layers": 32}}}
"""What the shapes of the file do not tell, and what it is checked against."""
FILES: dict[str, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
NAMES: dict[str, str] = {"v2.0": "hpsv2", "v2.1": "hpsv2.1"}


class HumanPreference:
    """Cosine similarity of the fine-tuned towers, in [-1, 1]; ordinary images score 0.15 to 0.35."""

    differentiable = True

    def __init__(self, backbone: ClipBackbone, version: Version) -> None:
        """`version` only names the score; the weights are the backbone's."""
        self.name = NAMES[version]
        self.backbone = backbone
        size = backbone.preprocessing.size
        self.preprocessing = Preprocessing(size=size, fit="longer", clamp=False)

    @property
    def module(self) -> nn.Module:
        """The weights, for moving them between devices."""
        return self.backbone.module

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) for images (B, 3, H, W) in [0, 1]; prompts are cut at 77 tokens and keep their end token."""
        check_inputs(images, prompts)
        texts = self.backbone.text_features(prompts)
        return cosine(self.backbone.image_features(images, self.preprocessing), texts)


def load_hps(
    path: str | Path,
    version: Version,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> HumanPreference:
    """From the authors' file ({"state_dict": ...}), its safetensors conversion, or the folder that holds one.

    In a folder the file of the version asked for is taken, by name. `architecture` is for tests: open_clip's
    configuration of the model when it is not ViT-H-14.
    """
    stem = FILES[version].removesuffix(".pt")
    file = find_file(path, (f"{stem}.safetensors", f"{stem}.pt"), f"HPS {version} weights")
    for other, name in FILES.items():  # no tensor tells the versions apart, the published name does
        if other != version and file.stem == name.removesuffix(".pt"):
            raise InputError(f"HPS {version} weights: {str(file)!r} is version {other[1:]}: choose that version.")
    return HumanPreference(load_clip(file, device, dtype, architecture=architecture or VIT_H_14), version)
