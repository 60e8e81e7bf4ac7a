"""Models on which the released code and ours are compared: random weights in SD1.5's layout, or the demo model."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.iteration_cost import as_pipeline, random_sd15
from ipgo_engine import demo


def random_small(device: str) -> Any:
    """SD1.5's layout in small, random weights, text as wide as SD1.5's: the notebook's 300 basis columns need it."""
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128, 128, 128), cross_attention_dim=768, attention_head_dim=8
    )
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 32, 64, 64),
    }
    vae = diffusers.AutoencoderKL(latent_channels=4, sample_size=64, **blocks)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=1024, num_attention_heads=12, num_hidden_layers=2
        )
    )
    return as_pipeline(unet.to(device), vae.to(device), text.to(device))


def make_pipeline(weights: str, device: str) -> Any:
    """The weights both sides use."""
    torch.manual_seed(0)
    if weights == "sd15":
        pipeline = random_sd15(torch.float32, device)
    elif weights == "demo":
        pipeline = demo.load_pipeline(device=device)
    else:
        pipeline = random_small(device)
    if weights != "demo":
        # No pixel outside [0, 1]: there the released clamp kills the gradient and ours passes it (see the demo model).
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.mul_(0.2)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).train(False)
    return pipeline


def full_prompt(tokenizer: Any, tokens: int) -> str:
    """A prompt of exactly so many tokens, begin and end included."""
    words = ["red", "heart", "cat", "house", "tree", "fish"]
    text = ""
    for i in range(tokens):
        longer = f"{text} {words[i % len(words)]}".strip()
        if len(tokenizer(longer).input_ids) > tokens:
            break
        text = longer
    return text
