"""How gradients pass through the two places where plain arithmetic would lose them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Half precision keeps 2^-14 .. 2^16 exactly enough; pixels start well inside, with room for growth on the way back.
_TARGET_EXPONENT = -3


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def clamp_straight_through(image: Tensor) -> Tensor:
    """Clamp to [0, 1]; the gradient passes as if there were no clamp, so that a saturated pixel can come back."""
    return _Clamp.apply(image)


class GradientScale:
    """Keeps gradients of a float16 model from vanishing: pixels' gradients are far below what float16 can hold.

    `outgoing` marks the float32 result, `incoming` every float32 input. On the way back the gradient is multiplied by a
    power of two at `outgoing`, and divided by it at `incoming`; the values themselves are untouched. One instance
    serves one graph and one backward pass at a time.
    """

    def __init__(self, exponent: int = _TARGET_EXPONENT) -> None:
        """The largest entry of the gradient is scaled to about 2 ** `exponent`."""
        self.exponent, self.factor = exponent, 1.0

    def outgoing(self, value: Tensor) -> Tensor:
        """Identity; its backward chooses the factor and applies it."""
        return _ScaleUp.apply(value, self)

    def incoming(self, value: Tensor) -> Tensor:
        """Identity; its backward takes the factor out again."""
        return _ScaleDown.apply(value, self)


class _ScaleUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        largest = float(grad_outputs[0].abs().max())
        usable = math.isfinite(largest) and largest > 0
        ctx.scale.factor = 2.0 ** (ctx.scale.exponent - math.frexp(largest)[1]) if usable else 1.0
        return grad_outputs[0] * ctx.scale.factor, None


class _ScaleDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] / ctx.scale.factor, None
