"""CLIP weights in the layout of Hugging Face transformers: a folder, or one file as in ComfyUI's clip_vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .clip_backbone import ClipBackbone
from .files import empty_model, fill_module, find_file, read_json, read_weights
from .preprocess import CLIP_MEAN, CLIP_STD, Preprocessing
from .text import Tokenize, load_clip_tokenizer

_FILES = ("model.safetensors", "*.safetensors", "pytorch_model.bin")
_CONSTANTS = ("position_ids",)  # old files hold these buffers; they are rebuilt


def load_transformers_clip(
    path: Path, weights: Mapping[str, Tensor] | None, device: str | torch.device | None, dtype: torch.dtype | None
) -> ClipBackbone:
    """`path` is the folder, or the file whose tensors `weights` are."""
    folder = path if path.is_dir() else path.parent
    if weights is None:
        weights = read_weights(find_file(path, _FILES, "CLIP weights"))
    weights = {name: w for name, w in weights.items() if not name.endswith(_CONSTANTS)}
    config = _config_from_shapes(weights) if path.is_file() else _config_from_file(folder / "config.json")
    tokenize = None
    if has_text(weights):
        tokenize = load_clip_tokenizer(folder, config["text_config"].get("max_position_embeddings", 77))
    preprocessing = _preprocessing(folder, config["vision_config"].get("image_size", 224))
    return build_clip(weights, config, str(path), device, dtype, tokenize, preprocessing)


def has_text(weights: Mapping[str, Tensor]) -> bool:
    """False for a vision tower alone, as ComfyUI's clip_vision folder holds them."""
    return any(name.startswith("text_model.") for name in weights)


def build_clip(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    what: str,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tokenize: Tokenize | None,
    preprocessing: Preprocessing,
) -> ClipBackbone:
    """The model of `config` (the content of a CLIP's config.json) with these weights, named as in transformers."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    for tower in ("vision_config", "text_config"):
        for name, default in (("num_attention_heads", 1), ("layer_norm_eps", 1e-5)):
            value = config[tower].get(name, default)
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f"CLIP weights {what!r}: {tower} says that {name} is {value!r}.")
    with empty_model(f"CLIP weights {what!r}"):
        if has_text(weights):
            model = CLIPModel(CLIPConfig(**config))
        else:
            vision = {**config["vision_config"], "projection_dim": config["projection_dim"]}
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    if not has_text(weights):
        weights = {name: w for name, w in weights.items() if name.startswith(("vision_model.", "visual_projection."))}
    module: Any = fill_module(model, weights, f"CLIP weights {what!r}", device, dtype)

    def image_tower(pixels: Tensor) -> Tensor:
        return module.visual_projection(module.vision_model(pixel_values=pixels).pooler_output)

    def text_tower(prompts: Sequence[str]) -> Tensor:
        assert tokenize is not None
        tokens = tokenize(prompts).to(module.logit_scale.device)
        # Attention is causal and the pooled position is the first end token: padding behind it changes nothing.
        return module.text_projection(module.text_model(input_ids=tokens).pooler_output)

    scale = float(weights["logit_scale"]) if has_text(weights) else None
    return ClipBackbone(module, image_tower, text_tower if tokenize else None, preprocessing, scale)


def _config_from_file(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"CLIP weights: {str(path)!r} is of a {kind!r} model; only CLIP fits here.")
    if kind == "clip_vision_model":
        return {"vision_config": raw, "text_config": {}, "projection_dim": raw.get("projection_dim", 512)}
    parts = {name: raw.get(name) or raw.get(f"{name}_dict") or {} for name in ("vision_config", "text_config")}
    end = parts["text_config"].get("eos_token_id", 0)
    if not isinstance(end, int) or not 0 <= end < parts["text_config"].get("vocab_size", 49408):
        raise InputError(f"CLIP weights: {str(path)!r} says that {end!r} is the end token, which is no token.")
    return {**parts, "projection_dim": raw.get("projection_dim", 512)}


def _config_from_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vision = _vision_shape(weights)
    text = _text_shape(weights) if has_text(weights) else {}
    return {"vision_config": vision, "text_config": text, "projection_dim": vision["projection_dim"]}


def _vision_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Configuration of the vision tower. The activation is in no tensor: as ComfyUI, towers up to the width of
    ViT-L (OpenAI's) use the quick approximation of GELU, wider ones (LAION's H, g, bigG) the exact one."""
    try:
        patch = weights["vision_model.embeddings.patch_embedding.weight"]
        positions = weights["vision_model.embeddings.position_embedding.weight"].shape[0]
        projection = weights["visual_projection.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"CLIP weights: the file lacks {error.args[0]}.") from error
    width, side = patch.shape[0], patch.shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "vision_model."),
        "num_attention_heads": {1280: 16, 1664: 16}.get(width, max(1, width // 64)),
        "patch_size": side,
        "image_size": round((positions - 1) ** 0.5) * side,
        "projection_dim": projection,
        "hidden_act": "quick_gelu" if width <= 1024 else "gelu",
    }


def _text_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    embedding = weights["text_model.embeddings.token_embedding.weight"]
    vision_width = weights["vision_model.embeddings.patch_embedding.weight"].shape[0]
    return {
        "hidden_size": embedding.shape[1],
        "vocab_size": embedding.shape[0],
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "text_model."),
        "num_attention_heads": max(1, embedding.shape[1] // 64),
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu" if vision_width <= 1024 else "gelu",
        "eos_token_id": 2,  # the value that makes transformers pool at the largest token id, which is the end token
    }


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    start = prefix + "encoder.layers."
    return 1 + max(int(name[len(start) :].split(".")[0]) for name in weights if name.startswith(start))


def _preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """From preprocessor_config.json where there is one; transformers crops with an offset rounded down."""
    path = folder / "preprocessor_config.json"
    raw = read_json(path) if path.is_file() else {}
    size, crop = raw.get("size", image_size), raw.get("crop_size", image_size)
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if size != image_size or crop != image_size or raw.get("resample", 3) != 3:
        raise InputError(
            f"{str(path)!r} does not resize the shorter side to {image_size} bicubically and crop, as CLIP does."
        )
    mean, std = tuple(raw.get("image_mean", CLIP_MEAN)), tuple(raw.get("image_std", CLIP_STD))
    return Preprocessing(size=image_size, mean=mean, std=std, crop="floor")
