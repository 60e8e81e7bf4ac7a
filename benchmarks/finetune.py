"""Fine-tuning on optimized pictures: does a LoRA learn what noise optimization found, so that plain sampling has it?

    python -m benchmarks.finetune --steps 8 --eta 0 --noise-lr 0.1 --noise-backprop 3

Needs peft. Pictures of every prompt and seed are optimized through their noise; a LoRA on the UNet is then trained on
them with the denoising loss, and another one, the control, on the unoptimized pictures of the same seeds. Judged is
plain sampling with fresh seeds: a gain of the control comes from training on one's own pictures, the rest from the
optimization. Pictures are kept on disk and resumable per prompt; on the embedded demo model unless --model says
otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import (
    add_generator_options,
    add_prompt_options,
    cells_of,
    fresh_lora,
    interval,
    load_rewards,
    make_pipeline,
    parse,
    read_prompts,
    sampler_settings,
    shown,
    slug,
    write_table,
)
from ipgo_engine import NoiseConfig, optimize_noise
from ipgo_engine.generators.diffusers import DiffusersGenerator

FRESH = tuple(range(1001, 1009))  # seeds nothing was trained on


class Bench:
    """Collects pictures, trains a LoRA on them, samples with fresh seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipeline = make_pipeline(options)
        self.generator = DiffusersGenerator(self.pipeline, **sampler_settings(options))
        self.target, self.held_out = load_rewards(options)

    def pictures(self, prompt: str) -> dict[str, Tensor]:
        """`plain` and `optimized` (seeds, 3, H, W), and their rewards."""
        cells = cells_of(self.options, ignored=("rank", "updates", "batch", "lora_lr"))
        path = cells / f"{slug(prompt)}.safetensors"
        if not path.exists():
            options, seeds = self.options, range(self.options.seeds)
            config = NoiseConfig(
                iterations=options.iterations,
                learning_rate=options.noise_lr,
                backprop_steps=options.noise_backprop or None,
                checkpoint=False,
            )
            result = optimize_noise(self.generator, self.target, [prompt] * len(seeds), config, seeds=list(seeds))
            kept = {"plain": result.start_image, "optimized": result.image}
            kept |= {"plain reward": result.start_rewards, "optimized reward": result.rewards}
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in kept.items()}, path)
        return load_file(path)

    @torch.no_grad()
    def fresh(self, prompts: list[str]) -> dict[str, list[float]]:
        """Target and held-out scores of plain sampling, `len(FRESH)` of every prompt in turn."""
        found: dict[str, list[float]] = {"target": [], "held-out": []}
        noise = self.generator.draw_noise(FRESH)
        for prompt in prompts:
            conditioning = self.generator.encode([prompt]).select([0] * len(FRESH))
            images = self.generator.generate(conditioning, noise)
            for key, reward in (("target", self.target), ("held-out", self.held_out)):
                found[key] += reward.score(images, [prompt] * len(FRESH)).tolist()
        return found

    def trained_on(self, images: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        """Scores after training a fresh LoRA with the denoising loss on these pictures."""
        options, unet, vae = self.options, self.pipeline.unet, self.pipeline.vae
        latents = self._encoded(images) * vae.config.scaling_factor
        embeddings = self.generator.encode(prompts).embeddings
        random = torch.Generator().manual_seed(0)
        with fresh_lora(unet, options.rank, seed=0) as learned:
            optimizer = torch.optim.Adam(learned, lr=options.lora_lr)
            for _ in range(options.updates):
                rows = torch.randint(len(latents), (options.batch,), generator=random)
                times = torch.randint(0, 1000, (options.batch,), generator=random).to(latents.device)
                noise = torch.randn(latents[rows].shape, generator=random).to(latents)
                noisy = self.pipeline.scheduler.add_noise(latents[rows], noise, times)
                predicted = unet(noisy, times, embeddings[rows].to(latents)).sample
                loss = (predicted - noise).square().mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
            return self.fresh(list(dict.fromkeys(prompts)))

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        parts = images.to(self.generator.device).split(16)
        return torch.cat([self.pipeline.vae.encode(part * 2 - 1).latent_dist.mode() for part in parts])


def main() -> None:
    """Collect, train twice, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--noise-lr", type=float, default=1e-2)
    parser.add_argument("--noise-backprop", type=int, default=0, help="K; 0 for all model steps")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--updates", type=int, default=300, help="of the LoRA")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("results/finetune"))
    options = parse(parser)
    prompts, bench = read_prompts(options), Bench(options)
    kept = {}
    for prompt in prompts:
        kept[prompt] = bench.pictures(prompt)
        before, after = (float(kept[prompt][f"{kind} reward"].mean()) for kind in ("plain", "optimized"))
        print(f"{prompt}: {before:.3f} to {after:.3f}", flush=True)
    texts = [prompt for prompt in prompts for _ in range(options.seeds)]
    found = {"nothing": bench.fresh(prompts)}
    for kind in ("plain", "optimized"):
        found[kind] = bench.trained_on(torch.cat([kept[prompt][kind] for prompt in prompts]), texts)
    groups = [prompt for prompt in prompts for _ in FRESH]
    rows = []
    for kind, base in (("plain", "nothing"), ("optimized", "nothing"), ("optimized", "plain")):
        row = {"LoRA trained on": f"{kind} pictures", "compared with": f"{base}{' pictures' * (base == 'plain')}"}
        for key, scores in found[kind].items():
            gains = [a - b for a, b in zip(scores, found[base][key], strict=True)]
            row[f"{key} gain, fresh seeds"] = shown(interval(gains, groups))
        rows.append(row)
    size = f"{len(prompts)} prompts x {options.seeds} pictures, {options.updates} updates, rank {options.rank}"
    print(write_table(rows, options.out / "table", f"Fine-tuning on the {options.model or 'demo model'}: {size}"))


if __name__ == "__main__":
    main()
