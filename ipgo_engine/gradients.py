"""Gradients of the reward: exact, or estimated where the reward is a black box (noise paper, section 4).

Each function generates the images of the given rows, adds the gradient of -sum(rewards) to the `.grad` of the
problem's parameters, and returns the images and their rewards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import LoopConfig
from .errors import InputError
from .generators.base import Conditioning, Generator
from .problems import Problem
from .rewards.base import Reward, scores_of

Inputs = Callable[[Sequence[int]], tuple[Conditioning, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Images (B, 3, H, W) and raw rewards (B,), both detached and on the CPU.

    There, because a run holds several sets of them: those of many prompts would fill the memory that the model needs.
    """

    images: Tensor
    rewards: Tensor


@dataclass
class Task:
    """Everything a gradient needs but the step; the memory knobs change when memory runs out."""

    generator: Generator
    problem: Problem
    reward: Reward
    config: LoopConfig
    micro_batch: int
    backprop_steps: int | None
    checkpoint: bool

    def chunks(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows in groups that fit into memory."""
        for start in range(0, len(rows), self.micro_batch):
            yield list(rows[start : start + self.micro_batch])

    def score(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Rewards of these rows' images."""
        return scores_of(self.reward, images, [self.problem.prompts[row] for row in rows])

    def mean_score(self, reward: Reward, rows: Sequence[int], evaluation: Evaluation) -> float:
        """Another reward's mean over images that are there, a few at a time."""
        prompts = [self.problem.prompts[row] for row in rows]
        total = 0.0
        with torch.no_grad():
            for places in self.chunks(range(len(rows))):
                chosen = [prompts[i] for i in places]
                images = evaluation.images[places].to(self.generator.device)
                total += float(scores_of(reward, images, chosen).sum())
        return total / len(rows)

    def generate(self, rows: Sequence[int]) -> Tensor:
        """Images of these rows, differentiable in the parameters."""
        conditioning, noise = self.problem.inputs(rows)
        return self.generator.generate(
            conditioning, noise, backprop_steps=self.backprop_steps, checkpoint=self.checkpoint
        )

    @torch.no_grad()
    def evaluate(self, rows: Sequence[int], inputs: Inputs | None = None) -> Evaluation:
        """Images and rewards without gradients, of the problem's present inputs unless others are given."""
        parts = []
        for chunk in self.chunks(rows):
            images = self.generator.generate(*(inputs or self.problem.inputs)(chunk))
            parts.append(_seen(images, self.score(images, chunk)))
        return _join(parts)


def _seen(images: Tensor, rewards: Tensor) -> Evaluation:
    return Evaluation(images.detach().cpu(), rewards.detach().cpu())


def _join(parts: Sequence[Evaluation]) -> Evaluation:
    return Evaluation(torch.cat([part.images for part in parts]), torch.cat([part.rewards for part in parts]))


def _random(task: Task, step: int, row: int | None = None) -> torch.Generator:
    """Random numbers of one step, or of one row in it.

    They depend on nothing else, so that a resumed run repeats them and how many rows fit into memory changes none. A
    hash, because a seed that is a small number would be the one that a starting noise was drawn with.
    """
    name = f"{task.config.seed} {step} {row}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))


def _normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.device)


