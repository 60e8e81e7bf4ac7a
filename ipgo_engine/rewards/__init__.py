"""Reward models and black boxes, one per file, all with the contract of `base.Reward`.

`load` makes the built-in ones. Any object with `name`, `differentiable` and `score(images, prompts)` is a reward too:

    class Redness:
        name, differentiable = "redness", True

        def score(self, images, prompts):   # (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32, higher is better
            return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))

    rewards.Weighted([(Redness(), 1.0), (rewards.load("aesthetic", path), 0.5)])
"""

from __future__ import annotations

from .base import Reward, begin_run, scores_of
from .combine import Weighted
from .fetch import download, offer
from .judge import Judge, JudgeConfig, JudgeError
from .loading import NAMES, load
from .offload import Offloaded
from .robust import Robust

__all__ = [
    "NAMES",
    "Judge",
    "JudgeConfig",
    "JudgeError",
    "Offloaded",
    "Reward",
    "Robust",
    "Weighted",
    "begin_run",
    "download",
    "load",
    "offer",
    "scores_of",
]
