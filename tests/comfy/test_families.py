"""The conformance tests on tiny random models of other families."""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.samplers
import host
import pytest
import tiny
import torch
from test_gradients import directional_error, objective, our_gradients, relative
from test_handover import handover_module
from test_stock import generator_module, ours

STEPS = 3
compat = host.pack("nodes.host.compat")
errors = host.pack("ipgo_engine.errors")

FAMILIES = {
    "sd15-v": (lambda: tiny.sd15(kind=comfy.model_base.ModelType.V_PREDICTION), tiny.vae, 4, 4.0, {}),
    "sdxl": (tiny.sdxl, tiny.vae, 4, 4.0, {"width": 64, "height": 64}),
    "sd3": (tiny.sd3, tiny.vae16, 16, 4.0, {}),
    "flux": (tiny.flux, tiny.vae16, 16, 1.0, {"guidance": 3.5}),
}
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "res_multistep", "lcm", "uni_pc")


def build(name):
    model, vae, channels, cfg, options = FAMILIES[name]
    return model(), vae(), tiny.conditioning(1, **options), tiny.conditioning(2, **options), channels, cfg


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    with host.node():
        return build(request.param)


def make(family, sampler):
    model, vae, positive, negative, channels, cfg = family
    with host.node():
        sampling = generator_module.Sampling.by_name(model, sampler, "simple", STEPS, cfg)
        return generator_module.ComfyGenerator(model, vae, sampling, negative, tiny.latent(channels), positive=positive)


def stock(family, sampler, model=None, seed=7):
    import nodes as comfy_nodes

    own, vae, positive, negative, channels, cfg = family
    with host.node():
        out = comfy_nodes.common_ksampler(
            model or own, seed, STEPS, cfg, sampler, "simple", positive, negative, tiny.latent(channels)
        )[0]
        return comfy_nodes.VAEDecode().decode(vae, out)[0].movedim(-1, 1).clone()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_stock_and_is_handed_over(family, sampler):
    expected = stock(family, sampler)
    generator = make(family, sampler)
    assert torch.equal(ours(generator), expected)
    assert torch.equal(ours(generator, backprop_steps=1), expected)
    with host.node():
        handed = handover_module.Handover(generator, generator.draw_noise([7]))
        assert torch.equal(stock(family, sampler, handed.model(), seed=1), expected)
    assert torch.equal(stock(family, sampler), expected)


def plain_gradients(family, noise):
    """Core's own guider and a hand-written Euler sampler over ordinary weights, without recompute or wrappers."""
    model, vae, positive, negative, channels, cfg = family
    generator = make(family, "euler")

    def euler(denoise, x, sigmas, extra_args, **_):
        for i in range(len(sigmas) - 1):
            d = (x - denoise(x, sigmas[i].expand(len(x)), **extra_args)) / sigmas[i]
            x = x + d * (sigmas[i + 1] - sigmas[i])
        return x

    # Flux writes into tensors that autograd saved: without this context plain autograd raises an error.
    with torch.enable_grad(), compat.gradient_kernels(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        noise = noise.clone().requires_grad_(True)
        embeddings = positive[0][0].to(noise, copy=True).requires_grad_(True)
        comfy.model_management.load_models_gpu([model, vae.patcher], force_full_load=True)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[embeddings, positive[0][1]]], negative)
        guider.set_cfg(cfg)
        sampler = comfy.samplers.KSAMPLER(euler)
        latents = guider.sample(
            noise[:, 0], tiny.latent(channels)["samples"], sampler, generator.sampling.sigmas.clone(), disable_pbar=True
        )
        pixels = vae.first_stage_model.decode(latents.to(noise)).float()
        return torch.autograd.grad(objective((pixels + 1) / 2), (noise, embeddings))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_vector_equals_a_plain_reference(name):
    with host.node():
        family = build(name)
    generator = make(family, "euler")
    _, gradients = our_gradients(generator)
    with torch.no_grad():
        noise = generator.draw_noise([7])
    expected = plain_gradients(build(name), noise)
    for got, want in zip(gradients, expected, strict=True):
        assert relative(got, want) < 1e-4


def test_storing_activations_changes_nothing(family):
    """Where it is impossible (Flux writes in place) or would run other kernels, it is recomputed after all."""
    generator = make(family, "euler")
    _, recomputed = our_gradients(generator)
    assert torch.equal(ours(generator, checkpoint=False), stock(family, "euler"))
    _, stored = our_gradients(generator, checkpoint=False)
    for a, b in zip(recomputed, stored, strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_gradient_agrees_with_finite_differences(family, sampler):
    assert directional_error(make(family, sampler), directions=2) < 3e-2


def test_latent_gives_the_same_image_or_is_refused(family):
    """Flow models mix noise and latent as they start: a LATENT alone cannot do it."""
    import nodes as comfy_nodes

    model, vae, positive, negative, channels, cfg = family
    generator = make(family, "euler")
    handed = handover_module.Handover(generator, generator.draw_noise([7]))
    if channels == 16:
        with pytest.raises(errors.InputError, match="flow models"):
            handed.latent()
        return
    with host.node():
        out = comfy_nodes.KSamplerAdvanced().sample(
            model, "disable", 0, STEPS, cfg, "euler", "simple", positive, negative, handed.latent(), 0, 10000, "disable"
        )[0]
        image = comfy_nodes.VAEDecode().decode(vae, out)[0].movedim(-1, 1)
    assert float((image - stock(family, "euler")).abs().max()) < 1e-5
