"""CLIP models from transformers or open_clip weights, shared by the rewards that use the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..errors import InputError
from .clip_backbone import ClipBackbone
from .clip_open import load_open_clip
from .clip_transformers import load_transformers_clip
from .files import read_json, read_weights

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
