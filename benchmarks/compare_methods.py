"""Raw prompt, Best-of-N and random search at equal cost, IPGO, noise with and without regularizer, joint: one table.

    python -m benchmarks.compare_methods --out results/compare [--shard 0/4] [--report]

Every (method, prompt) is written when it is done; a second call goes on where the first stopped. Several processes may
share the work with --shard i/n; --report makes the table of what is there. On the embedded demo model unless --model
says otherwise; scores of the demo model say nothing about SD1.5.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import (
    FRESH,
    add_generator_options,
    add_prompt_options,
    cached,
    cells_of,
    load_rewards,
    make_generator,
    parse,
    read_prompts,
)
from benchmarks.compare_report import METHODS, path_of, put_into_readme, report
from ipgo_engine import (
    JointConfig,
    NoiseConfig,
    NoiseRegularizer,
    OptimizeConfig,
    TokenConfig,
    optimize_jointly,
    optimize_noise,
    train_tokens,
)
from ipgo_engine.noise import CHANNEL_DIM


class Bench:
    """Generator, target reward, held-out reward, and how each is run for one prompt with all seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.generator, self.counter = make_generator(options)
        self.target, self.held_out = load_rewards(options)
        self.regularizer = NoiseRegularizer()
        self.seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
        length = options.token_length
        self.tokens = OptimizeConfig(
            tokens=TokenConfig(prefix_length=length, suffix_length=length),
            epochs=options.epochs,
            backprop_steps=options.token_backprop or None,
            learning_rate=options.token_lr,
            monitor_every=options.epochs,
            checkpoint=False,
        )
        self.noise = NoiseConfig(
            iterations=options.iterations,
            learning_rate=options.noise_lr,
            backprop_steps=options.noise_backprop or None,
            which=options.which,
            monitor_every=options.iterations,
            checkpoint=False,
        )

    def run(self, method: str, prompt: str) -> dict[str, Any]:
        """Scores of every seed's image, evaluations per image, seconds."""
        self.counter.take()
        started = time.perf_counter()
        found = self._methods()[method](prompt)
        found |= {"evaluations": self.counter.take() / len(self.seeds), "seconds": time.perf_counter() - started}
        if method == "ipgo":
            found |= self._transfer(prompt, found.pop("tokens"))
        return found

    def _methods(self) -> dict[str, Callable[[str], dict[str, Any]]]:
        free = replace(self.noise, regularization=0.0, learning_rate=self.options.free_lr)
        return {
            "raw": self._raw,
            "best-of-n": self._best_of_n,
            "random search": self._random_search,
            "ipgo": self._ipgo,
            "noise": lambda prompt: self._noise(prompt, self.noise),
            "noise, no regularizer": lambda prompt: self._noise(prompt, free),
            "joint": self._joint,
        }

    @torch.no_grad()
    def _images(self, prompt: str, seeds: list[int], tokens: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        conditioning = self.generator.encode([prompt]).select([0] * len(seeds))
        noise = self.generator.draw_noise(seeds)
        return self.generator.generate(tokens.condition(conditioning) if tokens else conditioning, noise), noise

    @torch.no_grad()
    def _scores(self, images: torch.Tensor, prompt: str, noise: torch.Tensor) -> dict[str, Any]:
        images = images.to(self.generator.device)
        texts = [prompt] * len(images)
        return {
            "target": self.target.score(images, texts).tolist(),
            "held_out": self.held_out.score(images, texts).tolist(),
            "probability": self.regularizer.measure(noise, CHANNEL_DIM)[1].tolist(),
            "thumbnails": [to_bytes(image) for image in images],
        }

    def _raw(self, prompt: str) -> dict[str, Any]:
        images, noise = self._images(prompt, list(self.seeds))
        return self._scores(images, prompt, noise)

    @torch.no_grad()
    def _best_of_n(self, prompt: str) -> dict[str, Any]:
        """Candidates of every seed: the seed itself, then seeds of its own. The report picks N.

        Random search draws from 20,000 (seed + 1) on, among which are candidates of other seeds here, never of its own.
        """
        rows = []
        for seed in self.seeds:
            candidates = [seed, *(10_000 * (seed + 1) + i for i in range(self.options.most - 1))]
            row: defaultdict[str, list[Any]] = defaultdict(list)
            for start in range(0, len(candidates), self.options.batch):
                images, noise = self._images(prompt, candidates[start : start + self.options.batch])
                for key, value in self._scores(images, prompt, noise).items():
                    row[key] += value
            rows.append(row | {"thumbnails": records_only(row["target"], row["thumbnails"])})
        return {"candidates": rows}

    @torch.no_grad()
    def _random_search(self, prompt: str) -> dict[str, Any]:
        """Hill climbing from every seed: a step between the best noise and fresh noise, which is Gaussian again."""
        pools: list[defaultdict[str, list[Any]]] = [defaultdict(list) for _ in self.seeds]
        conditioning = self.generator.encode([prompt]).select([0] * len(self.seeds))
        best, top = self.generator.draw_noise(self.seeds), torch.full((len(self.seeds),), -math.inf)
        angle = self.options.search_angle
        for turn in range(self.options.most):
            fresh = self.generator.draw_noise([20_000 * (seed + 1) + turn for seed in self.seeds])
            noise = math.cos(angle) * best + math.sin(angle) * fresh if turn else best
            found = self._scores(self.generator.generate(conditioning, noise), prompt, noise)
            for i, row in enumerate(pools):
                for key, values in found.items():
                    row[key].append(values[i])
            scores = torch.tensor(found["target"])
            better = (scores > top).to(best.device).view(-1, *[1] * (best.ndim - 1))
            best, top = torch.where(better, noise, best), torch.maximum(scores, top)
        return {"candidates": [row | {"thumbnails": records_only(row["target"], row["thumbnails"])} for row in pools]}

    def _ipgo(self, prompt: str) -> dict[str, Any]:
        """Tokens of their own for every seed, as in the paper's prompt-wise training, from a draw of their own."""
        results = [
            train_tokens(self.generator, self.target, [prompt], replace(self.tokens, seeds=(seed,), seed=seed))
            for seed in self.seeds
        ]
        images, noise = torch.cat([r.image for r in results]), self.generator.draw_noise(self.seeds)
        learned = {"tokens": [r.best for r in results], "curve": [curve(r) for r in results]}
        return self._scores(images, prompt, noise) | learned

    def _transfer(self, prompt: str, tokens: list[Any]) -> dict[str, Any]:
        """The target on fresh seeds, one for each set of tokens, with the tokens and without them."""
        found: dict[str, list[float]] = {"fresh": [], "fresh_raw": []}
        for seed, own in zip(FRESH, tokens, strict=False):
            for name, learned in (("fresh", own), ("fresh_raw", None)):
                images, noise = self._images(prompt, [seed], learned)
                found[name] += self._scores(images, prompt, noise)["target"]
        return found

    def _noise(self, prompt: str, config: NoiseConfig) -> dict[str, Any]:
        prompts = [prompt] * len(self.seeds)
        result = optimize_noise(self.generator, self.target, prompts, config, seeds=self.seeds)
        return self._scores(result.image, prompt, result.best) | {"curve": curve(result)}

    def _joint(self, prompt: str) -> dict[str, Any]:
        """One set of tokens, from one draw, for all seeds."""
        prompts = [prompt] * len(self.seeds)
        config = JointConfig(tokens=replace(self.tokens, seed=self.seeds[0]), noise=self.noise)
        result = optimize_jointly(self.generator, self.target, prompts, config, seeds=self.seeds)
        return self._scores(result.image, prompt, result.best[1]) | {"curve": curve(result)}


def curve(result: Any) -> list[list[float | None]]:
    """Reward and smallest P(z) of every step."""
    return [[event.reward, event.probability] for event in result.history]


def records_only(scores: list[float], thumbnails: list[str]) -> list[str | None]:
    """Thumbnails of the candidates that were the best when they came; the others can never be chosen."""
    best, kept = float("-inf"), []
    for score, thumbnail in zip(scores, thumbnails, strict=True):
        kept.append(thumbnail if score > best else None)
        best = max(best, score)
    return kept


def to_bytes(image: torch.Tensor) -> str:
    """A 96-pixel PNG in base64: small enough to travel, large enough to look at."""
    import base64
    import io

    array = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).resize((96, 96)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Run the shard, or make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser)
    parser.add_argument("--out", type=Path, default=Path("results/compare"))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--token-length", type=int, default=10, help="of prefix and of suffix")
    parser.add_argument("--token-backprop", type=int, default=1, help="K; 0 for all model steps")
    parser.add_argument("--token-lr", type=float, default=1e-3)
    parser.add_argument("--noise-backprop", type=int, default=0)
    parser.add_argument("--noise-lr", type=float, default=1e-2)
    parser.add_argument("--free-lr", type=float, default=1e-3, help="noise learning rate without the regularizer")
    parser.add_argument("--which", default="all", choices=["initial", "all"], help="which noise is optimized")
    parser.add_argument("--most", type=int, default=256, help="candidates per seed for Best-of-N and random search")
    parser.add_argument("--search-angle", type=float, default=0.5, help="radians between a random search's candidates")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th prompt, starting with the i-th")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--readme", action="store_true", help="with --report: put figure and table into the README")
    options = parse(parser)
    prompts = read_prompts(options)
    if not options.report:
        index, count = (int(part) for part in options.shard.split("/"))
        bench = Bench(options)
        for method in options.methods:
            for prompt in prompts[index::count]:
                cached(path_of(cells_of(options), method, prompt), lambda m=method, p=prompt: bench.run(m, p))
                print(f"{method}: {prompt}", flush=True)
    if options.report or options.shard == "0/1":
        print(report(options.out, cells_of(options), prompts, options.model or "demo model"))
    if options.readme:
        put_into_readme(options.out, cells_of(options), prompts)


if __name__ == "__main__":
    main()
