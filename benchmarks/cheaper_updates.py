"""Cheaper token updates: which of them buy the same reward for less?

    python -m benchmarks.cheaper_updates --steps 8 --eta 0 --learning-rate 0.02

Tried against updates with gradients through all model steps: gradients through the last ones only; the first part of a
trajectory sampled once and used for several updates; half as many model steps in the first half of the updates; UNet
and VAE in bfloat16. Whatever the updates saw, the learned tokens are judged by the plain sampler's picture in float32.
Needs a sampler without memory or noise of its own (DDIM, eta 0). Resumable per prompt; processor seconds, so that other
work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    EvaluationCounter,
    add_generator_options,
    add_prompt_options,
    cached,
    cells_of,
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
from ipgo_engine import OptimizeConfig, train_tokens
from ipgo_engine.generators.base import Conditioning
from ipgo_engine.generators.denoiser import Guidance, call
from ipgo_engine.generators.diffusers import DiffusersGenerator


class ReusedTrajectory(DiffusersGenerator):
    """Samples the steps without gradients for every n-th update only; the others start where that one got to."""

    every = 1

    def restart(self) -> None:
        """Before a run: nothing is kept from another."""
        self._updates, self._kept = 0, torch.empty(0)

    def _denoise(self, guidance: Guidance, noise: Tensor, backprop_steps: int, checkpoint: bool) -> Tensor:
        # Without gradients no K is given: such a picture, the raw prompt's for one, has a trajectory of its own.
        whole = backprop_steps == self.steps
        fresh = whole or self._updates % self.every == 0
        self._updates += not whole
        first = self.steps - backprop_steps
        run = self._sampler.run(noise[:, 1:])
        latents = noise[:, 0].to(self._dtype) * run.initial_sigma if fresh else self._kept
        for index, timestep in enumerate(self._sampler.timesteps):
            if index < first and not fresh:
                continue
            if index == first and not whole:
                self._kept = latents.detach()
            inputs = (run.scale(latents, timestep), guidance.positive)
            output = call(self._prediction(timestep, guidance), *inputs, grad=index >= first, checkpoint=checkpoint)
            latents = run.step(output, timestep, latents)
        return latents


class CoarseFirst:
    """A generator with few steps for the first pictures, one with all of them afterwards."""

    def __init__(self, coarse: DiffusersGenerator, fine: DiffusersGenerator, switch: int) -> None:
        self.coarse, self.fine, self.switch = coarse, fine, switch

    def restart(self) -> None:
        """Before a run."""
        self._calls = 0

    def generate(self, conditioning: Conditioning, noise: Tensor, **how: Any) -> Tensor:
        """One of the two."""
        self._calls += 1
        chosen = self.coarse if self._calls <= self.switch else self.fine
        return chosen.generate(conditioning, noise, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fine, name)


class Bench:
    """One pipeline; every variant is a sampler around it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipeline = make_pipeline(options)
        self.counter = EvaluationCounter(self.pipeline.unet, 2 if options.guidance > 1 else 1)
        self.target, self.held_out = load_rewards(options)
        self.plain = self.sampler(DiffusersGenerator)

    def sampler(self, kind: type[DiffusersGenerator], **changes: Any) -> Any:
        """A generator with the command line's settings but for the changes."""
        return kind(self.pipeline, **(sampler_settings(self.options) | changes))

    def variants(self) -> dict[str, tuple[Any, int | None, int]]:
        """Name: generator, gradients through how many steps, updates."""
        n, k = self.options.epochs, self.options.last
        found: dict[str, tuple[Any, int | None, int]] = {
            f"all steps, {count} updates": (self.plain, None, count) for count in (n, n // 2, 2 * n)
        }
        found[f"last {k} steps"] = (self.plain, k, n)
        for every in (2, 4):
            generator = self.sampler(ReusedTrajectory)
            generator.every = every
            found[f"last {k} steps, trajectory used {every} times"] = (generator, k, n)
        coarse = self.sampler(DiffusersGenerator, steps=self.options.steps // 2)
        found["half of the steps at first"] = (CoarseFirst(coarse, self.plain, n // 2 + 1), None, n)
        found["bfloat16"] = (self.sampler(DiffusersGenerator, autocast=torch.bfloat16), None, n)
        return found

    def run(self, prompt: str) -> dict[str, Any]:
        """Gains and cost of every variant: lists over seeds."""
        found: dict[str, Any] = {}
        for name, (generator, last, updates) in self.variants().items():
            row: dict[str, list[float]] = {key: [] for key in ("target", "held-out", "evaluations", "seconds")}
            for seed in range(self.options.seeds):
                config = OptimizeConfig(
                    epochs=updates,
                    seeds=(seed,),
                    backprop_steps=last,
                    learning_rate=self.options.learning_rate,
                    checkpoint=False,
                )
                getattr(generator, "restart", lambda: None)()
                self.counter.take()
                started = time.process_time()
                result = train_tokens(generator, self.target, [prompt], config)
                row["seconds"].append(time.process_time() - started)
                row["evaluations"].append(self.counter.take())
                for key, gain in self._gains(prompt, seed, result.best).items():
                    row[key].append(gain)
            found[name] = row
        return found

    @torch.no_grad()
    def _gains(self, prompt: str, seed: int, tokens: Any) -> dict[str, float]:
        """What the plain sampler's picture gains."""
        raw, noise = self.plain.encode([prompt]), self.plain.draw_noise([seed])
        tokens = tokens.to(self.plain.device)
        before, after = (self.plain.generate(c, noise) for c in (raw, tokens.condition(raw)))
        judges: dict[str, Callable[..., Tensor]] = {"target": self.target.score, "held-out": self.held_out.score}
        return {key: float(score(after, [prompt])[0] - score(before, [prompt])[0]) for key, score in judges.items()}


def report(cells: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """One row per variant; the difference to the first one is paired by prompt."""
    rows, first = [], next(iter(next(iter(cells.values()))))
    for name in next(iter(cells.values())):
        row: dict[str, Any] = {"updates": name}
        for key in ("target", "held-out"):
            values = [(prompt, v) for prompt, cell in cells.items() for v in cell[name][key]]
            row[f"{key} gain"] = shown(interval([v for _, v in values], [p for p, _ in values]))
        pairs = [
            (prompt, a - b)
            for prompt, cell in cells.items()
            for a, b in zip(cell[name]["target"], cell[first]["target"], strict=True)
        ]
        row["target minus first"] = (
            shown(interval([v for _, v in pairs], [p for p, _ in pairs])) if name != first else ""
        )
        for key, digits in (("evaluations", 0), ("seconds", 1)):
            values = [v for cell in cells.values() for v in cell[name][key]]
            row[key] = f"{sum(values) / len(values):.{digits}f}"
        rows.append(row)
    what = options.model or "demo model"
    title = (
        f"Cheaper token updates on the {what}: {len(cells)} prompts x {options.seeds} seeds, {options.epochs} updates"
    )
    return write_table(rows, options.out / "table", title)


def main() -> None:
    """Run what is not there yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser, seeds=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--last", type=int, default=3, help="K of the variants that stop gradients early")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("results/cheaper"))
    options = parse(parser)
    if options.eta or options.sampler != "ddim":
        parser.error("re-used trajectories need a sampler without memory or noise of its own: --sampler ddim --eta 0")
    bench, cells = Bench(options), {}
    for prompt in read_prompts(options):
        path = cells_of(options) / f"{slug(prompt)}.json"
        cells[prompt] = cached(path, lambda p=prompt: bench.run(p))
        print(prompt, {k: f"{sum(v['target']) / len(v['target']):.3f}" for k, v in cells[prompt].items()}, flush=True)
    print(report(cells, options))


if __name__ == "__main__":
    main()
