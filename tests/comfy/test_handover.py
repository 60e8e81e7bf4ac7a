"""Stock nodes make the optimized image again from what is handed over, bit for bit."""

from __future__ import annotations

import asyncio
import gc
import types
import weakref

import comfy.model_management
import host
import nodes as comfy_nodes
import pytest
import tiny
import torch
from test_stock import CFG, NAMED, STEPS, all_samplers, generator_module, make

handover_module = host.pack("nodes.host.handover")
errors = host.pack("ipgo_engine.errors")
STOCHASTIC = ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "ddpm")


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


@pytest.fixture(scope="module")
def custom_sampler():
    """The stock SamplerCustomAdvanced and CFGGuider nodes."""
    import os

    path = os.path.join(os.path.dirname(comfy_nodes.__file__), "comfy_extras", "nodes_custom_sampler.py")
    asyncio.run(comfy_nodes.load_custom_node(path, module_parent="comfy_extras"))
    return comfy_nodes.NODE_CLASS_MAPPINGS


def changed(generator, seeds=(7,)):
    """Noise that no seed draws."""
    noise = generator.draw_noise(seeds)
    return noise + 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(5)).to(noise)


def decode(vae, samples):
    return comfy_nodes.VAEDecode().decode(vae, samples)[0].movedim(-1, 1)


def through_custom(world, mapping, handed, latent):
    model, vae, positive, negative = world
    guider = host.run_node(mapping["CFGGuider"], model=model, positive=positive, negative=negative, cfg=CFG)
    out = host.run_node(
        mapping["SamplerCustomAdvanced"], noise=handed.noise(), guider=guider, sampler=handed.sampler(),
        sigmas=handed.sigmas(), latent_image=latent,
    )  # fmt: skip
    return decode(vae, out)


def through_ksampler(world, handed, sampler, latent, seed=99, denoise=1.0):
    _, vae, positive, negative = world
    out = comfy_nodes.common_ksampler(
        handed.model(), seed, STEPS, CFG, sampler, "normal", positive, negative, latent, denoise=denoise
    )[0]
    return decode(vae, out)


@pytest.mark.parametrize("sampler", NAMED)
def test_every_route_gives_the_generated_image(world, custom_sampler, sampler):
    generator = make(world, sampler)
    with host.node():
        with generator:
            prompt, noise = generator.encode(["a"]), changed(generator)
            image = generator.generate(prompt, noise.requires_grad_(True)).detach().cpu()
        handed = handover_module.Handover(generator, noise)
        rendered, _ = handover_module.render(generator, prompt, noise)
        assert torch.equal(rendered.cpu(), image)
        for _ in range(2):  # nothing is used up
            assert torch.equal(through_custom(world, custom_sampler, handed, tiny.latent()), image)
            assert torch.equal(through_ksampler(world, handed, sampler, tiny.latent()), image)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [s for s in all_samplers() if s not in (*NAMED, "deis", "ipndm_v", "dpm_adaptive")])
def test_every_other_sampler_too(world, custom_sampler, sampler):
    test_every_route_gives_the_generated_image(world, custom_sampler, sampler)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "lms"])
def test_latent_route_is_close_for_deterministic_samplers(world, sampler):
    model, vae, positive, negative = world
    generator = make(world, sampler)
    with host.node():
        noise = changed(generator)
        image, _ = handover_module.render(generator, generator.encode(["a"]), noise)
        latent = handover_module.Handover(generator, noise).latent()
        out = comfy_nodes.KSamplerAdvanced().sample(
            model, "disable", 0, STEPS, CFG, sampler, "normal", positive, negative, latent, 0, 10000, "disable"
        )[0]
        assert float((decode(vae, out) - image.cpu()).abs().max()) < 1e-5


