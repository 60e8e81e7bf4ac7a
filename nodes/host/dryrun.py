"""What a sampler does, found out by running it on a stand-in for the model that costs nothing.

One run tells how many noises it injects and which it multiplies by zero, how many model calls it makes, and whether
its gradient is right: the stand-in is smooth, so finite differences in float64 are exact to many digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.samplers
import torch
from torch import Tensor

from ...ipgo_engine.errors import InputError
from .noise import Call, NoisePlan, Tape, make_plan
from .samplers import BIASED, NOISE_SOURCES, rebind
from .weights import usable

STOCK_SOURCES = {name: getattr(k_diffusion, name) for name in NOISE_SOURCES}
PRECISION = {torch.float64: (1e-4, 1e-4), torch.float32: (3e-2, 3e-3)}
"""Finite-difference step, and the relative error above which a gradient counts as biased. Some samplers (uni_pc) make
float32 constants and cannot run in float64."""
SIDE = 8  # latent side of the planning run; a plan does not depend on the size


class _StandInModel:
    """The attributes samplers read from the model, with the patched model sampling even before the model is loaded."""

    def __init__(self, patcher: Any) -> None:
        self._model = patcher.model
        self.model_sampling = patcher.get_model_object("model_sampling")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _StandInGuider(comfy.samplers.CFGGuider):
    """A guider whose model is a smooth function of x that mixes positions, and counts its calls."""

    def __init__(self, patcher: Any) -> None:
        super().__init__(patcher)
        self.inner_model = _StandInModel(patcher)
        self.conds = {}
        self.calls = 0

    def __call__(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """Denoised latents; functions that the sampler hooks behind CFG are called as stock does."""
        self.calls += 1
        y = x / (1 + timestep.reshape(-1, *[1] * (x.ndim - 1)))
        mean = y.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        cond = 0.6 * y + 0.2 * torch.sin(y) + 0.3 * mean
        uncond = 0.5 * y + 0.1 * torch.cos(y) + 0.2 * mean
        return comfy.samplers.cfg_function(
            self.inner_model, cond, uncond, 1.5, x, timestep, model_options=model_options or {}
        )


def run_sampler(
    sampler: Any,
    tape: Tape,
    stock: bool,
    guider: Any,
    sigmas: Tensor,
    noise: Tensor,
    latent: Tensor,
    mask: Tensor | None,
    seed: int,
    callback: Callable[..., None] | None = None,
) -> Tensor:
    """Run a sampler with the tape as its noise source; `stock` tells whether the real sources are asked too."""
    extra = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
    taped = taped_sampler(sampler, tape, STOCK_SOURCES if stock else None)
    return taped.sample(guider, sigmas.clone(), extra, callback, noise, latent, mask, True)


def taped_sampler(sampler: Any, tape: Tape, stock: dict[str, Any] | None = None) -> Any:
    """The differentiable version of a SAMPLER whose injected noises come from the tape."""
    inner = rebind(sampler.sampler_function, tape.overrides(stock))
    random_inpaint = sampler.inpaint_options.get("random", False)

    def sample(model: Any, noise: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
        if random_inpaint and kwargs["extra_args"].get("denoise_mask") is not None:
            kept = model.noise  # drawn by KSAMPLER from seed + 1
            model.noise = tape.ask(Call(-1, False, float(sigmas[0]), float(sigmas[0])), kept, lambda: kept)
        # uni_pc writes into its sigmas, which autograd may have kept: `.data` is the same memory, counted apart.
        return inner(model, noise, sigmas.data, **kwargs)

    return comfy.samplers.KSAMPLER(sample, sampler.extra_options, sampler.inpaint_options)


def plan_noise(patcher: Any, sampler: Any, sigmas: Tensor, channels: int, ndim: int, masked: bool) -> NoisePlan:
    """Find out what the sampler consumes on this schedule, and refuse one whose gradient is wrong."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            return _Planner(patcher, sampler, sigmas, channels, ndim, masked, torch.float64).plan()
        except RuntimeError:  # of mixed dtypes
            return _Planner(patcher, sampler, sigmas, channels, ndim, masked, torch.float32).plan()


