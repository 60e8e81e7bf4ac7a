"""Gradients compared with a plain reference (no recompute, no aliases) and with finite differences."""

from __future__ import annotations

import comfy.model_management
import host
import pytest
import tiny
import torch
from test_stock import CFG, NAMED, STEPS, make

DIRECTIONS = 3


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


@pytest.fixture(scope="module")
def plain_world():
    """The same weights as ordinary tensors, never touched by the adapter."""
    return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


def weights(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3)).to(like.device)


def objective(images):
    """Curved, so that a wrong value shows in the gradient too."""
    return (images * weights(images)).mean() + images.pow(2).mean()


def our_gradients(generator, seeds=(7,), **how):
    """Images and gradients in the noise and in the embeddings."""
    with host.node(), generator:
        prompt = generator.encode(["a"] * len(seeds))
        embeddings = prompt.embeddings.clone().requires_grad_(True)
        noise = generator.draw_noise(seeds).requires_grad_(True)
        images = generator.generate(prompt.with_embeddings(embeddings, prompt.mask), noise, **how)
        gradients = torch.autograd.grad(objective(images), (noise, embeddings))
        return images.detach(), gradients


def plain_denoiser(model, positive, negative, sigma_needs_gradient):
    """CFG by hand over BaseModel.apply_model."""

    def denoise(x, sigma, embeddings):
        with torch.set_grad_enabled(sigma_needs_gradient(float(sigma))):
            both = torch.cat([embeddings, negative])
            cond, uncond = model.model.apply_model(
                torch.cat([x, x]), sigma.repeat(2), c_crossattn=both, transformer_options={}
            ).chunk(2)
            return uncond + (cond - uncond) * CFG

    return denoise


def plain_gradients(world, sampler, generator, last=None):
    """An independent sampler written out, over ordinary weights."""
    model, vae, positive, negative = world
    with torch.enable_grad():
        noise = generator.draw_noise([7]).requires_grad_(True)
        sigmas = generator.sampling.sigmas.to(noise)
        embeddings = positive[0][0].to(noise, copy=True).requires_grad_(True)
        first = 0 if last is None else STEPS - last
        comfy.model_management.load_models_gpu([model, vae.patcher], force_full_load=True)
        away = negative[0][0].to(noise)
        denoise = plain_denoiser(model, positive, away, lambda s: s <= float(sigmas[first]) * 1.0001)
        x = noise[:, 0] * torch.sqrt(1 + sigmas[0] ** 2)
        old = None
        for i in range(STEPS):
            sigma, following = sigmas[i], sigmas[i + 1]
            denoised = denoise(x, sigma.reshape(1), embeddings)
            if sampler == "euler":
                x = x + (x - denoised) / sigma * (following - sigma)
            elif sampler == "euler_ancestral":
                up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
                down = (following**2 - up**2) ** 0.5
                x = x + (x - denoised) / sigma * (down - sigma)
                x = x + noise[:, i + 1] * up if i < STEPS - 1 else x
            else:  # dpmpp_2m
                h = torch.log(sigma / following)
                best = denoised
                if old is not None and following > 0:
                    ratio = torch.log(sigmas[i - 1] / sigma) / h
                    best = (1 + 1 / (2 * ratio)) * denoised - old / (2 * ratio)
                x = following / sigma * x - torch.expm1(-h) * best if following > 0 else denoised
            old = denoised
        pixels = vae.first_stage_model.decode(x / 0.18215).float()
        images = (pixels + 1) / 2
        images = images + (images.clamp(0, 1) - images).detach()
        return images.detach(), torch.autograd.grad(objective(images), (noise, embeddings))


def relative(a, b):
    return float((a.cpu() - b.cpu()).norm() / b.norm())


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("last", [None, 1, 2])
def test_gradient_vector_equals_a_plain_reference(world, plain_world, sampler, last):
    generator = make(world, sampler)
    images, ours = our_gradients(generator, backprop_steps=last)
    expected_images, expected = plain_gradients(plain_world, sampler, generator, last)
    assert relative(images, expected_images) < 1e-5
    for got, want in zip(ours, expected, strict=True):
        assert relative(got, want) < 2e-5


@pytest.mark.parametrize("sampler", NAMED)
def test_stored_and_recomputed_gradients_agree(world, sampler):
    generator = make(world, sampler)
    _, recomputed = our_gradients(generator)
    _, stored = our_gradients(generator, checkpoint=False)
    for a, b in zip(recomputed, stored, strict=True):
        assert relative(a, b) < 1e-4


def directional_error(generator, seeds=(7,), directions=DIRECTIONS, step=3e-2):
    """Largest error of a directional derivative against central differences, relative to the gradient's norm."""
    _, gradients = our_gradients(generator, seeds)
    worst = 0.0
    with host.node(), generator, torch.no_grad():
        prompt = generator.encode(["a"] * len(seeds))
        base = (generator.draw_noise(seeds), prompt.embeddings)
        random = torch.Generator().manual_seed(11)
        for which in (0, 1):
            norm = gradients[which].norm()
            for _ in range(directions):
                noise = torch.randn(base[which].shape, generator=random).to(base[which])
                direction = gradients[which] / norm + noise / noise.norm()  # half along it, half anywhere

                def value(sign, which=which, direction=direction):
                    moved = list(base)
                    moved[which] = base[which] + sign * step * direction
                    images = generator.generate(prompt.with_embeddings(moved[1], prompt.mask), moved[0])
                    return float(objective(images.double()))

                measured = (value(1) - value(-1)) / (2 * step)
                exact = float((gradients[which] * direction).sum())
                worst = max(worst, abs(measured - exact) / float(norm))
    return worst


@pytest.mark.parametrize("sampler", NAMED)
def test_gradient_agrees_with_finite_differences(world, sampler):
    assert directional_error(make(world, sampler)) < 2e-3
