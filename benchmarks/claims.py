"""The papers' claims: one table and one figure per question, on the embedded demo model unless --model says otherwise.

    python -m benchmarks.claims --question constraints                              # one question
    python -m benchmarks.claims --prompts 4 --seeds 1 --epochs 10                   # a first look at all of them
    python -m benchmarks.claims --prompts 20 --seeds 3 --epochs 50 --shard 0/2      # everything, one of two processes
    python -m benchmarks.claims --question constraints --report                     # the table of what is there

Every (settings, prompt) is one JSON file: a second call goes on where the first stopped, and questions that share
settings share files. Gains are against the same seeds of the raw prompt; intervals resample prompts. Scores of the demo
model say nothing about SD1.5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.claims_table import Budget, Entry, questions
from benchmarks.common import (
    FRESH,
    add_generator_options,
    add_prompt_options,
    cached,
    interval,
    load_rewards,
    make_generator,
    parse,
    read_prompts,
    shortened,
    shown,
    write_table,
)
from benchmarks.degenerate import degenerate_table
from ipgo_engine import NoiseConfig, OptimizeConfig, optimize_noise, rewards, train_tokens

CATEGORIES = Path(__file__).parent / "demo_categories.txt"
RARE = ("size", "first_seed", "reward_path", "held_out_path", "categories")
GAINS = ("target", "held-out", "fresh seeds", "unseen prompts", "unseen categories")
Cells = dict[str, dict[str, Any]]  # what was found, by unit


class Runner:
    """Runs one entry on one unit: a prompt, or a group of prompts that share tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self._generators, self._raw = options, {}, {}
        target, held_out = load_rewards(options)
        self._rewards = {options.reward: target, options.held_out: held_out}
        self.seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))

    def generator(self, entry: Entry) -> tuple[Any, Any]:
        """The sampler of an entry and its evaluation counter; one per setting."""
        key = json.dumps(entry.generator)
        if key not in self._generators:
            self._generators[key] = make_generator(self.options, **entry.generator)
        return self._generators[key]

    def reward(self, name: str) -> Any:
        """A reward, loaded once."""
        if name not in self._rewards:
            self._rewards[name] = rewards.load(name, device=self.options.device)
        return self._rewards[name]

    def run(self, entry: Entry, unit: Unit) -> dict[str, Any]:
        """Gains per image, P(z), cost; tokens are learned anew for every seed.

        Those that seeds of the entry share are learned as often, each time from other first values.
        """
        prompts = unit.prompts
        generator, counter = self.generator(entry)
        target = self.reward(entry.reward or self.options.reward)
        counter.take()
        started = time.perf_counter()
        results: list[Any] = []
        if isinstance(entry.config, OptimizeConfig):
            results = [train_tokens(generator, target, list(prompts), config) for config in self._drawn(entry.config)]
        elif isinstance(entry.config, NoiseConfig):
            rows = [prompt for prompt in prompts for _ in self.seeds]
            results = [optimize_noise(generator, target, rows, entry.config, seeds=self.seeds * len(prompts))]
        images = sum(len(result.prompts) for result in results)
        found = {"seconds": (time.perf_counter() - started) / images, "evaluations": counter.take() / images}
        found |= self._gains(results, generator.device)
        if isinstance(entry.config, OptimizeConfig):
            tests = {"fresh seeds": prompts, "unseen prompts": unit.unseen, "unseen categories": unit.elsewhere}
            # As many fresh pictures however many sets of tokens there are.
            fresh = [FRESH] if len(results) == 1 else [(seed,) for seed in FRESH]
            for name, texts in tests.items():
                pairs = zip(results, fresh, strict=False)
                found[name] = [g for r, seeds in pairs for g in self._transfer(entry, generator, r.best, texts, seeds)]
        return found

    def _drawn(self, config: OptimizeConfig) -> list[OptimizeConfig]:
        """One for every set of tokens: what it is trained on, and the seed of its first values."""
        draw, shared = self.options.draw, len(config.seeds) > 1
        if draw is None:
            return [replace(config, seeds=config.seeds if shared else (seed,), seed=seed) for seed in self.seeds]
        seeds = [config.seeds] if shared else [(seed,) for seed in self.seeds]
        return [replace(config, seeds=own, seed=draw) for own in seeds]

    @torch.no_grad()
    def _gains(self, results: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """Gains of target and held-out reward, P(z): one value per image."""
        judge = self.reward(self.options.held_out)
        found: dict[str, Any] = {key: [] for key in ("target", "held-out", "P(z)")}
        for result in results:
            found["target"] += (result.rewards - result.start_rewards).tolist()
            before, after = (judge.score(i.to(device), result.prompts) for i in (result.start_image, result.image))
            found["held-out"] += (after - before).tolist()
            found["P(z)"] += [] if result.probability is None else result.probability.tolist()
        return found

    @torch.no_grad()
    def _transfer(
        self, entry: Entry, generator: Any, tokens: Any, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[float]:
        """Gains on fresh seeds."""
        target, tokens = self.reward(entry.reward or self.options.reward), tokens.to(generator.device)
        gains = []
        for prompt in prompts:
            key = (json.dumps(entry.generator), target.name, prompt, seeds)  # raw pictures are the same for all tokens
            if key not in self._raw:
                self._raw[key] = self._fresh(generator, target, prompt, seeds)
            gains += (self._fresh(generator, target, prompt, seeds, tokens) - self._raw[key]).tolist()
        return gains

    def _fresh(self, generator: Any, target: Any, prompt: str, seeds: Sequence[int], tokens: Any = None) -> Any:
        """Scores of the fresh seeds."""
        raw = generator.encode([prompt]).select([0] * len(seeds))
        images = generator.generate(tokens.condition(raw) if tokens else raw, generator.draw_noise(seeds))
        return target.score(images, [prompt] * len(seeds))


@dataclass(frozen=True)
class Unit:
    """Prompts trained on together, and prompts of the transfer test."""

    prompts: list[str]
    unseen: list[str] = field(default_factory=list)  # of the same category where there are categories
    elsewhere: list[str] = field(default_factory=list)  # of other categories


def units(entry: Entry, prompts: Sequence[str], categories: Sequence[list[str]]) -> list[Unit]:
    """One per prompt, or per whole group."""
    if entry.batch == 1:
        fewest, most = entry.words
        return [Unit([prompt]) for prompt in prompts if fewest <= len(prompt.split()) <= most]
    if entry.among == "list":
        return [Unit(group, [p for p in prompts if p not in group][:10]) for group in groups(prompts, entry.batch)]
    if entry.among == "category":
        own = [(c, group) for c in categories for group in groups(c, entry.batch)]
    else:  # as many groups, taken across the categories
        dealt = [prompt for row in zip(*categories, strict=True) for prompt in row]
        own = [(dealt, group) for group in groups(dealt, entry.batch)]
    everything = [prompt for c in categories for prompt in c]
    return [
        Unit(group, [p for p in near if p not in group][:4], [p for p in everything if p not in near][:8])
        for near, group in own
    ]


def groups(prompts: Sequence[str], size: int) -> list[list[str]]:
    """The whole groups of that size."""
    return [list(prompts[i : i + size]) for i in range(0, len(prompts) - size + 1, size)]


def cell(out: Path, entry: Entry, options: argparse.Namespace, unit: Unit) -> Path:
    """The file of one (settings, unit): everything that determines the result is in its name."""
    shared = {k: getattr(options, k) for k in ("model", "steps", "guidance", "sampler", "eta", "held_out", "seeds")}
    # What is rarely given counts only where it is, so that it does not change the other names.
    shared |= {k: str(v) for k in RARE if (v := getattr(options, k))}
    if isinstance(entry.config, OptimizeConfig):
        several = options.draw is None and (options.seeds > 1 or options.first_seed > 0)
        shared |= {"draw": "as the image"} if several else {"draw": options.draw} if options.draw else {}
        shared |= {"elsewhere": unit.elsewhere} if unit.elsewhere else {}
    kind = type(entry.config).__name__
    what = [kind, asdict(entry.config), shared | entry.generator, entry.reward or options.reward, unit.unseen]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    name = "-".join("".join(c if c.isalnum() else "_" for c in prompt) for prompt in unit.prompts)
    return out / "cells" / digest / f"{shortened(name)}.json"


def table_row(entry: Entry, done: Cells, others: Sequence[Cells], reference: Cells) -> dict[str, Any]:
    """Means with 95 % intervals over units, and the differences to the reference, paired by unit."""
    row: dict[str, Any] = {"setting": entry.label, "units": len(done)}
    for key in GAINS:
        values = [(unit, v) for unit, found in done.items() for v in found.get(key, [])]
        row[f"{key} gain"] = shown(interval([v for _, v in values], [u for u, _ in values])) if values else ""
    for key in GAINS[:3]:
        both = [u for u in done if done is not reference and done[u].get(key) and reference.get(u, {}).get(key)]
        pairs = [(u, float(np.mean(done[u][key]) - np.mean(reference[u][key]))) for u in both]
        row[f"{key} minus"] = shown(interval([v for _, v in pairs], [u for u, _ in pairs])) if pairs else ""
    shared = [u for u in done if all(u in cells for cells in others)]
    best = [u for u in shared if np.mean(done[u]["target"]) >= max(np.mean(cells[u]["target"]) for cells in others)]
    row["best for"] = f"{len(best)} of {len(shared)}" if shared else ""
    chances = [v for found in done.values() for v in found["P(z)"]]
    row["P(z) median"] = f"{np.median(chances):.2g}" if chances else ""
    row["evaluations"] = round(float(np.mean([found["evaluations"] for found in done.values()])))
    row["seconds"] = f"{np.mean([found['seconds'] for found in done.values()]):.1f}"
    return row


def report(name: str, jobs: Sequence[tuple[Entry, Sequence[Unit]]], options: argparse.Namespace) -> str:
    """Table and figure of one question, of the cells that are there."""
    found: list[tuple[Entry, Cells]] = []
    for entry, members in jobs:
        files = {" / ".join(unit.prompts): cell(options.out, entry, options, unit) for unit in members}
        done = {unit: json.loads(file.read_text()) for unit, file in files.items() if file.exists()}
        if done:
            found.append((entry, done))
    if not found:
        return f"{name}: nothing measured yet\n"
    first, reference = next(((e, c) for e, c in found if e.label == options.reference), found[0])
    rows = [table_row(entry, done, [cells for _, cells in found], reference) for entry, done in found]
    kept = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    rows = [{name: row[name] for name in kept} for row in rows]
    draw(name, found, options.out / f"{name}.png")
    what = options.model or "demo model"
    size = f"{options.seeds} seeds, {options.epochs} updates, differences to {first.label!r}"
    title = f"{name}: {jobs[0][0].reward or options.reward} on the {what}, {size}"
    return write_table(rows, options.out / name, title)


def draw(name: str, found: list[tuple[Entry, Cells]], path: Path) -> None:
    """Every gain of every setting, with its interval."""
    keys = [key for key in GAINS if any(f.get(key) for _, done in found for f in done.values())]
    fig = Figure(figsize=(3 * len(keys), 0.4 * len(found) + 1.2), layout="constrained")
    for ax, key in zip(fig.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for y, (_, done) in enumerate(found):
            values = [(unit, v) for unit, f in done.items() for v in f.get(key, [])]
            if values:
                mean, low, high = interval([v for _, v in values], [u for u, _ in values])
                ax.errorbar(mean, -y, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
        ax.axvline(0, color="grey", lw=0.5)
        ax.set_yticks([-y for y in range(len(found))], [entry.label for entry, _ in found], fontsize=7)
        ax.set_title(f"{key} gain", fontsize=8)
    fig.suptitle(name, fontsize=9)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Run the shard's cells, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    add_prompt_options(parser)
    names = list(questions(Budget(1, 1e-3, 1e-2, None, None, 1)))
    parser.add_argument("--question", nargs="*", choices=[*names, "degenerate"], default=[*names, "degenerate"])
    parser.add_argument("--epochs", type=int, default=50, help="updates of tokens and of noise alike")
    parser.add_argument("--token-lr", type=float, default=1e-3)
    parser.add_argument("--noise-lr", type=float, default=1e-2)
    parser.add_argument("--token-backprop", type=int, default=1, help="K; 0 for all model steps")
    parser.add_argument("--noise-backprop", type=int, default=0, help="K; 0 for all model steps")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--draw", type=int, help="seed of the tokens' first values (default: the image's own seed)")
    parser.add_argument("--categories", type=Path, help="lines `name: prompt, prompt, ...` (default: the demo model's)")
    parser.add_argument("--released-basis", type=int, default=15, help="N of the released-code preset (30 on SD1.5)")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th unit, starting with the i-th")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--reference", help="label of the setting the others are compared with (default: the first)")
    parser.add_argument("--out", type=Path, default=Path("results/claims"))
    options = parse(parser)
    prompts = read_prompts(options)
    categories = read_categories(options.categories or CATEGORIES)
    index, count = (int(part) for part in options.shard.split("/"))
    table, runner = questions(budget_of(options)), None if options.report else Runner(options)
    for name in options.question:
        if name == "degenerate":
            print(degenerate_table(options, prompts, options.out))
            continue
        jobs = [(entry, units(entry, prompts, categories)) for entry in table[name]]
        # Unit by unit, not setting by setting: an interrupted run leaves comparable rows.
        for i, row in enumerate(zip_longest(*(members for _, members in jobs))):
            for (entry, _), unit in zip(jobs, row, strict=True):
                if unit and runner and i % count == index:
                    cached(cell(options.out, entry, options, unit), lambda r=runner, e=entry, u=unit: r.run(e, u))
                    print(f"{name}: {entry.label}: {', '.join(unit.prompts)}", flush=True)
        print(report(name, jobs, options), flush=True)


def budget_of(options: argparse.Namespace) -> Budget:
    """What the command line sets; 0 model steps mean all of them."""
    steps = (options.token_backprop or None, options.noise_backprop or None)
    return Budget(options.epochs, options.token_lr, options.noise_lr, *steps, options.released_basis)


def read_categories(path: Path) -> list[list[str]]:
    """Lines `name: prompt, prompt, ...`; as many prompts in every category."""
    return [[p.strip() for p in line.partition(":")[2].split(",")] for line in path.read_text().splitlines() if line]


if __name__ == "__main__":
    main()
