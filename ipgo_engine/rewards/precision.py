"""Half-precision weights on the gradient path without losing small gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TARGET = 1024.0
"""Largest entry of the gradient where it enters a float16 network; keeps the rest far from 6e-5, where float16 thins
out, and from 65,504, where it ends."""


class GradientScale:
    """Scales the gradient up where it enters a float16 network and back down where it leaves it.

    The gradient of a similarity with respect to one pixel is around 1e-6, below what float16 resolves. `leave` goes
    around what comes out of the network and `enter` around what goes in; both are the identity in the forward pass.
    The factor is exact (a power of two) and chosen from the gradient that arrives, so no overflow needs handling.
    """

    def __init__(self) -> None:
        """One object per forward pass."""
        self.factor = 1.0

    def enter(self, x: Tensor) -> Tensor:
        """The identity; its gradient, of the dtype of `x`, is divided by the factor."""
        return _Enter.apply(x, self)  # pyright: ignore[reportReturnType]

    def leave(self, x: Tensor) -> Tensor:
        """The identity; its gradient is multiplied by the factor."""
        return _Leave.apply(x, self)  # pyright: ignore[reportReturnType]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.scale.factor, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        largest = float(grads[0].abs().max())
        usable = largest > 0 and largest != float("inf")
        exponent = torch.tensor(_TARGET / largest).log2().floor() if usable else torch.tensor(0.0)
        ctx.scale.factor = float(2.0 ** exponent.clamp(-40, 40))
        return grads[0] * ctx.scale.factor, None
