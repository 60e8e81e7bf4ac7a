"""Learning IPGO tokens, and putting them into a prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..ipgo_engine.optimize import train_tokens
from .host.conditioning import insert_tokens
from .reporting import run_results
from .resuming import kept_version
from .running import Job, lines, monitors_of
from .schema import (
    CATEGORY,
    Tokens,
    advanced,
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
from .training import keep_tokens, prompt_generator, render_each, shown_rows, token_facts, train_config

SIDES = ("both", "prefix only", "suffix only")


def prompt_inputs(meaning: str) -> list[Any]:
    """What is asked for, and what is not wanted."""
    return [
        io.String.Input("prompt", multiline=True, default="a photo of a cat", tooltip=meaning),
        io.String.Input(
            "negative", multiline=True, default="",
            tooltip="Negative prompt, used at cfg above 1. Tokens do not go in here."
        ),
    ]  # fmt: skip


def token_inputs(learning_rate: float, rate_name: str = "learning_rate") -> list[Any]:
    """The shape of the tokens and how they learn."""
    return [
        io.Float.Input(
            rate_name, default=learning_rate, min=0.000001, max=1.0, step=0.0001, round=0.000001,
            tooltip="Step size of the tokens. Larger learns faster and may jump about; the paper has 0.001.",
        ),
        io.Int.Input("prefix_length", default=10, min=0, max=200,
            tooltip="Learned tokens before the prompt; paper: 10."),
        io.Int.Input("suffix_length", default=10, min=0, max=200,
            tooltip="Learned tokens after the prompt; paper: 10."),
        advanced(io.Int.Input(
            "basis_size", default=30, min=1, max=300,
            tooltip="Basis vectors that the tokens of one side are made of (N); at most the width of the embedding.",
        )),
        advanced(io.Float.Input(
            "conformity", default=0.001, min=0.0, max=10.0, step=0.001, round=0.000001,
            tooltip="Weight of the penalty that keeps the mean token near that of the prompt (gamma of eq. 12).",
        )),
        advanced(io.Float.Input(
            "token_scale", default=1.0, min=0.01, max=100.0, step=0.1, round=0.001,
            tooltip="The tokens are multiplied by this. CLIP-L's own tokens are about eight times as long as fresh "
            "ones.",
        )),
        advanced(io.Combo.Input(
            "preset", options=["paper", "released-code"], default="paper",
            tooltip="paper: what the article describes. released-code: what the authors' notebook computes (wider "
            "basis, no rotation, other penalty), to compare.",
        )),
    ]  # fmt: skip


class IPGOTrainTokens(io.ComfyNode):
    """Learn tokens that raise a reward for one prompt, or for many."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs in the order in which a user meets them; everything rarely touched is marked advanced."""
        return io.Schema(
            node_id="IPGOTrainTokens",
            display_name="IPGO Train Tokens",
            category=CATEGORY,
            description="Learns a few tokens before and after your prompt that make the images score higher. Watch "
            "the reward rise under the node; Cancel keeps the best so far.",
            inputs=[
                io.Model.Input("model",
                    tooltip="Any diffusion model, LoRAs and other patches included. It stays as it is."),
                io.Clip.Input("clip", tooltip="Text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="VAE that belongs to the model."),
                reward_input("What the images are to score high on."),
                *prompt_inputs(
                    "One prompt per line. One line: tokens for this prompt. Several lines: one set of tokens that "
                    "serves them all."
                ),
                *size_inputs(512),
                seed_input("Seed of the images that tokens are trained on."),
                io.Int.Input(
                    "images_per_prompt", default=1, min=1, max=64,
                    tooltip="Train on so many seeds at once. 1 is fast and fits this one seed; 4 or more carry over "
                    "to seeds that were not trained on.",
                ),
                *sampling_inputs(20, 7.5, "euler"),
                io.Int.Input(
                    "epochs", default=50, min=1, max=10000,
                    tooltip="Passes over all prompts. The paper has 50 for one prompt and 20 for a list.",
                ),
                *token_inputs(0.001),
                *keeping_inputs("tokens"),
                advanced(io.Int.Input(
                    "prompts_per_step", default=4, min=0, max=1000,
                    tooltip="With a list: prompts per update; 0 is all of them. Fewer need less memory.",
                )),
                *gradient_inputs(1),
                *watching_inputs(),
            ],
            outputs=[
                Tokens.Output("tokens", display_name="tokens",
                    tooltip="The learned tokens, for Apply IPGO Conditioning."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            **newer(search_aliases=["reward optimization", "prompt optimization", "train embedding", "ipgo", "draft"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, reward: Any, **settings: Any) -> io.NodeOutput:
        """Train, keep, and show the best in a final pass on the stock path."""
        prompts = lines(settings["prompt"])
        config = train_config(settings, len(prompts))
        generator = prompt_generator(model, clip, vae, settings)
        job = Job(
            generator, reward, settings["save_as"], settings["resume"], monitors_of(settings), cls.hidden,
            keep=lambda result: [keep_tokens(result.best, settings)],
        )  # fmt: skip
        result, (conditioning, noise) = job.run(
            train_tokens, prompts, config, lambda found: shown_rows(generator, found.best, prompts, config)
        )
        with job.keeping(result):
            tokens = result.best.to("cpu")
            images = render_each(generator, conditioning, noise)
            return io.NodeOutput(tokens, *run_results(job, "IPGO Train Tokens", result, images, token_facts(tokens)))

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, resume: str | None = None, **_: Any) -> Any:
        """Run again when what is kept has changed."""
        return kept_version(save_as, resume)


class IPGOApplyConditioning(io.ComfyNode):
    """Learned tokens in a CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """CONDITIONING in, CONDITIONING out."""
        return io.Schema(
            node_id="IPGOApplyConditioning",
            display_name="Apply IPGO Conditioning",
            category=CATEGORY,
            description="Puts learned tokens before and after an encoded prompt. Plug the result into any sampler "
            "as the positive; leave the negative alone.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The positive prompt from CLIP Text Encode, areas and time ranges included."
                ),
                Tokens.Input("tokens", tooltip="Learned tokens, for the same text encoder as the prompt."),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                    tooltip="The tokens are multiplied by this. 0 gives the prompt back exactly as it was.",
                ),
                io.Combo.Input(
                    "sides", options=list(SIDES), default=SIDES[0], tooltip="Which of the learned tokens are put in."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning_out", display_name="conditioning",
                    tooltip="The prompt with the tokens; pooled output, masks, areas and time ranges are kept.",
                )
            ],
            **newer(search_aliases=["use tokens", "ipgo embedding", "apply reward tokens"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning: Any, tokens: Any, strength: float, sides: str) -> io.NodeOutput:
        """Insert, without changing the input."""
        with torch.inference_mode(False), torch.no_grad():
            prefix = None if sides == SIDES[2] else tokens.prefix().detach()
            suffix = None if sides == SIDES[1] else tokens.suffix().detach()
            return io.NodeOutput(insert_tokens(conditioning, prefix, suffix, strength))


NODES = [IPGOTrainTokens, IPGOApplyConditioning]
