"""Weights that autograd accepts, without copying them.

ComfyUI loads and runs models in inference mode. A weight made there cannot be saved for a backward pass, and neither
`.data`, `.to()` nor a view changes that. An alias can: an ordinary tensor over the same memory.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


def is_usable(tensor: Tensor) -> bool:
    """False for tensors autograd refuses: inference tensors, and those that lost their version counter."""
    if tensor.is_inference() or not all(is_usable(part) for part in quantized_parts(tensor).values()):
        return False
    try:
        _ = tensor._version
    except RuntimeError:
        return False
    return True


def alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the same memory. Inference mode must be off."""
    parts = quantized_parts(tensor)
    if parts:
        parts = {name: part if is_usable(part) else alias(part) for name, part in parts.items()}
        data = parts.pop("_qdata")
        quantized: Any = tensor
        return type(quantized)(data, quantized._layout_cls, replace(quantized._params, **parts))
    source = tensor.detach()
    empty = torch.empty(0, dtype=source.dtype, device=source.device)
    return empty.set_(source.untyped_storage(), source.storage_offset(), source.size(), source.stride())


def quantized_parts(tensor: Tensor) -> dict[str, Tensor]:
    """What a quantized weight of newer releases consists of: its data and its scales; nothing for other tensors."""
    data, params = getattr(tensor, "_qdata", None), getattr(tensor, "_params", None)
    if data is None or not is_dataclass(params):
        return {}
    scales = {field.name: getattr(params, field.name) for field in fields(params)}
    return {"_qdata": data, **{name: value for name, value in scales.items() if isinstance(value, Tensor)}}


def is_quantized(module: nn.Module) -> bool:
    """True when some weight of the module is a quantized tensor."""
    return any(quantized_parts(weight) for weight in module.parameters())


def usable(value: Any) -> Any:
    """Nested lists, tuples and dicts rebuilt with an alias for every tensor autograd refuses; nothing is changed."""
    if isinstance(value, Tensor):
        return value if is_usable(value) else alias(value)
    if type(value) is dict:
        return {key: usable(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(usable(item) for item in value)
    return value


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    """Where a tensor lies; a quantized one where its data does."""
    data = quantized_parts(tensor).get("_qdata", tensor)
    return data.device, data.untyped_storage().data_ptr()


class Aliases:
    """Replaces weights by aliases and puts the originals back.

    Tied weights stay tied. A module that was reloaded or moved in the meantime keeps what that gave it: the original
    would still be where it was.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    def apply(self, module: nn.Module) -> int:
        """Alias every parameter and buffer that needs it; returns how many did. May be called again after a reload."""
        seen: dict[int, Tensor] = {}
        return sum(
            self._apply_to(child._parameters, True, seen) + self._apply_to(child._buffers, False, seen)
            for child in module.modules()
        )

    def apply_to_attributes(self, value: Any) -> int:
        """Likewise every tensor that an object which is no module keeps in an attribute."""
        return self._apply_to(vars(value), False, {})

    def _apply_to(self, table: dict[str, Any], parameters: bool, seen: dict[int, Tensor]) -> int:
        count = 0
        for name, tensor in list(table.items()):
            if not isinstance(tensor, Tensor) or (is_usable(tensor) and not tensor.requires_grad):
                continue
            table[name] = self._replacement(tensor, parameters, seen)
            self._replaced.append((table, name, tensor, table[name]))
            count += 1
        return count

    @staticmethod
    def _replacement(tensor: Tensor, parameter: bool, seen: dict[int, Tensor]) -> Tensor:
        """One alias per distinct tensor, frozen."""
        if id(tensor) not in seen:
            new = alias(tensor)
            seen[id(tensor)] = nn.Parameter(new, requires_grad=False) if parameter else new
        return seen[id(tensor)]

    def restore(self) -> None:
        """Put every original back whose alias is still in place, over the same memory."""
        for table, name, original, replacement in reversed(self._replaced):
            if table.get(name) is replacement and _address(replacement) == _address(original):
                table[name] = original
        self._replaced.clear()
