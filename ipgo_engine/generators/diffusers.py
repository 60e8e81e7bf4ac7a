"""Stable Diffusion and SDXL pipelines of diffusers as differentiable maps from text embeddings and noise to images.

Nothing here samples: the pipeline's own UNet, VAE, text encoders and scheduler classes are called in the pipeline's own
order, so that the picture before any optimization is the stock picture. Left out are the safety checker and SDXL's
invisible watermark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Cancelled, InputError
from .base import Conditioning
from .denoiser import Decoder, Denoiser, Guidance, call, join, tidy
from .gradflow import GradientScale, clamp_straight_through
from .identity import describe_encoder, describe_weights
from .loading import check_pipeline, image_size, load_pipeline
from .prompts import Encoded, PromptEncoder
from .samplers import Sampler, make_scheduler

_CACHED_NEGATIVES = 8
_SCHEDULE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "timestep_spacing")
"""What of a scheduler's settings belongs to the model rather than to the sampler."""


class DiffusersGenerator:
    """A `Generator` made of a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`.

    Image i depends on row i alone; equal inputs give equal images, and no global random state is read or written. The
    pipeline's weights are frozen and put in eval mode; nothing else of it changes.

    - `sampler`: a name of `SAMPLERS`; settings come from the pipeline's scheduler. `eta` is DDIM's, 0 to 1.
    - `guidance_scale`: 1 or less means no guidance, as in the pipelines.
    - `negative_prompt`: None is the pipelines' default: the empty text, or zeros for an SDXL model that asks for them.
    - `width`, `height`: pixels; None is the model's own size.
    - `padded=False` cuts f(C) of a prompt to BOS..EOS. The negative prompt keeps the stock padding.
    - `autocast`: run UNet and VAE in this dtype while the sampler stays in the pipeline's (bfloat16 on a CPU: faster).
    - `should_stop` is asked before every model call, in backward passes too; True raises `Cancelled`.

    Raises `InputError` for settings that cannot work.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        sampler: str = "ddim",
        eta: float = 0.0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        padded: bool = True,
        autocast: torch.dtype | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        check_pipeline(pipeline)
        if not math.isfinite(guidance_scale):
            raise InputError(f"guidance_scale is {guidance_scale}: use a finite number, 1 or less for no guidance.")
        self._xl = hasattr(pipeline, "text_encoder_2")
        self._padded, self._should_stop, self._negative_prompt = padded, should_stop, negative_prompt
        self._guidance_scale = float(guidance_scale)
        self._dtype: torch.dtype = pipeline.unet.dtype
        self.device: torch.device = pipeline.unet.device
        self._prompts = PromptEncoder(pipeline)
        for module in (pipeline.unet, pipeline.vae, *self._prompts.models):
            module.requires_grad_(False).train(False)
        self._denoiser = Denoiser(pipeline, guidance_scale, autocast)
        self._decoder = Decoder(pipeline, autocast)
        self._zero_negative = self._xl and negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt
        self._negatives: dict[tuple[int, ...], Encoded] = {}
        self._half = torch.float16 in (self._dtype, autocast)
        self._size = image_size(pipeline, height, width)
        factor = int(pipeline.vae_scale_factor)
        scheduler = make_scheduler(sampler, pipeline.scheduler.config)
        shape = (int(pipeline.unet.config.in_channels), self._size[0] // factor, self._size[1] // factor)
        self._sampler = Sampler(
            scheduler, steps, eta=eta, shape=shape, dtype=self._dtype, device=self.device, begin=self._xl
        )
        self.settings: Mapping[str, Any] = {
            "sampler": sampler,
            "eta": eta,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "height": self._size[0],
            "width": self._size[1],
            "padded": padded,
            "autocast": None if autocast is None else str(autocast),
            **_model_settings(pipeline, scheduler),
        }
        self.steps = len(self._sampler.timesteps)
        self.noise_shape: tuple[int, ...] = self._sampler.shape
        self.dim = sum(int(model.config.hidden_size) for model in self._prompts.models)
        self.encoder = "+".join(describe_encoder(model.named_parameters()) for model in self._prompts.models)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> DiffusersGenerator:
        """From a local diffusers folder, safetensors only, without touching the network.

        `dtype` None is float32. `settings` are the constructor's. Raises `InputError` for a folder that cannot be used.
        """
        return cls(load_pipeline(folder, dtype=dtype, device=device), **settings)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode one prompt per image, of any length; the empty text is allowed.

        Embeddings are at least float32, (B, 77 k, d) for k parts of up to 75 tokens (`prompts.py` has the rule). Raises
        `InputError` when there are no prompts or one is not a text.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts is {prompts!r}: give a list of texts, one per image.")
        negative = self._prompts.parts([self._negative_prompt or ""])[0] if self._denoiser.guided else 1
        parts = [max(own, negative) for own in self._prompts.parts(prompts)]
        encoded = self._prompts.encode(prompts, parts, padded=self._padded)
        extras: dict[str, Any] = {"parts": torch.tensor(parts)}
        if encoded.pooled is not None:
            height, width = self._size
            extras["pooled"] = encoded.pooled.to(self._sampler.wide)
            extras["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts))
        return Conditioning(encoded.embeddings.to(self._sampler.wide), encoded.mask, extras)

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """What the stock pipeline draws for `generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds]`.

        (B, *noise_shape), standard normal, at least float32.
        """
        if not len(seeds):
            raise InputError("seeds is empty: give one seed per image.")
        return self._sampler.draw(seeds)

    def generate(
        self, conditioning: Conditioning, noise: Tensor, *, backprop_steps: int | None = None, checkpoint: bool = True
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], at least float32, differentiable in embeddings and noise.

        Pixels are clamped as the pipelines do; the gradient passes through the clamp. `backprop_steps` and `checkpoint`
        change gradients and memory, never values. Raises `InputError` for shapes that do not fit, `Cancelled` when
        `should_stop` says so.
        """
        self._check_inputs(conditioning, noise, backprop_steps)
        scale = GradientScale() if self._half and torch.is_grad_enabled() else None
        embeddings = conditioning.embeddings.to(self.device)
        noise = noise.to(self.device)
        if scale is not None:
            embeddings, noise = scale.incoming(embeddings), scale.incoming(noise)
        guidance = self._guidance(replace(conditioning, embeddings=embeddings.to(self._dtype)))
        latents = self._denoise(guidance, noise, self.steps if backprop_steps is None else backprop_steps, checkpoint)
        image = call(self._decode, latents, grad=True, checkpoint=checkpoint)
        return clamp_straight_through(image if scale is None else scale.outgoing(image))

    def _denoise(self, guidance: Guidance, noise: Tensor, backprop_steps: int, checkpoint: bool) -> Tensor:
        """The sampling loop: noise (B, n, C, h, w) to latents (B, C, h, w)."""
        run = self._sampler.run(noise[:, 1:])
        latents = noise[:, 0].to(self._dtype) * run.initial_sigma
        for index, timestep in enumerate(self._sampler.timesteps):
            grad = index >= self.steps - backprop_steps
            predict = self._prediction(timestep, guidance)
            inputs = (run.scale(latents, timestep), guidance.positive)
            latents = run.step(call(predict, *inputs, grad=grad, checkpoint=checkpoint), timestep, latents)
        return latents

    def _prediction(self, timestep: Tensor, guidance: Guidance) -> Callable[[Tensor, Tensor], Tensor]:
        """The model call of one step, as a function of what gradients reach."""

        def predict(latents: Tensor, positive: Tensor) -> Tensor:
            self._poll()
            return self._denoiser(latents, timestep, replace(guidance, positive=positive))

        return predict

    def _decode(self, latents: Tensor) -> Tensor:
        self._poll()
        return self._decoder(latents)

    def _poll(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise Cancelled("Stopped on request before a model call.")

    def _guidance(self, conditioning: Conditioning) -> Guidance:
        """What the UNet attends to, for embeddings that are already in the model's dtype."""
        positive, mask = tidy(conditioning.embeddings, _to(conditioning.mask, self.device))
        pooled, time_ids = (_to(conditioning.extras.get(key), self.device) for key in ("pooled", "time_ids"))
        negative = negative_pooled = None
        if self._denoiser.guided and self._zero_negative:
            # Zero keys get equal attention and zero values: the length makes no difference, so it takes the prompt's.
            negative = torch.zeros_like(positive)
            negative_pooled = None if pooled is None else torch.zeros_like(pooled)
            mask = None if mask is None else torch.cat([mask] * 2)
        elif self._denoiser.guided:
            encoded = self._negative(conditioning)
            positive, negative, mask = join(positive, mask, encoded.embeddings.to(self._dtype), encoded.mask)
            negative_pooled = encoded.pooled
        added = self._added(pooled, negative_pooled, time_ids) if self._xl else None
        return Guidance(positive, negative, mask, added, self._guidance_scale)

    def _added(self, pooled: Any, negative_pooled: Tensor | None, time_ids: Any) -> dict[str, Tensor]:
        """SDXL's other inputs, the negative rows first."""
        texts = [pooled] if negative_pooled is None else [negative_pooled, pooled]
        text_embeds = torch.cat([text.to(self._dtype) for text in texts])
        return {"text_embeds": text_embeds, "time_ids": torch.cat([time_ids.to(self._dtype)] * len(texts))}

    def _negative(self, conditioning: Conditioning) -> Encoded:
        """The negative prompt with as many parts as each row's prompt, encoded as one batch like the stock pipeline."""
        count = len(conditioning)
        parts = conditioning.extras.get("parts")
        key = tuple([1] * count if parts is None else parts.tolist())
        if key not in self._negatives:
            if len(self._negatives) >= _CACHED_NEGATIVES:
                self._negatives.clear()
            self._negatives[key] = self._prompts.encode([self._negative_prompt or ""] * count, key)
        return self._negatives[key]

    def _check_inputs(self, conditioning: Conditioning, noise: Tensor, backprop_steps: int | None) -> None:
        found, count = tuple(conditioning.embeddings.shape), len(conditioning)
        if len(found) != 3 or found[-1] != self.dim:
            raise InputError(f"embeddings have shape {found}: this model needs (B, S, {self.dim}); use `encode`.")
        if conditioning.mask is not None and tuple(conditioning.mask.shape) != found[:2]:
            raise InputError(f"mask has shape {tuple(conditioning.mask.shape)}: embeddings {found} need {found[:2]}.")
        if tuple(noise.shape) != (count, *self.noise_shape):
            wanted = (count, *self.noise_shape)
            raise InputError(f"noise has shape {tuple(noise.shape)}: {count} prompts need {wanted}; use `draw_noise`.")
        if self._xl and not {"pooled", "time_ids"} <= set(conditioning.extras):
            raise InputError("conditioning.extras lacks 'pooled' or 'time_ids', which SDXL needs: use `encode`.")
        if backprop_steps is not None and backprop_steps < 1:
            raise InputError(f"backprop_steps is {backprop_steps}: use 1 or more, or None for every step.")


def _model_settings(pipeline: Any, scheduler: Any) -> dict[str, Any]:
    """What tells one model from another for a run that is resumed."""
    return {
        "pipeline": type(pipeline).__name__,
        "dtype": str(pipeline.unet.dtype),
        # Models with the same text encoder differ in these alone.
        "unet": describe_weights(pipeline.unet.named_parameters()),
        "vae": describe_weights(pipeline.vae.named_parameters()),
        **{name: scheduler.config.get(name) for name in _SCHEDULE},
    }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
