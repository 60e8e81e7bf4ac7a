"""Does averaging a reward over changed images prevent hacking? Ascent on pixels and on noise, plain and averaged.

    python -m benchmarks.robust_effect --out results/robust --prompts 8

Reported per way of ascent, as gains over the unoptimized picture: the reward itself; the reward of changed versions
that were not used in the ascent; the reward after saving as JPEG; and the held-out reward. A pattern that only fools
the reward gains in the first column and not in the others.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import (
    add_generator_options,
    add_prompt_options,
    interval,
    load_rewards,
    make_generator,
    read_prompts,
    shown,
    write_table,
)
from ipgo_engine import NoiseConfig, optimize_noise, rewards
from ipgo_engine.report import from_pil, to_pil

UNSEEN = 12_345  # seed of the changes that only measure


def ascend_pixels(images: Tensor, prompt: str, reward: rewards.Reward, options: argparse.Namespace) -> Tensor:
    """The images after sign-gradient steps on their pixels, at most `--reach` away from where they were."""
    start, current = images, images.clone()
    for _ in range(options.iterations):
        current = current.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(current, [prompt] * len(images)).sum(), current)
        moved = current + 2.5 * options.reach / options.iterations * gradient.sign()
        current = torch.clamp(moved, start - options.reach, start + options.reach).clamp(0, 1)
    return current.detach()


def through_jpeg(images: Tensor, quality: int = 75) -> Tensor:
    """What is left of the images in a JPEG file."""
    saved = []
    for image in images:
        file = io.BytesIO()
        to_pil(image).save(file, format="JPEG", quality=quality)
        saved.append(from_pil(Image.open(file)))
    return torch.cat(saved).to(images)


class Bench:
    """Target, held-out reward, and the four columns of the table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.generator, _ = make_generator(options)
        self.target, self.held_out = load_rewards(options)
        self.unseen = rewards.Robust(self.target, samples=8, seed=UNSEEN).augmentations
        self.ways = {"plain": self.target, "averaged": rewards.Robust(self.target, samples=options.samples)}

    @torch.no_grad()
    def columns(self, images: Tensor, prompt: str) -> dict[str, Tensor]:
        """Scores (B,) of every column."""
        texts = [prompt] * len(images)
        changed = torch.stack([self.target.score(change(images), texts) for change in self.unseen])
        return {
            "reward": self.target.score(images, texts),
            "changed versions": changed.mean(0),
            "after JPEG": self.target.score(through_jpeg(images), texts),
            "held-out": self.held_out.score(images, texts),
        }

    def run(self, prompt: str) -> list[dict[str, Any]]:
        """Gains of every way of ascent for one prompt."""
        seeds = list(range(self.options.seeds))
        with torch.no_grad():
            conditioning = self.generator.encode([prompt]).select([0] * len(seeds))
            start = self.generator.generate(conditioning, self.generator.draw_noise(seeds)).clamp(0, 1)
        before, rows = self.columns(start, prompt), []
        for way, reward in self.ways.items():
            ends = {}
            if "pixels" in self.options.of:
                ends["pixels"] = ascend_pixels(start, prompt, reward, self.options)
            if "noise" in self.options.of:
                noise = NoiseConfig(iterations=self.options.iterations)
                found = optimize_noise(self.generator, reward, [prompt] * len(seeds), noise, seeds=seeds)
                ends["noise"] = found.image.to(start)
            for what, images in ends.items():
                after = self.columns(images, prompt)
                gains = {name: (after[name] - before[name]).tolist() for name in before}
                rows.append({"prompt": prompt, "of": what, "way": way, **gains})
        return rows


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser, prompts=8, seeds=2)
    parser.add_argument("--out", default="results/robust")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--of", nargs="+", default=["pixels", "noise"], choices=["pixels", "noise"], help="ascent on")
    parser.add_argument("--samples", type=int, default=4, help="changed versions per evaluation")
    parser.add_argument("--reach", type=float, default=8 / 255, help="how far a pixel may move")
    options = parser.parse_args()
    bench, rows = Bench(options), []
    for prompt in read_prompts(options):
        rows += bench.run(prompt)
        print(rows[-1], flush=True)
    table = []
    for what in options.of:
        for way in bench.ways:
            chosen = [row for row in rows if (row["of"], row["way"]) == (what, way)]
            entry: dict[str, Any] = {"ascent on": what, "reward": way}
            for name in ("reward", "changed versions", "after JPEG", "held-out"):
                values = [value for row in chosen for value in row[name]]
                groups = [row["prompt"] for row in chosen for _ in row[name]]
                entry[f"gain: {name}"] = shown(interval(values, groups))
            table.append(entry)
    print(write_table(table, Path(options.out) / "robust", "Gains with the plain and with the averaged reward"))


if __name__ == "__main__":
    main()
