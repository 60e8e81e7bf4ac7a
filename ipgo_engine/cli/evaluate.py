"""What the engine's result does not say: fresh seeds, best of N, the last step, single rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import LoopConfig, NoiseConfig, OptimizeConfig
from ..events import StepEvent
from ..generators.base import Generator
from ..rewards import Reward, scores_of
from ..tokens import IPGOTokens

FIRST_OF_N = 1_000_000  # seeds of best-of-N, far from those a user gives


@torch.no_grad()
def render(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    tokens: IPGOTokens | None = None,
    noise: Tensor | None = None,
    size: int = 4,
) -> Tensor:
    """Images on the CPU, one per prompt and seed (or noise, (B, n, C, H, W)), `size` of them at a time."""
    parts = []
    if tokens is not None:
        tokens = tokens.to(generator.device)
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        conditioning = generator.encode(list(prompts[rows]))
        if tokens is not None:
            conditioning = tokens.condition(conditioning)
        drawn = generator.draw_noise(list(seeds[rows])) if noise is None else noise[rows]
        parts.append(generator.generate(conditioning, drawn.to(generator.device)).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def rate(reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device, size: int = 8) -> list[float]:
    """Raw scores of images."""
    scores: list[float] = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        scores += scores_of(reward, images[rows].to(device), list(prompts[rows])).tolist()
    return scores


def best_of(
    generator: Generator,
    reward: Reward,
    prompt: str,
    count: int,
    size: int = 4,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Tensor, float]:
    """The best of `count` random seeds: its image (3, H, W) and reward. `tick` is called after every image batch."""
    best, winner = -math.inf, None
    for start in range(0, count, size):
        seeds = [FIRST_OF_N + i for i in range(start, min(start + size, count))]
        images = render(generator, [prompt] * len(seeds), seeds, size=size)
        scores = rate(reward, images, [prompt] * len(seeds), generator.device)
        top = max(range(len(scores)), key=scores.__getitem__)
        if winner is None or scores[top] > best:
            best, winner = scores[top], images[top]
        tick()
    assert winner is not None
    return winner, best


def images_at_equal_cost(
    config: LoopConfig, history: Sequence[StepEvent], steps: int, *, differentiable: bool = True
) -> int:
    """How many images cost as many model evaluations as the run spent on one of its images.

    A backward pass counts as two evaluations and a recomputed forward pass as one.
    """
    if not history:
        return 1
    rounds = config.epochs if isinstance(config, OptimizeConfig) else getattr(config, "iterations", 1)
    updates = rounds * history[-1].step / max(history[-1].total, 1)
    gradient = config.gradient
    if gradient == "auto":
        gradient = "exact" if differentiable else "hybrid-noise"
    through = min(config.backprop_steps or steps, steps) if gradient in ("exact", "hybrid-image", "hybrid-noise") else 0
    samples = config.perturbations if gradient in ("zeroth-order", "hybrid-noise") else 0
    one_update = steps * (1 + samples) + through * (3 if config.checkpoint else 2)
    start = 0 if isinstance(config, NoiseConfig) else 1  # noise starts at the stock image; tokens are compared with it
    return max(1, math.ceil((updates * one_update + (1 + start) * steps) / steps))
