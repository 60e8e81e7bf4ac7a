"""What this ComfyUI offers in its lists."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.model_management import get_torch_device

from ...ipgo_engine.errors import InputError
from .samplers import BIASED

SMALLEST = 16
"""Pixels of a side, as in the Empty Latent Image node."""


def samplers() -> list[str]:
    """Samplers whose gradient is right, those of other packs included; packs may add theirs at any time."""
    return [name for name in comfy.samplers.KSampler.SAMPLERS if name not in BIASED]


def schedulers() -> list[str]:
    """Every scheduler there is now."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


def reward_dtype(name: str) -> torch.dtype:
    """Precision of a reward model; `auto` is float32 on the CPU and float16 elsewhere."""
    if name == "auto":
        name = "float32" if get_torch_device().type == "cpu" else "float16"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def empty_latent(width: int, height: int) -> dict[str, object]:
    """What the Empty Latent Image node makes, for one image; a link may bring sizes that its widget would not take."""
    for name, side in (("width", width), ("height", height)):
        if side < SMALLEST:
            raise InputError(f"{name} is {side} pixels: use {SMALLEST} or more.")
    return {"samples": torch.zeros(1, 4, height // 8, width // 8), "downscale_ratio_spacial": 8}
