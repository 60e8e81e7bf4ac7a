"""Keeps optimized noise where Gaussian noise lives (noise paper, section 3.1: eqs. 6 to 9)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .permutations import Shuffles, affine_orders, run_length

LOG2 = math.log(2.0)
CHANNEL_DIM = 2  # of the noise of a generator, (B, n, C, ...)
FEWEST_VALUES = 16  # fewer numbers than this hold no evidence for or against being Gaussian


def choose_block_size(values: int) -> int:
    """k for a noise of n values: the largest power of two with n >= 256 k^2, between 1 and 64.

    Global faults (scale, mean, zeros) are seen best with small blocks, local structure (a channel's offset, slow
    waves: what a hacked brightness looks like) with large ones, and the bounds go blind when k comes near m = n / k.
    `benchmarks/block_size.py` measures both; this is the best compromise at every n (the draft's m / 100 is about 1.6
    times as large, the released code always takes 4).
    """
    return max(1, min(64, 2 ** int(math.log2(math.sqrt(values) / 16)))) if values >= 256 else 1


class NoiseRegularizer:
    """Concentration inequalities on the mean and the covariance of k-blocks of z, over b permutations of its values.

    `block_size` is k; None chooses it from n. The first permutation is the identity: only there local structure lies
    as the sampler sees it. It carries half the weight of the expectation in eq. 9 (a uniform choice among 100 would
    leave it one hundredth, and its gradient would drown); eq. 8 takes the minimum, so weights do not matter there. The
    other permutations depend on `seed` and n alone. Computed in float32 whatever z is.

    With `channel_dim`, one permutation more: the channels of one place lie together, k is their number, and it weighs
    as much as all the others. An offset of whole channels is what changes a picture's colour and brightness, and with
    the small k that a small noise needs no other order sees it: on the demo model (n = 1024) brightness turned a black
    cat into an empty page while P(z) stayed at 0.5.
    """

    def __init__(self, block_size: int | None = None, permutations: int = 100, seed: int = 0) -> None:
        if permutations < 1 or (block_size is not None and block_size < 1):
            raise InputError(f"block_size is {block_size}, permutations is {permutations}: both must be at least 1.")
        self.block_size, self.permutations, self.seed = block_size, permutations, seed

    def log_probability(self, z: Tensor, channel_dim: int | None = None) -> Tensor:
        """R(z) of eq. 9 without mu: expectation of log p1 + log p2, at most 0, differentiable; z of any shape."""
        return self.measure(z[None], None if channel_dim is None else channel_dim + 1)[0][0]

    def probability(self, z: Tensor, channel_dim: int | None = None) -> float:
        """P(z) of eq. 8, in [0, 1]: the smallest p1 or p2 over the permutations; z of any shape."""
        return float(self.measure(z.detach()[None], None if channel_dim is None else channel_dim + 1)[1][0])

    def measure(self, z: Tensor, channel_dim: int | None = None) -> tuple[Tensor, Tensor]:
        """R(z), differentiable, and P(z) of every row of z (B, ...): two float32 tensors (B,) from one pass.

        `channel_dim` (1 or more) says which dimension holds the channels, and must be followed by those of places.
        Raises `InputError` when a row has too few values for two blocks, or one that is not finite.
        """
        flat = z.flatten(1).float()
        if not bool(torch.isfinite(flat).all()):
            raise InputError("the noise holds NaN or infinity: start again from freshly drawn noise.")
        values = flat.shape[1]
        block = self.block_size or choose_block_size(values)
        if values < max(2 * block, FEWEST_VALUES):
            raise InputError(
                f"a noise of {values} values is too small for blocks of {block}: "
                f"at least {max(2 * block, FEWEST_VALUES)} values are needed."
            )
        count = self.permutations if block > 1 else 1  # blocks of one value look the same in every order
        steps, starts = affine_orders(values // run_length(values, block), count - 1, self.seed)
        found = _Measure.apply(flat, block, steps.to(flat.device), starts.to(flat.device))
        if channel_dim is None or channel_dim + 1 >= z.ndim or not 1 < z.shape[channel_dim] <= values // 2:
            return found  # a single channel, or a single place: nothing to put together
        together = z.float().movedim(channel_dim, -1).flatten(1)
        offsets = _Measure.apply(together, z.shape[channel_dim], steps[:0], starts[:0])
        return (found[0] + offsets[0]) / 2, torch.minimum(found[1], offsets[1])


class _Measure(torch.autograd.Function):
    """Values and gradient together: both bounds have closed-form gradients, and most are zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, block: int, steps: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows, want = len(z), ctx.needs_input_grad[0]
        used = z.shape[1] // block * block
        blocks = z[:, :used].view(rows, 1, -1, block)
        found = _bounds(*_moments(blocks), used // block)
        total, lowest, gradient = found.total(), found.lowest(), torch.zeros_like(z)
        if want and bool(found.hot.any()):
            gradient[:, :used] = found.slope(blocks, found.hot).reshape(rows, used)
        if len(steps):
            shuffles = Shuffles(z, block, steps, starts)
            moments = [_moments(shuffles.blocks(shuffles.orders(part))) for part in shuffles.parts]
            mean, second = (torch.cat(part, dim=1) for part in zip(*moments, strict=True))
            found = _bounds(mean, second, shuffles.count)
            total, lowest = (total + found.total()) / 2, torch.minimum(lowest, found.lowest())
            gradient /= 2
            hot = found.hot
            for part in shuffles.parts if want else ():
                part = part[hot[part]]
                if len(part):
                    orders = shuffles.orders(part)
                    slope = found.slope(shuffles.blocks(orders), part)
                    shuffles.put_back(gradient, slope, orders, 0.5 / len(steps))
        probability = lowest.exp()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(probability)
        return total, probability

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None


class _Bounds(NamedTuple):
    """log p1 and log p2 (eqs. 6, 7) of P orders, (B, P), and the gradient of their sum.

    That of a block z_i is `constant` + (`axis` . z_i) `pull`, each (B, P, k, 1).
    """

    log1: Tensor
    log2: Tensor
    constant: Tensor
    axis: Tensor
    pull: Tensor

    @property
    def hot(self) -> Tensor:
        """Which of the P have a gradient: of typical noise a few."""
        return ((self.log1 < 0) | (self.log2 < 0)).any(0)

    def total(self) -> Tensor:
        """The expectation of eq. 9, (B,)."""
        return (self.log1 + self.log2).mean(1)

    def lowest(self) -> Tensor:
        """The minimum of eq. 8, (B,)."""
        return torch.minimum(self.log1, self.log2).amin(1)

    def slope(self, blocks: Tensor, orders: Tensor) -> Tensor:
        """Gradients of blocks (B, Q, m, k) in these Q of the P orders."""
        along = (blocks @ self.axis[:, orders]).transpose(2, 3)
        return (along * self.pull[:, orders]).add_(self.constant[:, orders]).transpose(2, 3)


def _moments(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, P, k) and second moments (B, P, k, k) of blocks (B, P, m, k)."""
    return blocks.mean(dim=2), blocks.transpose(2, 3) @ blocks / blocks.shape[2]


def _bounds(mean: Tensor, second: Tensor, count: int) -> _Bounds:
    """Both bounds from the moments of `count` blocks."""
    block = mean.shape[2]
    log1 = (LOG2 - count * mean.square().sum(-1) / (2 * block)).clamp_max(0)
    covariance = second - torch.eye(block, device=mean.device)
    small = covariance if mean.device.type in ("cpu", "cuda") else covariance.cpu()  # other backends may lack eigh
    spectrum, vectors = (part.to(mean.device) for part in torch.linalg.eigh(small))
    m2, top = spectrum.abs().max(dim=-1)
    excess = ((1 + m2).sqrt() - 1 - math.sqrt(block / count)).clamp_min(0)
    log2 = (LOG2 - count / 2 * excess.square()).clamp_max(0)
    # d log p1 / d z_i = -mean / k;  d log p2 / d z_i = -sign excess / sqrt(1 + M2) (u . z_i) u, u the top eigenvector
    axis = vectors.gather(-1, top[..., None, None].expand(*top.shape, block, 1))
    sign = spectrum.gather(-1, top[..., None])[..., 0].sign()
    constant = ((log1 < 0) / -block)[..., None, None] * mean[..., None]
    pull = ((log2 < 0) * sign * excess / -(1 + m2).sqrt())[..., None, None] * axis
    return _Bounds(log1, log2, constant, axis, pull)
