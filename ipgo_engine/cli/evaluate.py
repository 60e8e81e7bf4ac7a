"""What the engine's result does not say: fresh seeds, best of N, the last step, single rewards."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..config import LoopConfig, NoiseConfig, OptimizeConfig
from ..errors import Cancelled, IPGOError
from ..events import StepEvent
from ..generators.base import Generator
from ..loop import VALIDATION_ROWS
from ..memory import is_out_of_memory
from ..rewards import Reward, scores_of
from ..tokens import IPGOTokens

FIRST_OF_N = 1_000_000  # seeds of best-of-N, far from those a user gives

Part = TypeVar("Part")


class Attempts:
    """What is wanted besides the learned files and their pictures: where it breaks, its cells stay empty.

    The first trouble is said; what broke once is not tried again.
    """

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def __call__(self, name: str, call: Callable[[], object]) -> bool:
        """Whether `call` came to its end. Ctrl-C is no trouble: the generator makes no more pictures, that is all."""
        if name in self.broken:
            return False
        try:
            call()
        except Cancelled:
            return False
        except Exception as error:
            if not self.broken:
                reason = " ".join(describe_error(error).split())
                print(f"ipgo: {name} broke down, cells of the table stay empty: {reason}", file=sys.stderr)
            self.broken.add(name)
            return False
        return True


def describe_error(error: Exception) -> str:
    """The text of an error; of one that is not the engine's own, also what kind it is."""
    return str(error) if isinstance(error, IPGOError) else f"{type(error).__name__}: {error}"


def in_groups(count: int, size: int, call: Callable[[slice], Part]) -> list[Part]:
    """`call` for `size` rows at a time, for one at a time after memory has run out."""
    found: list[Part] = []
    start = 0
    while start < count:
        try:
            found.append(call(slice(start, min(start + size, count))))
            start += size
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                text = "Out of memory with one picture at a time: use a smaller picture or lower precision."
                raise IPGOError(text) from error
        size = 1  # outside of the handler, whose error keeps the tensors alive
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def render_at_once(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: IPGOTokens | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Images on the CPU, one per prompt and seed (or noise, (B, n, C, H, W)), in one batch."""
    conditioning = generator.encode(list(prompts))
    if tokens is not None:
        conditioning = tokens.to(generator.device).condition(conditioning)
    drawn = generator.draw_noise(list(seeds)) if noise is None else noise
    return generator.generate(conditioning, drawn.to(generator.device)).float().cpu()


def render(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    tokens: IPGOTokens | None = None,
    noise: Tensor | None = None,
    size: int = 4,
) -> Tensor:
    """Images on the CPU, `size` of them at a time."""

    def draw(rows: slice) -> Tensor:
        return render_at_once(generator, prompts[rows], seeds[rows], tokens, None if noise is None else noise[rows])

    return torch.cat(in_groups(len(prompts), size, draw))


@torch.no_grad()
def rate(reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device, size: int = 8) -> list[float]:
    """Raw scores of images."""

    def score(rows: slice) -> list[float]:
        return scores_of(reward, images[rows].to(device), list(prompts[rows])).tolist()

    return [value for part in in_groups(len(prompts), size, score) for value in part]


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
    config: LoopConfig, history: Sequence[StepEvent], steps: int, *, differentiable: bool = True, rows: int = 1
) -> int:
    """How many images cost as many model evaluations as the run spent on one of its `rows` images.

    A backward pass counts as two evaluations and a recomputed forward pass as one. Epochs of several updates are
    compared by a validation each, of so many rows at most.
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
    if history[-1].total > rounds:
        one_update += steps * min(rows, VALIDATION_ROWS) / rows
    start = 0 if isinstance(config, NoiseConfig) else 1  # noise starts at the stock image; tokens are compared with it
    return max(1, math.ceil((updates * one_update + (1 + start) * steps) / steps))
