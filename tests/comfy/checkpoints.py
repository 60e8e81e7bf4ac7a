"""Checkpoint files with random weights that the stock loader recognises.

SD1.5 is full-size: its 860 million UNet weights, CLIP-L and the VAE. SDXL has every layer of SDXL and both of its text
encoders, but its deeper levels are as narrow as the first, which the loader allows: a quarter of a billion weights
instead of 2.6 billion.
"""

from __future__ import annotations

import comfy.model_base
import comfy.sd
import comfy.supported_models
import tiny
import torch

COMMON = {
    "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
    "out_channels": 4, "model_channels": 320, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
SD15 = {
    **COMMON, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": False,
    "context_dim": 768, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "adm_in_channels": None,
}  # fmt: skip
SDXL = {
    **COMMON, "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 1, 1],
    "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "adm_in_channels": 2816, "num_classes": "sequential",
}  # fmt: skip
VAE = {
    "params": {
        "ddconfig": {
            "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        },
        "embed_dim": 4,
    }
}  # fmt: skip
FAMILIES = {
    "sd15": (comfy.supported_models.SD15, comfy.model_base.BaseModel, SD15),
    "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL, SDXL),
}


def write(family: str, path) -> int:
    """Write the file, in half precision as checkpoints are; the number of weights of its UNet."""
    described, kind, settings = FAMILIES[family]
    config = described(dict(settings))
    config.set_inference_dtype(torch.float16, torch.float32)
    model = kind(config, device=torch.device("cpu"))
    tiny.initialise(model.diffusion_model, 0)
    clip = comfy.sd.CLIP(config.clip_target({}), model_options={"dtype": torch.float16})
    tiny.initialise(clip.cond_stage_model, 1)
    vae = tiny.vae(config=VAE)
    vae.first_stage_model.half()
    comfy.sd.save_checkpoint(str(path), tiny.patcher(model.eval()), clip=clip, vae=vae)
    return sum(weight.numel() for weight in model.diffusion_model.parameters())