class _Directions:
    """Normal directions for rows of one step: each row has random numbers of its own."""

    def __init__(self, task: Task, rows: Sequence[int], step: int) -> None:
        self._random = {row: _random(task, step, row) for row in rows}

    def like(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """The next direction of each of these rows, shaped as `x` (rows first)."""
        return torch.stack([_normal_like(x[i], self._random[row]) for i, row in enumerate(rows)])


def exact(task: Task, rows: Sequence[int], step: int) -> Evaluation:
    """Back-propagation through reward, decoder and sampler."""
    parts = []
    for chunk in task.chunks(rows):
        images = task.generate(chunk)
        rewards = task.score(images, chunk)
        if rewards.requires_grad:  # a side of length zero or K beyond every use leaves nothing to learn
            torch.autograd.backward(-rewards.sum())
        parts.append(_seen(images, rewards))
    return _join(parts)


def _hybrid(task: Task, rows: Sequence[int], perturbed: Callable[[list[int], Tensor], Tensor]) -> Evaluation:
    """Back-propagate <h, M> with h = mean_i (r(y_i) - r(y)) (y_i - y) / mu^2 (section 4)."""
    count, scale = task.config.perturbations, task.config.perturbation_scale
    parts = []
    for chunk in task.chunks(rows):
        images = task.generate(chunk)
        y = images.detach()
        with torch.no_grad():
            rewards = task.score(y, chunk)
            # Rewards are promised pixels in [0, 1], or what the generator gives: a black box may wrap around outside.
            low, high = min(0.0, float(y.min())), max(1.0, float(y.max()))
            h = torch.zeros_like(y)
            for _ in range(count):
                changed = perturbed(chunk, y)
                gain = task.score(changed.clamp(low, high), chunk) - rewards
                h += gain.view(-1, 1, 1, 1) * (changed - y)
            h /= count * scale**2
        if images.requires_grad:
            torch.autograd.backward(-(h * images).sum())
        parts.append(_seen(y, rewards))
    return _join(parts)


def hybrid_image(task: Task, rows: Sequence[int], step: int) -> Evaluation:
    """y_i = M(z) + mu xi_i: perturbations in image space; no further image is generated."""
    directions, scale = _Directions(task, rows, step), task.config.perturbation_scale
    return _hybrid(task, rows, lambda chunk, y: y + scale * directions.like(y, chunk))


def hybrid_noise(task: Task, rows: Sequence[int], step: int) -> Evaluation:
    """y_i = M(z + mu xi_i): perturbations of the noise, so that every y_i is a picture (the paper's choice).

    To first order h is J J^T grad r: not the reward's gradient but its part along directions in which pictures vary.
    """
    directions, scale = _Directions(task, rows, step), task.config.perturbation_scale

    def perturbed(chunk: list[int], _: Tensor) -> Tensor:
        conditioning, noise = task.problem.inputs(chunk)
        return task.generator.generate(conditioning, noise + scale * directions.like(noise, chunk))

    return _hybrid(task, rows, perturbed)


def zeroth_order(task: Task, rows: Sequence[int], step: int) -> Evaluation:
    """g = mean_i (r(theta + mu xi_i) - r(theta)) xi_i / mu on the parameters; no gradient through the model."""
    random = _random(task, step)
    base = task.evaluate(rows)
    count, scale = task.config.perturbations, task.config.perturbation_scale
    parameters = [*task.problem.shared, *task.problem.own]
    kept = [p.detach().clone() for p in parameters]
    totals = [torch.zeros_like(p) for p in kept]
    try:
        for _ in range(count):
            directions = [_normal_like(p, random) for p in kept]
            _set(parameters, [p + scale * d for p, d in zip(kept, directions, strict=True)])
            gains = (task.evaluate(rows).rewards - base.rewards) / (scale * count)
            for total, direction, parameter in zip(totals, directions, parameters, strict=True):
                own = any(parameter is p for p in task.problem.own)
                weight = gains.view(-1, *[1] * (direction.ndim - 1)) if own else gains.sum()
                total += weight.to(direction.device) * direction
    finally:
        _set(parameters, kept)
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = -total if parameter.grad is None else parameter.grad - total
    return base


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def no_gradient(task: Task, rows: Sequence[int], step: int) -> Evaluation:
    """Images and rewards alone, for a method that proposes parameters without a gradient."""
    return task.evaluate(rows)


Estimator = Callable[[Task, Sequence[int], int], Evaluation]
ESTIMATORS: dict[str, Estimator] = {
    "exact": exact,
    "zeroth-order": zeroth_order,
    "hybrid-image": hybrid_image,
    "hybrid-noise": hybrid_noise,
    "bayesian": no_gradient,
}
FORWARD_ONLY = (zeroth_order, no_gradient)  # nothing is back-propagated


def choose(config: LoopConfig, reward: Reward) -> Estimator:
    """The estimator the settings ask for; "auto" is exact for a differentiable reward, else hybrid in noise space."""
    name = config.gradient
    if name == "auto":
        name = "exact" if reward.differentiable else "hybrid-noise"
    if name == "exact" and not reward.differentiable:
        raise InputError(
            f"reward {reward.name!r} is not differentiable: use gradient hybrid-noise, hybrid-image or zeroth-order."
        )
    return ESTIMATORS[name]