def test_latent_route_keeps_the_picture_that_was_given(world):
    """At full denoise stock still adds the noise to it."""
    model, vae, positive, negative = world
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))}
    generator = make(world, "euler", latent=latent)
    with host.node():
        noise = changed(generator)
        image, _ = handover_module.render(generator, generator.encode(["a"]), noise)
        handed = handover_module.Handover(generator, noise).latent()
        out = comfy_nodes.KSamplerAdvanced().sample(
            model, "disable", 0, STEPS, CFG, "euler", "normal", positive, negative, handed, 0, 10000, "disable"
        )[0]
        assert float((decode(vae, out) - image.cpu()).abs().max()) < 1e-5


def test_latent_route_is_refused_for_a_mask_and_for_half_a_denoise(world):
    samples = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    masked = {"samples": samples, "noise_mask": (torch.arange(64) < 32).float().expand(1, 64, 64).clone()}
    for latent, denoise in ((masked, 1.0), ({"samples": samples}, 0.6)):
        generator = make(world, "euler", latent=latent, denoise=denoise)
        with pytest.raises(errors.InputError, match="denoise below 1 or a mask"):
            handover_module.Handover(generator, changed(generator)).latent()


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_latent_route_is_refused_where_noise_is_injected(world, sampler):
    generator = make(world, sampler)
    handed = handover_module.Handover(generator, changed(generator))
    with pytest.raises(errors.InputError, match="LATENT cannot carry"):
        handed.latent()


def test_other_settings_are_refused_with_the_reason(world):
    generator = make(world, "euler_ancestral")
    handed = handover_module.Handover(generator, changed(generator))
    with host.node():
        with pytest.raises(errors.InputError, match="same sampler"):
            through_ksampler(world, handed, "dpmpp_sde", tiny.latent())
        _, _, positive, negative = world
        with pytest.raises(errors.InputError, match="other sampling settings"):
            comfy_nodes.common_ksampler(
                handed.model(), 0, STEPS + 3, CFG, "euler_ancestral", "normal", positive, negative, tiny.latent()
            )
        with pytest.raises(errors.InputError, match="batch size"):
            through_ksampler(world, handed, "euler_ancestral", tiny.latent(side=12))


def test_noises_of_another_size_or_batch_are_refused_by_every_sampler(world, custom_sampler):
    """SAMPLER is connected, NOISE is forgotten."""
    model, _, positive, negative = world
    generator = make(world, "euler_ancestral")
    handed = handover_module.Handover(generator, changed(generator))
    guider = host.run_node(custom_sampler["CFGGuider"], model=model, positive=positive, negative=negative, cfg=CFG)
    fresh = host.run_node(custom_sampler["RandomNoise"], noise_seed=1)
    for latent in (tiny.latent(side=12), tiny.latent(batch=2)):
        with pytest.raises(errors.InputError, match=r"for latents of shape \(1, 4, 8, 8\)"):
            host.run_node(
                custom_sampler["SamplerCustomAdvanced"], noise=fresh, guider=guider, sampler=handed.sampler(),
                sigmas=handed.sigmas(), latent_image=latent,
            )  # fmt: skip


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_what_is_handed_over_is_a_copy_each_time(world, sampler):
    """Samplers and other packs may write into what they are given; uni_pc raises the last sigma."""
    generator = make(world, sampler)
    noise = changed(generator)
    with host.node():
        handover_module.render(generator, generator.encode(["a"]), noise)
        with generator:
            generator.generate(generator.encode(["a"]), noise)
    assert float(generator.sampling.sigmas[-1]) == 0
    handed, sigma = handover_module.Handover(generator, noise), float(generator.sampling.sigmas[0])
    first = noise[:, 0].cpu().clone()
    noise.zero_()
    for _ in range(2):
        given = handed.noise().generate_noise(tiny.latent())
        assert torch.equal(given, first)
        assert float(handed.sigmas()[0]) == sigma
        given.zero_()
        handed.sigmas().zero_()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_model_that_carries_noise_is_not_optimized_again(world, sampler):
    generator = make(world, sampler)
    model = handover_module.Handover(generator, changed(generator)).model()
    with pytest.raises(errors.InputError, match="already carries optimized noise"):
        make(world, sampler, model=model)


