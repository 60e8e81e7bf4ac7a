"""What training tokens needs besides the engine: settings from widgets, the rows to show, the files to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ipgo_engine.config import OptimizeConfig, TokenConfig
from ..ipgo_engine.loop import VALIDATION_ROWS, spread
from .host import files
from .host.choices import empty_latent
from .host.generator import ComfyGenerator, Sampling
from .host.watch import final_images
from .resuming import pin
from .running import or_none, seeds_from, shared_settings

KEPT_SETTINGS = ("width", "height", "steps", "cfg", "sampler_name", "scheduler", "negative")
"""Widgets that a tokens file records, so that a user can tell how its images were made."""


def token_config(settings: dict[str, Any]) -> TokenConfig:
    """Shape of the tokens from the widgets."""
    return TokenConfig.preset(
        settings["preset"],
        prefix_length=settings["prefix_length"],
        suffix_length=settings["suffix_length"],
        basis_size=settings["basis_size"],
        scale=settings["token_scale"],
    )


def train_config(settings: dict[str, Any], prompts: int) -> OptimizeConfig:
    """The engine's settings: the preset for one prompt or for a list, with what the widgets say."""
    size = or_none(settings["prompts_per_step"]) or prompts
    return OptimizeConfig.preset(
        settings["preset"],
        batch=prompts > 1,
        tokens=token_config(settings),
        epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        conformity=settings["conformity"],
        seeds=seeds_from(settings["seed"], settings["images_per_prompt"]),
        batch_size=None if size >= prompts else size,
        **shared_settings(settings),
    )


def prompt_generator(model: Any, clip: Any, vae: Any, settings: dict[str, Any]) -> ComfyGenerator:
    """The generator of a node that encodes its prompts itself."""
    sampling = Sampling.by_name(
        model, settings["sampler_name"], settings["scheduler"], settings["steps"], settings["cfg"]
    )
    latent = empty_latent(settings["width"], settings["height"])
    generator = ComfyGenerator(model, vae, sampling, settings["negative"], latent, clip=clip, seed=settings["seed"])
    pin(generator, settings, clip=generator.negative)  # any text shows the encoder's LoRA and its last layer
    return generator


def keep_tokens(tokens: Any, settings: dict[str, Any]) -> Path:
    """A new numbered tokens file; it records how the images were made."""
    path = files.next_token_file(settings["save_as"])
    return tokens.save(path, **{key: settings[key] for key in KEPT_SETTINGS if key in settings})


def shown_rows(generator: Any, tokens: Any, prompts: list[str], config: OptimizeConfig) -> tuple[Any, Tensor]:
    """Conditioning and noise of the images that a run reports: every prompt with every seed, or a spread of them."""
    pairs = [(p, s) for p in range(len(prompts)) for s in range(len(config.seeds))]
    rows = range(len(pairs)) if config.batch_size is None else spread(len(pairs), VALIDATION_ROWS)
    chosen = [pairs[row] for row in rows]
    with torch.no_grad():
        conditioning = tokens.condition(generator.encode(prompts)).select([p for p, _ in chosen])
        return conditioning, generator.draw_noise(config.seeds)[[s for _, s in chosen]]


def render_each(generator: Any, conditioning: Any, noise: Tensor) -> Tensor:
    """Final images (B, 3, H, W) on the CPU, one at a time, as KSampler makes each seed with batch size one."""
    images = [final_images(generator, conditioning.select([row]), noise[row : row + 1]) for row in range(len(noise))]
    return torch.cat(images)


def token_facts(tokens: Any) -> list[str]:
    """Lines for the report: how long the tokens are, and for which encoder."""
    norms = ", ".join(f"{name} {value:.3g}" for name, value in tokens.norms().items())
    return [
        f"Tokens: mean length {norms}; {tokens.num_parameters} numbers learned; encoder "
        f"{tokens.metadata.get('encoder')}."
    ]
