"""ComfyUI's MODEL, CLIP and VAE as the engine's generator: noise and prompt in, image out, differentiable.

What it computes is a stock KSampler run followed by a stock VAEDecode, bit for bit: the user's own installed sampler
(see `samplers`), core's own guider, the model with all its patches, the VAE's own decode. What is added for the
gradient lives on a clone of the MODEL and is gone when the session ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...ipgo_engine.errors import InputError
from ...ipgo_engine.generators.base import Conditioning
from ...ipgo_engine.generators.gradflow import GradientScale
from . import compat, decode, wrappers
from .conditioning import ComfyConditioning, from_engine, to_engine
from .dryrun import draw_noise, plan_noise, taped_sampler
from .inputs import controls_of, encoder_name, networks_beside, one_latent, owned, place_in_batch
from .interrupt import comfy_interrupt_as_cancelled, poll_interrupt
from .noise import NoisePlan, replay
from .recomputed import RecomputedModules
from .refuse import refuse_hooks, refuse_missing, refuse_paged, refuse_unsupported
from .samplers import function_name, refuse_biased, sampler_by_name, sigmas_by_name
from .weights import Aliases, is_quantized, usable

DRAWS_KEPT = 64
"""Seeds whose exact stock injections are remembered (only for samplers with overlapping Brownian intervals)."""

BACKWARD_MEMORY = 3.0
"""Free memory asked for, in units of what ComfyUI reckons for a model call: idle models make way."""


@dataclass(frozen=True)
class Sampling:
    """How to sample: a SAMPLER, SIGMAS (steps + 1,) and the guidance scale."""

    sampler: Any
    sigmas: Tensor
    cfg: float

    @classmethod
    def by_name(
        cls, model: Any, sampler: str, scheduler: str, steps: int, cfg: float, denoise: float = 1.0
    ) -> Sampling:
        """The settings of the KSampler node."""
        return cls(
            sampler_by_name(sampler), usable_sigmas(sigmas_by_name(model, sampler, scheduler, steps, denoise)), cfg
        )


def usable_sigmas(sigmas: Tensor) -> Tensor:
    """SIGMAS as an ordinary tensor of its own (uni_pc writes into the one it is given)."""
    with torch.inference_mode(False):
        return usable(sigmas).detach().clone()


class ComfyGenerator:
    """Implements `ipgo_engine.generators.base.Generator`; use it as a context manager around a whole run.

    Inside the context inference mode is off, the weights are loaded completely and aliased for autograd. On leaving
    it, after success, error or cancel, everything is as before.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        sampling: Sampling,
        negative: ComfyConditioning | str,
        latent: dict[str, Any],
        *,
        clip: Any = None,
        positive: ComfyConditioning | None = None,
        seed: int = 0,
    ) -> None:
        refuse_missing(vae, clip, needs_clip=positive is None or isinstance(negative, str))
        compat.refuse_nested(latent["samples"])
        refuse_unsupported(model)
        refuse_biased(function_name(sampling.sampler))
        self._aliases, self._modules = Aliases(), RecomputedModules()
        self._networks: list[torch.nn.Module] = []  # all that a sampling computes with
        self.model, self.vae, self.clip, self.sampling, self.seed = model, vae, clip, sampling, seed
        self.latent, self.mask = one_latent(model, latent)
        self.place = place_in_batch(latent)
        self.positive = positive
        self.negative = self._encode_text(negative) if isinstance(negative, str) else owned(negative)
        for name, conditioning in (("positive", positive or []), ("negative", self.negative)):
            refuse_hooks(conditioning, name)
        self.plan: NoisePlan = plan_noise(
            model, sampling.sampler, sampling.sigmas, self.latent.shape[1], self.latent.ndim, self.mask is not None
        )
        self.steps = len(self.plan.step_starts) or self.plan.model_calls
        self.settings = self._settings()
        self.noise_shape = (self.plan.rows, *self.latent.shape[1:])
        self.device: torch.device = model.load_device
        self.dim = int(self.negative[0][0].shape[-1])
        self.encoder = encoder_name(clip, self.dim)
        self._drawn: OrderedDict[int, tuple[Tensor, dict[int, Tensor]]] = OrderedDict()
        self._stack: ExitStack | None = None
        self._patcher: Any = None
        self._vae_patcher: Any = None
        self._run: Any = None
        self._memory = 0.0

    # the session

    def __enter__(self) -> ComfyGenerator:
        """Switch inference mode off, make the clone that gradients go through."""
        if self._stack is not None:
            raise RuntimeError("The generator is in use already.")
        with ExitStack() as stack:
            stack.callback(self._close)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            self._patcher = compat.ordinary_clone(self.model, "model")
            self._vae_patcher = compat.ordinary_clone(self.vae.patcher, "vae")
            self._run = wrappers.GradientRun(self._patcher, self._prepare)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave everything as it was."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _close(self) -> None:
        self._modules.restore()
        self.give_weights_back()
        self._patcher = self._vae_patcher = self._run = None
        self._networks = []

    @contextmanager
    def _session(self) -> Iterator[None]:
        """The open session, or one for this call alone."""
        if self._stack is not None:
            yield
        else:
            with self:
                yield

    # the protocol

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode one prompt per image as CLIPTextEncode does; a given positive CONDITIONING stands for each."""
        with torch.inference_mode(False), torch.no_grad():
            if self.positive is not None:
                return to_engine([owned(self.positive)] * len(prompts))
            return to_engine([self._encode_text(prompt) for prompt in prompts])

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """What stock KSampler draws for each seed with batch size one: (len(seeds), *noise_shape), float32."""
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.cat([self._draw(int(seed)) for seed in seeds]).to(self.device)

    def generate(
        self, conditioning: Conditioning, noise: Tensor, *, backprop_steps: int | None = None, checkpoint: bool = True
    ) -> Tensor:
        """Images (B, 3, H, W), float32, in [0, 1]; see the protocol."""
        self._check(conditioning, noise)
        with self._session(), comfy_interrupt_as_cancelled():
            latents: list[Tensor | None] = [None] * len(noise)
            for images, positive in from_engine(conditioning):
                sampled = self._sample(positive, noise[images], backprop_steps, checkpoint)
                for image, latent in zip(images, sampled, strict=True):
                    latents[image] = latent
            return self._decode(torch.stack([latent for latent in latents if latent is not None]), checkpoint)

    # how

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it continues."""
        return {
            "model": type(self.model.model).__name__,
            "sampler": function_name(self.sampling.sampler) or "sampler",
            "sigmas": [float(sigma) for sigma in self.sampling.sigmas],
            "cfg": float(self.sampling.cfg),
            "latent": list(self.latent.shape),
            "mask": self.mask is not None,
            "batch_index": self.place,
        }

    def _check(self, conditioning: Conditioning, noise: Tensor) -> None:
        if tuple(noise.shape[1:]) != self.noise_shape or len(noise) != len(conditioning):
            raise InputError(
                f"noise has shape {tuple(noise.shape)}; {len(conditioning)} prompts need "
                f"{(len(conditioning), *self.noise_shape)}."
            )
        differentiable = torch.is_grad_enabled() and (noise.requires_grad or conditioning.embeddings.requires_grad)
        if differentiable and self._stack is None:
            raise RuntimeError("Gradients need an open session: use `with generator:` around generate and backward.")

    def _encode_text(self, prompt: str) -> ComfyConditioning:
        """CONDITIONING of one prompt, owned by us."""
        assert self.clip is not None  # the constructor refuses a text without a CLIP
        self.give_weights_back()
        with torch.no_grad():
            conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return owned(conditioning)

    def _draw(self, seed: int) -> Tensor:
        """(1, *noise_shape) for one seed; what is injected beyond it to the last bit is remembered."""
        if self.plan.calls and seed == 2**64 - 1:
            raise InputError(f"seed is {seed}, and this sampler draws from the seed after it, too: use a smaller one.")
        initial = comfy.sample.prepare_noise(self.latent, seed, [self.place]).to(self.device)
        noise, exact = draw_noise(
            self.model, self.sampling.sampler, self.sampling.sigmas.to(self.device), self.plan, initial,
            self.latent.to(self.device), None if self.mask is None else self._mask_like(initial), seed,
        )  # fmt: skip
        if exact:
            self._drawn[seed] = (noise[0].cpu(), {index: value[0].cpu() for index, value in exact.items()})
            while len(self._drawn) > DRAWS_KEPT:
                self._drawn.popitem(last=False)
        return noise

    def _mask_like(self, noise: Tensor) -> Tensor:
        """The denoise mask in latent resolution, as the guider prepares it."""
        return comfy.sampler_helpers.prepare_mask(self.mask, noise.shape, noise.device)

    def injections(self, noise: Tensor) -> list[Tensor | None]:
        """What the sampler is given at every call. For noise nobody changed, to the last bit what stock injects."""
        injections = self.plan.injections(noise)
        for image in range(len(noise)) if self._drawn else ():
            exact = next(
                (e for drawn, e in self._drawn.values() if torch.equal(drawn, noise[image].detach().cpu())), {}
            )
            for call, value in exact.items():
                made = injections[call]
                assert made is not None  # only calls that inject something are remembered
                correction = torch.zeros_like(made)
                correction[image] = value.to(made) - made[image].detach()
                injections[call] = made + correction
        return injections

    def _sample(self, positive: ComfyConditioning, noise: Tensor, steps: int | None, checkpoint: bool) -> Tensor:
        """Latents (B, C, h, w) in the VAE's scale."""
        self._run.begin(self.plan.first_call_with_gradient(steps), checkpoint)
        self._memory = BACKWARD_MEMORY * self._patcher.memory_required([2 * len(noise), *self.latent.shape[1:]])
        tape = replay(self.plan.calls, self.injections(noise))
        guider = comfy.samplers.CFGGuider(self._patcher)
        guider.set_conds(positive, self.negative)
        guider.set_cfg(self.sampling.cfg)
        latent = self.latent.expand(len(noise), *self.latent.shape[1:])
        samples = guider.sample(
            noise[:, 0],
            latent,
            taped_sampler(self.sampling.sampler, tape),
            self.sampling.sigmas.clone(),
            self.mask,
            None,
            True,
            self.seed,
        )
        compat.refuse_streaming(self._patcher.model, self.device)  # a ControlNet may have loaded a VAE in between
        return compat.as_stock_latent(samples)

    def give_weights_back(self) -> None:
        """Before anything is loaded, which may move our models away: an alias's original would keep its memory."""
        self._aliases.restore()

    def _prepare(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING: load everything completely, then give autograd weights it accepts."""
        self.give_weights_back()
        decode.load([self._patcher, self._vae_patcher], self._memory)
        real_model, conds, models = executor(*args, **compat.prepare_arguments(kwargs))
        refuse_paged(models)
        compat.refuse_streaming(real_model, self.device)
        self._run.stock_mode = torch.inference_mode if is_quantized(real_model) else torch.no_grad
        controls = list(controls_of(conds))
        self._networks = [real_model, *(model.model for model in models)]
        self._networks += networks_beside(self._patcher, controls)
        for network in self._networks:
            self._aliases.apply(network)
        self._aliases.apply_to_attributes(real_model.latent_format)  # Playground's and Wan's have a mean and a spread
        for control in controls:
            if isinstance(getattr(control, "control_model", None), torch.nn.Module):
                self._modules.apply(control.control_model)
        return real_model, conds, models

    def _decode(self, latents: Tensor, checkpoint: bool) -> Tensor:
        """Images on `device`."""
        poll_interrupt()
        self.give_weights_back()
        decode.load([self._patcher, self._vae_patcher], self._memory)
        network = self._vae_patcher.model
        for each in (*self._networks, network):  # the backward pass needs all of them
            self._aliases.apply(each)
        blocks = RecomputedModules()
        try:
            for block in decode.blocks(network) if checkpoint else ():
                blocks.apply(block)
            scale = GradientScale()  # a float16 VAE would lose the gradient of a pixel
            return scale.outgoing(decode.decode(self.vae, network, scale.incoming(latents))).to(self.device)
        finally:
            blocks.restore()
