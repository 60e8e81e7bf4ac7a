"""Tiny models with random weights, made of ComfyUI's own MODEL and VAE classes."""

from __future__ import annotations

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

WIDTH = 64  # of the text embeddings

UNET = {
    "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
    "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
    "channel_mult": [1, 2], "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": WIDTH,
    "transformer_depth_output": [1, 1, 1, 1], "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
VAE = {
    "params": {
        "ddconfig": {
            "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        },
        "embed_dim": 4,
    }
}  # fmt: skip


class TinySD15(comfy.supported_models.SD15):
    unet_config = {}  # noqa: RUF012
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012


def initialise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights of a size that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                value = value / parameter[0].numel() ** 0.5
            else:
                value = 1 + 0.1 * value if name.endswith(("weight", "scale")) else 0.05 * value
            parameter.copy_(value)
    return module


def patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a BaseModel."""
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def sd15(seed: int = 0, dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None, kind=None):
    """MODEL like SD1.5: a UNet that predicts the noise."""
    config = TinySD15(dict(UNET))
    config.set_inference_dtype(dtype, manual_cast)
    kind = kind or comfy.model_base.ModelType.EPS
    model = comfy.model_base.BaseModel(config, model_type=kind, device=torch.device("cpu"))
    initialise(model.diffusion_model.float(), seed)
    model.diffusion_model.to(dtype)
    return patcher(model.eval())


def vae(seed: int = 1, config: dict | None = None, contrast: float = 0.2):
    """VAE with a factor of 8; `contrast` below 1 keeps its pixels off the clamp at black and white."""
    config = config or VAE
    network = initialise(AutoencoderKL(**config["params"]), seed)
    with torch.no_grad():
        network.decoder.conv_out.weight.mul_(contrast)
    return comfy.sd.VAE(sd=network.state_dict(), config=config)


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = {}  # noqa: RUF012
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012


def sdxl(seed: int = 0, pooled: int = WIDTH):
    """MODEL like SDXL: sizes and pooled text enter beside the prompt."""
    config = TinySDXL({**UNET, "num_classes": "sequential", "adm_in_channels": pooled + 6 * 256})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SDXL(config, device=torch.device("cpu"))
    initialise(model.diffusion_model, seed)
    return patcher(model.eval())


def sd3(seed: int = 0):
    """MODEL like SD3: a transformer that predicts a flow."""
    size = {"in_features": WIDTH, "out_features": 128}
    config = comfy.supported_models.SD3(
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
            "adm_in_channels": WIDTH, "context_embedder_config": {"target": "torch.nn.Linear", "params": size},
            "pos_embed_max_size": 16, "num_patches": 256, "pos_embed_scaling_factor": None, "qk_norm": "rms",
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SD3(config, device=torch.device("cpu"))
    initialise(model.diffusion_model, seed)
    model.diffusion_model.pos_embed.copy_(
        0.2 * torch.randn(model.diffusion_model.pos_embed.shape, generator=torch.Generator().manual_seed(1))
    )
    return patcher(model.eval())


def flux(seed: int = 0):
    """MODEL like Flux: a flow transformer whose blocks write in place."""
    settings = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH,
        "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    }  # fmt: skip
    known = set(comfy.ldm.flux.model.FluxParams.__dataclass_fields__) | {"image_model"}
    config = comfy.supported_models.Flux({key: value for key, value in settings.items() if key in known})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Flux(config, device=torch.device("cpu"))
    initialise(model.diffusion_model, seed)
    return patcher(model.eval())


def vae16():
    """VAE with 16 latent channels."""
    params = {"ddconfig": {**VAE["params"]["ddconfig"], "z_channels": 16}, "embed_dim": 16}
    made = vae(config={"params": params})
    made.latent_channels = 16
    return made


def conditioning(seed: int, length: int = 77, width: int = WIDTH, **options):
    """CONDITIONING of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, length, width, generator=generator),
            {"pooled_output": torch.randn(1, width, generator=generator), **options},
        ]
    ]


def latent(channels: int = 4, side: int = 8, batch: int = 1):
    """LATENT, empty."""
    return {"samples": torch.zeros(batch, channels, side, side)}
