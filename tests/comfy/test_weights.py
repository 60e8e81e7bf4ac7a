"""Weights that autograd refuses, quantized weights, dynamic VRAM, attention kernels without a backward."""

from __future__ import annotations

import json
import types

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import host
import nodes as comfy_nodes
import pytest
import tiny
import torch
from test_gradients import directional_error, our_gradients, relative
from test_states import control_net
from test_stock import STEPS, make, ours, stock

weights = host.pack("nodes.host.weights")
compat = host.pack("nodes.host.compat")
decode = host.pack("nodes.host.decode")
errors = host.pack("ipgo_engine.errors")


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


def test_aliases_share_memory_keep_ties_and_are_taken_back():
    with host.node():
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        module[2].weight = module[0].weight
    before = dict([*module.named_parameters(), *module.named_buffers()])
    aliases = weights.Aliases()
    assert aliases.apply(module) > 0
    assert aliases.apply(module) == 0
    assert module[2].weight is module[0].weight
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert weights.is_usable(tensor)
        assert tensor.data_ptr() == before[name].data_ptr()
        assert not tensor.requires_grad
    x = torch.randn(3, 4, requires_grad=True)
    module.eval()(x).sum().backward()
    replaced = module[0].bias = torch.nn.Parameter(torch.zeros(4))  # a reload in between
    aliases.restore()
    assert module[0].bias is replaced
    assert module[0].weight is before["0.weight"]


