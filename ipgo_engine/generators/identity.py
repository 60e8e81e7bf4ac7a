"""Names for weights: tokens learned for another encoder, and a run of another model, are recognised by them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_VALUES_PER_WEIGHT = 64


def describe_encoder(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """`"clip-768x12-3fa2c1d09b"`: hidden size, number of layers, and a hash of the signs of some weights.

    `parameters` are the encoder's (name, tensor) pairs, as `named_parameters()` gives them. Signs survive every
    rounding (float32, float16, bfloat16 give the same text), and a name counts from "layers." on, so that a host that
    wraps the same encoder in other modules arrives at the same text. Cheap: 64 values of each matrix of the layers.
    """
    matrices = {name: weight for name, weight in parameters if weight.ndim == 2}
    layers = {name[name.index("layers.") :]: weight for name, weight in matrices.items() if "layers." in name}
    chosen = layers or matrices
    names = sorted(chosen, key=_natural)
    width = int(chosen[names[0]].shape[-1]) if names else 0
    depth = len({name.split(".")[1] for name in layers})
    return f"{'clip' if layers else 'encoder'}-{width}x{depth}-{_digest({name: chosen[name] for name in names})}"


def describe_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """`"3fa2c1d09b"`: a hash of the signs of some values of every matrix and kernel, the same in every precision."""
    weights = {name: weight for name, weight in parameters if weight.ndim >= 2}
    return _digest({name: weights[name] for name in sorted(weights)})


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Ten digits for names, shapes and the signs of the first values, in this order."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    with torch.no_grad():
        first = [weight.detach().flatten()[:_VALUES_PER_WEIGHT].float() for weight in weights.values()]  # may be float8
        signs = [torch.signbit(values) for values in first]
        digest.update(bytes(torch.cat(signs).to("cpu", torch.uint8).tolist()) if signs else b"")
    return digest.hexdigest()[:10]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
