"""P(z) of degenerate noises against what the model makes of them (noise paper, section 3.1)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.common import cached, cells_of, interval, load_rewards, make_generator, shown, slug, write_table
from ipgo_engine import NoiseRegularizer
from ipgo_engine.noise import CHANNEL_DIM


def smooth(z: Tensor) -> Tensor:
    """Neighbours correlated, variance one again."""
    blurred = avg_pool2d(z.flatten(0, 1), 3, stride=1, padding=1).view_as(z)
    return blurred / blurred.std(dim=(2, 3, 4), keepdim=True)


def tiled(z: Tensor) -> Tensor:
    """One quarter of the picture, four times."""
    quarter = z[..., : z.shape[-2] // 2, : z.shape[-1] // 2]
    return quarter.repeat(1, 1, 1, 2, 2)


# Noise is (B, n, C, H, W): initial and injected noises alike are changed.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gaussian": lambda z: z,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "one value per channel": lambda z: z[..., :1, :1].expand_as(z),
    "the same in every channel": lambda z: z[:, :, :1].expand_as(z),
    "a quarter, four times": tiled,
    "neighbours correlated": smooth,
    "x 0.5": lambda z: 0.5 * z,
    "x 0.9": lambda z: 0.9 * z,
    "x 0.97": lambda z: 0.97 * z,
    "x 1.03": lambda z: 1.03 * z,
    "x 1.1": lambda z: 1.1 * z,
    "x 1.5": lambda z: 1.5 * z,
    "shifted by 0.1": lambda z: z + 0.1,
    "signs only": torch.sign,
}


@torch.no_grad()
def measure(options: argparse.Namespace, prompt: str, tools: list[Any]) -> dict[str, Any]:
    """P(z) and the scores of every kind, one value per seed."""
    generator, judges, regularizer = tools
    seeds = list(range(options.seeds))
    conditioning = generator.encode([prompt]).select([0] * len(seeds))
    plain, found = generator.draw_noise(seeds), {}
    for name, change in KINDS.items():
        noise = change(plain).contiguous()
        images = generator.generate(conditioning, noise)
        scores = {judge.name: judge.score(images, [prompt] * len(seeds)).tolist() for judge in judges}
        found[name] = scores | {"P(z)": regularizer.measure(noise, CHANNEL_DIM)[1].tolist()}
    return found


def degenerate_cells(options: argparse.Namespace) -> Path:
    """Where its cells lie: what the other questions are asked with does not change them."""
    keys = ("model", "steps", "guidance", "sampler", "eta", "size", "seeds", "reward", "reward_path", "held_out")
    chosen = {key: getattr(options, key) for key in (*keys, "held_out_path", "out")}
    return cells_of(argparse.Namespace(**chosen)) / "degenerate"


def degenerate_table(options: argparse.Namespace, prompts: Sequence[str], out: Path) -> str:
    """Loss of both scores against Gaussian noise of the same seeds, beside the median P(z)."""
    tools: list[Any] = []  # made when they are needed
    folder, cells = degenerate_cells(options), {}
    names = (options.reward, options.held_out)
    if options.report:  # what is there
        prompts = [prompt for prompt in prompts if (folder / f"{slug(prompt)}.json").exists()]
    if not prompts:
        return "degenerate: nothing measured yet\n"
    for prompt in prompts:
        path = folder / f"{slug(prompt)}.json"
        if not tools and not path.exists():
            tools += [make_generator(options)[0], load_rewards(options), NoiseRegularizer()]
        cells[prompt] = cached(path, lambda p=prompt, t=tools: measure(options, p, t))
    rows = []
    for kind in KINDS:
        row: dict[str, Any] = {"noise": kind}
        chances = [v for cell in cells.values() for v in cell[kind]["P(z)"]]
        row["P(z) median"], row["P(z) lowest"] = f"{np.median(chances):.2g}", f"{np.min(chances):.2g}"
        for name in names:
            pairs = [
                (prompt, a - b)
                for prompt, cell in cells.items()
                for a, b in zip(cell[kind][name], cell["Gaussian"][name], strict=True)
            ]
            row[f"{name} minus Gaussian"] = shown(interval([v for _, v in pairs], [p for p, _ in pairs]))
        rows.append(row)
    title = f"Degenerate noises: {len(prompts)} prompts x {options.seeds} seeds, eta {options.eta:g}"
    return write_table(rows, out / f"degenerate-eta-{options.eta:g}", title)
