"""Optimizing the noise that an image starts from, and measuring how likely a noise is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipgo_engine.config import NoiseConfig
from ..ipgo_engine.errors import InputError
from ..ipgo_engine.formats.noise import LEARNED_WITH, write_noise
from ..ipgo_engine.noise import NoiseRegularizer, choose_block_size
from ..ipgo_engine.optimize import optimize_noise
from .host import files
from .host.generator import ComfyGenerator, Sampling
from .host.handover import Handover, blocked
from .host.watch import final_images
from .reporting import run_results
from .resuming import SAMPLING, kept_version, pin
from .running import Job, for_every_image, lines, monitors_of, or_none, seeds_from, shared_settings
from .schema import (
    CATEGORY,
    advanced,
    gradient_inputs,
    keeping_inputs,
    newer,
    reward_input,
    run_outputs,
    sampling_inputs,
    seed_input,
    watching_inputs,
)


def noise_inputs() -> list[Any]:
    """How the noise is optimized."""
    return [
        io.Int.Input(
            "iterations", default=50, min=1, max=10000,
            tooltip="Updates of the noise; each costs one image and its gradient."
        ),
        io.Float.Input(
            "noise_learning_rate", default=0.01, min=0.000001, max=10.0, step=0.001, round=0.000001,
            tooltip="Step size of the noise: 0.01 with the regularizer, 0.001 without it.",
        ),
        io.Float.Input(
            "regularization", default=1.0, min=0.0, max=1000.0, step=0.1, round=0.0001,
            tooltip="Weight of the term that keeps the noise looking like noise. 0 switches it off: P(z) in the curve "
            "then falls, and a reward that contradicts the prompt can end in a blank page.",
        ),
        io.Combo.Input(
            "which_noise", options=["all", "initial"], default="all",
            tooltip="all: also the noise that ancestral and SDE samplers inject at every step. initial: the first "
            "only.",
        ),
        advanced(io.Float.Input(
            "stop_below_probability", default=0.0, min=0.0, max=1.0, step=0.001, round=0.000001,
            tooltip="Noise whose P(z) is below this is never the best, and the run ends when that of every image is "
            "(with tokens: of any image). 0 never stops.",
        )),
        advanced(io.Int.Input(
            "block_size", default=0, min=0, max=4096,
            tooltip="Block length k of the regularizer; 0 chooses it from the size of the noise.",
        )),
        advanced(io.Int.Input(
            "permutations", default=100, min=1, max=10000, tooltip="Orders of the values that the regularizer looks at."
        )),
    ]  # fmt: skip


def noise_config(settings: dict[str, Any]) -> NoiseConfig:
    """The engine's settings from the widgets."""
    return NoiseConfig(
        iterations=settings["iterations"],
        learning_rate=settings["noise_learning_rate"],
        regularization=settings["regularization"],
        which=settings["which_noise"],
        block_size=or_none(settings["block_size"]),
        permutations=settings["permutations"],
        min_probability=or_none(settings["stop_below_probability"]),
        **shared_settings(settings),
    )


def handover_outputs() -> list[Any]:
    """What stock samplers need to make the images again."""
    return [
        io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced, with sampler and sigmas."),
        io.Sampler.Output(
            "sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced: injects the optimized noises too."
        ),
        io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="For SamplerCustomAdvanced: the same noise levels."),
        io.Model.Output(
            "model_out", display_name="model",
            tooltip="For a plain KSampler with the same sampler, scheduler, steps and cfg; its seed does not matter.",
        ),
        io.Latent.Output(
            "latent_out", display_name="latent",
            tooltip="For KSamplerAdvanced with add_noise disabled. Only samplers that inject no noise, eps models "
            "and full denoise: otherwise nodes behind it say why not. Use noise, sampler and sigmas, or model, "
            "then.",
        ),
    ]  # fmt: skip


def handover_values(generator: ComfyGenerator, noise: Tensor) -> list[Any]:
    """Values of `handover_outputs` for noise (B, *noise_shape)."""
    handover = Handover(generator, noise)
    try:
        latent = handover.latent()
    except InputError as error:
        latent = blocked(f"latent of the optimized noise: {error}")
    return [handover.noise(), handover.sampler(), handover.sigmas(), handover.model(), latent]


def noise_facts(noise: Tensor, config: NoiseConfig) -> list[str]:
    """Lines for the report, of the noises that were optimized."""
    optimized = noise[0, :1] if config.which == "initial" else noise[0]
    block = config.block_size or choose_block_size(optimized.numel())
    count = f"{len(optimized)} of {noise.shape[1]} per image optimized"
    return [f"Noise: {count}, {optimized.numel()} values; blocks of {block}."]


def keep_noise(
    noise: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    generator: ComfyGenerator,
    settings: dict[str, Any],
    tokens: Path | None = None,
) -> Path:
    """A new numbered noise file; it records how the images were made, and the tokens it was learned with."""
    labels: dict[str, Any] = {key: settings[key] for key in SAMPLING if key in settings}
    labels["encoder"] = None if generator.clip is None else generator.encoder
    labels[LEARNED_WITH] = None if tokens is None else tokens.name
    path = files.next_noise_file(settings["save_as"])
    return write_noise(path, noise, prompts=list(prompts), seeds=list(seeds), **labels)


