"""Samplers that other packs install: what they inject is optimized, and what cannot be is refused."""

from __future__ import annotations

import functools
import itertools

import comfy.k_diffusion.sampling as k_diffusion
import comfy.samplers
import host
import pytest
import tiny
import torch
from comfy.k_diffusion.sampling import get_ancestral_step, sample_euler_ancestral
from test_gradients import directional_error
from test_handover import changed, handover_module, through_ksampler
from test_stock import make, ours, stock

errors = host.pack("ipgo_engine.errors")


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


@torch.no_grad()
def written_out(model, x, sigmas, extra_args=None, callback=None, disable=None, *, s_noise=0.5):
    """A function in a module of its own, which asks core's for noise and never calls back."""
    draw = k_diffusion.default_noise_sampler(x, seed=extra_args.get("seed"))
    for sigma, following in itertools.pairwise(sigmas):
        down, up = get_ancestral_step(sigma, following)
        x = x + (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma * (down - sigma)
        if following > 0:
            x = x + draw(sigma, following) * s_noise * up
    return x


@torch.no_grad()
def passed_on(model, x, sigmas, **kwargs):
    """A function around one of core's."""
    return sample_euler_ancestral(model, x, sigmas, eta=0.5, **kwargs)


SAMPLERS = {
    "written out": written_out,
    "passed on": passed_on,
    "partial": functools.partial(k_diffusion.sample_euler_ancestral, eta=0.5),
}


def install(monkeypatch, function):
    """As packs do."""
    monkeypatch.setattr(k_diffusion, "sample_other", function, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "other"])


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_of_another_pack_equals_stock_and_its_noises_are_optimized(world, monkeypatch, kind):
    install(monkeypatch, SAMPLERS[kind])
    expected = stock(world, "other")
    generator = make(world, "other")
    assert generator.steps == 4
    assert generator.noise_shape[0] == 4  # one to begin with, three injected
    assert torch.equal(ours(generator), expected)
    assert torch.equal(ours(generator, backprop_steps=1), expected)
    assert directional_error(generator, directions=1) < 3e-3
    with host.node():
        noise = changed(generator)
        with generator:
            image = generator.generate(generator.encode(["a"]), noise).detach().cpu()
        handed = handover_module.Handover(generator, noise)
        assert torch.equal(through_ksampler(world, handed, "other", tiny.latent()), image)


def test_options_of_a_sampler_are_kept(world, monkeypatch):
    """In a SAMPLER that is handed over, too."""
    install(monkeypatch, None)
    sampler = comfy.samplers.KSAMPLER(k_diffusion.sample_euler_ancestral, {"eta": 0.5})
    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: sampler)
    expected = stock(world, "other")
    generator = make(world, "other")
    assert torch.equal(ours(generator), expected)
    with host.node():
        handed = handover_module.Handover(generator, generator.draw_noise([7]))
        assert torch.equal(through_ksampler(world, handed, "other", tiny.latent()), expected)


def test_noise_that_is_multiplied_by_zero_is_not_optimized(world, monkeypatch):
    install(monkeypatch, functools.partial(k_diffusion.sample_euler_ancestral, s_noise=0.0))
    generator = make(world, "other")
    assert generator.noise_shape[0] == 1
    assert torch.equal(ours(generator), stock(world, "other"))


@torch.no_grad()
def with_a_source_of_its_own(model, x, sigmas, extra_args=None, **kwargs):
    torch.manual_seed(extra_args["seed"])
    return k_diffusion.sample_euler(model, x + 0.1 * torch.randn_like(x), sigmas, extra_args=extra_args, **kwargs)


@torch.no_grad()
def with_half_a_gradient(model, x, sigmas, **kwargs):
    return k_diffusion.sample_euler(model, 0.5 * x + 0.5 * x.detach(), sigmas, **kwargs)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(with_a_source_of_its_own, "draws noise from a source of its own"), (with_half_a_gradient, r"off by \d+\.\d%")],
)
def test_a_sampler_that_cannot_be_optimized_is_refused_with_the_reason(world, monkeypatch, function, reason):
    install(monkeypatch, function)
    state = torch.get_rng_state()
    with pytest.raises(errors.InputError, match=reason):
        make(world, "other")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampler_without_a_function_is_refused_by_name(world, monkeypatch):
    class OwnWay(comfy.samplers.Sampler):
        pass

    install(monkeypatch, None)
    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: OwnWay())
    with pytest.raises(errors.InputError, match="sampler is a OwnWay, which samples in its own way"):
        make(world, "other")
