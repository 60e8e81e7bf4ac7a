"""The permutations of eqs. 8 and 9 of the noise paper: made of two integers each, and fast to read and to undo."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROW = 1024  # indices of an order are made as a table of this width, without a division per index
_RUN = 64  # values that stay together in a large noise


def run_length(values: int, block: int) -> int:
    """How many neighbours of a noise of n values stay together in every permutation but the identity: 1, or 64 of many.

    A processor reads what lies together many times faster. Neighbours go to the same place of as many different blocks,
    so that no block holds two of them, and where n is large there are still so many runs that the permutations see the
    same as before (`python -m benchmarks.block_size --orders runs`).
    """
    return _RUN if values >= _RUN * 1024 and block <= _RUN else 1


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
    """The permutations themselves, (len(steps), n), int32."""
    modulus = values - 1
    table = steps[:, None] * torch.arange(_ROW, device=steps.device) % modulus
    heads = (steps * _ROW % modulus)[:, None] * torch.arange(-(-values // _ROW), device=steps.device)
    heads = (heads + starts[:, None]) % modulus
    order = (heads.int()[:, :, None] + table.int()[:, None, :]).flatten(1)[:, :values]
    order = torch.where(order < modulus, order, order - modulus)  # a sum of two: much faster than a division
    order[:, modulus] = modulus
    return order


class Shuffles:
    """A noise z (B, n) in P permutations of its R runs of L values, as many at a time as suit the processor.

    k runs that follow one another in a permutation make L blocks: one of their first values, one of their second, and
    so on. Runs that are too few for that are left out, as values that are too few for a block are.
    """

    def __init__(self, z: Tensor, block: int, steps: Tensor, starts: Tensor) -> None:
        self._block, self._run = block, run_length(z.shape[1], block)
        self._runs = z[:, : z.shape[1] // self._run * self._run].view(len(z), -1, self._run)
        self._used = self._runs.shape[1] // block * block
        self.count = self._used // block * self._run  # m
        self._steps, self._starts = steps, starts
        room = 1 << (18 if z.device.type == "cpu" else 24)  # what fits into a cache, or keeps a GPU busy
        at_once = max(1, room // z.numel())
        self.parts = torch.arange(len(steps), device=z.device).split(at_once)
        # Fresh memory would take longer than what is done in it.
        self._chosen, self._moved = (z.new_empty(at_once * z.numel() if self._run > 1 else 0) for _ in range(2))

    def orders(self, part: Tensor) -> Tensor:
        """The permutations of these numbers, (Q, R)."""
        return order_indices(self._steps[part], self._starts[part], self._runs.shape[1])

    def _places(self, orders: Tensor) -> Tensor:
        """What makes a block, (Q, m / L, k), in Q orders (Q, R)."""
        return orders[:, : self._used].view(len(orders), -1, self._block)

    def blocks(self, orders: Tensor) -> Tensor:
        """Blocks (B, Q, m, k) in Q orders (Q, R)."""
        places, rows = self._places(orders), len(self._runs)
        if self._run == 1:
            return self._runs[..., 0].index_select(1, places.flatten()).view(rows, *places.shape)
        # Whole runs lie side by side in a row of Z^T: (B, Q, k, m).
        found = _copy(self._runs, places.transpose(1, 2).flatten(), self._chosen)
        return found.view(rows, len(orders), self._block, self.count).transpose(2, 3)

    def put_back(self, gradient: Tensor, slope: Tensor, orders: Tensor, weight: float) -> None:
        """Add `weight` times what belongs to these blocks (B, Q, m, k) to `gradient` (B, n), where their values are."""
        (rows, runs, run), places = self._runs.shape, self._places(orders)
        if run == 1:  # not index_add_: it takes 17 times as long on a CPU
            index = places.flatten().long().expand(rows, -1)
            gradient += weight * torch.zeros_like(gradient).scatter_add_(1, index, slope.reshape(rows, -1))
            return
        slope = slope.transpose(2, 3).reshape(rows, len(orders), self._used, run)
        for i, place in enumerate(places.transpose(1, 2).flatten(1)):
            whence = torch.zeros_like(orders[i])  # reading in disorder is faster than writing in disorder
            whence[place.long()] = torch.arange(self._used, dtype=place.dtype, device=place.device)
            moved = _copy(slope[:, i], whence, self._moved).index_fill_(1, orders[i, self._used :].long(), 0)
            gradient[:, : runs * run].add_(moved.flatten(1), alpha=weight)


def _copy(runs: Tensor, places: Tensor, room: Tensor) -> Tensor:
    """The runs (B, R, L) at these places, (B, len(places), L), in `room`; a CPU copies rows of a matrix as a whole."""
    rows, count, run = runs.shape
    first = count * torch.arange(rows, dtype=places.dtype, device=places.device)
    places = (first[:, None] + places).flatten()
    found = room[: len(places) * run].view(-1, run)
    return torch.index_select(runs.reshape(-1, run), 0, places, out=found).view(rows, -1, run)