class IPGONoiseOptimize(io.ComfyNode):
    """Find the noise whose image scores high and that is still noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of KSampler, the reward, and how the noise learns."""
        return io.Schema(
            node_id="IPGONoiseOptimize",
            display_name="Regularized Noise Optimize",
            category=CATEGORY,
            description="Changes the noise of an image until it scores higher, and keeps it likely under the "
            "Gaussian it should come from (P(z)). The result plugs into stock samplers.",
            inputs=[
                io.Model.Input("model",
                    tooltip="Any diffusion model, LoRAs and other patches included. It stays as it is."),
                io.Conditioning.Input("positive",
                    tooltip="The prompt, encoded; Apply IPGO Conditioning may come before."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, encoded."),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model."),
                reward_input("What the image is to score high on."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Size of the picture, and the picture itself for denoise below 1. A batch optimizes "
                    "several images, with seeds that follow one another.",
                ),
                io.String.Input(
                    "prompt", multiline=True, default="a photo of a cat",
                    tooltip="What the reward compares the image with: usually the positive prompt as text. One line "
                    "for all images, or one line per image.",
                ),
                seed_input("Seed of the noise that is improved."),
                *sampling_inputs(10, 7.5, "euler"),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01, round=0.001,
                    tooltip="As in KSampler: below 1 the latent image is only changed.",
                ),
                *noise_inputs(),
                *keeping_inputs("noise"),
                *gradient_inputs(0),
                *watching_inputs(),
            ],
            outputs=[*handover_outputs(), *run_outputs()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            **newer(search_aliases=["reward optimization", "noise optimization", "dno", "prno", "reno", "seed"]),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, vae: Any, reward: Any, latent_image: Any, **settings: Any
    ) -> io.NodeOutput:
        """Optimize, and show the best in a final pass on the stock path."""
        count = len(latent_image["samples"])
        prompts = for_every_image(lines(settings["prompt"]), count)
        sampling = Sampling.by_name(
            model,
            settings["sampler_name"],
            settings["scheduler"],
            settings["steps"],
            settings["cfg"],
            settings["denoise"],
        )
        generator = ComfyGenerator(
            model, vae, sampling, negative, latent_image, positive=positive, seed=settings["seed"]
        )
        pin(
            generator, settings, positive=positive, negative=negative, latent=latent_image["samples"],
            mask=latent_image.get("noise_mask"),
        )  # fmt: skip
        seeds = seeds_from(settings["seed"], count)
        job = Job(
            generator, reward, settings["save_as"], settings["resume"], monitors_of(settings), cls.hidden,
            keep=lambda found: [keep_noise(found.best, found.prompts, seeds, generator, settings)],
        )  # fmt: skip
        config = noise_config(settings)
        result, conditioning = job.run(
            optimize_noise, prompts, config, lambda found: generator.encode(prompts), seeds=seeds
        )
        with job.keeping(result):
            images = final_images(generator, conditioning, result.best)
            return io.NodeOutput(
                *handover_values(generator, result.best),
                *run_results(job, "Regularized Noise Optimize", result, images, noise_facts(result.best, config)),
            )

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, resume: str | None = None, **_: Any) -> Any:
        """Run again when what is kept has changed."""
        return kept_version(save_as, resume)


class IPGONoiseProbability(io.ComfyNode):
    """P(z) of a noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A LATENT that is noise, or a NOISE with a latent for its shape."""
        return io.Schema(
            node_id="IPGONoiseProbability",
            display_name="Noise Probability",
            category=CATEGORY,
            description="How likely a noise is under the Gaussian that samplers draw from: about 0.1 to 0.5 for fresh "
            "noise of 128 pixels, rarely 0.02, and powers of ten less for noise that was bent to please a reward.",
            inputs=[
                io.Latent.Input("latent",
                    tooltip="With noise connected: gives its shape. Otherwise it is itself measured."),
                io.Noise.Input("noise", optional=True,
                    tooltip="Optional: the noise to measure, from RandomNoise for example."),
                advanced(io.Int.Input(
                    "block_size", default=0, min=0, max=4096, tooltip="Block length k; 0 chooses it from the size."
                )),
                advanced(io.Int.Input(
                    "permutations", default=100, min=1, max=10000, tooltip="Orders of the values that are looked at."
                )),
            ],
            outputs=[
                io.Float.Output("probability", display_name="P(z)",
                    tooltip="Smallest bound over all orders, 0 to 1 (eq. 8)."),
                io.Float.Output(
                    "log_probability", display_name="log probability",
                    tooltip="What the optimizer adds to the reward (eq. 9)."
                ),
                io.String.Output("report", display_name="report", tooltip="One line per image."),
            ],
            **newer(search_aliases=["p(z)", "gaussian test", "noise check"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, latent: Any, block_size: int, permutations: int, noise: Any = None) -> io.NodeOutput:
        """Measure every image; the numbers given out are those of the least likely."""
        values = latent["samples"] if noise is None else noise.generate_noise(latent)
        with torch.inference_mode(False), torch.no_grad():
            regularizer = NoiseRegularizer(or_none(block_size), permutations)
            logs, probabilities = regularizer.measure(values.clone(), channel_dim=1)
        worst = int(probabilities.argmin())
        text = [
            f"image {i}: P(z) {float(p):.4g}, log probability {float(log):.4g}"
            for i, (p, log) in enumerate(zip(probabilities, logs, strict=True), start=1)
        ]
        return io.NodeOutput(float(probabilities[worst]), float(logs[worst]), "\n".join(text))


NODES = [IPGONoiseOptimize, IPGONoiseProbability]