def test_weights_that_ask_for_a_gradient_do_not_get_one():
    """Packs that load outside of a node forget to freeze; gradients of weights would fill the memory."""
    module = torch.nn.Linear(4, 4)
    before, aliases = dict(module.named_parameters()), weights.Aliases()
    aliases.apply(module)
    module(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert [weight.grad for weight in (*module.parameters(), *before.values())] == [None] * 4
    aliases.restore()
    assert dict(module.named_parameters()) == before
    assert module.weight.requires_grad


PARTS = {"rows": lambda w: w[2:], "columns": lambda w: w[:, 1:3], "turned": lambda w: w.T}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_an_alias_of_a_part_is_that_part(part):
    """Weights of one file may lie in one piece of memory."""
    with host.node():
        weight = part(torch.arange(20.0).reshape(5, 4))
    found = weights.alias(weight)
    assert weights.is_usable(found)
    assert torch.equal(found, weight)
    assert found.data_ptr() == weight.data_ptr()


def quantized():
    """The tiny model with every Linear weight in scaled fp8, loaded by core's own mixed-precision layers."""
    plain = tiny.sd15()
    config = tiny.TinySD15(dict(tiny.UNET))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    model = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
    state = plain.model.diffusion_model.state_dict()
    for name, module in plain.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = state[f"{name}.weight"]
            scale = weight.abs().max() / 448
            state[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
            state[f"{name}.weight_scale"] = scale
            format_ = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{name}.comfy_quant"] = torch.tensor(list(format_), dtype=torch.uint8)
    model.diffusion_model.load_state_dict(state, strict=False)
    return tiny.patcher(model.eval())


@pytest.mark.skipif(not hasattr(comfy.ops, "mixed_precision_ops"), reason="this ComfyUI has no quantized layers")
def test_quantized_weights(world):
    with host.node():
        model = quantized()
    kinds = {type(p).__name__ for p in model.model.parameters()}
    assert "QuantizedTensor" in kinds
    expected = stock(world, "euler", model=model)
    assert torch.equal(ours(make(world, "euler", model=model)), expected)
    _, reference = our_gradients(make(world, "euler"))
    _, gradients = our_gradients(make(world, "euler", model=model))
    for got, want in zip(gradients, reference, strict=True):
        assert float(torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)) > 0.9
    assert torch.equal(stock(world, "euler", model=model), expected)


def dynamic(inner, reload):
    """A patcher that says of itself what one in dynamic VRAM says."""

    class Dynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    made = Dynamic(inner.model, inner.load_device, inner.offload_device)
    made.cached_patcher_init = reload
    return made


HAS_DYNAMIC = hasattr(comfy.model_patcher.ModelPatcher, "is_dynamic")


@pytest.mark.skipif(not HAS_DYNAMIC, reason="this ComfyUI has no dynamic VRAM")
def test_dynamic_vram_takes_a_second_ordinary_model_for_the_gradient(world):
    """The user's own model is not touched; the clone is what the loader gives without dynamic VRAM."""
    loads = []

    def reload(disable_dynamic=False):
        loads.append(disable_dynamic)
        return tiny.sd15()

    model = dynamic(world[0], (reload, ()))
    generator = make(world, "euler", model=model)
    _, gradients = our_gradients(generator)
    assert loads == [True]
    _, reference = our_gradients(make(world, "euler"))
    for got, want in zip(gradients, reference, strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.skipif(not HAS_DYNAMIC, reason="this ComfyUI has no dynamic VRAM")
def test_dynamic_vram_without_a_loader_is_refused_with_the_way_out(world):
    with pytest.raises(errors.InputError, match="--disable-dynamic-vram"):
        compat.ordinary_clone(dynamic(world[0], None), "model")


def test_the_gradient_is_computed_on_one_device(world):
    """Several GPUs compute in threads of their own, which know nothing of our wrappers."""
    model = world[0].clone()
    model.set_additional_models("multigpu", [world[0].clone()])
    model.model_options["multigpu_clones"] = {"another device": None}
    clone = compat.ordinary_clone(model, "model")
    assert not clone.get_additional_models_with_key("multigpu")
    assert "multigpu_clones" not in clone.model_options
    assert model.get_additional_models_with_key("multigpu")
    assert "multigpu_clones" in model.model_options


def test_streamed_weights_are_refused(world, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_cast_buffer", lambda *a: None, raising=False)
    with pytest.raises(errors.InputError, match="streamed"):
        compat.refuse_streaming(world[0].model, torch.device("meta"))
    compat.refuse_streaming(world[0].model, next(world[0].model.parameters()).device)


def without_backward(q, k, v, heads, mask=None, **kwargs):
    """An attention kernel as fast ones are: right, and unknown to autograd."""
    with torch.no_grad():
        return attention.attention_pytorch(q.detach(), k.detach(), v.detach(), heads, mask, **kwargs)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_attention_without_a_backward(world, checkpoint):
    """The user's kernel makes the image; the gradient does not come from it."""
    model = world[0].clone()
    used = []

    def override(_function, *args, **kwargs):
        used.append(torch.is_grad_enabled() or args[0].requires_grad)  # layers choose kernels by either
        return without_backward(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = stock(world, "euler", model=model)
    generator = make(world, "euler", model=model)
    used.clear()
    assert torch.equal(ours(generator, checkpoint=checkpoint), expected)
    assert used
    assert not any(used)
    assert directional_error(generator, directions=2) < 2e-2
    assert model.model_options["transformer_options"]["optimized_attention_override"] is override


def test_the_prompt_alone_has_its_gradient_through_attention_without_a_backward(world):
    """Tokens learn through the last step only: what attention asks with has no gradient there, its keys have one."""
    model = world[0].clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _function, *args, **kwargs: without_backward(*args, **kwargs)
    found = []
    for generator in (make(world, "euler"), make(world, "euler", model=model)):
        with host.node(), generator:
            prompt = generator.encode(["a"])
            embeddings = prompt.embeddings.clone().requires_grad_(True)
            changed = prompt.with_embeddings(embeddings, prompt.mask)
            image = generator.generate(changed, generator.draw_noise([7]), backprop_steps=1)
            found += torch.autograd.grad(image.pow(2).mean(), embeddings)
    assert relative(found[1], found[0]) < 1e-4


@pytest.fixture
def kernel(monkeypatch):
    """Makes an attention kernel that of every layer, as a start with another option or a GPU does."""

    def choose(function):
        for name in ("optimized_attention", "optimized_attention_masked"):
            monkeypatch.setattr(attention, name, function, raising=False)

    return choose


def test_what_is_stored_is_not_computed_again(world, monkeypatch, kernel):
    """The CPU's own kernel has no backward, so that nothing would be stored there."""
    kernel(attention.attention_pytorch)
    expected, calls, forward = stock(world, "euler"), [], type(world[0].model)._apply_model

    def counting(*args, **kwargs):
        calls.append(1)
        fused = not getattr(comfy.model_management, "in_training", True)  # newer kernels without a backward
        assert not (torch.is_grad_enabled() and fused)
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(world[0].model), "_apply_model", counting)
    generator, found = make(world, "euler"), []
    for checkpoint, times in ((True, 2 * STEPS), (False, STEPS + 1)):  # one more to see whether values are the same
        calls.clear()
        images, gradients = our_gradients(generator, checkpoint=checkpoint)
        assert torch.equal(images.cpu(), expected)
        assert len(calls) == times
        found.append(gradients)
    for recomputed, stored in zip(*found, strict=True):
        assert relative(stored, recomputed) < 1e-5


@pytest.mark.parametrize("length", [77, 82])
def test_a_prompt_learns_the_same_whether_stored_or_computed_again(world, kernel, length):
    """A prompt that is longer than the negative is a call of its own, and that of the negative has no gradient."""
    kernel(attention.attention_pytorch)
    model, vae, _, negative = world
    generator, found = make((model, vae, tiny.conditioning(1, length), negative), "euler"), []
    for checkpoint in (True, False):
        with host.node(), generator:
            prompt = generator.encode(["a"])
            embeddings = prompt.embeddings.clone().requires_grad_(True)
            learned = prompt.with_embeddings(embeddings, prompt.mask)
            image = generator.generate(learned, generator.draw_noise([7]), backprop_steps=1, checkpoint=checkpoint)
            found += torch.autograd.grad(image.pow(2).mean(), embeddings)
    assert relative(found[1], found[0]) < 1e-5


def test_a_control_net_through_attention_without_a_backward(world, kernel):
    """No override of attention reaches a ControlNet."""
    model, vae, _, negative = world
    with host.node():
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        applied = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            tiny.conditioning(1), negative, control_net(), hint, 0.8, 0.0, 0.9
        )
    own = (model, vae, *applied)
    _, wanted = our_gradients(make(own, "euler"))
    kernel(without_backward)
    _, found = our_gradients(make(own, "euler"))
    for got, want in zip(found, wanted, strict=True):
        assert relative(got, want) < 1e-4
    assert attention.optimized_attention is without_backward


def test_the_identity_of_an_encoder_is_that_of_its_fp8_copy():
    """Tokens fit both."""
    name_of = host.pack("nodes.host.inputs").encoder_name
    encoder = torch.nn.ModuleDict({"clip_l": torch.nn.Linear(64, 64)})
    names = [
        name_of(types.SimpleNamespace(cond_stage_model=encoder.to(kind)), 64) for kind in (None, torch.float8_e4m3fn)
    ]
    assert names[0] == names[1]
    assert (
        name_of(types.SimpleNamespace(cond_stage_model=torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64)})), 64)
        != names[0]
    )


def test_saturated_pixels_keep_their_gradient():
    with host.node():
        contrast = tiny.vae(contrast=8.0)
        comfy.model_management.load_models_gpu([contrast.patcher], force_full_load=True)
    with torch.inference_mode(False), torch.enable_grad():
        weights.Aliases().apply(contrast.first_stage_model)
        latents = torch.randn(1, 4, 8, 8, device=contrast.device, requires_grad=True)
        images = decode.decode(contrast, contrast.first_stage_model, latents)
        assert float(((images == 0) | (images == 1)).float().mean()) > 0.2
        assert torch.equal(images.detach().cpu(), contrast.decode(latents.detach()).movedim(-1, 1))
        (ours_,) = torch.autograd.grad(images.sum(), latents)
        raw = contrast.first_stage_model.decode(latents) / 2
        (linear,) = torch.autograd.grad(raw.sum(), latents)
    assert relative(ours_, linear) < 1e-5


def test_a_vae_that_ends_in_a_curve_has_the_gradient_of_the_curve():
    """Some formats do not end in (x + 1) / 2."""
    pixels = torch.tensor([-2.0, -0.3, 0.1, 0.4], requires_grad=True)
    image = decode.straight_through(lambda x: x.mul_(2).square().clamp(0, 1), pixels)
    assert torch.equal(image, (2 * pixels).square().clamp(0, 1))
    (gradient,) = torch.autograd.grad(image.sum(), pixels)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -2.4, 0.8, 3.2]))


