"""Sockets, inputs that several nodes share, and what only newer ComfyUI releases understand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from comfy_api.latest import io

from .host.choices import samplers, schedulers

Tokens = io.Custom("IPGO_TOKENS")
Reward = io.Custom("IPGO_REWARD")
LossMap = io.Custom("LOSS_MAP")

CATEGORY = "IPGO"
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
RESUME = ("start anew", "continue", "take the best so far")
GRADIENTS = ["auto", "exact", "hybrid-noise", "hybrid-image", "zeroth-order"]

Part = TypeVar("Part")


def newer(**options: Any) -> dict[str, Any]:
    """The given fields of `io.Schema` that this release has."""
    known = {field.name for field in fields(io.Schema)}
    return {key: value for key, value in options.items() if key in known}


def advanced(part: Part) -> Part:
    """Mark an input as advanced, where this release knows the mark."""
    if hasattr(part, "advanced"):
        part.advanced = True  # type: ignore[attr-defined]
    return part


def reward_input(purpose: str) -> Any:
    """The reward that is optimized or measured."""
    return Reward.Input("reward", tooltip=f"{purpose} Connect one of the IPGO reward nodes.")


def sampling_inputs(steps: int, cfg: float, sampler: str) -> list[Any]:
    """Steps, guidance, sampler and scheduler, with the names that stock KSampler gives them."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=1000, tooltip="Sampling steps of every image, as in KSampler."),
        io.Float.Input(
            "cfg", default=cfg, min=0.0, max=100.0, step=0.1, round=0.01,
            tooltip="Classifier-free guidance, as in KSampler. At 1.0 the negative is not used.",
        ),
        io.Combo.Input(
            "sampler_name", options=samplers(), default=sampler,
            tooltip="Your installed samplers, without those whose gradient is wrong (deis, ipndm_v, dpm_adaptive, "
            "ar_video).",
        ),
        io.Combo.Input(
            "scheduler", options=schedulers(), default="normal", tooltip="How the noise level falls, as in KSampler."
        ),
    ]  # fmt: skip


def seed_input(what: str) -> Any:
    """The seed, kept between runs: a better picture of the same seed is the point."""
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=False,
        tooltip=f"{what} The first image is the one KSampler makes from this seed.",
    )  # fmt: skip


def size_inputs(side: int) -> list[Any]:
    """Width and height in pixels."""
    return [
        io.Int.Input(
            name, default=side, min=64, max=4096, step=8,
            tooltip=f"Image {name} in pixels: 512 for SD1.5, 1024 for SDXL, 128 for the demo model.",
        )
        for name in ("width", "height")
    ]  # fmt: skip


def gradient_inputs(backprop_steps: int) -> list[Any]:
    """How the gradient of the reward is computed."""
    return [
        advanced(io.Int.Input(
            "backprop_steps", default=backprop_steps, min=0, max=1000,
            tooltip="Gradients pass through the last so many sampling steps; 0 is all of them. Fewer steps are "
            "faster, 1 is the paper's choice for tokens. Images do not change.",
        )),
        advanced(io.Combo.Input(
            "gradient", options=GRADIENTS, default="auto",
            tooltip="auto: exact where the reward is differentiable, hybrid-noise for black boxes such as JPEG "
            "size. The others force a method.",
        )),
        advanced(io.Int.Input(
            "perturbations", default=8, min=1, max=256,
            tooltip="Extra images per step for rewards without a gradient. More are slower and steadier.",
        )),
        advanced(io.Float.Input(
            "perturbation_scale", default=0.05, min=0.0001, max=1.0, step=0.001, round=0.0001,
            tooltip="Size of one perturbation, for rewards without a gradient.",
        )),
        advanced(io.Boolean.Input(
            "save_memory", default=True,
            tooltip="Recompute the model in the backward pass: about a third slower, memory flat in the number of "
            "steps. When memory runs out anyway, images are made in smaller groups.",
        )),
    ]  # fmt: skip


def watching_inputs() -> list[Any]:
    """What is measured besides, and how often something is shown."""
    return [
        advanced(io.Int.Input(
            "preview_every", default=1, min=1, max=1000,
            tooltip="Steps between two live previews of the current images."
        )),
        advanced(io.Int.Input(
            "monitor_every", default=5, min=1, max=1000,
            tooltip="Steps between two measurements of the held-out rewards."
        )),
        advanced(io.Int.Input(
            "patience", default=0, min=0, max=1000,
            tooltip="Stop after so many measurements in which the first held-out reward did not rise; 0 never stops.",
        )),
        *monitor_inputs(),
    ]  # fmt: skip


def monitor_inputs() -> list[Any]:
    """Rewards that are measured and never optimized."""
    return [
        Reward.Input(
            f"monitor_{number}", optional=True,
            tooltip="Optional: a held-out reward, measured and never optimized. If it falls while the reward rises, "
            "the run is fooling the reward.",
        )
        for number in (1, 2)
    ]  # fmt: skip


def keeping_inputs(name: str) -> list[Any]:
    """Where a run is kept and whether it goes on from there."""
    return [
        io.String.Input(
            "save_as", default=name,
            tooltip="Name of the files this run writes: learned tokens in models/ipgo_tokens, learned noise and the "
            "state to resume from in output/ipgo, and after Cancel or a failure the best pictures there too. "
            "Sub-folders are allowed.",
        ),
        io.Combo.Input(
            "resume", options=list(RESUME), default=RESUME[0],
            tooltip="start anew: ignore what was saved. continue: go on from where the run of this name stopped; "
            "model, inputs and settings must be the same, but for more epochs or iterations and for what is shown or "
            "saves memory. take the best so far: give out what a run had found, without going on.",
        ),
    ]  # fmt: skip


def run_outputs() -> list[Any]:
    """What every run shows."""
    return [
        io.Image.Output(
            "images", display_name="images",
            tooltip="The best images, made in a final pass exactly as stock nodes make them.",
        ),
        io.Image.Output("before", display_name="before", tooltip="What the same prompt and seeds gave before."),
        io.Image.Output(
            "curve", display_name="curve",
            tooltip="Reward over the steps, with held-out rewards and P(z) where they were measured.",
        ),
        LossMap.Output("loss", display_name="loss", tooltip="Loss per step, for the stock Plot Loss Graph node."),
        io.String.Output("report", display_name="report",
            tooltip="Scores before and after, why it ended, where it is kept."),
    ]  # fmt: skip
