"""The UNet with classifier-free guidance, and the VAE decoder, as functions that can be called again in a backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast as mixed_precision
from torch.nn.functional import pad

from ..recompute import recompute


@dataclass(frozen=True)
class Guidance:
    """Everything the UNet attends to, in the model's dtype; the negative half is None without guidance.

    `positive` and `negative` are (B, S, d) with the same S. `mask` is (2B, S) or (B, S), None when every position
    counts; `added` holds SDXL's pooled text and size ids. Negative rows come first.
    """

    positive: Tensor
    negative: Tensor | None = None
    mask: Tensor | None = None
    added: dict[str, Tensor] | None = None
    scale: float = 1.0


def join(
    positive: Tensor, mask: Tensor | None, negative: Tensor, negative_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positive, negative and joint mask of one batched call, the negative rows first.

    Where lengths differ the shorter side is filled up with zeros behind the mask: a masked position gets attention
    exp(-10000) = 0, so this is what two separate calls compute, in one. Equal lengths without masks need none.
    """
    if positive.shape[1] == negative.shape[1] and mask is None and negative_mask is None:
        return positive, negative, None
    length = max(positive.shape[1], negative.shape[1])
    sides = ((positive, mask), (negative, negative_mask))
    masks = [torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) if m is None else m for e, m in sides]
    masks = [pad(m, (0, length - m.shape[1])) for m in masks]
    positive, negative = (pad(e, (0, 0, 0, length - e.shape[1])) for e in (positive, negative))
    return positive, negative, torch.cat([masks[1], masks[0]])


def tidy(embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same rows without positions that no row uses; no mask where nothing is left to hide.

    A row taken out of a batch of longer ones then takes the stock path again.
    """
    if mask is None:
        return embeddings, None
    used = mask.any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    hides = not bool(mask[:, :length].all())
    return embeddings[:, :length], mask[:, :length] if hides else None


def call(function: Callable[..., Tensor], *inputs: Tensor, grad: bool, checkpoint: bool) -> Tensor:
    """`function(*inputs)` without gradients, with recomputation in the backward, or as plain autograd does it."""
    if not (grad and torch.is_grad_enabled()):
        with torch.no_grad():
            return function(*inputs)
    return recompute(function, *inputs) if checkpoint else function(*inputs)


class Denoiser:
    """One model call per step: the noise prediction after guidance."""

    def __init__(self, pipeline: Any, guidance_scale: float, autocast: torch.dtype | None) -> None:
        self._unet, self._autocast = pipeline.unet, autocast
        width = self._unet.config.time_cond_proj_dim
        # As the pipelines do: guidance above 1 only, and never with a model that has the scale as an input.
        self.guided = guidance_scale > 1 and width is None
        self._condition = None
        if width is not None:
            scale = torch.tensor([guidance_scale - 1])
            self._condition = pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)

    def __call__(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """Latents (B, C, H, W), scaled for the model, to the prediction of the same shape and dtype."""
        inputs, embeddings = latents, guidance.positive
        if guidance.negative is not None:
            inputs, embeddings = torch.cat([latents] * 2), torch.cat([guidance.negative, guidance.positive])
        options: dict[str, Any] = {} if guidance.mask is None else {"encoder_attention_mask": guidance.mask}
        if self._condition is not None:
            options["timestep_cond"] = self._condition.to(latents).expand(len(inputs), -1)
        with casting(self._autocast, latents):
            output = self._unet(
                inputs,
                timestep,
                encoder_hidden_states=embeddings,
                added_cond_kwargs=guidance.added,
                return_dict=False,
                **options,
            )[0]
        output = output.to(latents.dtype)
        if guidance.negative is None:
            return output
        uncond, text = output.chunk(2)
        return uncond + guidance.scale * (text - uncond)


class Decoder:
    """Latents to the VAE's image, as each pipeline unscales them."""

    def __init__(self, pipeline: Any, autocast: torch.dtype | None) -> None:
        self._vae, self._autocast = pipeline.vae, autocast
        config = self._vae.config
        self._scale = config.scaling_factor
        xl = hasattr(pipeline, "text_encoder_2")
        # SDXL's VAE overflows in float16; its pipeline runs it in float32.
        self._upcast = xl and self._vae.dtype == torch.float16 and bool(config.force_upcast)
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        self._moments = (mean, std) if xl and mean is not None and std is not None else None

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about [0, 1], not clamped, at least float32."""
        latents = latents.to(torch.float32 if self._upcast else self._vae.dtype)
        if self._moments is None:
            latents = latents / self._scale
        else:
            mean, std = (torch.tensor(m).view(1, -1, 1, 1).to(latents) for m in self._moments)
            latents = latents * std / self._scale + mean
        with casting(self._autocast, latents):
            image = self._decode(latents)
        image = image * 0.5 + 0.5
        return image.to(torch.promote_types(image.dtype, torch.float32))

    def _decode(self, latents: Tensor) -> Tensor:
        module = _Decode(self._vae)
        if not self._upcast:
            return module(latents)
        # float32 copies for this call alone: the pipeline casts the module itself, which a backward would not survive.
        weights = {name: weight.float() for name, weight in module.state_dict().items()}
        return torch.func.functional_call(module, weights, (latents,))


class _Decode(nn.Module):
    """Gives `vae.decode` the form of a module call."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def casting(dtype: torch.dtype | None, like: Tensor) -> AbstractContextManager:
    """Automatic mixed precision, where asked for."""
    return nullcontext() if dtype is None else mixed_precision(like.device.type, dtype)
