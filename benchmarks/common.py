"""What the benchmark commands share: the demo generator, counting model evaluations, intervals, tables."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipgo_engine import demo, rewards
from ipgo_engine.cli import inputs
from ipgo_engine.generators.diffusers import DiffusersGenerator

PROMPTS = Path(__file__).parent / "demo_prompts.txt"
DEMO_REWARDS = {"reward": "demo-clip", "held_out": "demo-judge"}
UNNAMED = "--model needs --reward and --held-out: the demo's rewards know emoji-like pictures only"
FRESH = (1001, 1002, 1003)  # seeds nothing is trained on


class EvaluationCounter:
    """Counts UNet evaluations per image: a forward is one, a backward two, guidance's second row is not counted twice.

    With recomputation every call made with gradients on is the second forward of a step and is followed by a backward.
    """

    def __init__(self, unet: torch.nn.Module, rows_per_image: int) -> None:
        self.forwards = self.backwards = 0.0

        def count(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            sample = arguments[0] if arguments else options["sample"]
            self.forwards += sample.shape[0] / rows_per_image
            self.backwards += torch.is_grad_enabled() * sample.shape[0] / rows_per_image

        unet.register_forward_hook(count, with_kwargs=True)

    def take(self) -> float:
        """Evaluations since the last call: forwards + 2 backwards."""
        total, self.forwards, self.backwards = self.forwards + 2 * self.backwards, 0.0, 0.0
        return total


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """Sampler settings every benchmark takes; defaults are the demo model's."""
    parser.add_argument("--model", help="a local diffusers folder (default: the demo model)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=demo.GUIDANCE_SCALE)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--size", type=int, help="pixels; default: the model's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_prompt_options(parser: argparse.ArgumentParser, prompts: int = 20, seeds: int = 3) -> None:
    """Prompts, seeds, and the two rewards."""
    parser.add_argument("--list", type=Path, default=PROMPTS, help="file of prompts, one per line")
    parser.add_argument("--prompts", type=int, default=prompts, help="how many of them")
    parser.add_argument("--seeds", type=int, default=seeds)
    add_reward_options(parser)


def add_reward_options(parser: argparse.ArgumentParser) -> None:
    """What is optimized and what is watched; `parse` fills in the demo model's."""
    parser.add_argument("--reward", help="what is optimized (with the demo model: demo-clip)")
    parser.add_argument("--reward-path", help="its weights, for a reward that has some")
    parser.add_argument("--held-out", help="what is only watched (with the demo model: demo-judge)")
    parser.add_argument("--held-out-path")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; a model of one's own is never judged by the demo's rewards unless they are named."""
    options = parser.parse_args()
    if options.model and not (options.reward and options.held_out):
        parser.error(UNNAMED)
    for name, demos in DEMO_REWARDS.items():
        setattr(options, name, getattr(options, name) or demos)
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The first `--prompts` prompts of `--list`."""
    return inputs.read_prompts(options.list)[: options.prompts]


def load_rewards(options: argparse.Namespace) -> tuple[rewards.Reward, rewards.Reward]:
    """Target and held-out reward."""
    target = rewards.load(options.reward, options.reward_path, options.device)
    return target, rewards.load(options.held_out, options.held_out_path, options.device)


def make_pipeline(options: argparse.Namespace) -> Any:
    """The pipeline of --model, or the demo model's."""
    if not options.model:
        return demo.load_pipeline(device=options.device)
    from ipgo_engine.generators.loading import load_pipeline

    return load_pipeline(options.model, device=options.device)


def sampler_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of a `DiffusersGenerator`."""
    return {
        "sampler": options.sampler,
        "eta": options.eta,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "width": options.size,
        "height": options.size,
    }


def make_generator(options: argparse.Namespace, **changes: Any) -> tuple[DiffusersGenerator, EvaluationCounter]:
    """The generator of the command line's options, and a counter on its UNet."""
    settings = sampler_settings(options) | changes
    pipeline = make_pipeline(options)
    counter = EvaluationCounter(pipeline.unet, 2 if settings["guidance_scale"] > 1 else 1)
    return DiffusersGenerator(pipeline, **settings), counter


@contextmanager
def fresh_lora(unet: Any, rank: int, seed: int) -> Iterator[list[torch.nn.Parameter]]:
    """A LoRA on the attention of a UNet, drawn anew, and gone afterwards: what there is to learn. Needs peft."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), "benchmark")
    try:
        yield [p for p in unet.parameters() if p.requires_grad]
    finally:
        unet.delete_adapters("benchmark")


def slug(text: str) -> str:
    """A file name, of a prompt for example."""
    return shortened("".join(c if c.isalnum() else "-" for c in text))


def shortened(name: str) -> str:
    """A name that file systems take; a digest tells apart what was cut off."""
    return name if len(name) <= 80 else f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


WHERE = ("out", "shard", "report", "readme", "prompts", "list", "device", "methods", "of")
"""Options that say where results go, how work is shared and which cells are wanted, not what a cell holds."""


def cells_of(options: argparse.Namespace, ignored: Sequence[str] = ()) -> Path:
    """The folder of one set of settings: a cell measured with others is never taken for one of these."""
    settings = {key: str(value) for key, value in vars(options).items() if key not in (*WHERE, *ignored)}
    return options.out / "cells" / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def cached(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON at `path`; computed and written when it is not there, so that a benchmark can be resumed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(compute()))
        part.replace(path)
    return json.loads(path.read_text())


def interval(values: Sequence[float], groups: Sequence[Any], rounds: int = 4000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval, resampling whole groups (prompts): images of one prompt are not independent.

    NaN as the interval of fewer than four groups: resampling two or three says nothing.
    """
    table: dict[Any, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        table.setdefault(group, []).append(value)
    means = np.array([np.mean(v) for v in table.values()])
    if len(means) < 4:
        return float(means.mean()), math.nan, math.nan
    random = np.random.default_rng(0)
    samples = means[random.integers(len(means), size=(rounds, len(means)))].mean(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


def shown(triple: tuple[float, float, float], digits: int = 3) -> str:
    """`mean [low, high]`, or the mean alone where there is no interval."""
    mean, low, high = triple
    if math.isnan(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> str:
    """Write `rows` as CSV and Markdown beside each other; returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"# {title}", "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    text = "\n".join([*lines, "", machine()]) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def machine() -> str:
    """One line saying what the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {device}"
