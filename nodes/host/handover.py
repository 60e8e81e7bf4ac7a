"""What a run hands to stock nodes, and the final image, made on the stock path without gradients.

| route                                                | deterministic sampler | stochastic sampler |
|------------------------------------------------------|-----------------------|--------------------|
| NOISE, SAMPLER, SIGMAS into SamplerCustomAdvanced    | bit for bit           | bit for bit        |
| MODEL into KSampler, same settings                   | bit for bit           | bit for bit        |
| LATENT into KSamplerAdvanced, add_noise disabled     | 1e-6, not flow models | refused            |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ...ipgo_engine.errors import InputError
from ...ipgo_engine.generators.base import Conditioning
from . import compat, decode
from .conditioning import from_engine
from .generator import ComfyGenerator
from .noise import Call, replay
from .samplers import accepts_noise_sampler, function_name, rebind
from .wrappers import KEY


class OptimizedNoise:
    """NOISE: the initial noise of a run, (B, C, h, w)."""

    def __init__(self, noise: Tensor, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """The optimized noise, whatever the latent holds; its shape must fit."""
        check_shape(self.noise, input_latent["samples"])
        return self.noise.clone()


def check_shape(noise: Tensor, latent: Tensor) -> None:
    """Refuse a latent of another size, naming both."""
    if tuple(noise.shape) != tuple(latent.shape):
        raise InputError(
            f"The optimized noise is for latents of shape {tuple(noise.shape)}, this latent has {tuple(latent.shape)}: "
            "use the same width, height and batch size as in the optimization."
        )


def blocked(message: str) -> Any:
    """An output that nodes behind it stop at, saying why."""
    return ExecutionBlocker(message)


def replaying_sampler(sampler: Any, calls: tuple[Call, ...], injections: list[Tensor | None]) -> Any:
    """SAMPLER: the installed sampler with the recorded noises injected; the very same object where it injects none.

    It keeps no state between runs. Where the stock function takes its source of noise as an argument, it is called
    untouched.
    """
    if not any(value is not None for value in injections):
        return sampler
    inner = sampler.sampler_function

    @functools.wraps(inner)
    def sample(model: Any, noise: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
        tape = replay(calls, injections)
        if calls[0].source == -1 and kwargs["extra_args"].get("denoise_mask") is not None:
            model.noise = tape.ask(calls[0], noise, None)
        if accepts_noise_sampler(inner):
            return inner(model, noise, sigmas, **{**kwargs, "noise_sampler": tape.noise_sampler(noise)})
        with torch.no_grad():
            return rebind(inner, tape.overrides())(model, noise, sigmas, **kwargs)

    return comfy.samplers.KSAMPLER(sample, sampler.extra_options, sampler.inpaint_options)


@dataclass(frozen=True)
class Baked:
    """OUTER_SAMPLE of a MODEL: other noise, and a sampler that replays. Holds no model: the output outlives the run.

    The seed is that of the run, too: models draw from it what is not the sampler's (unCLIP).
    """

    initial: Tensor
    seed: int
    injections: list[Tensor | None]
    calls: tuple[Call, ...]
    sampler: str

    def __call__(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any, callback: Any,
        disable_pbar: bool, seed: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """What the sampler that is wrapped gives for the optimized noise."""
        check_shape(self.initial, latent)
        if any(v is not None for v in self.injections) and self.sampler != (name := function_name(sampler)):
            raise InputError(
                f"The optimized noise holds what '{self.sampler}' injects, but the sampler is '{name}': "
                "set the same sampler, scheduler, steps and denoise as in the optimization."
            )
        replaying = replaying_sampler(sampler, self.calls, self.injections)
        noise = self.initial.to(noise)
        return executor(noise, latent, replaying, sigmas, mask, callback, disable_pbar, self.seed, *args, **kwargs)


class Handover:
    """Everything stock nodes need to make the images of one noise tensor (B, *noise_shape) again."""

    def __init__(self, generator: ComfyGenerator, noise: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            owned = noise.detach().clone()
            injections = generator.injections(owned)
            self._initial = owned[:, 0].cpu()
            self._injections = [None if v is None else v.detach().cpu() for v in injections]
        self._generator = generator
        self._calls = generator.plan.calls

    def noise(self) -> OptimizedNoise:
        """NOISE."""
        return OptimizedNoise(self._initial, self._generator.seed)

    def sampler(self) -> Any:
        """SAMPLER."""
        return replaying_sampler(self._generator.sampling.sampler, self._calls, self._injections)

    def sigmas(self) -> Tensor:
        """SIGMAS (steps + 1,), on the CPU as schedulers give them."""
        return self._generator.sampling.sigmas.detach().cpu().clone()

    def model(self) -> Any:
        """MODEL that puts the optimized noise into a plain KSampler, whatever its seed."""
        clone = self._generator.model.clone()
        name = function_name(self._generator.sampling.sampler)
        baked = Baked(self._initial, self._generator.seed, self._injections, self._calls, name)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, baked)
        return clone

    def latent(self) -> dict[str, Tensor]:
        """LATENT for KSamplerAdvanced with add_noise disabled; refused where that would make another image."""
        generator = self._generator
        if any(v is not None for v in self._injections):
            raise InputError(
                "The sampler injects noise, which a LATENT cannot carry: use NOISE, SAMPLER and SIGMAS, or MODEL."
            )
        sampling = generator.model.get_model_object("model_sampling")
        if not isinstance(sampling, comfy.model_sampling.EPS):
            raise InputError(
                "This model mixes noise and latent as it starts (flow models): use NOISE and SIGMAS, or MODEL."
            )
        sigma = generator.sampling.sigmas[:1].cpu()
        if generator.mask is not None or float(sigma) < float(sampling.sigma_max) * (1 - 1e-5):
            raise InputError(
                "With a denoise below 1 or a mask a LATENT alone gives another image: use NOISE and SIGMAS, or MODEL."
            )
        with torch.inference_mode(False), torch.no_grad():
            latent = generator.latent.cpu()  # --gpu-only has it elsewhere
            if torch.count_nonzero(latent) > 0:
                latent = generator.model.model.process_latent_in(latent)
            noised = sampling.noise_scaling(sigma, self._initial.clone(), latent.expand_as(self._initial), True)
            return {"samples": generator.model.model.process_latent_out(noised)}


def render(generator: ComfyGenerator, conditioning: Conditioning, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The final images (B, 3, H, W) in [0, 1] and latents (B, C, h, w): own MODEL and VAE, stock calls."""
    latents: dict[int, Tensor] = {}
    generator.give_weights_back()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for images, positive in from_engine(conditioning):
            handover = Handover(generator, noise[images])
            latent = generator.latent.expand(len(images), *generator.latent.shape[1:])
            samples = comfy.sample.sample_custom(
                generator.model, handover.noise().noise, generator.sampling.cfg, handover.sampler(), handover.sigmas(),
                positive, generator.negative, latent, generator.mask, None, True, generator.seed,
            )  # fmt: skip
            latents.update(zip(images, samples, strict=True))
        samples = torch.stack([latents[image] for image in range(len(noise))])
        pixels = generator.vae.decode(compat.as_stock_latent(samples))
    return decode.to_images(pixels.movedim(-1, 1)), samples
