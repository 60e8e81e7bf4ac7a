"""The whiteness experiment of the noise paper: brightness as the reward of a black thing, with and without regularizer.

    python -m benchmarks.whiteness --out results/whiteness

Writes a figure (pictures along the way, reward, P(z), and what the two small image-text models of the demo make of
the prompt), a table, and the curves. Hacking is visible as brightness that rises while P(z) and the image-text scores
fall. On the embedded demo model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import add_generator_options, interval, make_generator, shown, write_table
from ipgo_engine import NoiseConfig, optimize_noise, rewards

PROMPTS = ("black cat", "black heart", "black bird", "black bear")
MONITORS = ("demo-clip", "demo-judge")


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


def configurations(options: argparse.Namespace) -> dict[str, NoiseConfig]:
    """With and without the regularizer, otherwise the same."""
    shared: dict[str, Any] = {
        "iterations": options.iterations,
        "learning_rate": options.learning_rate,
        "backprop_steps": options.backprop or None,
        "monitor_every": 1,
        "checkpoint": False,
    }
    return {"regularized": NoiseConfig(**shared), "not regularized": NoiseConfig(regularization=0.0, **shared)}


def figure(albums: dict[str, Album], histories: dict[str, list[Any]], reward: str, path: Path) -> None:
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
        curves[2].plot(x, [event.monitors[MONITORS[0]] for event in history])
    curves[1].set_yscale("log")
    for ax, title in zip(curves, (f"{reward} (optimized)", "smallest P(z)", f"{MONITORS[0]} (held out)"), strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
    curves[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Run both settings on every prompt and write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    parser.add_argument("--out", type=Path, default=Path("results/whiteness"))
    parser.add_argument("--prompts", nargs="*", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--backprop", type=int, default=0, help="K; 0 for all model steps")
    parser.add_argument("--reward", default="brightness")
    options = parser.parse_args()
    generator, _ = make_generator(options)
    reward = rewards.load(options.reward, device=options.device)
    monitors = [rewards.load(name, device=options.device) for name in MONITORS]
    prompts = [prompt for prompt in options.prompts for _ in range(options.seeds)]
    seeds = [seed for _ in options.prompts for seed in range(options.seeds)]
    steps = sorted({round(options.iterations * f) for f in (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)})
    options.out.mkdir(parents=True, exist_ok=True)
    albums, histories, rows = {}, {}, []
    for name, config in configurations(options).items():
        album = Album(steps)
        result = optimize_noise(generator, reward, prompts, config, album, seeds=seeds, monitors=monitors)
        albums[name], histories[name] = album, result.history
        rows += table_rows(name, album, reward, monitors, prompts, result)
        print()
    figure(albums, histories, options.reward, options.out / "figure.png")
    title = f"{options.reward} on {len(options.prompts)} prompts x {options.seeds} seeds, demo model"
    print(write_table(rows, options.out / "table", title))


@torch.no_grad()
def table_rows(
    name: str, album: Album, reward: Any, monitors: list[Any], prompts: list[str], result: Any
) -> list[dict[str, Any]]:
    """Scores at the start, halfway and at the end."""
    rows = []
    for step in (album.steps[0], album.steps[len(album.steps) // 2 + 1], album.steps[-1]):
        images = album.pages[step].to(next(iter(result.image)).device)
        row: dict[str, Any] = {"setting": name, "step": step}
        for judge in (reward, *monitors):
            row[judge.name] = shown(interval(judge.score(images, prompts).tolist(), prompts))
        row["smallest P(z)"] = f"{np.float64(result.history[step].probability):.2g}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
