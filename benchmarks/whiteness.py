"""The whiteness experiment of the noise paper: brightness as the reward of a black thing, with and without regularizer.

    python -m benchmarks.whiteness --out results/whiteness

Writes a figure (pictures along the way, reward, P(z), and what two image-text models make of the prompt) and two
tables: scores along the way, and what P(z) says of the noises, with eqs. 8 and 9 on the tensor as it is stored and with
the channels of one place put together besides. Hacking is visible as brightness that rises while the image-text scores
fall. On the embedded demo model unless --model says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import (
    add_generator_options,
    add_prompt_options,
    interval,
    load_rewards,
    make_generator,
    parse,
    read_prompts,
    shown,
    write_table,
)
from ipgo_engine import NoiseConfig, NoiseRegularizer, optimize_noise, rewards
from ipgo_engine.noise import CHANNEL_DIM

BLACK = Path(__file__).parent / "demo_black_prompts.txt"
DRIVEN = "brightness"
AS_STORED, TOGETHER = "as stored", "channels together"
"""What P(z) looks at: the orders of eqs. 8 and 9 alone, or one more, with the channels of a place together."""


class Album:
    """An observer that keeps the pictures of some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.pages = steps, {}

    def on_step(self, event: Any) -> None:
        """Keep the images of the steps asked for."""
        if event.step in self.steps:
            self.pages[event.step] = event.images.float().cpu()
        print(f"\r{event.step}/{event.total} reward {event.reward:.3f} P {event.probability:.2g}", end="", flush=True)

    def on_message(self, message: str) -> None:
        """Show it."""
        print(message)

    def cancelled(self) -> bool:
        """Never."""
        return False


def configurations(options: argparse.Namespace) -> dict[str, tuple[NoiseConfig, int | None]]:
    """Settings, and which dimension the regularizer takes for the channels: None is eqs. 8 and 9 as printed."""
    shared: dict[str, Any] = {
        "iterations": options.iterations,
        "learning_rate": options.learning_rate,
        "backprop_steps": options.backprop or None,
        "monitor_every": 1,
        "checkpoint": False,
    }
    return {
        "regularized": (NoiseConfig(**shared), CHANNEL_DIM),
        "as printed": (NoiseConfig(**shared), None),
        "not regularized": (NoiseConfig(regularization=0.0, **shared), CHANNEL_DIM),
    }


def figure(albums: dict[str, Album], histories: dict[str, list[Any]], watched: str, path: Path) -> None:
    """Pictures of the first prompt along the way, one row per setting, and the curves beneath."""
    steps = next(iter(albums.values())).steps
    fig = Figure(figsize=(2 * len(steps), 2 * len(albums) + 3.4), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[2 * len(albums), 3.4])
    axes = top.subplots(len(albums), len(steps), squeeze=False)
    for row, (name, album) in zip(axes, albums.items(), strict=True):
        for ax, step in zip(row, steps, strict=True):
            ax.imshow(album.pages[step][0].permute(1, 2, 0).clamp(0, 1).numpy())
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(f"step {step}", fontsize=8)
        row[0].set_ylabel(name, fontsize=8)
    curves = bottom.subplots(1, 3)
    for name, history in histories.items():
        x = [event.step for event in history]
        curves[0].plot(x, [event.reward for event in history], label=name)
        curves[1].plot(x, [max(event.probability, 1e-30) for event in history])
        curves[2].plot(x, [event.monitors[watched] for event in history])
    curves[1].set_yscale("log")
    chance = "smallest P(z) (of 'as printed': as stored)"
    for ax, title in zip(curves, (f"{DRIVEN} (optimized)", chance, f"{watched} (only watched)"), strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
    curves[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Run every setting on every prompt and write figure and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser, seeds=2)
    parser.set_defaults(list=BLACK)
    parser.add_argument("--out", type=Path, default=Path("results/whiteness"))
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--backprop", type=int, default=0, help="K; 0 for all model steps")
    options = parse(parser)
    generator, _ = make_generator(options)
    driven, monitors, texts = rewards.load(DRIVEN), load_rewards(options), read_prompts(options)
    prompts = [prompt for prompt in texts for _ in range(options.seeds)]
    seeds = [seed for _ in texts for seed in range(options.seeds)]
    steps = sorted({round(options.iterations * f) for f in (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)})
    options.out.mkdir(parents=True, exist_ok=True)
    albums, histories, rows = {}, {}, []
    noises = [noise_row("fresh", generator.draw_noise(range(20)))]
    for name, (config, channel_dim) in configurations(options).items():
        album = Album(steps)
        with patch("ipgo_engine.problems.CHANNEL_DIM", channel_dim):
            result = optimize_noise(generator, driven, prompts, config, album, seeds=seeds, monitors=monitors)
        albums[name], histories[name] = album, result.history
        order = TOGETHER if channel_dim else AS_STORED
        rows += table_rows(name, album, driven, list(monitors), prompts, result, order)
        noises.append(noise_row(name, result.best))
        print()
    figure(albums, histories, monitors[0].name, options.out / "figure.png")
    what = f"{options.model or 'demo model'}: {len(texts)} black things x {options.seeds} seeds"
    print(write_table(rows, options.out / "table", f"{what}, driven by {DRIVEN}"))
    print(write_table(noises, options.out / "noises", f"{what}: the brightest pictures' noises"))


def noise_row(name: str, noise: Tensor) -> dict[str, Any]:
    """P(z) with and without the channels put together, smallest and largest, and how far a channel's mean is off."""
    measure = NoiseRegularizer().measure
    chances = {AS_STORED: measure(noise)[1], TOGETHER: measure(noise, CHANNEL_DIM)[1]}
    row: dict[str, Any] = {"noise": name, "of": len(noise)}
    for what, values in chances.items():
        row[f"P(z), {what}"] = f"{float(values.min()):.2g} to {float(values.max()):.2g}"
    row["largest channel mean"] = f"{float(noise.mean(dim=(3, 4)).abs().max()):.2f}"
    return row


@torch.no_grad()
def table_rows(
    name: str, album: Album, reward: Any, monitors: list[Any], prompts: list[str], result: Any, order: str
) -> list[dict[str, Any]]:
    """Scores at the start, halfway and at the end; P(z) is the one that the run itself knew."""
    rows = []
    last = album.steps[-1]
    for step in (0, round(last / 2), last):
        images = album.pages[step].to(next(iter(result.image)).device)
        row: dict[str, Any] = {"setting": name, "step": step}
        for judge in (reward, *monitors):
            row[judge.name] = shown(interval(judge.score(images, prompts).tolist(), prompts))
        row["smallest P(z)"] = f"{np.float64(result.history[step].probability):.2g} ({order})"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
