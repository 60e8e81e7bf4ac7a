"""MODEL, CLIP and VAE built from a diffusers folder compute what diffusers computes on the same weights."""

from __future__ import annotations

from pathlib import Path

import comfy.sd1_clip
import diffusers
import host
import pytest
import torch
import transformers
from engine.tiny_pipelines import tokenizer

demo = host.pack("nodes.host.demo")
generator_module = host.pack("nodes.host.generator")
identity = host.pack("ipgo_engine.generators.identity")
errors = host.pack("ipgo_engine.errors")
PROMPT = "a red cat on the moon"


def random_pipeline(folder, prediction="epsilon"):
    """A pipeline of the demo's shape with random weights, saved in fp16."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=514, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 96), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, scaling_factor=0.9,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), unet=unet, safety_checker=None, feature_extractor=None,
        tokenizer=tokenizer(),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
        ),
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=["random", "embedded"])
def world(request, tmp_path_factory):
    """(folder, diffusers pipeline in float32, MODEL, CLIP, VAE)."""
    folder = demo.FOLDER if request.param == "embedded" else random_pipeline(tmp_path_factory.mktemp("demo"))
    if not (folder / "model_index.json").is_file():
        pytest.skip("the embedded demo model is not in this checkout")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    with host.node():
        return folder, pipeline, *demo.load_demo(folder)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


TEXTS = (
    PROMPT, "A Red CAT, on the MOON!", "it's 2024, isn't it?", "a-b_c/d 'e' \"f\"", "  two   spaces\nand a line",
    "caf\u00e9 \u65e5\u672c \U0001f600", "x" * 40, "",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer(world, text):
    """The same ids as the folder's own tokenizer gives, and the same words as CLIP's."""
    _, pipeline, _, clip, _ = world
    with host.node():
        (pairs,) = clip.tokenize(text)["l"]
    ids = pipeline.tokenizer(text, padding="max_length", max_length=len(pairs), return_tensors="pt").input_ids
    assert [int(pair[0]) for pair in pairs] == ids[0].tolist()
    core = transformers.CLIPTokenizer.from_pretrained(str(Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"))
    ours, theirs = ("".join(t.tokenize(text)).split("</w>") for t in (pipeline.tokenizer, core))
    assert ours == theirs


def test_weights_in_brackets_are_understood(world):
    *_, clip, _ = world
    with host.node():
        (pairs,) = clip.tokenize("red (cat:1.5)")["l"]
    assert {pair[1] for pair in pairs} == {1.0, 1.5}


def test_text_encoder(world):
    _, pipeline, _, clip, _ = world
    with host.node():
        ours = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))[0][0]
    ids = pipeline.tokenizer(PROMPT, padding="max_length", max_length=ours.shape[1], return_tensors="pt").input_ids
    with torch.no_grad():
        assert difference(ours, pipeline.text_encoder(ids)[0]) < 1e-4


def test_prompts_longer_than_the_encoder(world):
    _, _, _, clip, _ = world
    with host.node():
        long = clip.encode_from_tokens_scheduled(clip.tokenize(" ".join(["cat"] * 100)))[0][0]
    assert long.shape[1] > 77


def test_unet(world):
    _, pipeline, model, _, _ = world
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, pipeline.unet.config.in_channels, 16, 16, generator=random)
    context = torch.randn(2, 77, pipeline.unet.config.cross_attention_dim, generator=random)
    t = torch.tensor([10.0, 700.0])
    with host.node():
        ours = model.model.diffusion_model(x, t, context=context, transformer_options={})
    with torch.no_grad():
        assert difference(ours, pipeline.unet(x, t, encoder_hidden_states=context).sample) < 1e-4


def test_vae(world):
    _, pipeline, _, _, vae = world
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    with host.node():
        ours, encoded = vae.decode(latents).movedim(-1, 1), vae.encode(pixels.movedim(1, -1))
    with torch.no_grad():
        theirs = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        assert difference(ours, theirs) < 1e-4
        assert difference(encoded, pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean) < 1e-4


def test_the_whole_picture(world):
    """DDIM with guidance, as many steps, from the same noise: the same image."""
    _, pipeline, model, clip, vae = world
    steps, cfg = 5, 3.0
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=0
    )
    pipeline.scheduler.set_timesteps(steps)
    with host.node():
        sampling = generator_module.Sampling.by_name(model, "euler", "normal", steps, cfg)
        sampling = generator_module.Sampling(sampling.sampler, pipeline.scheduler.sigmas.clone(), cfg)
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        generator = generator_module.ComfyGenerator(model, vae, sampling, "", latent, clip=clip)
        with generator, torch.no_grad():
            noise = generator.draw_noise([3])
            ours = generator.generate(generator.encode([PROMPT]), noise).cpu()
    start = noise[:, 0].cpu() * pipeline.scheduler.sigmas[0] / pipeline.scheduler.init_noise_sigma
    theirs = pipeline(
        PROMPT, latents=start, num_inference_steps=steps, guidance_scale=cfg, output_type="pt", height=128, width=128
    ).images
    assert difference(ours, theirs) < 2e-3


def test_both_generators_know_the_encoder_by_the_same_name(world):
    _, pipeline, model, clip, vae = world
    with host.node():
        sampling = generator_module.Sampling.by_name(model, "euler", "normal", 2, 1.0)
        generator = generator_module.ComfyGenerator(
            model, vae, sampling, "", {"samples": torch.zeros(1, 4, 16, 16)}, clip=clip
        )
    assert generator.encoder == identity.describe_encoder(pipeline.text_encoder.named_parameters())
    assert generator.dim == pipeline.text_encoder.config.hidden_size


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(errors.InputError, match="demo model is not at"):
        demo.load_demo(tmp_path)
