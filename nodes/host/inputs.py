"""What comes into a node, made ready: CONDITIONING and LATENT of our own, the encoder's name, ControlNets."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...ipgo_engine.errors import InputError
from ...ipgo_engine.generators.identity import describe_encoder
from . import compat
from .conditioning import ComfyConditioning
from .weights import usable

DEEPEST = 8
"""How far patches are looked into: a dict of lists of objects with a dict of networks needs six."""


def owned(conditioning: ComfyConditioning) -> ComfyConditioning:
    """The same CONDITIONING in ordinary tensors that nobody else writes into."""
    with torch.inference_mode(False):
        return [
            [None if e is None else usable(e).detach().clone(), usable(dict(options))] for e, options in conditioning
        ]


def one_latent(model: Any, latent: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The latent image (1, C, h, w) and the denoise mask of a LATENT whose images, and masks, are all the same."""
    with torch.inference_mode(False):
        samples = usable(compat.fix_empty_latent(model, latent)).detach().clone()
        mask = latent.get("noise_mask")
        mask = None if mask is None else usable(mask).detach().clone()
    if not _all_equal(samples):
        raise InputError(f"latent holds {len(samples)} different images: give one (LatentFromBatch).")
    if mask is not None and mask.ndim > 2:
        if not _all_equal(mask[: len(samples)]):
            raise InputError(
                f"latent holds different masks for its {len(samples)} images: give one image (LatentFromBatch) or one "
                "mask."
            )
        mask = mask[:1]
    return samples[:1], mask


def _all_equal(rows: Tensor) -> bool:
    return all(torch.equal(rows[0], other) for other in rows[1:])


def place_in_batch(latent: dict[str, Any]) -> int:
    """Which of the noises that a seed gives is that of this LATENT: not the first, if it was taken from a batch."""
    return int(latent["batch_index"][0]) if latent.get("batch_index") is not None else 0


def encoder_name(clip: Any, dim: int) -> str:
    """Identity of the text encoders, the same that the diffusers generator gives to the same weights."""
    model = getattr(clip, "cond_stage_model", None)
    if model is None:
        return f"conditioning-{dim}"
    towers = [child for _, child in model.named_children() if any(True for _ in child.parameters())]
    return "+".join(describe_encoder(_sign_readable(tower)) for tower in towers)


def _sign_readable(tower: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named weights; 8-bit floats as integers of the same sign, which is what the identity is made of."""
    for name, weight in tower.named_parameters():
        one_byte = weight.is_floating_point() and weight.element_size() == 1
        yield name, weight.detach().view(torch.int8) if one_byte else weight


def controls_of(conds: dict[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Every ControlNet in the conditionings, chained ones too."""
    for entries in conds.values():
        for entry in entries:
            control = entry.get("control")
            while control is not None:
                yield control
                control = control.previous_controlnet


def networks_beside(patcher: Any, controls: list[Any]) -> list[torch.nn.Module]:
    """The networks of ControlNets, that of a T2I-Adapter too, which no patcher loads; of their VAEs; of patches."""
    own = [part for control in controls for part in vars(control).values() if isinstance(part, torch.nn.Module)]
    vaes = [control.vae for control in controls if getattr(control, "vae", None) is not None]
    return [*own, *(vae.first_stage_model for vae in vaes), *networks_of_patches(patcher)]


def networks_of_patches(patcher: Any) -> list[torch.nn.Module]:
    """The networks that patches of other packs bring along: in objects, what functions enclose, lists and dicts."""
    options = patcher.model_options.get("transformer_options", {})
    found: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()
    waiting = deque((options.get(name), 0) for name in ("patches", "patches_replace"))
    while waiting:
        value, depth = waiting.popleft()
        if isinstance(value, torch.nn.Module):
            found[id(value)] = value
        elif depth < DEEPEST and id(value) not in seen:
            seen.add(id(value))
            waiting += [(part, depth + 1) for part in _parts(value)]
    return list(found.values())


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, str | bytes | int | float | Tensor | type | types.ModuleType):
        return []
    return [*_enclosed(value), getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]


def _enclosed(value: Any) -> Iterator[Any]:
    """What a function took from the function around it."""
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents
