"""Weights in every state, patches by other nodes, interruption and failure; ComfyUI is as before afterwards."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib.util
import inspect
import os
import types

import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import host
import nodes as comfy_nodes
import pytest
import tiny
import torch
from test_gradients import directional_error, objective, our_gradients, relative
from test_stock import CFG, STEPS, generator_module, make, ours, stock

errors = host.pack("ipgo_engine.errors")


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


def lora_for(model, strength=1.0, load=comfy.sd.load_lora_for_models):
    """MODEL with a LoRA on one attention projection."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    weight = model.model.state_dict()[key]
    generator = torch.Generator().manual_seed(5)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    lora = {
        f"{name}.lora_up.weight": torch.randn(weight.shape[0], 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, weight.shape[1], generator=generator) * 0.3,
        f"{name}.alpha": torch.tensor(4.0),
    }
    with host.node():
        return load(model, None, lora, strength, 0)[0]


def test_lora_is_respected_and_taken_off_again(world):
    base = stock(world, "euler")
    patched = lora_for(world[0])
    expected = stock(world, "euler", model=patched)
    assert not torch.equal(base, expected)
    _, plain = our_gradients(make(world, "euler"))
    assert torch.equal(ours(make(world, "euler", model=patched)), expected)
    assert directional_error(make(world, "euler", model=patched), directions=1) < 2e-2
    assert torch.equal(stock(world, "euler"), base)
    _, again = our_gradients(make(world, "euler"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_lora_in_bypass_mode_is_refused(world):
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if load is None:
        pytest.skip("this ComfyUI has no bypass mode")
    with pytest.raises(errors.InputError, match=r"bypass mode.*use Load LoRA"):
        make(world, "euler", model=lora_for(world[0], load=load))


@pytest.mark.parametrize(
    ("dtype", "compute", "tolerance"),
    [
        (torch.float16, torch.float32, 2e-2),
        (torch.bfloat16, torch.float32, 5e-2),
        (torch.bfloat16, None, 0.3),
        (torch.float8_e4m3fn, torch.float32, 0.5),
        (torch.float8_e5m2, torch.float32, 0.8),
    ],
)
def test_stored_precision(world, dtype, compute, tolerance):
    """Equal to stock bit for bit; the gradient points where that of float32 weights does."""
    with host.node():
        model = tiny.sd15(dtype=dtype, manual_cast=compute)
    expected = stock(world, "euler", model=model)
    assert torch.equal(ours(make(world, "euler", model=model)), expected)
    _, reference = our_gradients(make(world, "euler"))
    _, gradients = our_gradients(make(world, "euler", model=model))
    for got, want in zip(gradients, reference, strict=True):
        assert relative(got, want) < tolerance
    assert torch.equal(stock(world, "euler", model=model), expected)


def test_partly_loaded_model_with_lora(world, monkeypatch):
    """Low VRAM: weights cast on the fly, LoRA applied on the fly. The gradient is that of the loaded model."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu" and hasattr(comfy.model_management, "get_cast_buffer"):
        pytest.skip("this ComfyUI streams such weights, which is refused (test_weights)")
    patched = lora_for(world[0])
    _, reference = our_gradients(make(world, "euler", model=patched))
    comfy.model_management.unload_all_models()

    whole = comfy.model_management.load_models_gpu

    def partial(models, *args, **kwargs):
        for model in models:
            if model.model is not world[0].model:
                whole([model], *args, **kwargs)
            elif model.model.model_loaded_weight_memory == 0:
                model.patch_model(device_to=device, lowvram_model_memory=500_000)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", partial)
    _, gradients = our_gradients(make(world, "euler", model=patched))
    casting = sum(bool(getattr(m, "comfy_cast_weights", False)) for m in patched.model.modules())
    assert casting > 0
    monkeypatch.undo()
    patched.unpatch_model(torch.device("cpu"))
    for got, want in zip(gradients, reference, strict=True):
        assert relative(got, want) < 1e-4


EXTRAS = (
    "nodes_freelunch", "nodes_pag", "nodes_model_advanced", "nodes_rescalecfg", "nodes_hypertile", "nodes_tomesd",
    "nodes_sag", "nodes_cfg", "nodes_easycache", "nodes_fresca", "nodes_tcfg", "nodes_eps",
)  # fmt: skip


@pytest.fixture(scope="module")
def extras():
    folder = os.path.join(os.path.dirname(comfy_nodes.__file__), "comfy_extras")
    for name in EXTRAS:
        if os.path.exists(os.path.join(folder, name + ".py")):
            asyncio.run(comfy_nodes.load_custom_node(os.path.join(folder, name + ".py"), module_parent="comfy_extras"))
    return comfy_nodes.NODE_CLASS_MAPPINGS


PATCHES = {
    "FreeU": {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2},
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "RescaleCFG": {"multiplier": 0.7},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "CFGZeroStar": {},
    "TCFG": {},
    "FreSca": {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 2},
    "EpsilonScaling": {"scaling_factor": 1.005},
    "CFGNorm": {"strength": 0.9},
}
RANDOM = {
    "TomePatchModel": {"ratio": 0.5},
    "HyperTile": {"tile_size": 32, "swap_size": 2, "max_depth": 0, "scale_depth": False},
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_by_other_nodes_are_respected(world, extras, name):
    if name not in extras:
        pytest.skip(f"this ComfyUI has no {name}")
    model = host.run_node(extras[name], model=world[0], **PATCHES[name])
    expected = stock(world, "euler", model=model)
    generator = make(world, "euler", model=model)
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2
    _, recomputed = our_gradients(generator)
    assert all(bool(g.isfinite().all()) for g in recomputed)


def test_a_patch_that_writes_in_place(world):
    """What autograd saved is destroyed: such a model is computed again, whatever was asked for."""

    def patch(out, extra_options):
        grown = out.exp()
        more = grown * grown
        grown.add_(1.0)
        return out + 0.01 * more

    model = world[0].clone()
    model.set_model_attn2_output_patch(patch)
    generator = make(world, "euler", model=model)
    assert torch.equal(ours(generator, checkpoint=False), stock(world, "euler", model=model))
    _, recomputed = our_gradients(generator)
    _, stored = our_gradients(generator, checkpoint=False)
    for got, want in zip(stored, recomputed, strict=True):
        assert torch.equal(got, want)


def test_a_patch_may_write_into_the_predictions(world):
    model = world[0].clone()
    model.set_model_sampler_pre_cfg_function(lambda args: [prediction.mul_(0.9) for prediction in args["conds_out"]])
    expected = stock(world, "euler", model=model)
    generator = make(world, "euler", model=model)
    assert not torch.equal(expected, stock(world, "euler"))
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2


def test_sampling_that_a_node_patched_counts_before_the_model_is_loaded(extras):
    with host.node():
        own = tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)
    model = host.run_node(extras["ModelSamplingSD3"], model=own[0], shift=3.0)
    image = ours(make(own, "dpmpp_2m_sde", model=model))
    assert torch.equal(image, stock(own, "dpmpp_2m_sde", model=model))


def test_an_empty_latent_gets_the_scale_of_the_model(world):
    """Newer releases know models with 16 pixels per latent; Empty Latent Image makes 8."""
    if "downscale_ratio_spacial" not in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        pytest.skip("this ComfyUI does not scale empty latents")
    model = world[0].clone()
    coarse = copy.copy(model.get_model_object("latent_format"))
    coarse.spacial_downscale_ratio = 16
    model.add_object_patch("latent_format", coarse)
    with host.node():
        stock_latent = comfy_nodes.EmptyLatentImage().generate(128, 64, 1)[0]
    for latent in (stock_latent, host.pack("nodes.host.choices").empty_latent(128, 64)):
        assert make(world, "euler", latent=latent, model=model).latent.shape == (1, 4, 4, 8)


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_are_refused_by_name(world, extras, name):
    if name not in extras:
        pytest.skip(f"this ComfyUI has no {name}")
    options = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    model = host.run_node(extras[name], model=world[0], **options)
    with pytest.raises(errors.InputError, match=name):
        make(world, "euler", model=model)


@pytest.mark.parametrize("name", RANDOM)
def test_patches_that_draw_from_the_global_random_state_are_refused_by_name(world, extras, name):
    model = host.run_node(extras[name], model=world[0], **RANDOM[name])
    with pytest.raises(errors.InputError, match=rf"{name}.*made again"):
        make(world, "euler", model=model)


def test_a_checkpoint_without_a_vae_or_a_text_encoder_is_refused(world):
    model, vae, positive, negative = world
    with host.node():
        empty = comfy.sd.VAE(sd={})
    with pytest.raises(errors.InputError, match="vae is invalid: the checkpoint"):
        make((model, empty, positive, negative), "euler")
    sampling = generator_module.Sampling.by_name(model, "euler", "normal", STEPS, CFG)
    with pytest.raises(errors.InputError, match="clip is empty: the checkpoint"):
        generator_module.ComfyGenerator(model, vae, sampling, "a text", tiny.latent())


def test_a_model_whose_gradient_would_be_lost_is_refused_by_name():
    kind = getattr(comfy.model_base, "CosmosPredict2", None)
    if kind is None:
        pytest.skip("this ComfyUI has no Cosmos Predict2")
    model = types.SimpleNamespace(wrappers={}, injections={}, model_options={}, model=object.__new__(kind))
    with pytest.raises(errors.InputError, match=r"CosmosPredict2.*no backward"):
        host.pack("nodes.host.refuse").refuse_unsupported(model)


def test_latents_of_sound_and_picture_together_are_refused(world):
    if importlib.util.find_spec("comfy.nested_tensor") is None:
        pytest.skip("this ComfyUI has no such latents")
    from comfy.nested_tensor import NestedTensor

    parts = NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 16)])
    with pytest.raises(errors.InputError, match="several tensors"):
        make(world, "euler", latent={"samples": parts})


def test_hooks_are_refused_with_the_reason(world):
    model, vae, _, negative = world
    hooked = tiny.conditioning(1) + tiny.conditioning(3, hooks=object())
    with pytest.raises(errors.InputError, match="positive carries hooks"):
        make((model, vae, hooked, negative), "euler")
    with pytest.raises(errors.InputError, match="negative carries hooks"):
        make((model, vae, negative, hooked), "euler")


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_guidance_scale(world, cfg):
    model, vae, positive, negative = world
    generator = make(world, "euler", cfg=cfg)
    with host.node():
        out = comfy_nodes.common_ksampler(model, 7, STEPS, cfg, "euler", "normal", positive, negative, tiny.latent())[0]
        expected = comfy_nodes.VAEDecode().decode(vae, out)[0].movedim(-1, 1)
    assert torch.equal(ours(generator), expected)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "euler_ancestral", "dpmpp_2m_sde", "uni_pc"])
@pytest.mark.parametrize("masked", [False, True])
def test_image_to_image_and_masks(world, sampler, masked):
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))}
    if masked:
        latent["noise_mask"] = (torch.arange(64) < 32).float().expand(1, 64, 64).clone()
    expected = stock(world, sampler, latent=latent, denoise=0.6)
    generator = make(world, sampler, latent=latent, denoise=0.6)
    assert torch.equal(ours(generator), expected)
    if masked and sampler == "ddim":
        assert generator.noise_shape[0] == 2  # the kept region has a noise of its own
    else:
        assert (generator.noise_shape[0] > 1) == (sampler in ("euler_ancestral", "dpmpp_2m_sde"))
    assert directional_error(generator, directions=1) < 3e-2


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_an_image_taken_from_a_batch_has_the_noise_of_its_place(world, sampler):
    with host.node():
        latent = comfy_nodes.LatentFromBatch().frombatch(tiny.latent(batch=4), 2, 1)[0]
    expected = stock(world, sampler, latent=latent)
    assert not torch.equal(expected, stock(world, sampler))
    assert torch.equal(ours(make(world, sampler, latent=latent)), expected)


def test_pictures_that_differ_are_refused(world):
    samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    with pytest.raises(errors.InputError, match="latent holds 2 different images"):
        make(world, "euler", latent={"samples": samples})


def test_masks_that_differ_are_refused(world):
    samples = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8)).repeat(2, 1, 1, 1)
    mask = torch.zeros(2, 64, 64)
    mask[0, :, :32] = 1
    with pytest.raises(errors.InputError, match="different masks for its 2 images"):
        make(world, "euler", latent={"samples": samples, "noise_mask": mask})
    mask[1] = mask[0]
    make(world, "euler", latent={"samples": samples, "noise_mask": mask})
    mask[1] = 0  # stock uses the first for a single image
    make(world, "euler", latent={"samples": samples[:1], "noise_mask": mask})


def test_areas_masks_and_time_ranges(world):
    model, vae, positive, negative = world
    other = tiny.conditioning(3, area=(4, 8, 2, 0), strength=0.8)
    third = tiny.conditioning(4, mask=torch.ones(1, 64, 64), mask_strength=0.5, start_percent=0.0, end_percent=0.6)
    combined = (model, vae, positive + other + third, negative)
    expected = stock(combined, "dpmpp_2m")
    assert torch.equal(ours(make(combined, "dpmpp_2m")), expected)


def weights_of(world):
    model, vae = world[:2]
    return [*model.model.parameters(), *model.model.buffers(), *vae.first_stage_model.parameters()]


def assert_untouched(world, before, image):
    """The very same parameter objects, options and images as before."""
    assert all(a is b for a, b in zip(before, weights_of(world), strict=True))
    assert "optimized_attention_override" not in world[0].model_options["transformer_options"]
    assert not world[0].wrappers
    assert getattr(comfy.model_management, "in_training", False) is False
    assert torch.equal(stock(world, "euler_ancestral"), image)


def test_success_leaves_everything_as_it_was(world):
    image = stock(world, "euler_ancestral")
    before = weights_of(world)
    state = torch.get_rng_state()
    generator = make(world, "euler_ancestral")
    our_gradients(generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator._patcher is None
    assert_untouched(world, before, image)


class Interrupt:
    """Presses Cancel at the n-th model call."""

    def __init__(self, monkeypatch, call):
        self.calls, original = 0, comfy.model_management.throw_exception_if_processing_interrupted

        def poll():
            self.calls += 1
            if self.calls == call:
                comfy.model_management.interrupt_current_processing()
            original()

        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", poll)


@pytest.mark.parametrize("call", [1, 3, 7, 10])
def test_cancel_in_forward_and_backward(world, monkeypatch, call):
    image = stock(world, "euler_ancestral")
    before = weights_of(world)
    generator = make(world, "euler_ancestral")
    with monkeypatch.context() as patch:
        Interrupt(patch, call)
        with pytest.raises(errors.Cancelled) as raised:
            our_gradients(generator)
    assert isinstance(raised.value.__cause__, comfy.model_management.InterruptProcessingException)
    assert not comfy.model_management.processing_interrupted()
    assert_untouched(world, before, image)
    assert torch.equal(ours(make(world, "euler_ancestral")), image)


def fail_at(patch, world, call, error):
    """Raise from inside the model at its n-th call, those of the backward pass counted too."""
    forward = type(world[0].model)._apply_model
    calls = 0

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return forward(self, *args, **kwargs)

    patch.setattr(type(world[0].model), "_apply_model", failing)


@pytest.mark.parametrize("failure", [comfy.model_management.OOM_EXCEPTION, RuntimeError, ValueError])
@pytest.mark.parametrize("call", [2, 6])
def test_failure_leaves_everything_as_it_was(world, monkeypatch, failure, call):
    image = stock(world, "euler_ancestral")
    before = weights_of(world)
    generator = make(world, "euler_ancestral")
    with monkeypatch.context() as patch:
        fail_at(patch, world, call, failure("simulated"))
        with pytest.raises(failure, match="simulated"):
            our_gradients(generator)
    assert_untouched(world, before, image)
    assert torch.equal(ours(generator), image)


def test_nan_reaches_the_loop_and_nothing_else(world):
    image = stock(world, "euler_ancestral")
    before = weights_of(world)
    generator = make(world, "euler_ancestral")
    with host.node(), generator:
        noise = (generator.draw_noise([7]) * float("nan")).requires_grad_(True)
        images = generator.generate(generator.encode(["a"]), noise)
        assert bool(images.isnan().any())
        torch.autograd.grad(objective(images), noise)
    assert_untouched(world, before, image)


def test_memory_is_released():
    """Runs leave no tensors behind."""

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    with host.node():
        own = tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)
    stock(own, "dpmpp_sde")
    our_gradients(make(own, "dpmpp_sde"))
    first = alive()
    for _ in range(3):
        our_gradients(make(own, "dpmpp_sde"))
    assert alive() <= first


def test_gradient_outside_a_session_is_an_error(world):
    generator = make(world, "euler")
    with host.node(), torch.inference_mode(False):
        noise = generator.draw_noise([1]).requires_grad_(True)
        with pytest.raises(RuntimeError, match="open session"):
            generator.generate(generator.encode(["a"]), noise)
        with torch.no_grad():
            assert generator.generate(generator.encode(["a"]), noise).shape == (1, 3, 64, 64)


def test_batches_equal_their_parts(world):
    """Images of a batch are those of the single runs up to rounding, and so are the gradients."""
    generator = make(world, "euler_ancestral")
    images, (noise, _) = our_gradients(generator, (7, 8))
    for index, seed in enumerate((7, 8)):
        assert relative(images[index].cpu(), stock(world, "euler_ancestral", seed=seed)[0]) < 1e-5
    assert generator_module.ComfyGenerator is type(generator)
    assert noise.shape == (2, *generator.noise_shape)
    assert generator.sampling.cfg == CFG


def control_net(seed=4, channels=3):
    """A ControlNet for the tiny model, with a hint of so many channels."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {**tiny.UNET, "hint_channels": channels}
    for key in ("out_channels", "transformer_depth_output"):
        config.pop(key, None)
    heads = {"num_heads": 4, "num_head_channels": -1}
    network = comfy.cldm.cldm.ControlNet(
        **config, **heads, operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.float32
    )
    tiny.initialise(network, seed)
    return comfy.controlnet.ControlNet(network.eval(), load_device=comfy.model_management.get_torch_device())


def test_control_net(world):
    model, vae, _, negative = world
    control = control_net()
    with host.node():
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        applied = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            tiny.conditioning(1), negative, control, hint, 0.8, 0.0, 0.9
        )
    own = (model, vae, *applied)
    expected = stock(own, "euler")
    assert not torch.equal(expected, stock(world, "euler"))
    generator = make(own, "euler")
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=2) < 3e-2
    assert "forward" not in vars(control.control_model)
    assert torch.equal(stock(own, "euler"), expected)


