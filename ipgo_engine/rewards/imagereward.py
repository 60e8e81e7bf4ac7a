"""ImageReward 1.0 (Xu et al. 2023): BLIP reads the prompt while looking at the image, a small head rates it.

Architecture: BLIP's ViT-L/16 and its BERT-base text encoder with cross-attention to the image, both from transformers
(`BlipVisionModel`, `BlipTextModel`); the rating is read at the first text position by a stack of linear layers. The
constants that centre the score are the authors'. Measured against their package: equal scores from the same
preprocessed tensor; Pillow's rounding to 8 bits moves the score of a small random network by 0.006 at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .files import empty_model, fill_module, find_file, read_json, read_weights
from .heads import rating_head
from .precision import GradientScale
from .preprocess import Preprocessing, check_inputs
from .text import load_bert_tokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rating, from the authors' code
PROMPT_TOKENS = 35  # the authors pad and cut every prompt to this length
FILES = ("ImageReward.safetensors", "ImageReward.pt")

_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward:
    """Standardized rating: about 0 for an ordinary image, roughly -2.3 to 2."""

    name = "imagereward"
    differentiable = True

    def __init__(self, module: nn.ModuleDict, tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]]) -> None:
        """`module` holds "vision", "text" and "head"; `tokenize` gives ids and mask, both (B, 35)."""
        self.module = module
        self._vision: Any = module["vision"]
        self._text: Any = module["text"]
        self.preprocessing = Preprocessing(size=int(self._vision.config.image_size))
        self._tokenize = tokenize

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) for images (B, 3, H, W) in [0, 1]; prompts are cut at 35 word pieces."""
        check_inputs(images, prompts)
        return self.pixel_scores(self.preprocessing(images), prompts).to(images.device)

    def pixel_scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of pixels (B, 3, 224, 224) that are preprocessed already."""
        weight: Tensor = self._vision.embeddings.class_embedding
        scale = GradientScale() if weight.dtype == torch.float16 and pixels.requires_grad else None
        pixels = scale.enter(pixels) if scale else pixels
        seen: Tensor = self._vision(pixel_values=pixels.to(weight)).last_hidden_state
        ids, mask = (tensor.to(seen.device) for tensor in self._tokenize(prompts))
        read = self._text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        features = read.last_hidden_state[:, 0].float()
        features = scale.leave(features) if scale else features
        return (self.module["head"](features).squeeze(-1) - MEAN) / STD


def load_imagereward(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> ImageReward:
    """From a folder with ImageReward.pt (or its safetensors conversion) and the vocab.txt of bert-base-uncased.

    med_config.json beside them is read when it is there; without it the published sizes are assumed. `path` may also
    be the file itself, with vocab.txt in the same folder.
    """
    file = find_file(path, FILES, "ImageReward weights")
    vocabulary = find_file(file.parent, ("vocab.txt",), "ImageReward tokenizer (vocab.txt of bert-base-uncased)")
    weights = {name: tensor for name, tensor in read_weights(file).items() if not name.startswith(_UNUSED)}
    settings = read_json(file.parent / "med_config.json") if (file.parent / "med_config.json").is_file() else {}
    module = _build(weights, settings)
    for name, part in module.items():
        keep = torch.float32 if name == "head" else dtype  # the rating is read in float32, as the authors do
        fill_module(part, _part(weights, name), f"ImageReward weights {file.name!r}, {name}", device, keep)
    return ImageReward(module.train(False), load_bert_tokenizer(vocabulary, PROMPT_TOKENS))


def _build(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.ModuleDict:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        vision_sizes, text_sizes = _vision_sizes(weights), _text_sizes(weights, settings)
    except KeyError as error:
        raise InputError(f"ImageReward weights: the file lacks {error.args[0]}; it is another model.") from error
    with empty_model("ImageReward weights"):
        vision, text = BlipVisionConfig(**vision_sizes), BlipTextConfig(**text_sizes)
        parts = {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "head": rating_head(text.hidden_size),
        }
    return nn.ModuleDict(parts)


def _vision_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = weights["blip.visual_encoder.patch_embed.proj.weight"]
    positions = weights["blip.visual_encoder.pos_embed"].shape[1] - 1
    return {
        "hidden_size": patch.shape[0],
        "intermediate_size": weights["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"blip\.visual_encoder\.blocks\.(\d+)\."),
        "num_attention_heads": max(1, patch.shape[0] // 64),
        "image_size": round(positions**0.5) * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "layer_norm_eps": 1e-6,  # timm's, on which BLIP's ViT is built; transformers' own default is 1e-5
    }


def _text_sizes(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    words = weights["blip.text_encoder.embeddings.word_embeddings.weight"]
    heads = settings.get("num_attention_heads", max(1, words.shape[1] // 64))
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"med_config.json: num_attention_heads is {heads!r}, which is no number of heads.")
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": weights["blip.visual_encoder.patch_embed.proj.weight"].shape[0],
        "intermediate_size": weights["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": weights["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": settings.get("layer_norm_eps", 1e-12),
        "hidden_act": settings.get("hidden_act", "gelu"),
        "is_decoder": True,  # gives the layers cross-attention; the attention itself stays bidirectional
    }


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [int(match[1]) for name in weights if (match := re.match(pattern, name))]
    if not numbers:
        raise KeyError(pattern)
    return max(numbers) + 1


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[name]
    part = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    return {_vision_name(key): tensor for key, tensor in part.items()} if name == "vision" else part


def _vision_name(name: str) -> str:
    """BLIP's name of a vision tensor as transformers calls it."""
    if name.startswith("norm."):
        return "post_layernorm." + name.removeprefix("norm.")
    for old, new in _VISION_NAMES:
        name = name.replace(old, new)
    return name