def test_only_single_rgb_pictures_come_out_of_a_vae():
    video = torch.rand(1, 3, 1, 4, 4)
    assert torch.equal(decode.to_images(video), video[:, :, 0])
    for shape, reason in (((1, 3, 5, 4, 4), "5 frames"), ((1, 4, 4, 4), "need RGB"), ((1, 3, 4), "need RGB")):
        with pytest.raises(errors.InputError, match=reason):
            decode.to_images(torch.rand(shape))


def test_decoded_blocks_are_computed_again(world):
    """The VAE's gradient is the same with and without recomputed blocks."""
    vae = world[1]
    recomputed = host.pack("nodes.host.recomputed")
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([vae.patcher], force_full_load=True)
        weights.Aliases().apply(vae.first_stage_model)
        latents = torch.randn(1, 4, 8, 8, device=vae.device, requires_grad=True)
        gradients = []
        for again in (False, True):
            blocks = recomputed.RecomputedModules()
            for block in decode.blocks(vae.first_stage_model) if again else ():
                blocks.apply(block)
            images = decode.decode(vae, vae.first_stage_model, latents)
            blocks.restore()
            gradients.append(torch.autograd.grad((images**2).sum(), latents)[0])
    assert decode.blocks(vae.first_stage_model)
    assert relative(gradients[1], gradients[0]) < 1e-6


def in_file_precision(patcher, dtype):
    """What a start with dynamic VRAM loads without paging: weights as in the file, beside the precision meant."""
    comfy.model_management.archive_model_dtypes(patcher.model)
    patcher.model.to(dtype)
    return patcher


@pytest.mark.skipif(not HAS_DYNAMIC, reason="this ComfyUI has no dynamic VRAM")
def test_dynamic_vram_keeps_the_files_precision_and_the_clone_does_not(world):
    """Files in float16 are common, VAEs that compute in another precision too."""
    with host.node():
        model = dynamic(world[0], (lambda disable_dynamic=False: in_file_precision(tiny.sd15(), torch.float16), ()))
        vae = tiny.vae()
        vae.patcher = dynamic(vae.patcher, (lambda disable_dynamic=False: halved_vae(), ()))
    generator = make((model, vae, *world[2:]), "euler")
    _, gradients = our_gradients(generator)
    _, reference = our_gradients(make(world, "euler"))
    for got, want in zip(gradients, reference, strict=True):
        assert relative(got, want) < 2e-2


def halved_vae():
    with host.node():
        return in_file_precision(tiny.vae().patcher, torch.float16)


def test_weights_that_were_moved_meanwhile_stay_where_they_are():
    """An unload moves the alias; the original, still in the old place, must not come back."""
    with host.node():
        module = torch.nn.Linear(4, 4)
    originals = dict(module.named_parameters())
    aliases = weights.Aliases()
    aliases.apply(module)
    module.weight.data = module.weight.data.clone()  # what `module.to` does between two devices
    aliases.restore()
    assert module.weight is not originals["weight"]
    assert module.bias is originals["bias"]
    assert torch.equal(module.weight, originals["weight"])


def test_weights_on_a_device_that_is_called_without_a_number_are_at_home(monkeypatch):
    """ComfyUI calls Apple's device `mps`, its tensors say `mps:0`."""
    monkeypatch.setattr(comfy.model_management, "get_cast_buffer", lambda *a: None, raising=False)
    compat.refuse_streaming(torch.nn.Linear(2, 2, device="meta"), torch.device("meta", 0))