class _Planner:
    """One planning run and its checks on a small latent."""

    def __init__(
        self, patcher: Any, sampler: Any, sigmas: Tensor, channels: int, ndim: int, masked: bool, dtype: torch.dtype
    ) -> None:
        self.patcher, self.sampler = patcher, sampler
        self.sigmas = usable(sigmas).detach().cpu().clone()
        self.step, self.tolerance = PRECISION[dtype]
        shape = (1, channels, *[1] * (ndim - 4), SIDE, SIDE)
        generator = torch.Generator().manual_seed(0)
        self.random = lambda: torch.randn(shape, generator=generator, dtype=dtype)
        self.latent = self.random()
        self.mask = (torch.arange(SIDE) % 2).to(dtype).expand(shape).clone() if masked else None
        self.name = getattr(sampler.sampler_function, "__name__", "sampler").removeprefix("sample_")

    def plan(self) -> NoisePlan:
        """Run once with gradients, then compare with finite differences and with another seed."""
        leaves = [self.random().requires_grad_(True)]

        def inject(_index: int, _call: Call, like: Tensor, _stock: Any) -> Tensor:
            leaves.append(self.random().requires_grad_(True))
            return leaves[-1].reshape(like.shape)

        tape, guider, starts = Tape(inject), _StandInGuider(self.patcher), []
        output = self._run(tape, guider, leaves[0], 0, lambda *_: starts.append(guider.calls - 1))
        weights = self.random()
        value = (output.double() * weights).sum()
        gradients = (
            torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        )
        self._check(leaves, gradients, weights, output.detach())
        used = [g is not None and bool(g.any()) for g in gradients[1:]]
        return make_plan(tape.calls, used, guider.calls, starts)

    def _run(self, tape: Tape, guider: Any, noise: Tensor, seed: int, callback: Any = None) -> Tensor:
        return run_sampler(
            self.sampler, tape, False, guider, self.sigmas, noise, self.latent, self.mask, seed, callback
        )

    def _check(self, leaves: list[Tensor], gradients: Any, weights: Tensor, output: Tensor) -> None:
        """Refuse hidden noise and biased gradients."""
        values = [leaf.detach() for leaf in leaves]
        if not torch.equal(self._value(values, seed=1), output):
            raise InputError(
                f"sampler '{self.name}' draws noise from a source of its own, so it cannot be optimized or "
                "replayed. Use a stock sampler, 'euler' or 'dpmpp_2m' for example."
            )
        total = sum(float((g**2).sum()) for g in gradients if g is not None) ** 0.5
        for _ in range(2):
            direction = [self.random() for _ in values]
            exact = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
            ends = [
                self._value([v + s * self.step * d for v, d in zip(values, direction, strict=True)]) for s in (1, -1)
            ]
            measured = float(((ends[0].double() - ends[1].double()) * weights).sum()) / (2 * self.step)
            if abs(measured - exact) > self.tolerance * total:
                reason = BIASED.get(
                    self.name, f"its gradient is off by {abs(measured - exact) / max(total, 1e-30):.1%}"
                )
                raise InputError(f"sampler is '{self.name}': {reason}. Use another, 'dpmpp_2m' or 'euler' for example.")

    def _value(self, values: list[Tensor], seed: int = 0) -> Tensor:
        """The final latent for the given noises, without gradients."""
        tape = Tape(lambda index, _call, like, _stock: values[index + 1].reshape(like.shape))
        with torch.no_grad():
            return self._run(tape, _StandInGuider(self.patcher), values[0], seed)


def draw_noise(
    patcher: Any,
    sampler: Any,
    sigmas: Tensor,
    plan: NoisePlan,
    initial: Tensor,
    latent: Tensor,
    mask: Tensor | None,
    seed: int,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The noises stock would use for this seed: (B, rows, ...) float32, and what it injects that is a combination.

    The combination of increments equals stock up to rounding only, so its exact values are returned beside it, by call.
    """
    stock_values: list[Tensor] = []

    def inject(_index: int, _call: Call, _like: Tensor, stock: Any) -> Tensor:
        stock_values.append(stock())
        return stock_values[-1]

    tape = Tape(inject)
    run_sampler(sampler, tape, True, _StandInGuider(patcher), usable(sigmas), initial, latent, mask, seed)
    return _collect(plan, tape, initial, stock_values)


def _collect(plan: NoisePlan, tape: Tape, initial: Tensor, values: list[Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """Rows from what was recorded; increments that no single call covers are asked from the same Brownian path."""
    rows: dict[int, Tensor] = {0: initial}
    exact: dict[int, Tensor] = {}
    for index, recipe in enumerate(plan.recipes):
        if len(recipe) == 1 and recipe[0][1] == 1.0:
            rows[recipe[0][0]] = values[index]
        elif recipe:
            exact[index] = values[index]
    for row, source, sigma, sigma_next in plan.increments:
        if row not in rows:
            like, stock = values[0].new_tensor, tape.sources[source]
            assert stock is not None  # increments come from Brownian trees, which always have a stock source
            rows[row] = stock(like(sigma), like(sigma_next))
    return torch.stack([rows[row].float() for row in range(plan.rows)], dim=1), exact
