"""Differentiable versions of the user's own installed samplers.

Stock samplers are decorated with `torch.no_grad`. The functions of their module are bound again to a private copy of
the module's globals, undecorated: the same code objects, so the same arithmetic, bit for bit. The same copy replaces
the two sources of injected noise, which lets it be recorded and replayed.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.samplers

from ...ipgo_engine.errors import InputError

BIASED = {
    "deis": "it detaches its history, so the gradient is off by several per cent",
    "ipndm_v": "it detaches its history, so the gradient is off by about one per cent",
    "dpm_adaptive": "its step size depends on the picture, which the gradient cannot see",
    "ar_video": "it writes key-value caches while it samples, which cannot be repeated in a backward pass",
}
"""Samplers whose gradient was measured to be wrong. Any other is measured when it is used (see `plan`)."""

NOISE_SOURCES = ("default_noise_sampler", "BrownianTreeNoiseSampler")
"""The names in the k-diffusion module from which stock samplers get the noise they inject."""


def function_name(sampler: Any) -> str:
    """Name of the function of a SAMPLER, which may have none; refused where there is no function."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise InputError(
            f"sampler is a {type(sampler).__name__}, which samples in its own way: use one from KSamplerSelect."
        )
    return getattr(sampler.sampler_function, "__name__", "")


def refuse_biased(name: str) -> None:
    """Refuse, by name and with the reason, a sampler whose gradient is known to be wrong."""
    key = name.removeprefix("sample_")
    if key in BIASED:
        raise InputError(f"sampler is '{key}': {BIASED[key]}. Use another, 'dpmpp_2m' or 'euler' for example.")


def rebind(function: Callable[..., Any], overrides: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` without `no_grad`, and with the module globals named in `overrides` replaced.

    Callables that are no plain functions are returned as they are.
    """
    if isinstance(function, functools.partial):
        return functools.partial(rebind(function.func, overrides), *function.args, **function.keywords)
    raw = inspect.unwrap(function)
    if not isinstance(raw, types.FunctionType):
        return function
    return _copy(raw, _namespace(raw.__globals__, overrides))


def _copy(raw: types.FunctionType, namespace: dict[str, Any]) -> types.FunctionType:
    """The same code object with other globals."""
    copy = types.FunctionType(raw.__code__, namespace, raw.__name__, raw.__defaults__, raw.__closure__)
    copy.__kwdefaults__ = raw.__kwdefaults__
    return copy


def _namespace(module_globals: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A private copy of a module's globals: its own functions, undecorated, see each other and the overrides."""
    namespace = dict(module_globals)
    for name, value in module_globals.items():
        if value is k_diffusion and module_globals is not vars(k_diffusion):
            namespace[name] = types.SimpleNamespace(**_namespace(vars(k_diffusion), overrides))
            continue
        raw = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
        if not isinstance(raw, types.FunctionType):
            continue
        if raw.__globals__ is module_globals:
            namespace[name] = _copy(raw, namespace)
        elif raw.__globals__ is vars(k_diffusion):
            namespace[name] = rebind(raw, overrides)
    namespace.update({name: value for name, value in overrides.items() if name in namespace})
    return namespace


def accepts_noise_sampler(function: Callable[..., Any]) -> bool:
    """True when the sampler takes the source of its noise as an argument."""
    try:
        return "noise_sampler" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def sampler_by_name(name: str) -> Any:
    """The installed sampler of that name, refused if its gradient is biased."""
    if name not in comfy.samplers.KSampler.SAMPLERS:
        raise InputError(f"sampler is {name!r}: this ComfyUI has {', '.join(comfy.samplers.KSampler.SAMPLERS)}.")
    refuse_biased(name)
    return comfy.samplers.sampler_object(name)


def sigmas_by_name(patcher: Any, sampler: str, scheduler: str, steps: int, denoise: float = 1.0) -> Any:
    """The sigmas that the stock KSampler node would use, (steps + 1,)."""
    names = comfy.samplers.KSampler.SCHEDULERS
    if scheduler not in names:
        raise InputError(f"scheduler is {scheduler!r}: this ComfyUI has {', '.join(names)}.")
    if steps < 1 or not denoise > 0:
        raise InputError(
            f"steps is {steps} and denoise is {denoise}: nothing would be sampled. Use 1 step or more, and a denoise "
            "above 0."
        )
    stock = comfy.samplers.KSampler(
        patcher,
        steps=steps,
        device=patcher.load_device,
        sampler=sampler,
        scheduler=scheduler,
        denoise=denoise,
        model_options=patcher.model_options,
    )
    if not bool(stock.sigmas.isfinite().all()):
        raise InputError(f"scheduler is '{scheduler}', which has no noise levels for {steps} step(s): use more steps.")
    return stock.sigmas.detach().clone()
