"""Wrappers on a clone of the user's MODEL: what makes one stock sampling run differentiable, interruptible and cheap.

Wrappers take `*args, **kwargs` because their signatures grew over the releases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import comfy.ldm.modules.attention as attention
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ...ipgo_engine.generators.gradflow import GradientScale
from .compat import gradient_kernels
from .interrupt import poll_interrupt
from .recomputed import WITH_BACKWARD, Mode, is_transformer_options, recomputed

KEY = "ipgo"

MODEL_EXPONENT = 4
"""Size of the gradient, as a power of two, where it enters a model call. The largest entries of every layer of the demo
model then lie between 2^-17 and 2^8; float16 has 2^-24 to 2^16, the token gradient is the smallest of all, and wider
schedules and models need room above."""


def needs_gradient(value: Any) -> bool:
    """True for a tensor that a gradient is asked for."""
    return isinstance(value, Tensor) and value.requires_grad


def attention_with_backward(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """An attention override that changes nothing unless a gradient is needed and the kernel has no backward.

    `previous` is the override the user's own patches installed; its backward is unknown, so it too is replaced by
    scaled-dot-product attention while a gradient is computed, and by nothing otherwise.
    """

    def override(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        differentiates = torch.is_grad_enabled() and any(needs_gradient(a) for a in args[:3])
        known = previous is None and getattr(function, "__name__", "") in WITH_BACKWARD
        if differentiates and not known:
            return attention.attention_pytorch(*args, **kwargs)
        return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)

    return override


def stored_apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """APPLY_MODEL without recomputation: activations are kept, the model must not write into what autograd saved.

    The model gets lists of its own: UNets take what a ControlNet gave out of its lists, and may be called again.
    """
    args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs), is_leaf=is_transformer_options)
    with gradient_kernels() if torch.is_grad_enabled() else nullcontext():
        return executor(*args, **kwargs)


def scaled_calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """CALC_COND_BATCH with the gradient in the range of float16, from the predictions back to the inputs.

    This is the one place around the model and its ControlNets whose ends are float32: what a ControlNet hands to the
    model may be float16 itself. Every call chooses its scale from the gradient that arrives, so a gradient that grows
    from step to step does not overflow. To other precisions a power of two makes no difference.
    """
    if not torch.is_grad_enabled():
        return executor(model, conds, x, *args, **kwargs)
    scale = GradientScale(MODEL_EXPONENT)
    conds = [entries and [_scaled(entry, scale) for entry in entries] for entries in conds]
    predictions = torch.stack(executor(model, conds, scale.incoming(x), *args, **kwargs))
    return [prediction.clone() for prediction in scale.outgoing(predictions)]  # patches may write into them


def _scaled(entry: dict[str, Any], scale: GradientScale) -> dict[str, Any]:
    """A processed conditioning in which every tensor that needs a gradient comes out of the scale."""
    conds = dict(entry["model_conds"])
    for name, cond in conds.items():
        if any(needs_gradient(leaf) for leaf in tree_leaves(cond.cond)):
            copies = tree_map(lambda leaf: scale.incoming(leaf) if needs_gradient(leaf) else leaf, cond.cond)
            conds[name] = cond._copy_with(copies)
    return {**entry, "model_conds": conds}


class GradientRun:
    """The wrappers of a gradient clone, and what changes from one sampling run to the next."""

    def __init__(self, patcher: Any, prepare: Callable[..., Any]) -> None:
        self._first_call, self._calls, self._checkpoint = 0, 0, True
        self._storable: bool | None = None
        self.stock_mode: Mode = torch.no_grad
        options = patcher.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attention_with_backward(options.get("optimized_attention_override"))
        patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
        patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise)
        patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, scaled_calc_cond_batch)
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model)

    def begin(self, first_call: int, checkpoint: bool) -> None:
        """Start a run in which gradients pass from model call `first_call` on."""
        self._first_call, self._calls, self._checkpoint = first_call, 0, checkpoint

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """PREDICT_NOISE: polls for an interrupt, and lets gradients pass in the last calls only."""
        poll_interrupt()
        self._calls += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._calls > self._first_call):
            return executor(*args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """APPLY_MODEL, recomputed in the backward pass, or stored where that is possible and gives the same values."""
        if self._checkpoint or self._storable is False or not torch.is_grad_enabled():
            return recomputed(executor, *args, stock_mode=self.stock_mode, **kwargs)
        stored = stored_apply_model(executor, *args, **kwargs)
        if self._storable is None and stored.requires_grad:
            self._storable = _can_be_stored(stored, functools.partial(executor, *args, **kwargs), self.stock_mode)
        if self._storable is False:
            return recomputed(executor, *args, stock_mode=self.stock_mode, **kwargs)
        return stored


def _can_be_stored(stored: Tensor, call: functools.partial[Tensor], stock_mode: Mode) -> bool:
    """Whether a call with gradients gives the stock values and can be differentiated. Found out once per session.

    With gradients other kernels may run (attention without a backward is replaced), and the image would depend on
    `checkpoint`; and blocks that write in place (Flux) destroy what autograd saved.
    """
    with torch.no_grad():
        if not torch.equal(stored, recomputed(call.func, *call.args, stock_mode=stock_mode, **call.keywords)):
            return False
    leaves, _ = tree_flatten((call.args, call.keywords))
    inputs = [leaf for leaf in leaves if needs_gradient(leaf)]
    try:
        torch.autograd.grad(stored, inputs, torch.zeros_like(stored), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return False
    return True