def test_control_nets_in_a_row(world):
    model, vae, positive, negative = world
    given = positive, negative
    with host.node():
        for seed in (4, 6):
            hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
            given = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
                *given, control_net(seed), hint, 0.5, 0.0, 0.9
            )
    own = (model, vae, *given)
    expected = stock(own, "euler")
    generator = make(own, "euler")
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2


def test_a_latent_format_with_tensors(world):
    """As those of Playground, Wan and Qwen: made by a loader node, in inference mode."""
    import comfy.latent_formats

    model = world[0].clone()
    with host.node():
        made = comfy.latent_formats.SDXL_Playground_2_5()
    model.add_object_patch("latent_format", made)
    mean = made.latents_mean
    expected = stock(world, "euler", model=model)
    generator = make(world, "euler", model=model)
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2
    assert made.latents_mean is mean


def test_a_t2i_adapter(world):
    """A ControlNet whose network no patcher loads, and whose weights still ask for a gradient."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light

    class Adapter(Adapter_light):
        def forward(self, x):
            return {"input": super().forward(x)["input"][:-1]}  # a level of the tiny UNet is one block shorter

    model, vae, positive, negative = world
    with host.node():
        network = tiny.initialise(Adapter(channels=[32, 64, 64, 64], nums_rb=1, cin=192), 5).eval()
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        applied = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact"), hint, 0.8, 0.0, 0.9
        )
    own = (model, vae, *applied)
    before = dict(network.named_parameters())
    expected = stock(own, "euler")
    assert not torch.equal(expected, stock(world, "euler"))
    generator = make(own, "euler")
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2
    assert torch.equal(stock(own, "euler"), expected)
    if comfy.model_management.get_torch_device().type == "cpu":
        assert all(before[name] is weight for name, weight in network.named_parameters())


class Network:
    """As packs patch attention: an object with a network made while a node ran, in inference mode."""

    def __init__(self, width):
        with host.node():
            network = torch.nn.Linear(width, width)
            self.weights = {"to_k": network.to(comfy.model_management.get_torch_device())}

    def __call__(self, q, context, value, *rest):
        return q, context + 0.1 * self.weights["to_k"](context), value

    def as_function(self):
        inner = self.weights
        return lambda q, context, value, *rest: (q, context + 0.1 * inner["to_k"](context), value)

    def replace(self, q, k, v, extra_options):
        attended = comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])
        return attended + 0.1 * self.weights["to_k"](attended)


@pytest.mark.parametrize("kind", ["object", "function", "method in place of attention"])
def test_a_patch_may_bring_a_network(world, kind):
    network = Network(tiny.UNET["context_dim"])
    patched = world[0].clone()
    if kind == "method in place of attention":
        patched.set_model_attn2_replace(network.replace, "middle", 0)
    else:
        patched.set_model_attn2_patch(network if kind == "object" else network.as_function())
    expected = stock(world, "euler", model=patched)
    assert not torch.equal(expected, stock(world, "euler"))
    weight = network.weights["to_k"].weight
    generator = make(world, "euler", model=patched)
    assert torch.equal(ours(generator), expected)
    assert directional_error(generator, directions=1) < 3e-2
    assert network.weights["to_k"].weight is weight


def test_a_control_net_in_dynamic_vram_is_refused(world, monkeypatch):
    model, vae, _, negative = world
    control = control_net()
    monkeypatch.setattr(
        type(control.control_model_wrapped),
        "is_dynamic",
        lambda self: self is control.control_model_wrapped,
        raising=False,
    )
    with host.node():
        hint = torch.rand(1, 64, 64, 3)
        applied = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            tiny.conditioning(1), negative, control, hint, 0.8, 0.0, 0.9
        )
    with pytest.raises(errors.InputError, match="--disable-dynamic-vram"):
        our_gradients(make((model, vae, *applied), "euler"))


def test_a_control_net_may_have_a_vae(world):
    """As those of SD3, Flux and Qwen: the hint is encoded in the first step."""
    model, vae, _, negative = world
    control = control_net(channels=4)
    with host.node():
        other = tiny.vae()
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        control.latent_format = model.get_model_object("latent_format")
        applied = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
            tiny.conditioning(1), negative, control, hint, 0.8, 0.0, 0.9, vae=other
        )
    own = (model, vae, *applied)
    generator = make(own, "euler")
    assert directional_error(generator, directions=1) < 3e-2


@pytest.mark.parametrize(("call", "checkpoint"), [(2, True), (6, True), (1, False)])
def test_cancel_inside_a_layer(world, monkeypatch, call, checkpoint):
    """Newer releases raise their interrupt from every layer, and theirs is no `Exception`."""

    class Interrupted(BaseException):
        pass

    monkeypatch.setattr(comfy.model_management, "InterruptProcessingException", Interrupted)
    image = stock(world, "euler_ancestral")
    before = weights_of(world)
    with monkeypatch.context() as patch:
        fail_at(patch, world, call, Interrupted())
        with pytest.raises(errors.Cancelled):
            our_gradients(make(world, "euler_ancestral"), checkpoint=checkpoint)
    assert_untouched(world, before, image)
