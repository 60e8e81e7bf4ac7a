"""CLIP models as rewards use them: features of pixels and of prompts, from transformers or open_clip weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .files import read_json, read_weights
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
        """Features (B, D) of the prompts, without gradients; every prompt is encoded once and remembered."""
        if self._text_tower is None:
            raise InputError("these CLIP weights hold the vision tower only: scoring a prompt needs the text tower.")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if len(self._texts) + len(new) > _CACHED_PROMPTS:
            self._texts.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            with torch.no_grad():
                encoded = self._text_tower(new).float().cpu()
            self._texts.update(zip(new, encoded, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarity (B,) of matching rows; the epsilon is that of `torch.nn.functional.normalize`."""
    return (F.normalize(images, dim=-1) * F.normalize(texts.to(images.device), dim=-1)).sum(dim=-1)


_LOADED: WeakValueDictionary[tuple[Any, ...], ClipBackbone] = WeakValueDictionary()
"""Backbones in use, so that two rewards on the same weights share them; forgotten with the last reward."""


def load_clip(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    architecture: Mapping[str, Any] | None = None,
) -> ClipBackbone:
    """A CLIP from a transformers folder, an open_clip folder, or one file of either kind.

    `architecture` stands for the content of open_clip_config.json where an open_clip file has none beside it. Loading
    the same weights twice gives the same object. Raises `InputError` for anything that is no such CLIP.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"CLIP weights: {str(path)!r} does not exist.")
    # Resolved for the key alone: a link's target may have another name, and no vocabulary beside it.
    key = (path.resolve(), _state(path), str(device or "cpu"), dtype, repr(architecture))
    backbone = _LOADED.get(key)
    if backbone is None:
        backbone = _LOADED[key] = _load(path, device, dtype, architecture)
    return backbone


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file does: the folder's own time would not tell that one was written anew."""
    files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _load(
    path: Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    architecture: Mapping[str, Any] | None,
) -> ClipBackbone:
    from .clip_open import load_open_clip
    from .clip_transformers import load_transformers_clip

    if path.is_dir() and (path / "config.json").is_file() and "model_type" in read_json(path / "config.json"):
        return load_transformers_clip(path, None, device, dtype)
    if path.is_dir() and not (path / "open_clip_config.json").is_file():
        raise InputError(
            f"CLIP weights: {str(path)!r} holds neither config.json (transformers) nor open_clip_config.json."
        )
    if path.is_dir():
        return load_open_clip(path, None, device, dtype, architecture)
    weights = read_weights(path)
    if any(name.startswith("vision_model.") for name in weights):
        return load_transformers_clip(path, weights, device, dtype)
    return load_open_clip(path, weights, device, dtype, architecture)
