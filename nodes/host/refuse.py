"""What cannot be optimized through, refused by name and with the reason before any time is spent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...ipgo_engine.errors import InputError
from .compat import is_dynamic
from .wrappers import KEY

CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
"""Wrapper keys of core's patches that skip model calls depending on the picture."""

RANDOM_PATCHES = {
    "TomePatchModel": "which merges tokens at random places",
    "HyperTile": "which draws the size of its tiles",
}
"""Core nodes whose patches draw from the global random state: the backward pass would draw again."""

MODELS = {"CosmosPredict2": "its fused kernel has no backward"}
"""Model classes with an operation that loses the gradient without an error."""


def refuse_unsupported(patcher: Any) -> None:
    """Refuse models and patches whose gradient would be missing or wrong."""
    keys = {key for group in patcher.wrappers.values() for key in group}
    for key, name in CACHES.items():
        if key in keys:
            raise InputError(
                f"model is patched with {name}, which reuses old results: its gradient is wrong. Remove {name}."
            )
    if KEY in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise InputError(
            "model already carries optimized noise, which would replace the noise of this run: connect the MODEL from "
            "before the IPGO node that gave it out."
        )
    if "bypass_lora" in patcher.injections:
        raise InputError(
            "model carries a LoRA in bypass mode, whose weights lie where no gradient passes: use Load LoRA instead."
        )
    makers = set(_patch_makers(patcher))
    for name, what in RANDOM_PATCHES.items():
        if name in makers:
            raise InputError(
                f"model is patched with {name}, {what}: no image could be made again, and the gradient is that of "
                f"another image. Remove {name}."
            )
    for base in type(patcher.model).__mro__:
        if base.__name__ in MODELS:
            raise InputError(f"model is a {base.__name__}: {MODELS[base.__name__]}. Use another model.")


def _patch_makers(patcher: Any) -> Iterator[str]:
    """Names of the classes whose methods made the patches of the transformer blocks."""
    for patches in patcher.model_options.get("transformer_options", {}).get("patches", {}).values():
        for patch in patches:
            yield getattr(patch, "__qualname__", "").split(".")[0]


def refuse_paged(models: list[Any]) -> None:
    """Refuse further models (ControlNets, patches with a network) whose weights are paged in and out."""
    for model in models:
        if is_dynamic(model):
            raise InputError(
                f"a {type(model.model).__name__} beside the model is in dynamic VRAM, where its weights may change "
                "before the backward pass: start ComfyUI with --disable-dynamic-vram, or leave it out."
            )


def refuse_missing(vae: Any, clip: Any, needs_clip: bool) -> None:
    """Refuse what a checkpoint loader gives out for the parts that its checkpoint does not hold."""
    if getattr(vae, "first_stage_model", None) is None:
        raise InputError("vae is invalid: the checkpoint it comes from holds none. Connect one from Load VAE instead.")
    if clip is None and needs_clip:
        raise InputError(
            "clip is empty: the checkpoint it comes from holds no text encoder. Connect one from Load CLIP instead."
        )


def refuse_hooks(conditioning: list[Any], name: str) -> None:
    """Refuse scheduled weight hooks: they are gone when the backward pass runs the model again."""
    if any("hooks" in options for _, options in conditioning):
        raise InputError(
            f"{name} carries hooks (scheduled LoRA or CLIP schedule), which change the weights while sampling: "
            "the gradient would use the wrong weights. Apply the LoRA to the model instead."
        )