def test_a_batch_of_seeds_is_handed_over_whole(world, custom_sampler):
    generator = make(world, "dpmpp_2m_sde")
    with host.node():
        noise = changed(generator, (1, 2, 3))
        with generator:
            image = generator.generate(generator.encode(["a"] * 3), noise).detach().cpu()
        handed = handover_module.Handover(generator, noise)
        assert torch.equal(through_custom(world, custom_sampler, handed, tiny.latent(batch=3)), image)
        assert torch.equal(through_ksampler(world, handed, "dpmpp_2m_sde", tiny.latent(batch=3)), image)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_sde"])
def test_a_masked_batch_is_handed_over_whole(world, custom_sampler, sampler):
    """Inpainting: the kept region of ddim has a noise of its own, which travels in the SAMPLER."""
    samples = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(64) < 32).float().expand(1, 64, 64).clone()
    single = {"samples": samples, "noise_mask": mask}
    batch = {"samples": samples.repeat(2, 1, 1, 1), "noise_mask": mask}
    generator = make(world, sampler, latent=batch)
    with host.node():
        noise = changed(generator, (1, 2))
        with generator:
            image = generator.generate(generator.encode(["a"] * 2), noise).detach().cpu()
            first = generator.generate(generator.encode(["a"]), noise[:1]).detach().cpu()
        handed = handover_module.Handover(generator, noise)
        assert torch.equal(through_custom(world, custom_sampler, handed, batch), image)
        assert torch.equal(through_ksampler(world, handed, sampler, batch), image)
        alone = handover_module.Handover(generator, noise[:1])
        assert torch.equal(through_custom(world, custom_sampler, alone, single), first)
    assert float((image[0] - first[0]).abs().max()) < 1e-5


def revision(seed):
    """CONDITIONING with a picture as the prompt, whose embedding is noised from the seed of the sampling."""
    random = torch.Generator().manual_seed(seed)
    picture = types.SimpleNamespace(image_embeds=torch.randn(1, 1280, generator=random))
    unclip = [{"clip_vision_output": picture, "strength": 1.0, "noise_augmentation": 0.5}]
    return tiny.conditioning(seed, width=tiny.WIDTH, unclip_conditioning=unclip)


def test_the_seed_of_the_ksampler_does_not_matter(custom_sampler):
    """Noise that the model itself draws from the seed (unCLIP) is part of the picture."""
    with host.node():
        own = tiny.sdxl(pooled=1280), tiny.vae(), revision(1), revision(2)
        sampling = generator_module.Sampling.by_name(own[0], "euler", "normal", STEPS, CFG)
        generator = generator_module.ComfyGenerator(*own[:2], sampling, own[3], tiny.latent(), positive=own[2], seed=7)
        noise = changed(generator)
        with generator:
            image = generator.generate(generator.encode(["a"]), noise).detach().cpu()
        assert torch.equal(handover_module.render(generator, generator.encode(["a"]), noise)[0].cpu(), image)
        handed = handover_module.Handover(generator, noise)
        assert torch.equal(through_custom(own, custom_sampler, handed, tiny.latent()), image)
        assert torch.equal(through_ksampler(own, handed, "euler", tiny.latent()), image)


def test_what_is_handed_over_holds_no_vae_and_no_prompt():
    """A MODEL with noise may lie in ComfyUI's cache for hours."""
    with host.node():
        model, vae = tiny.sd15(), tiny.vae()
        generator = make((model, vae, tiny.conditioning(1), tiny.conditioning(2)), "euler_ancestral")
    handed = handover_module.Handover(generator, changed(generator)).model()
    watched = weakref.ref(vae), weakref.ref(generator)
    del generator, vae
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert handed is not None


def test_a_latent_on_the_gpu_is_handed_over(world):
    """Where EmptyLatentImage puts it with --gpu-only."""
    device = comfy.model_management.get_torch_device()
    generator = make(world, "euler", latent={"samples": torch.zeros(1, 4, 8, 8, device=device)})
    handed = handover_module.Handover(generator, changed(generator))
    assert handed.latent()["samples"].device.type == "cpu"
