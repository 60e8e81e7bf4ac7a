"""Several rewards as one: a weighted sum, on the raw scores or on scores brought to a common scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Reward, begin_run, scores_of, settings_of


class Weighted:
    """sum_i w_i (r_i - mean_i) / std_i, itself a reward.

    Without `scales` the raw scores are summed (mean 0, std 1), as both papers do: a reward with a wide range then
    drowns the others (aesthetic spans about 2 points between ordinary images, HPS v2 about 0.05). With `scales`, one
    (mean, std) per reward, each term counts in units of its own spread; `calibrated` measures them on your images.
    The statistics are constants, never re-estimated while optimizing: a moving scale would move the goal.

    A weight may be negative (avoid) but not 0: measure a reward that is not optimized as a monitor instead.
    """

    def __init__(
        self, parts: Sequence[tuple[Reward, float]], scales: Sequence[tuple[float, float]] | None = None
    ) -> None:
        """Raises `InputError` for no parts, a weight of 0 or not finite, or scales that do not fit the parts."""
        if not parts:
            raise InputError("Weighted got no rewards: give at least one (reward, weight) pair.")
        for reward, weight in parts:
            if not math.isfinite(weight) or weight == 0:
                raise InputError(f"weight of {reward.name!r} is {weight!r}: use a finite number other than 0.")
        self.parts = [(reward, float(weight)) for reward, weight in parts]
        self.scales = _checked(scales, len(parts))

    @property
    def name(self) -> str:
        """Weights and names, such as `1*aesthetic + 0.5*clip`."""
        return " + ".join(f"{weight:g}*{reward.name}" for reward, weight in self.parts)

    @property
    def differentiable(self) -> bool:
        """True when every part is: a partial gradient would be a biased one."""
        return all(reward.differentiable for reward, _ in self.parts)

    @property
    def score_settings(self) -> dict[str, Any]:
        """Those of every part, and its scale in three digits: measured anew on a GPU, the further ones may differ."""
        scales = [[f"{number:.3g}" for number in scale] for scale in self.scales]
        return {"parts": [settings_of(reward) for reward, _ in self.parts], "scales": scales}

    @property
    def module(self) -> nn.Module | None:
        """The weights of every part that has some, for moving them between devices; None without any."""
        modules = [module for reward, _ in self.parts if (module := getattr(reward, "module", None)) is not None]
        return nn.ModuleList(modules) if modules else None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Weighted sums (B,), float32, for images (B, 3, H, W) in [0, 1]."""
        total = torch.zeros(images.shape[0], device=images.device)
        for (reward, weight), (mean, std) in zip(self.parts, self.scales, strict=True):
            total = total + weight * (scores_of(reward, images, prompts) - mean) / std
        return total

    def raw(self, images: Tensor, prompts: Sequence[str]) -> list[tuple[str, Tensor]]:
        """(name, raw scores (B,)) of every part, in order, without gradients: what a table shows beside the sum."""
        with torch.no_grad():
            return [(reward.name, scores_of(reward, images, prompts)) for reward, _ in self.parts]

    def begin_run(self) -> None:
        """Passed on to every part."""
        begin_run(*(reward for reward, _ in self.parts))

    def calibrated(self, images: Tensor, prompts: Sequence[str]) -> Weighted:
        """The same sum with each part's mean and standard deviation measured on these images (two or more)."""
        if images.shape[0] < 2:
            raise InputError(f"calibration got {images.shape[0]} image(s): a spread needs two or more.")
        self.begin_run()
        scales = [(float(scores.mean()), float(scores.std())) for _, scores in self.raw(images, prompts)]
        for (reward, _), (_, std) in zip(self.parts, scales, strict=True):
            if not std > 0:
                raise InputError(f"{reward.name!r} scores all {images.shape[0]} calibration images alike: add others.")
        return Weighted(self.parts, scales)


def _checked(scales: Sequence[tuple[float, float]] | None, count: int) -> list[tuple[float, float]]:
    if scales is None:
        return [(0.0, 1.0)] * count
    if len(scales) != count:
        raise InputError(f"{len(scales)} scale(s) for {count} reward(s): give one (mean, std) per reward.")
    for mean, std in scales:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise InputError(f"scale is ({mean!r}, {std!r}): use a finite mean and a std above 0.")
    return [(float(mean), float(std)) for mean, std in scales]
