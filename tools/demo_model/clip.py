"""The small CLIP (its text tower becomes the text encoder) and the judge: a convolutional image tower of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ipgo_engine.demo import Judge

from .data import SIZE, Drawer, Pictures
from .states import log, steps_done
from .tokenizer import LENGTH, write_tokenizer

WIDTH, PROJECTION = 192, 128
MEAN, STD = 0.5, 0.5  # pixels are scaled to [-1, 1]


def all_captions(pictures: Pictures) -> list[str]:
    """Every word a caption may hold."""
    from .data import BACKGROUNDS

    extra = ["a flat 3d on background , black white small big large cute happy sad photo picture of the with and"]
    return [*pictures.captions, *BACKGROUNDS, *extra]


def build(tokenizer: Any) -> CLIPModel:
    """Text: 4 layers; pictures: 5 layers on patches of 16 pixels; width 192, projection 128."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        num_hidden_layers=4,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **layers,
    )
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=16, num_hidden_layers=5, projection_dim=PROJECTION, **layers)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION))


def roughen(images: Tensor, random: torch.Generator) -> Tensor:
    """Noise, blur and contrast, so that neither decoder artefacts nor tiny patterns decide a score."""
    size = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(size, 1, 1, 1, generator=random) * (high - low) + low).to(images.device)

    blurred = nn.functional.avg_pool2d(nn.functional.pad(images, (2,) * 4, mode="replicate"), 5, 1)
    images = torch.lerp(images, blurred, uniform(0, 1))
    images = (images - 0.5) * uniform(0.7, 1.2) + 0.5 + uniform(-0.1, 0.1)
    noise = torch.randn(images.shape, generator=random).to(images.device)
    return (images + noise * uniform(0, 0.12)).clamp(0, 1)


def tokenize(tokenizer: Any, captions: list[str], device: str) -> Tensor:
    """Padded to the longest: a causal tower does not see what comes later."""
    return tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids.to(device)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, concepts: Tensor) -> Tensor:
    """Symmetric cross-entropy; pictures of one concept are not each other's negatives."""
    logits = scale.exp().clamp_max(50) * images @ texts.T
    same = (concepts[:, None] == concepts[None, :]) & ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(images), device=images.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def unit(features: Any) -> Tensor:
    """Features of length one; newer transformers wrap them."""
    features = getattr(features, "pooler_output", features)
    return nn.functional.normalize(features.float(), dim=-1)


def train_clip(pictures: Pictures, out: Path, minutes: float, device: str) -> None:
    """Train for `minutes`, going on from `out/clip.pt`; the vocabulary is written to `out/tokenizer`.

    The text tower is trained in the first call only: the UNet and the judge depend on its states.
    """
    torch.manual_seed(0)
    if (out / "clip.pt").exists():
        tokenizer, model = load_clip(out, device)
        model.train(True).requires_grad_(True)
        model.text_model.requires_grad_(False)
    else:
        tokenizer = write_tokenizer(all_captions(pictures), out / "tokenizer")
        model = build(tokenizer).to(device)
    names = {caption: i for i, caption in enumerate(dict.fromkeys(pictures.captions))}
    concepts = torch.tensor([names[caption] for caption in pictures.captions], device=device)

    def loss_of(images: Tensor, captions: list[str], rows: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            pixels = unit(model.get_image_features(pixel_values=(images - MEAN) / STD))
            texts = unit(model.get_text_features(input_ids=tokenize(tokenizer, captions, device)))
        return contrast(pixels, texts, model.logit_scale, concepts[rows])

    fit(model, loss_of, Drawer(pictures, seed=10 + steps_done(out / "clip.csv")), out / "clip", minutes, device)


def train_judge(pictures: Pictures, out: Path, minutes: float, device: str) -> None:
    """Train the judge's image tower against the frozen text tower, on other draws; goes on from `out/judge.pt`."""
    torch.manual_seed(1)
    tokenizer, clip = load_clip(out, device)
    model = Judge(PROJECTION).to(device)
    if (out / "judge.pt").exists():
        model.load_state_dict(torch.load(out / "judge.pt", map_location=device, weights_only=True))
    names = {caption: i for i, caption in enumerate(dict.fromkeys(pictures.captions))}
    concepts = torch.tensor([names[caption] for caption in pictures.captions], device=device)

    def loss_of(images: Tensor, captions: list[str], rows: Tensor) -> Tensor:
        with torch.no_grad():
            texts = unit(clip.get_text_features(input_ids=tokenize(tokenizer, captions, device)))
        with torch.autocast(device, torch.bfloat16):
            pixels = unit(model(images))
        return contrast(pixels, texts, model.logit_scale, concepts[rows])

    fit(model, loss_of, Drawer(pictures, seed=20 + steps_done(out / "judge.csv")), out / "judge", minutes, device)


def load_clip(out: Path, device: str) -> tuple[Any, CLIPModel]:
    """Tokenizer and model as trained so far."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = build(tokenizer).to(device)
    model.load_state_dict(torch.load(out / "clip.pt", map_location=device, weights_only=True))
    return tokenizer, model.requires_grad_(False).train(False)


def fit(model: nn.Module, loss_of: Any, drawer: Drawer, file: Path, minutes: float, device: str) -> None:
    """AdamW with warm-up and a linear fall, for `minutes`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    started, step, shown, mean = time.time(), 0, time.time(), 0.0
    before = steps_done(file.with_suffix(".csv"))
    while (done := (time.time() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - done)
        images, captions, rows = drawer.batch(64)
        loss = loss_of(roughen(images.to(device), drawer.random), captions, rows.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        mean += (float(loss.detach()) - mean) / min(step, 50)
        if time.time() - shown > 30:
            shown = time.time()
            log(file.with_suffix(".csv"), step=before + step, loss=mean)
            torch.save(model.state_dict(), file.with_suffix(".pt"))
    log(file.with_suffix(".csv"), step=before + step, loss=mean)
    torch.save(model.state_dict(), file.with_suffix(".pt"))
