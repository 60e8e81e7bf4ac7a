"""A reward averaged over small changes of the image: patterns that only one exact pixel grid carries earn nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Reward, begin_run, scores_of, settings_of
from .preprocess import check_inputs, into_range


@dataclass(frozen=True)
class Augmentation:
    """One change: crop a window, resample it, add noise. Fractions of the image's own sides, so any size works."""

    top: float
    left: float
    side: float
    scale: float
    noise: float
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        """The changed images (B, 3, H', W') in [0, 1], differentiable; the same change for every image of the batch."""
        height, width = images.shape[-2:]
        rows, columns = max(1, round(height * self.side)), max(1, round(width * self.side))
        top, left = math.floor((height - rows) * self.top), math.floor((width - columns) * self.left)
        changed = images[..., top : top + rows, left : left + columns]
        target = (max(1, round(rows * self.scale)), max(1, round(columns * self.scale)))
        if target != (rows, columns):
            changed = F.interpolate(changed, size=target, mode="bilinear", align_corners=False, antialias=True)
        if self.noise > 0:
            source = torch.Generator().manual_seed(self.seed)
            changed = changed + self.noise * torch.randn(changed.shape[1:], generator=source).to(changed)
        return into_range(changed)


class Robust:
    """The mean of a reward over the image itself and `samples` changed versions of it.

    The changes are drawn once from `seed`, so equal images always score equal and a run can be resumed. The score
    stays on the reward's own scale. Cost: `samples` + 1 times the reward; wrap the reward in `Offloaded` first to keep
    memory at that of one.
    """

    def __init__(
        self,
        reward: Reward,
        samples: int = 4,
        *,
        seed: int = 0,
        crop: float = 0.15,
        resample: float = 0.3,
        noise: float = 0.02,
    ) -> None:
        """Each version keeps at least 1 - `crop` of both sides, is shrunk to at least 1 - `resample` of that, and gets
        Gaussian noise of standard deviation `noise` (of the range 0 to 1). Raises `InputError` for other values."""
        if samples < 1:
            raise InputError(f"samples is {samples!r}: use 1 or more.")
        for name, value in (("crop", crop), ("resample", resample)):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value!r}: use a fraction from 0 to below 1.")
        if not (math.isfinite(noise) and noise >= 0):
            raise InputError(f"noise is {noise!r}: use 0 or more.")
        self.reward = reward
        draw = torch.Generator().manual_seed(seed)
        self.augmentations = [_drawn(draw, crop, resample, noise) for _ in range(samples)]

    @property
    def name(self) -> str:
        """Such as `robust(aesthetic)`."""
        return f"robust({self.reward.name})"

    @property
    def differentiable(self) -> bool:
        """As the reward: the changes themselves always are."""
        return self.reward.differentiable

    @property
    def score_settings(self) -> dict[str, Any]:
        """Those of the reward, and the changes."""
        return {"reward": settings_of(self.reward), "augmentations": [astuple(one) for one in self.augmentations]}

    @property
    def module(self) -> nn.Module | None:
        """The reward's weights, where it has any."""
        return getattr(self.reward, "module", None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean scores (B,) for images (B, 3, H, W) in [0, 1]."""
        check_inputs(images, prompts)
        images = into_range(images)
        total = scores_of(self.reward, images, prompts)
        for change in self.augmentations:
            total = total + scores_of(self.reward, change(images), prompts)
        return total / (1 + len(self.augmentations))

    def begin_run(self) -> None:
        """Passed on to the reward."""
        begin_run(self.reward)


def _drawn(draw: torch.Generator, crop: float, resample: float, noise: float) -> Augmentation:
    top, left, side, scale = torch.rand(4, generator=draw).tolist()
    seed = int(torch.randint(2**31, (1,), generator=draw))
    return Augmentation(top, left, 1 - crop * side, 1 - resample * scale, noise, seed)
