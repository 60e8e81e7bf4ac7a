"""The generator computes what stock KSampler and VAEDecode compute, bit for bit, and leaves them as they were."""

from __future__ import annotations

import host
import nodes as comfy_nodes
import pytest
import tiny
import torch

generator_module = host.pack("nodes.host.generator")
errors = host.pack("ipgo_engine.errors")

NAMED = (
    "euler",
    "euler_ancestral",
    "ddim",
    "lms",
    "dpmpp_2m",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "uni_pc",
    "lcm",
    "res_multistep",
    "ddpm",
)
STEPS, CFG = 4, 4.0


def all_samplers():
    import comfy.samplers

    return comfy.samplers.KSampler.SAMPLERS


def all_schedulers():
    import comfy.samplers

    return comfy.samplers.KSampler.SCHEDULERS


@pytest.fixture(scope="module")
def world():
    """MODEL, VAE and conditionings as they exist inside a running prompt: inference tensors."""
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


def stock(world, sampler, scheduler="normal", seed=7, latent=None, denoise=1.0, model=None):
    """Image (1, 3, H, W) and latent of KSampler and VAEDecode."""
    own, vae, positive, negative = world
    with host.node():
        out = comfy_nodes.common_ksampler(
            model or own,
            seed,
            STEPS,
            CFG,
            sampler,
            scheduler,
            positive,
            negative,
            latent or tiny.latent(),
            denoise=denoise,
        )[0]
        return comfy_nodes.VAEDecode().decode(vae, out)[0].movedim(-1, 1).clone()


def make(world, sampler, scheduler="normal", latent=None, denoise=1.0, model=None, cfg=CFG):
    own, vae, positive, negative = world
    model = model or own
    with host.node():
        sampling = generator_module.Sampling.by_name(model, sampler, scheduler, STEPS, cfg, denoise)
        return generator_module.ComfyGenerator(
            model, vae, sampling, negative, latent or tiny.latent(), positive=positive
        )


def ours(generator, seed=7, **how):
    with host.node(), generator:
        noise = generator.draw_noise([seed]).requires_grad_(True)
        return generator.generate(generator.encode(["a"]), noise, **how).detach().cpu()


@pytest.mark.parametrize("sampler", NAMED)
def test_equals_stock(world, sampler):
    expected = stock(world, sampler)
    generator = make(world, sampler)
    assert torch.equal(ours(generator), expected)
    assert torch.equal(ours(generator, backprop_steps=1), expected)
    assert torch.equal(ours(generator, checkpoint=False), expected)
    with host.node(), generator, torch.no_grad():
        image = generator.generate(generator.encode(["a"]), generator.draw_noise([7]))
    assert torch.equal(image.cpu(), expected)
    assert torch.equal(stock(world, sampler), expected)


@pytest.mark.parametrize("scheduler", all_schedulers())
def test_every_scheduler_equals_stock(world, scheduler):
    expected = stock(world, "dpmpp_2m_sde", scheduler)
    assert torch.equal(ours(make(world, "dpmpp_2m_sde", scheduler)), expected)


def test_a_scheduler_without_noise_levels_is_named(world, monkeypatch):
    """Stock's kl_optimal gives not a number for one step, and a black picture."""
    monkeypatch.setitem(globals(), "STEPS", 1)
    for sampler in ("euler", "dpmpp_3m_sde"):
        with pytest.raises(errors.InputError, match="'kl_optimal', which has no noise levels for 1 step"):
            make(world, sampler, "kl_optimal")


def test_the_largest_seed_is_refused_where_the_sampler_draws_from_the_next(world):
    largest = 2**64 - 1
    assert torch.equal(ours(make(world, "euler"), largest), stock(world, "euler", seed=largest))
    with pytest.raises(errors.InputError, match=f"seed is {largest}.*use a smaller one"):
        ours(make(world, "euler_ancestral"), largest)


@pytest.mark.parametrize(("steps", "denoise"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, float("nan"))])
def test_no_step_to_sample_is_named(world, monkeypatch, steps, denoise):
    """Widgets do not go so low, links do."""
    monkeypatch.setitem(globals(), "STEPS", steps)
    with pytest.raises(errors.InputError, match=f"steps is {steps} and denoise is {denoise}: nothing would be sampled"):
        make(world, "euler", denoise=denoise)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [s for s in all_samplers() if s not in NAMED])
def test_every_sampler_equals_stock_or_is_refused(world, sampler):
    expected = stock(world, sampler)
    if sampler in ("deis", "ipndm_v", "dpm_adaptive"):
        with pytest.raises(errors.InputError, match=sampler):
            make(world, sampler)
        return
    assert torch.equal(ours(make(world, sampler)), expected)
