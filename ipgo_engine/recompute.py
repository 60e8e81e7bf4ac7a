"""Gradients through a model call without storing its activations.

`torch.utils.checkpoint` is not used: where a block writes into its input in place (Flux, FreeU), its gradient is
silently wrong by a few per cent. Here the forward is the plain no-grad call, bit for bit, and the backward runs it
again with gradients.

A function that overwrites what its own backward needs is run once more with copies of what it overwrites. Keeping such
copies ready costs every operation some Python (a third more time for a small model), so it is done only for functions
that were caught at it: autograd counts the writes to every tensor and refuses a gradient it cannot vouch for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_WRITES_IN_PLACE: set[Any] = set()  # code of functions that were caught; a hint that saves time, nothing depends on it


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], context: Callable[[], AbstractContextManager], *inputs: Tensor
    ) -> Tensor:
        ctx.function, ctx.context = function, context
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        with torch.enable_grad(), ctx.context():
            grads = iter(_gradients(ctx.function, inputs, wanted, grad_outputs[0]))
        return (None, None, *(next(grads) if need else None for need in needed))


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], wanted: list[Tensor], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` with respect to `wanted`, some of the inputs."""

    def attempt() -> tuple[Tensor | None, ...]:
        output = function(*inputs)
        return torch.autograd.grad(output, wanted, grad_output.to(output.dtype), allow_unused=True)

    code = getattr(function, "__code__", type(function))
    if code not in _WRITES_IN_PLACE:
        try:
            return attempt()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            _WRITES_IN_PLACE.add(code)
    with _writes_allowed():
        return attempt()


@contextmanager
def _writes_allowed() -> Iterator[None]:
    """`allow_mutation_on_saved_tensors` without its mix-up of tensors.

    Torch knows a saved tensor by its address. Once it is overwritten only its copy is kept, so the address can become
    another tensor's, which is then taken for the old one: about one gradient in twenty through a ControlNet was wrong.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as saved:
        saved.cloned = _Copies(saved.tid_to_weakhandle)
        yield


class _Copies(WeakKeyDictionary):
    """Copies by handle; the address of a tensor that has been copied stands for it no longer."""

    def __init__(self, handles: MutableMapping[Any, Any]) -> None:
        super().__init__()
        self._handles = handles

    def __setitem__(self, handle: Any, copy: Tensor) -> None:
        super().__setitem__(handle, copy)
        for address in [address for address, known in self._handles.items() if known is handle]:
            del self._handles[address]


def recompute(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Call `function(*inputs)` now without gradients and again, with gradients, in the backward pass.

    `function` maps tensors to one tensor and must be deterministic. `context` is entered around the second call only.
    Gradients reach `inputs`, nothing that `function` closes over. Memory: the inputs and the output, no activations.
    """
    return _Recompute.apply(function, context, *inputs)
