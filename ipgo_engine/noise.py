"""Keeps optimized noise where Gaussian noise lives (noise paper, section 3.1: eqs. 6 to 9)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

LOG2 = math.log(2.0)
CHANNEL_DIM = 2  # of the noise of a generator, (B, n, C, ...)
FEWEST_VALUES = 16  # fewer numbers than this hold no evidence for or against being Gaussian
_ROW = 1024  # indices of an order are made as a table of this width, without a division per index


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
        steps, starts = affine_orders(values, count - 1, self.seed)
        found = _Measure.apply(flat, block, steps.to(flat.device), starts.to(flat.device))
        if channel_dim is None or channel_dim + 1 >= z.ndim or not 1 < z.shape[channel_dim] <= values // 2:
            return found  # a single channel, or a single place: nothing to put together
        together = z.float().movedim(channel_dim, -1).flatten(1)
        offsets = _Measure.apply(together, z.shape[channel_dim], steps[:0], starts[:0])
        return (found[0] + offsets[0]) / 2, torch.minimum(found[1], offsets[1])


def affine_orders(values: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Steps a and starts c of `count` permutations i -> (a i + c) mod (n - 1), a coprime to n - 1; the last stays.

    Two integers a permutation instead of n sorted random numbers, and measured to tell degenerate noise apart at least
    as well as uniformly random permutations do: a stride keeps long-range structure together. (Modulo n itself, a
    block size that divides n would keep every residue class together and the block mean would never change.)
    """
    random = torch.Generator().manual_seed(seed)
    steps: list[int] = []
    while len(steps) < count:
        step = int(torch.randint(1, values - 1, (), generator=random))
        if math.gcd(step, values - 1) == 1:
            steps.append(step)
    return torch.tensor(steps, dtype=torch.long), torch.randint(values - 1, (count,), generator=random)


def order_indices(steps: Tensor, starts: Tensor, values: int) -> Tensor:
    """The permutations themselves, (len(steps), n), int32: places in `twice(z)`.

    There every value but the last stands twice, so that no sum has to be taken modulo n - 1: that took longer than all
    the rest together.
    """
    modulus = values - 1
    table = steps[:, None] * torch.arange(_ROW, device=steps.device) % modulus
    heads = (steps * _ROW % modulus)[:, None] * torch.arange(-(-values // _ROW), device=steps.device)
    heads = (heads + starts[:, None]) % modulus
    order = (heads.int()[:, :, None] + table.int()[:, None, :]).flatten(1)[:, :values]
    order[:, modulus] = 2 * modulus
    return order


def twice(z: Tensor) -> Tensor:
    """(B, 2 n - 1): z without its last value, then z."""
    return torch.cat([z[:, :-1], z], dim=1)


class _Measure(torch.autograd.Function):
    """Values and gradient in one pass: both bounds have closed-form gradients, and most are zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, block: int, steps: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        want = ctx.needs_input_grad[0]
        log1, log2, gradient = _bounds(z, z, None, block, want)
        total, lowest = (log1 + log2)[:, 0], torch.minimum(log1, log2)[:, 0]
        if len(steps):
            total, weight = total / 2, 0.5 / len(steps)
            gradient = gradient / 2
            room = 1 << (18 if z.device.type == "cpu" else 24)  # what fits into a cache, or keeps a GPU busy
            source = twice(z)
            for a, c in zip(*(t.split(max(1, room // z.numel())) for t in (steps, starts)), strict=True):
                log1, log2, slope = _bounds(z, source, order_indices(a, c, z.shape[1]), block, want)
                total = total + weight * (log1 + log2).sum(1)
                lowest = torch.minimum(lowest, torch.minimum(log1, log2).amin(1))
                gradient = gradient + weight * slope
        probability = lowest.exp()
        ctx.save_for_backward(gradient)
        ctx.shape = z.shape
        ctx.mark_non_differentiable(probability)
        return total, probability

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).expand(ctx.shape), None, None, None


def _bounds(
    z: Tensor, source: Tensor, orders: Tensor | None, block: int, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log p1 and log p2 (eqs. 6, 7) of z (B, n) under P permutations, (B, P) each, and the gradient of their sum.

    The permutations are places in `source`, or None for z as it is. z is cut into m blocks of k = `block`; a remainder
    shorter than a block is left out. The gradient is (B, n), or a scalar zero where it vanishes: typical noise is free.
    """
    rows, count = z.shape[0], z.shape[1] // block
    places = None if orders is None else orders[:, : count * block]
    chosen = z[:, : count * block] if places is None else source.index_select(1, places.flatten())
    blocks = chosen.view(rows, -1, count, block)
    mean = blocks.mean(dim=2)
    log1 = (LOG2 - count * mean.square().sum(-1) / (2 * block)).clamp_max(0)
    covariance = blocks.transpose(2, 3) @ blocks / count - torch.eye(block, device=z.device)
    small = covariance if z.device.type in ("cpu", "cuda") else covariance.cpu()  # other backends may lack eigh
    spectrum, vectors = (part.to(z.device) for part in torch.linalg.eigh(small))
    m2, top = spectrum.abs().max(dim=-1)
    excess = ((1 + m2).sqrt() - 1 - math.sqrt(block / count)).clamp_min(0)
    log2 = (LOG2 - count / 2 * excess.square()).clamp_max(0)
    hot = ((log1 < 0) | (log2 < 0)).any(0)  # the permutations that have a gradient: of typical noise a few
    if not with_slope or not bool(hot.any()):
        return log1, log2, z.new_zeros(())
    # d log p1 / d z_i = -mean / k;  d log p2 / d z_i = -sign excess / sqrt(1 + M2) (u . z_i) u, u the top eigenvector
    u = vectors.gather(-1, top[..., None, None].expand(*top.shape, block, 1))
    sign = spectrum.gather(-1, top[..., None])[..., 0].sign()
    slope1 = ((log1 < 0) / -block)[..., None, None] * mean[:, :, None, :]
    slope2 = ((log2 < 0) * sign * excess / -(1 + m2).sqrt())[..., None, None] * u.transpose(2, 3)
    slope = (slope1[:, hot] + (blocks[:, hot] @ u[:, hot]) * slope2[:, hot]).view(rows, -1)
    if places is None:
        return log1, log2, torch.nn.functional.pad(slope, (0, z.shape[1] - slope.shape[1]))
    places, modulus = places[hot].flatten(), z.shape[1] - 1
    places = torch.where(places < modulus, places, places - modulus).long()
    # Not index_add_: it takes 17 times as long on a CPU.
    return log1, log2, torch.zeros_like(z).scatter_add_(1, places.expand(rows, -1), slope)
