"""Tokens and noise in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..ipgo_engine.config import JointConfig, OptimizeConfig
from ..ipgo_engine.optimize import optimize_jointly
from .host.conditioning import from_engine
from .host.watch import final_images
from .noise import handover_outputs, handover_values, keep_noise, noise_config, noise_facts, noise_inputs
from .reporting import run_results
from .resuming import kept_version
from .running import Job, for_every_image, lines, monitors_of, seeds_from
from .schema import (
    CATEGORY,
    Tokens,
    gradient_inputs,
    keeping_inputs,
    newer,
    reward_input,
    run_outputs,
    sampling_inputs,
    seed_input,
    size_inputs,
    watching_inputs,
)
from .tokens import prompt_inputs, token_inputs
from .training import keep_tokens, prompt_generator, token_config, token_facts


class IPGOJointOptimize(io.ComfyNode):
    """Learn tokens and noise together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of both methods; the budget is in iterations."""
        return io.Schema(
            node_id="IPGOJointOptimize",
            display_name="Joint Optimize",
            category=CATEGORY,
            description="Learns tokens and optimizes the noise at the same time: the most reward for the same "
            "number of images, for pictures you want to keep rather than for prompts you want to reuse.",
            inputs=[
                io.Model.Input("model",
                    tooltip="Any diffusion model, LoRAs and other patches included. It stays as it is."),
                io.Clip.Input("clip", tooltip="Text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model."),
                reward_input("What the images are to score high on."),
                *prompt_inputs("What the images show. One line for all of them, or one line per image of batch_size."),
                *size_inputs(512),
                seed_input("Seed of the noise that is improved."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64,
                    tooltip="Number of images: each has a noise of its own, all share the tokens.",
                ),
                *sampling_inputs(10, 7.5, "euler"),
                *noise_inputs(),
                *token_inputs(0.001, "token_learning_rate"),
                *keeping_inputs("joint"),
                *gradient_inputs(0),
                *watching_inputs(),
            ],
            outputs=[
                Tokens.Output("tokens", display_name="tokens", tooltip="The learned tokens."),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The first prompt with the tokens, for the sampler."
                ),
                io.Conditioning.Output("negative_out", display_name="negative",
                    tooltip="The negative prompt, encoded."),
                *handover_outputs(),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            **newer(search_aliases=["reward optimization", "tokens and noise", "ipgo"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, reward: Any, **settings: Any) -> io.NodeOutput:
        """Optimize both, keep the tokens, and show the best in a final pass on the stock path."""
        prompts = for_every_image(lines(settings["prompt"]), settings["batch_size"], "batch_size")
        generator = prompt_generator(model, clip, vae, settings)
        seeds = seeds_from(settings["seed"], settings["batch_size"])

        def keep(found: Any) -> list[Path]:
            tokens = keep_tokens(found.best[0], settings)
            return [tokens, keep_noise(found.best[1], found.prompts, seeds, generator, settings, tokens)]

        job = Job(generator, reward, settings["save_as"], settings["resume"], monitors_of(settings), cls.hidden, keep)

        def finish(result: Any) -> Any:
            with torch.no_grad():
                return result.best[0].condition(generator.encode(prompts))

        config = joint_config(settings)
        result, conditioning = job.run(optimize_jointly, prompts, config, finish, seeds=seeds)
        with job.keeping(result):
            tokens, noise = result.best[0].to("cpu"), result.best[1]
            images = final_images(generator, conditioning, noise)
            positive = from_engine(conditioning.select([0]))[0][1]
            facts = [*token_facts(tokens), *noise_facts(noise, config.noise)]
            return io.NodeOutput(
                tokens, positive, generator.negative, *handover_values(generator, noise),
                *run_results(job, "Joint Optimize", result, images, facts),
            )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, resume: str | None = None, **_: Any) -> Any:
        """Run again when what is kept has changed."""
        return kept_version(save_as, resume)


def joint_config(settings: dict[str, Any]) -> JointConfig:
    """The engine's settings from the widgets."""
    tokens = OptimizeConfig.preset(
        settings["preset"],
        tokens=token_config(settings),
        learning_rate=settings["token_learning_rate"],
        conformity=settings["conformity"],
    )
    return JointConfig(tokens=tokens, noise=noise_config(settings))


NODES = [IPGOJointOptimize]
