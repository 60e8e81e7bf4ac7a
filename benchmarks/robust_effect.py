"""Does averaging a reward over changed images prevent hacking? Ascent on pixels and on noise, plain and averaged.

    python -m benchmarks.robust_effect --out results/robust --prompts 8

Reported per way of ascent, as gains over the unoptimized picture: the reward itself; the reward of changed versions
that were not used in the ascent; the reward after saving as JPEG; and the held-out reward. A pattern that only fools
the reward gains in the first column and not in the others. Resumable per prompt.
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
    cached,
    cells_of,
    interval,
    load_rewards,
    make_generator,
    parse,
    read_prompts,
    shown,
    slug,
    write_table,
)
from ipgo_engine import NoiseConfig, optimize_noise, rewards
from ipgo_engine.report import from_pil, to_pil

COLUMNS = ("reward", "changed versions", "after JPEG", "held-out")
MINUS = "averaged minus plain"  # of the same picture
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
        scores = (
            self.target.score(images, texts),
            changed.mean(0),
            self.target.score(through_jpeg(images), texts),
            self.held_out.score(images, texts),
        )
        return dict(zip(COLUMNS, scores, strict=True))

    def run(self, prompt: str, of: str) -> dict[str, dict[str, list[float]]]:
        """Gains of both rewards' ascent on one prompt's pixels or noise, by column."""
        seeds = list(range(self.options.seeds))
        with torch.no_grad():
            conditioning = self.generator.encode([prompt]).select([0] * len(seeds))
            start = self.generator.generate(conditioning, self.generator.draw_noise(seeds)).clamp(0, 1)
        before, found = self.columns(start, prompt), {}
        for way, reward in self.ways.items():
            if of == "pixels":
                images = ascend_pixels(start, prompt, reward, self.options)
            else:
                images = self._ascend_noise(prompt, reward, seeds).to(start)
            after = self.columns(images, prompt)
            found[way] = {name: (after[name] - before[name]).tolist() for name in before}
        return found

    def _ascend_noise(self, prompt: str, reward: rewards.Reward, seeds: list[int]) -> Tensor:
        """The images of regularized noise optimization."""
        config = NoiseConfig(
            iterations=self.options.iterations,
            learning_rate=self.options.noise_lr,
            backprop_steps=self.options.noise_backprop or None,
            checkpoint=False,
        )
        return optimize_noise(self.generator, reward, [prompt] * len(seeds), config, seeds=seeds).image


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser, prompts=8, seeds=2)
    parser.add_argument("--out", type=Path, default=Path("results/robust"))
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--of", nargs="+", default=["pixels", "noise"], choices=["pixels", "noise"], help="ascent on")
    parser.add_argument("--samples", type=int, default=4, help="changed versions per evaluation")
    parser.add_argument("--reach", type=float, default=8 / 255, help="how far a pixel may move")
    parser.add_argument("--noise-lr", type=float, default=1e-2)
    parser.add_argument("--noise-backprop", type=int, default=0, help="K; 0 for all model steps")
    options = parse(parser)
    bench, table = Bench(options), []
    for what in options.of:
        cells = {}
        for prompt in read_prompts(options):
            path = cells_of(options) / what / f"{slug(prompt)}.json"
            cells[prompt] = cached(path, lambda p=prompt, w=what: bench.run(p, w))
            print(f"{what}: {prompt}", flush=True)
        for cell in cells.values():
            ways = (cell["averaged"], cell["plain"])
            cell[MINUS] = {name: [a - b for a, b in zip(*(w[name] for w in ways), strict=True)] for name in COLUMNS}
        for way in (*bench.ways, MINUS):
            row: dict[str, Any] = {"ascent on": what, "reward": way}
            for name in COLUMNS:
                values = [(prompt, value) for prompt, cell in cells.items() for value in cell[way][name]]
                row[f"gain: {name}"] = shown(interval([v for _, v in values], [p for p, _ in values]))
            table.append(row)
    title = f"Gains with the plain and with the averaged reward, {options.iterations} steps"
    print(write_table(table, options.out / "robust", title))


if __name__ == "__main__":
    main()
