"""The noise file: optimized noises as safetensors, with the prompts and settings they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .files import write_whole
from .tokens import engine_version, json_header

FORMAT = "ipgo-noise-1"
LEARNED_WITH = "learned_with"
"""The label that names the tokens file without which this noise gives another picture; None for noise alone."""


def write_noise(path: str | Path, noise: Tensor, **metadata: Any) -> Path:
    """Write noises (B, n, C, H, W) and JSON metadata: `prompts` and `seeds` of the rows, `sampler`, `steps`, ...

    Raises `InputError` for a label that is not JSON and for a file that cannot be written.
    """
    text = json_header(metadata, {"format": FORMAT, "version": engine_version()}, "noise file")
    return write_whole(path, lambda part: save_file({"noise": noise.detach().cpu().contiguous()}, part, metadata=text))


def read_noise(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Noises and metadata. Raises `InputError` when the file is missing, damaged or not a noise file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a noise file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            if header.pop("format", None) != FORMAT:
                raise ValueError("it is another kind of safetensors file")
            noise = file.get_tensor("noise")
        _check(noise, header)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a noise file or is damaged ({error}).") from error
    return noise, header


def _check(noise: Tensor, header: dict[str, Any]) -> None:
    """Raise `ValueError` for what a reader could not use."""
    if noise.ndim != 5 or not noise.numel() or not noise.is_floating_point():
        raise ValueError(f"its noise is a {noise.dtype} tensor of shape {tuple(noise.shape)}")
    if not torch.isfinite(noise.float()).all():
        raise ValueError("its noise holds numbers that are not finite")
    for name, fits in (("prompts", _is_text), ("seeds", _is_seed)):
        values = header.get(name, [])
        if not isinstance(values, list) or not all(map(fits, values)):
            raise ValueError(f"its {name} cannot be read")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64  # a bool is an int, too
