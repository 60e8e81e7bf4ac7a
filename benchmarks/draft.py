"""DRaFT-1, the strongest baseline of the IPGO paper's Table 1: a LoRA on the UNet, gradient of the last step only.

    python -m benchmarks.draft --prompts 20 --seeds 3 --epochs 50

Needs peft. One LoRA per prompt and seed (the paper's prompt-wise training, rank 6, Adam, clip-norm 1), and IPGO with as
many updates beside it: an update of either costs one sampling and one gradient through the last step. Both report the
best update, as the paper does. On the embedded demo model unless --model says otherwise; resumable per prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    FRESH,
    EvaluationCounter,
    add_generator_options,
    add_prompt_options,
    cached,
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
from ipgo_engine import OptimizeConfig, train_tokens
from ipgo_engine.generators.diffusers import DiffusersGenerator

GAINS = ("target", "held-out", "fresh seeds")
COST = ("seconds", "evaluations")


class Bench:
    """Both methods, one prompt and one seed at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        pipeline = make_pipeline(options)
        self.unet: Any = pipeline.unet
        self.counter = EvaluationCounter(self.unet, 2 if options.guidance > 1 else 1)
        self.generator = DiffusersGenerator(pipeline, **sampler_settings(options))
        self.target, self.held_out = load_rewards(options)

    def run(self, prompt: str) -> dict[str, Any]:
        """Gains of every method: lists over seeds."""
        methods = {
            f"DRaFT-1, lr {rate:g}": lambda seed, r=rate: self._draft(prompt, seed, r) for rate in self.options.lora_lr
        } | {f"IPGO, lr {rate:g}": lambda seed, r=rate: self._ipgo(prompt, seed, r) for rate in self.options.token_lr}
        found = {}
        for name, method in methods.items():
            parts = [method(seed) for seed in range(self.options.seeds)]
            found[name] = {key: [v for part in parts for v in part[key]] for key in GAINS}
            found[name] |= {key: sum(part[key] for part in parts) for key in COST}
            found[name]["parameters"] = parts[0]["parameters"]
        return found

    def _begin(self) -> None:
        self.counter.take()
        self.started = time.perf_counter()

    def _cost(self) -> dict[str, float]:
        """Of learning alone, from `_begin` on; pictures of fresh seeds only measure what was learned."""
        return {"seconds": time.perf_counter() - self.started, "evaluations": self.counter.take()}

    def _image(self, prompt: str, noise: Tensor, tokens: Any = None, grad: bool = False) -> Tensor:
        conditioning = self.generator.encode([prompt]).select([0] * len(noise))
        if tokens is not None:
            conditioning = tokens.condition(conditioning)
        with torch.set_grad_enabled(grad):
            # Plain autograd: recomputation would give gradients to inputs alone, not to the LoRA.
            return self.generator.generate(conditioning, noise, backprop_steps=1, checkpoint=False)

    def _ipgo(self, prompt: str, seed: int, rate: float) -> dict[str, Any]:
        config = OptimizeConfig(
            epochs=self.options.epochs, seeds=(seed,), seed=seed, learning_rate=rate, checkpoint=False
        )
        self._begin()
        result = train_tokens(self.generator, self.target, [prompt], config)
        cost = self._cost()
        tokens = result.best.to(self.generator.device)
        before, after = self._held_out([result.start_image, result.image], prompt)
        noise = self.generator.draw_noise(FRESH)
        fresh = [self._score(self._image(prompt, noise, t), prompt) for t in (None, tokens)]
        return {
            "target": (result.rewards - result.start_rewards).tolist(),
            "held-out": [after - before],
            "fresh seeds": (fresh[1] - fresh[0]).tolist(),
            "parameters": tokens.num_parameters,
        } | cost

    def _draft(self, prompt: str, seed: int, rate: float) -> dict[str, Any]:
        """Adam on a fresh LoRA; the best update counts."""
        noise, fresh = self.generator.draw_noise([seed]), self.generator.draw_noise(FRESH)
        raw = self._score(self._image(prompt, fresh), prompt)
        self._begin()
        first = self._image(prompt, noise)
        with fresh_lora(self.unet, self.options.rank, seed) as learned:
            optimizer = torch.optim.Adam(learned, lr=rate)
            start = self._score(first, prompt)
            best, image = start, first
            kept = [p.detach().clone() for p in learned]
            for left in reversed(range(self.options.epochs + 1)):  # the last one only evaluates, as IPGO's does
                made = self._image(prompt, noise, grad=left > 0)
                reward = self.target.score(made, [prompt])
                if float(reward.detach()) > float(best):
                    best, image = reward.detach(), made.detach()
                    kept = [p.detach().clone() for p in learned]
                if not left:
                    break
                optimizer.zero_grad()
                torch.autograd.backward(-reward.sum())
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
            cost = self._cost()
            with torch.no_grad():
                for parameter, value in zip(learned, kept, strict=True):
                    parameter.copy_(value)
            after = self._score(self._image(prompt, fresh), prompt)
        judged = self._held_out([first, image], prompt)
        return {
            "target": (best - start).tolist(),
            "held-out": [judged[1] - judged[0]],
            "fresh seeds": (after - raw).tolist(),
            "parameters": sum(p.numel() for p in learned),
        } | cost

    @torch.no_grad()
    def _score(self, images: Tensor, prompt: str) -> Tensor:
        return self.target.score(images, [prompt] * len(images))

    @torch.no_grad()
    def _held_out(self, images: Sequence[Tensor], prompt: str) -> list[float]:
        return [float(self.held_out.score(i.to(self.generator.device), [prompt])[0]) for i in images]


def report(cells: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """One row per method, intervals over prompts."""
    rows, last = [], list(next(iter(cells.values())))[-1]
    for method in next(iter(cells.values())):
        done = {prompt: cell[method] for prompt, cell in cells.items() if method in cell}
        row: dict[str, Any] = {"method": method, "parameters": next(iter(done.values()))["parameters"]}
        for key in GAINS:
            values = [(prompt, v) for prompt, found in done.items() for v in found[key]]
            row[f"{key} gain"] = shown(interval([v for _, v in values], [p for p, _ in values]))
            theirs = [v for prompt in done for v in cells[prompt][last][key]]
            minus = [a - b for (_, a), b in zip(values, theirs, strict=True)]
            row[f"{key} minus last"] = shown(interval(minus, [p for p, _ in values])) if method != last else ""
        count = len(done) * options.seeds
        row["evaluations"] = round(sum(found["evaluations"] for found in done.values()) / count)
        row["seconds"] = f"{sum(found['seconds'] for found in done.values()) / count:.1f}"
        rows.append(row)
    what = options.model or "demo model"
    title = f"DRaFT-1 and IPGO on the {what}: {len(cells)} prompts x {options.seeds} seeds, {options.epochs} updates"
    return write_table(rows, options.out / "table", title)


def main() -> None:
    """Run what is not there yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--lora-lr", type=float, nargs="*", default=[1e-3])
    parser.add_argument("--token-lr", type=float, nargs="*", default=[1e-3])
    parser.add_argument("--out", type=Path, default=Path("results/draft"))
    options = parse(parser)
    bench, cells = Bench(options), {}
    for prompt in read_prompts(options):
        path = cells_of(options) / f"{slug(prompt)}.json"
        cells[prompt] = cached(path, lambda p=prompt: bench.run(p))
        print(prompt, {k: f"{sum(v['target']) / len(v['target']):.3f}" for k, v in cells[prompt].items()}, flush=True)
    print(report(cells, options))


if __name__ == "__main__":
    main()
