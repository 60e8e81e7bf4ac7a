"""diffusers schedulers as pure functions of the noise they consume."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

# Name -> class in diffusers and what differs from the pipeline's own scheduler settings. All of them draw noise, if
# any, inside `step` and through `randn_tensor`; Brownian-tree samplers do not and are left out.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_scheduler(name: str, config: Any) -> Any:
    """The diffusers scheduler of this name with a pipeline's scheduler settings, as `from_config` makes it."""
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}: use one of {', '.join(SAMPLERS)}.")
    if "beta_schedule" not in config:  # from_config would take betas of its own, and the picture would be noise
        raise InputError(
            "the pipeline's scheduler has no beta_schedule: its model was trained otherwise (flow matching, EDM), and "
            "no sampler here can sample it. Use a model that predicts epsilon or v."
        )
    import diffusers

    class_name, changes = SAMPLERS[name]
    return getattr(diffusers, class_name).from_config(config, **changes)


class Sampler:
    """A scheduler with its steps set, ready to be run any number of times on given noise.

    `shape` is the latent's (C, H, W). `begin` says that the pipeline tells its scheduler where it begins (SDXL does).
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        *,
        eta: float,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        begin: bool,
    ) -> None:
        limit = int(scheduler.config.num_train_timesteps)
        if not 1 <= steps <= limit:
            raise InputError(f"steps is {steps}: use 1 to {limit}, the steps this model was trained with.")
        if not 0 <= eta <= 1:
            raise InputError(f"eta is {eta}: use 0 (deterministic) to 1 (as much noise as in training).")
        takes_eta = "eta" in inspect.signature(scheduler.step).parameters
        if eta and not takes_eta:
            raise InputError(f"eta is {eta}, but {type(scheduler).__name__} has none: use eta=0, or sampler='ddim'.")
        self._template, self._shape, self._dtype, self._device = scheduler, shape, dtype, device
        self._options: dict[str, Any] = {"eta": eta, "return_dict": False} if takes_eta else {"return_dict": False}
        scheduler.set_timesteps(steps, device=device)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        # Numerical quadrature, the same in every run: cached, it costs LMS nothing after the first.
        quadrature = getattr(scheduler, "get_lms_coefficient", None)
        self._lms = functools.cache(quadrature) if quadrature else None
        self.timesteps: list[Tensor] = list(scheduler.timesteps)
        try:
            self._draws = self._probe()
        except (ValueError, NotImplementedError) as error:
            kind = scheduler.config.get("prediction_type")
            raise InputError(
                f"{type(scheduler).__name__} cannot sample a model whose prediction_type is {kind!r} ({error}): use "
                "another sampler."
            ) from error

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, C, H, W): the initial noise and those injected with a weight other than zero."""
        return 1 + sum(used for _, used in self._draws), *self._shape

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """What the stock pipeline draws with one CPU generator per image: (B, n, C, H, W), at least float32.

        Noises of weight zero are drawn, as the pipeline does, and dropped.
        """
        kept = []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(int(seed))
            draws = [(self._dtype, True), *self._draws]
            rows = [(torch.randn((1, *self._shape), generator=generator, dtype=d), used) for d, used in draws]
            kept.append(torch.stack([row[0].to(self.wide) for row, used in rows if used]))
        return torch.stack(kept).to(self._device)

    @property
    def wide(self) -> torch.dtype:
        """float32, or float64 for a float64 model."""
        return torch.promote_types(self._dtype, torch.float32)

    def run(self, injected: Tensor) -> SamplerRun:
        """A fresh run that injects these noises, (B, n - 1, C, H, W), in order."""
        rows = iter(injected.unbind(1))
        used = iter(self._draws)

        def replay(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            kept = next(used)[1]
            noise = next(rows) if kept else torch.zeros(tuple(shape), device=self._device)
            return noise.to(dtype)

        return self._start(replay)

    def _start(self, draw: Callable[[Sequence[int], torch.dtype], Tensor]) -> SamplerRun:
        # A copy per run: no state survives, and a scheduler that keeps past outputs frees their graph with the run.
        scheduler = copy.deepcopy(self._template)
        if self._lms is not None:
            scheduler.get_lms_coefficient = self._lms
        return SamplerRun(scheduler, draw, self._options)

    def _probe(self) -> list[tuple[torch.dtype, bool]]:
        """Every noise that a run draws after the initial one: its dtype, and whether it reaches the result."""
        draws: list[tuple[torch.dtype, bool]] = []
        drawn: list[Tensor] = []

        def record(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            drawn.append(torch.zeros(tuple(shape), dtype=dtype, device=self._device, requires_grad=True))
            return drawn[-1]

        with torch.inference_mode(False), torch.enable_grad():
            run = self._start(record)
            latents = torch.zeros((1, self._shape[0], 1, 1), dtype=self._dtype, device=self._device)
            for timestep in self.timesteps:
                drawn.clear()
                output = torch.zeros_like(run.scale(latents, timestep))
                latents = run.step(output, timestep, latents)
                if drawn and latents.requires_grad:
                    weights = torch.autograd.grad(latents.sum(), drawn, allow_unused=True)
                else:
                    weights = [None] * len(drawn)
                used = [weight is not None and bool(weight.any()) for weight in weights]
                draws += [(noise.dtype, u) for noise, u in zip(drawn, used, strict=True)]
                latents = latents.detach()
        return draws


class SamplerRun:
    """One pass over the steps. Its scheduler draws from the given source, never from a random generator."""

    def __init__(
        self, scheduler: Any, draw: Callable[[Sequence[int], torch.dtype], Tensor], options: dict[str, Any]
    ) -> None:
        self._scheduler, self._options = scheduler, options
        self._step = _redirect(inspect.unwrap(type(scheduler).step), draw)

    @property
    def initial_sigma(self) -> Any:
        """What the initial noise is multiplied by."""
        return self._scheduler.init_noise_sigma

    def scale(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The model's input at this step."""
        return self._scheduler.scale_model_input(latents, timestep)

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents after this step."""
        return self._step(self._scheduler, output, timestep, latents, **self._options)[0]


def _redirect(step: Any, draw: Callable[[Sequence[int], torch.dtype], Tensor]) -> Callable[..., Any]:
    """The scheduler's own `step`, with its own `randn_tensor`.

    The function gets a private copy of its module's names. Patching the module instead would reach every other pipeline
    of the process, and would need undoing.
    """

    def randn_tensor(shape: Sequence[int], *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
        return draw(shape, dtype)

    names = {**step.__globals__, "randn_tensor": randn_tensor}
    redirected = types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
    redirected.__kwdefaults__ = step.__kwdefaults__
    return redirected


__all__ = ["SAMPLERS", "Sampler", "SamplerRun", "make_scheduler"]
