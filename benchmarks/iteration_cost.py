"""Time and memory of one optimization step, in units of the stock pipeline's own call for the same picture.

    python -m benchmarks.iteration_cost                       # the demo model
    python -m benchmarks.iteration_cost --random sd15 --size 512 --device cuda --dtype float16

`--random sd15` builds a full-size SD1.5 UNet and VAE with random weights: time and memory do not depend on weights.
Every figure is the median of `--repeats` in one process, the stock call's before those of the steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_table
from benchmarks.turns import Memory
from ipgo_engine import IPGOTokens, NoiseRegularizer, TokenConfig, demo
from ipgo_engine.generators.denoiser import Guidance, call
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.generators.samplers import make_scheduler
from ipgo_engine.noise import CHANNEL_DIM


def random_sd15(dtype: torch.dtype, device: str) -> Any:
    """A StableDiffusionPipeline of SD1.5's size with random weights and the demo model's tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return as_pipeline(unet.to(dtype), vae.to(dtype), text.to(device, dtype))


def as_pipeline(unet: Any, vae: Any, text: Any) -> Any:
    """A StableDiffusionPipeline of these parts and the demo model's tokenizer and scheduler."""
    from diffusers import StableDiffusionPipeline

    base = demo.load_pipeline()
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=base.tokenizer,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Clock:
    """Median seconds and peak memory of a call."""

    def __init__(self, device: str, repeats: int) -> None:
        self.memory, self.repeats = Memory(device), repeats

    def measure(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(seconds, peak MiB above what was there before)."""
        call()
        times, peak = [], 0.0
        self.memory.start()
        for _ in range(self.repeats):
            started = time.perf_counter()
            call()
            peak = self.memory.peak()  # waits for the device
            times.append(time.perf_counter() - started)
        return statistics.median(times), peak


class HalfStored(DiffusersGenerator):
    """Stores the activations of the last half of the model steps and of the decoder, recomputes the others."""

    def _prediction(self, timestep: Tensor, guidance: Guidance) -> Callable[[Tensor, Tensor], Tensor]:
        predict = super()._prediction(timestep, guidance)
        stored = timestep < self._sampler.timesteps[(self.steps - 1) // 2]
        return predict if stored else partial(call, predict, grad=True, checkpoint=True)


class Steps:
    """One optimization step of each method on one picture; the reward is the mean pixel, which costs nothing."""

    def __init__(self, pipeline: Any, steps: int, size: int, eta: float) -> None:
        self.pipeline, self.size, self.eta, self.count = pipeline, size, eta, steps
        settings: dict[str, Any] = {"sampler": "ddim", "eta": eta, "steps": steps, "width": size, "height": size}
        self.generator = DiffusersGenerator(pipeline, guidance_scale=7.5, **settings)
        self.half_stored = HalfStored(pipeline, guidance_scale=7.5, **settings)
        self.conditioning = self.generator.encode(["red heart"])
        self.noise = self.generator.draw_noise([0]).requires_grad_()
        basis = min(30, self.generator.dim)
        self.tokens = IPGOTokens(self.generator.dim, TokenConfig(basis_size=basis)).to(self.generator.device)
        self.regularizer = NoiseRegularizer()

    def calls(self, kind: str) -> dict[str, Callable[[], None]]:
        """What is measured, by name. "compiled" compiles the pipeline, and everything after it runs compiled."""
        if kind == "compiled":
            self.pipeline.unet.compile()
            self.pipeline.vae.decoder.compile()
            stored = "noise step, all steps, stored, compiled"
            return {"stock pipeline, compiled": self.stock, stored: lambda: self.noise_step(self.generator, False)}
        both = {"stock pipeline": self.stock, "engine, no gradient": self.plain}
        if kind == "tokens":
            return both | {f"IPGO step, K = {k}": partial(self.token_step, k) for k in (1, 2)}
        return both | {
            "noise step, all steps, recomputed": lambda: self.noise_step(self.generator, True),
            "noise step, all steps, half of them stored": lambda: self.noise_step(self.half_stored, False),
            "noise step, all steps, stored": lambda: self.noise_step(self.generator, False),
            "regularizer alone": self.regularize,
        }

    def stock(self) -> None:
        """The pipeline's own call."""
        seeded = torch.Generator().manual_seed(0)
        self.pipeline.scheduler = make_scheduler("ddim", self.pipeline.scheduler.config)
        self.pipeline(
            "red heart",
            num_inference_steps=self.count,
            guidance_scale=7.5,
            width=self.size,
            height=self.size,
            eta=self.eta,
            generator=seeded,
            output_type="pt",
        )

    @torch.no_grad()
    def plain(self) -> None:
        """The engine's own sampling without gradients."""
        self.generator.generate(self.conditioning, self.noise)

    def token_step(self, last: int) -> None:
        """IPGO with gradients through the last model steps."""
        conditioning = self.tokens.condition(self.conditioning)
        image = self.generator.generate(conditioning, self.noise.detach(), backprop_steps=last)
        torch.autograd.grad(image.mean(), list(self.tokens.parameters()))

    def noise_step(self, generator: DiffusersGenerator, checkpoint: bool) -> None:
        """Noise with gradients through all model steps, regularizer included."""
        image = generator.generate(self.conditioning, self.noise, checkpoint=checkpoint)
        loss = image.mean() + self.regularizer.log_probability(self.noise[0], CHANNEL_DIM - 1)
        torch.autograd.grad(loss, self.noise)

    def regularize(self) -> None:
        """The regularizer alone, on noise that has left the typical set a little (on typical noise it is cheaper)."""
        noise = (self.noise.detach() * 1.05).requires_grad_()
        torch.autograd.grad(self.regularizer.log_probability(noise[0], CHANNEL_DIM - 1), noise)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=["sd15"])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--token-steps", type=int, default=20)
    parser.add_argument("--noise-steps", type=int, default=10)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes, and needs a compiler")
    parser.add_argument("--out", type=Path, default=Path("results/iteration_cost"))
    options = parser.parse_args()
    dtype, clock = getattr(torch, options.dtype), Clock(options.device, options.repeats)
    if options.random:
        pipeline = random_sd15(dtype, options.device)
    else:
        pipeline = demo.load_pipeline(dtype=dtype, device=options.device)
    rows, unit = [], 0.0
    kinds = [("tokens", options.token_steps), ("noise", options.noise_steps)]
    for kind, count in [*kinds, *([("compiled", options.noise_steps)] if options.compile else [])]:
        steps = Steps(pipeline, count, options.size, options.eta)
        for name, step in steps.calls(kind).items():
            seconds, peak = clock.measure(step)
            unit = seconds if name == "stock pipeline" else unit
            row = {"step": name, "model steps": count, "seconds": f"{seconds:.4f}", "x stock": f"{seconds / unit:.2f}"}
            rows.append(row | {"peak MiB": f"{peak:.0f}"})
            print(rows[-1], flush=True)
    what = f"{options.random or 'demo model'}, {options.size} px, {options.dtype}"
    print(write_table(rows, options.out / f"{options.random or 'demo'}-{options.dtype}", f"One step: {what}"))


if __name__ == "__main__":
    main()
