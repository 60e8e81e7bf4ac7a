"""Gradients of float16 models against float32 arithmetic on the same weights: none vanishes, none overflows."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.sd
import host
import nodes as comfy_nodes
import pytest
import tiny
import torch
from test_gradients import objective
from test_stock import make, ours, stock

SMALL, LARGE = 2.0**-16, 2.0**16
"""Factors on the objective; real rewards of real images have pixel gradients of about 1e-6."""


def half_vae():
    with host.node():
        return comfy.sd.VAE(sd=tiny.vae().first_stage_model.state_dict(), config=tiny.VAE, dtype=torch.float16)


def control_net(compute):
    """A float16 ControlNet for the tiny model."""
    config = {key: value for key, value in tiny.UNET.items() if key not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(
        **config, num_heads=4, num_head_channels=-1, hint_channels=3, device="cpu", dtype=torch.float16,
        operations=comfy.ops.manual_cast if compute else comfy.ops.disable_weight_init,
    )  # fmt: skip
    tiny.initialise(network, 4)
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network.eval(), load_device=device, manual_cast_dtype=compute)


def world_of(compute, controlled=False, vae=tiny.vae):
    """A float16 model that computes in `compute` (None: in float16 too)."""
    with host.node():
        positive, negative = tiny.conditioning(1), tiny.conditioning(2)
        if controlled:
            hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
            apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
            positive, negative = apply(positive, negative, control_net(compute), hint, 0.8, 0.0, 1.0)
        return tiny.sd15(dtype=torch.float16, manual_cast=compute), vae(), positive, negative


def gradients(world, factor, **how):
    """Gradients of the objective in noise and prompt; `factor` is put on it and taken off again."""
    generator = make(world, "euler")
    with host.node(), generator:
        prompt = generator.encode(["a"])
        embeddings = prompt.embeddings.clone().requires_grad_(True)
        noise = generator.draw_noise([7]).requires_grad_(True)
        images = generator.generate(prompt.with_embeddings(embeddings, prompt.mask), noise, **how)
        found = torch.autograd.grad(factor * objective(images), (noise, embeddings))
        return [gradient.double() / factor for gradient in found]


def assert_alike(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        assert float(torch.cosine_similarity(got.flatten(), want.flatten(), 0)) > 0.98
        assert float(got.norm() / want.norm()) == pytest.approx(1, abs=0.05)
        assert float((got == 0).float().mean()) < 0.02


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("factor", [SMALL, 1.0, LARGE])
def test_model(factor, checkpoint):
    wanted = gradients(world_of(torch.float32), 1.0, backprop_steps=1)
    assert_alike(gradients(world_of(None), factor, backprop_steps=1, checkpoint=checkpoint), wanted)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_control_net(checkpoint):
    wanted = gradients(world_of(torch.float32, controlled=True), 1.0, backprop_steps=1)
    found = gradients(world_of(None, controlled=True), SMALL, backprop_steps=1, checkpoint=checkpoint)
    assert_alike(found, wanted)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("factor", [SMALL, LARGE])
def test_vae(factor, checkpoint):
    wanted = gradients(world_of(torch.float32), 1.0, backprop_steps=1)
    found = gradients(world_of(torch.float32, vae=half_vae), factor, backprop_steps=1, checkpoint=checkpoint)
    assert_alike(found, wanted)


def test_all_steps_are_finite_and_alike():
    wanted = gradients(world_of(torch.float32), 1.0)
    assert_alike(gradients(world_of(None), SMALL), wanted)


def test_the_scale_is_exact():
    """In float32 a factor on the objective changes the gradient by exactly that factor."""
    world = world_of(torch.float32)
    for got, want in zip(gradients(world, SMALL), gradients(world, 1.0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_pictures_equal_stock(checkpoint):
    world = world_of(None, controlled=True, vae=half_vae)
    expected = stock(world, "euler")
    assert torch.equal(ours(make(world, "euler"), checkpoint=checkpoint), expected)
