"""CLIP weights in the layout of open_clip, run by the same transformers modules as the rest.

open_clip and transformers name and group the tensors of one architecture differently; nothing else differs. Renaming
them means that HPS v2 and open_clip checkpoints need no package that ComfyUI lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .clip_backbone import ClipBackbone
from .clip_transformers import build_clip
from .files import find_file, read_json, read_weights
from .preprocess import CLIP_MEAN, CLIP_STD, Preprocessing
from .text import load_clip_tokenizer

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.*", "*.safetensors", "*.pt", "*.bin")
_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}  # of ViT-H, g and bigG; every other published CLIP uses 64
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' own spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def load_open_clip(
    path: Path,
    weights: Mapping[str, Tensor] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    architecture: Mapping[str, Any] | None,
) -> ClipBackbone:
    """`path` is the folder, or the file whose tensors `weights` are.

    `architecture` is what `open_clip_config.json` would say: {"model_cfg": ..., "preprocess_cfg": ...}. In a file
    without either, sizes are read from the shapes and the activation must be given: no tensor tells GELU from its
    quick approximation.
    """
    folder = path if path.is_dir() else path.parent
    if weights is None:
        weights = read_weights(find_file(path, _FILES, "open_clip weights"))
    settings = _settings(folder, architecture)
    config = _config(weights, settings.get("model_cfg", {}))
    tokenize = load_clip_tokenizer(folder, config["text_config"]["max_position_embeddings"], cleaned=True)
    preprocessing = _preprocessing(settings.get("preprocess_cfg", {}), config["vision_config"]["image_size"])
    return build_clip(rename(weights), config, str(path), device, dtype, tokenize, preprocessing)


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names; query, key and value of an attention come apart."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in ("visual.proj", "text_projection"):
            target = "visual_projection.weight" if name == "visual.proj" else "text_projection.weight"
            renamed[target] = tensor.T.contiguous()
        elif name in _WHOLE:
            renamed[_WHOLE[name]] = tensor
        elif block := _BLOCK.fullmatch(name):
            renamed |= _renamed_in_block(block, tensor)
        elif name != "attn_mask":  # a constant in older files
            prefix = next((old for old in _NORMS if name.startswith(old)), None)
            renamed[_NORMS[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    return renamed


def _renamed_in_block(block: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    tower = "vision_model" if block[1] else "text_model"
    start, rest = f"{tower}.encoder.layers.{block[2]}.", block[3]
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{start}self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    prefix = next((old for old in _IN_BLOCK if rest.startswith(old)), None)
    return {start + (_IN_BLOCK[prefix] + rest.removeprefix(prefix) if prefix else rest): tensor}


def _settings(folder: Path, architecture: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if architecture is not None:
        return architecture
    beside = folder / "open_clip_config.json"
    return read_json(beside) if beside.is_file() else {}


def _config(weights: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of transformers' CLIP, from the shapes and from open_clip's own `model_cfg`."""
    text, vision = model.get("text_cfg", {}), model.get("vision_cfg", {})
    if {"hf_model_name", "hf_tokenizer_name"} & set(text) or "timm_model_name" in vision or "custom_text" in model:
        raise InputError("open_clip configuration: only CLIP models with open_clip's own two towers fit here.")
    try:
        vision_config, text_config = _vision(weights, vision), _text(weights, text)
        projection = weights["visual.proj"].shape[1]
    except (KeyError, ValueError) as error:
        raise InputError(f"CLIP weights: no plain CLIP of transformers or open_clip; {error} is missing.") from error
    if not model:
        raise InputError(
            "open_clip weights: their shapes do not tell which activation they need. Put the model's own "
            "open_clip_config.json beside the file."
        )
    _check_sizes(vision, vision_config)
    _check_sizes(text, text_config)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {
        "vision_config": vision_config | {"hidden_act": activation},
        "text_config": text_config | {"hidden_act": activation},
        "projection_dim": projection,
    }


def _check_sizes(theirs: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, ours in (("width", "hidden_size"), ("layers", "num_hidden_layers"), ("patch_size", "patch_size")):
        if name in theirs and theirs[name] != found[ours]:
            raise InputError(
                f"CLIP weights: this is a model of another size; its {name} is {found[ours]} instead of {theirs[name]}."
            )


def _vision(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    patch = weights["visual.conv1.weight"]
    width, side = patch.shape[0], patch.shape[-1]
    positions = weights["visual.positional_embedding"].shape[0] - 1
    head_width = settings.get("head_width", _HEAD_WIDTH.get(width, 64))
    return {
        "hidden_size": width,
        "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "visual.transformer.resblocks."),
        "num_attention_heads": max(1, width // head_width),
        "image_size": round(positions**0.5) * side,
        "patch_size": side,
    }


def _text(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    words = weights["token_embedding.weight"]
    return {
        "hidden_size": words.shape[1],
        "vocab_size": words.shape[0],
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "transformer.resblocks."),
        "num_attention_heads": settings.get("heads", max(1, words.shape[1] // 64)),
        "max_position_embeddings": weights["positional_embedding"].shape[0],
        "eos_token_id": 2,  # the value that makes transformers pool at the largest token id, which is the end token
    }


def _layers(weights: Mapping[str, Tensor], start: str) -> int:
    return 1 + max(int(name[len(start) :].split(".")[0]) for name in weights if name.startswith(start))


def _preprocessing(raw: Mapping[str, Any], image_size: int) -> Preprocessing:
    """open_clip resizes with torchvision, which rounds the crop's offset half to even."""
    if raw.get("interpolation", "bicubic") != "bicubic":
        raise InputError(f"open_clip configuration: interpolation {raw['interpolation']!r} is not supported.")
    fit = {"shortest": "shorter", "squash": "squash"}.get(raw.get("resize_mode", "shortest"))
    if fit not in ("shorter", "squash"):
        raise InputError(f"open_clip configuration: resize_mode {raw['resize_mode']!r} is not supported.")
    mean, std = tuple(raw.get("mean", CLIP_MEAN)), tuple(raw.get("std", CLIP_STD))
    return Preprocessing(size=image_size, mean=mean, std=std, fit=fit, crop="round")
