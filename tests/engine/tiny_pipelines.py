"""Tiny random Stable Diffusion and SDXL pipelines, built in code: 16 x 16 pixels, latents of 4 x 8 x 8."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WORDS = ["a", "cat", "on", "the", "moon", "red", "dog", "in", "rain", "blurry", "bad"]


def _byte_symbols() -> list[str]:
    """The printable characters that stand for bytes in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


@functools.cache
def tokenizer_folder() -> str:
    """A CLIP tokenizer of single bytes and no merges."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-"))
    symbols = _byte_symbols()
    entries = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(entries)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return str(folder)


def tokenizer(**options: Any) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(tokenizer_folder(), model_max_length=77, **options)


def text_config(hidden: int, layers: int = 3, **options: Any) -> Any:
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        **{**ids, **options},
    )


def vae(contrast: float, **options: Any) -> Any:
    """`contrast` scales the last layer: 1 saturates some pixels, 0.2 none."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        **options,
    )
    _livelier(model, 1.2)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(contrast)
    return model


def unet(cross: int, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": cross,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **options})


def scheduler(**options: Any) -> Any:
    """What SD1.5 ships: PNDM with the scaled linear schedule, and settings for the other samplers."""
    defaults = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    return diffusers.PNDMScheduler.from_config({**defaults, **options})


def _livelier(module: Any, factor: float) -> Any:
    """Random weights as initialised give nearly grey pictures that hardly depend on anything."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(factor)
    return module


def sd(
    seed: int = 0, *, contrast: float = 1.0, unet_options: dict[str, Any] | None = None, **scheduler_options: Any
) -> Any:
    """An SD1.5-like pipeline, embeddings of width 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae(contrast),
            text_encoder=_livelier(transformers.CLIPTextModel(text_config(16)), 20.0),
            tokenizer=tokenizer(),
            unet=_livelier(unet(16, **(unet_options or {})), 1.3),
            scheduler=scheduler(**scheduler_options),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return _evaluating(pipeline)


def sdxl(seed: int = 0, *, contrast: float = 1.0, force_zeros: bool = True) -> Any:
    """An SDXL-like pipeline with two text encoders, embeddings of width 16 + 24."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        second = transformers.CLIPTextModelWithProjection(text_config(24, 2, projection_dim=20, hidden_act="gelu"))
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae(contrast),
            text_encoder=_livelier(transformers.CLIPTextModel(text_config(16)), 3.0),
            text_encoder_2=_livelier(second, 3.0),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(pad_token="!"),
            unet=_livelier(unet(40, **added, projection_class_embeddings_input_dim=6 * 8 + 20), 1.3),
            scheduler=scheduler(),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return _evaluating(pipeline)


def _evaluating(pipeline: Any) -> Any:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, name, None)
        if module is not None:
            module.train(False)
    return pipeline
