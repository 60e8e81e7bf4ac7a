"""Everything that differs between ComfyUI releases, found by looking, never by version number."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...ipgo_engine.errors import InputError
from .weights import quantized_parts


@contextmanager
def gradient_kernels() -> Iterator[None]:
    """Switch off fused kernels without a backward (RoPE, RMS norm, quantized matmul), where core has a switch."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def is_dynamic(patcher: Any) -> bool:
    """True when the weights live in dynamic VRAM: paged in and out by the driver, not to be aliased."""
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def ordinary_clone(patcher: Any, what: str) -> Any:
    """A clone whose weights are ordinary tensors on one device. `what` names the input in the error message.

    A dynamic model is loaded a second time, without dynamic VRAM, from where it came from; any other clone shares
    its weights with the original.
    """
    if not is_dynamic(patcher):
        clone = patcher.clone()
    else:
        try:
            clone = patcher.clone(disable_dynamic=True)
            in_precision_of_model(clone.model)
        except RuntimeError as error:
            raise InputError(
                f"{what} uses dynamic VRAM and cannot be loaded a second time without it ({error}). "
                "Load it with a stock loader, or start ComfyUI with --disable-dynamic-vram."
            ) from error
    if hasattr(clone, "remove_additional_models"):
        clone.remove_additional_models("multigpu")
    clone.model_options.pop("multigpu_clones", None)
    return clone


def in_precision_of_model(model: torch.nn.Module) -> None:
    """Convert weights that are in the precision of their file to the one their model was made for.

    A start with dynamic VRAM converts as it pages weights in; what it loads without paging keeps the file's, of which
    the layers of a float16 file in a bfloat16 VAE make an error.
    """
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            wanted = getattr(module, f"{name}_comfy_model_dtype", None)
            if wanted not in (None, tensor.dtype) and not quantized_parts(tensor):
                tensor.data = tensor.data.to(wanted)  # of a model loaded for us alone; tied weights stay tied


def fix_empty_latent(patcher: Any, latent: dict[str, Any]) -> Tensor:
    """The latent as stock KSampler would use it: an empty one gets the channels and the scale of the model."""
    function = comfy.sample.fix_empty_latent_channels
    extra = [
        k
        for k in inspect.signature(function).parameters
        if k in ("downscale_ratio_spacial", "downscale_ratio_temporal")
    ]
    return function(patcher, latent["samples"], **{key: latent.get(key) for key in extra})


def vae_output_dtype(vae: Any) -> torch.dtype:
    """The dtype in which the VAE hands out images."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32


def refuse_nested(latent: Any) -> None:
    """Refuse latents that are several tensors in one (audio with video)."""
    if getattr(latent, "is_nested", False):
        raise InputError(
            "latent holds several tensors (audio and video together): only image latents can be optimized."
        )


def prepare_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of PREPARE_SAMPLING with a complete load of the weights asked for, where that exists."""
    return {**kwargs, "force_full_load": True} if "force_full_load" in kwargs else kwargs


def as_stock_latent(samples: Tensor) -> Tensor:
    """Latents in the dtype in which KSampler hands them on."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", None)
    return samples if dtype is None else samples.to(dtype())


def refuse_streaming(model: torch.nn.Module, device: torch.device) -> None:
    """Refuse weights that are streamed through shared buffers.

    Newer releases overwrite such a buffer with the next layer's weight before the backward pass has used it: the
    gradient is wrong, and no error says so.
    """
    if not hasattr(comfy.model_management, "get_cast_buffer"):
        return
    away = sum(weight.device.type != device.type for weight in model.parameters())  # "mps" is not equal to "mps:0"
    if away:
        raise InputError(
            f"model does not fit into the memory of {device}: {away} of its weights would be streamed, and the "
            "gradient would be wrong. Use a smaller model or one in fp8, a smaller picture, or leave out --novram."
        )
