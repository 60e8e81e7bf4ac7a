"""Calls and modules that compute again in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.ldm.modules.attention as attention
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...ipgo_engine.recompute import recompute
from .compat import gradient_kernels
from .interrupt import comfy_interrupt_as_cancelled, poll_interrupt

Mode = Callable[[], AbstractContextManager[Any]]

WITH_BACKWARD = frozenset({"attention_basic", "attention_pytorch", "attention_split", "attention_xformers"})
"""Attention functions of core whose backward is right; the others (sub-quadratic, sage, flash, int8) have none."""


@contextmanager
def backward_kernels() -> Iterator[None]:
    """Kernels with a backward, for model code that no override of attention reaches (ControlNets)."""
    names = [n for n in ("optimized_attention", "optimized_attention_masked") if hasattr(attention, n)]
    before = {name: getattr(attention, name) for name in names}
    with gradient_kernels():
        try:
            for name, function in before.items():
                if getattr(function, "__name__", "") not in WITH_BACKWARD:
                    setattr(attention, name, attention.attention_pytorch)
            yield
        finally:
            for name, function in before.items():
                setattr(attention, name, function)


def is_transformer_options(node: Any) -> bool:
    """The options travel as they are, not as a copy: patches write into them."""
    return isinstance(node, dict) and ("cond_or_uncond" in node or "sample_sigmas" in node)


def recomputed(function: Callable[..., Any], *args: Any, stock_mode: Mode = torch.no_grad, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, without gradients now and again, with gradients, in the backward pass.

    Arguments and result may be nested; gradients flow through every tensor in them that needs one. `stock_mode` is
    how gradients are switched off: quantized layers compute something else in inference mode, the mode of stock nodes,
    than under `no_grad`.
    """
    leaves, layout = tree_flatten((args, kwargs), is_leaf=is_transformer_options)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    inputs = [leaves[i] for i in where]
    for i in where:  # the closure must not keep the graph of earlier steps alive
        leaves[i] = None
    result = _Result()

    def call(*tensors: Tensor) -> Tensor:
        poll_interrupt()  # the backward pass is half of the time
        full = list(leaves)
        for index, tensor in zip(where, tensors, strict=True):
            # Layers ask `requires_grad` to choose between kernels, whether gradients are on or not.
            full[index] = tensor if torch.is_grad_enabled() else tensor.detach()
        rebuilt_args, rebuilt_kwargs = tree_unflatten(full, layout)
        with comfy_interrupt_as_cancelled():  # newer releases raise theirs from every layer, in the backward pass too
            if torch.is_grad_enabled():
                return result.pack(function(*rebuilt_args, **rebuilt_kwargs))
            with stock_mode():
                packed = result.pack(function(*rebuilt_args, **rebuilt_kwargs))
        return packed.clone() if packed.is_inference() else packed

    if torch.is_grad_enabled() and where:
        return result.unpack(recompute(call, *inputs, context=backward_kernels))
    with torch.no_grad():
        return result.unpack(call(*inputs))


class _Result:
    """A nested result as one tensor: autograd functions of the engine return one."""

    def pack(self, value: Any) -> Tensor:
        """One flat tensor, or the only one there is, untouched."""
        if isinstance(value, Tensor):
            self.layout = None
            return value
        leaves, self.layout = tree_flatten(value)
        self.leaves = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def unpack(self, packed: Tensor) -> Any:
        """The nested result again."""
        if self.layout is None:
            return packed
        parts = iter(packed.split([leaf.numel() for leaf in self.leaves if isinstance(leaf, torch.Size)]))
        full = [next(parts).clone().view(leaf) if isinstance(leaf, torch.Size) else leaf for leaf in self.leaves]
        return tree_unflatten(full, self.layout)


class RecomputedModules:
    """Gives modules a recomputed forward, and takes it away again."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []

    def apply(self, module: nn.Module) -> None:
        """Recompute this module from now on; calls with a list (a cache to fill) stay as they are."""
        if "forward" in vars(module):  # ours already, or somebody else's own
            return
        stock = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            repeatable = not any(isinstance(value, list) for value in (*args, *kwargs.values()))
            return recomputed(stock, *args, **kwargs) if repeatable else stock(*args, **kwargs)

        module.forward = forward
        self._modules.append(module)

    def restore(self) -> None:
        """The class's own forward again, everywhere."""
        for module in self._modules:
            del module.forward
        self._modules.clear()
