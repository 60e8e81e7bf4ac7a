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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.claims_table import Budget, Entry, questions
from benchmarks.common import PROMPTS, add_generator_options, cached, interval, make_generator, shown, write_table
from benchmarks.degenerate import degenerate_table
from ipgo_engine import NoiseConfig, OptimizeConfig, optimize_noise, rewards, train_tokens

FRESH = (1001, 1002, 1003)  # seeds nothing was trained on
GAINS = ("target", "held-out", "fresh seeds", "unseen prompts")


class Runner:
    """Runs one entry on one unit: a prompt, or a group of prompts that share tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self._generators, self._rewards = options, {}, {}
        self.seeds = tuple(range(options.seeds))

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

    def run(self, entry: Entry, prompts: Sequence[str], unseen: Sequence[str]) -> dict[str, Any]:
        """Gains per image, P(z), cost; tokens of one prompt and one seed are learned anew for every seed."""
        generator, counter = self.generator(entry)
        target = self.reward(entry.reward or self.options.reward)
        counter.take()
        started = time.perf_counter()
        results: list[Any] = []
        if isinstance(entry.config, OptimizeConfig):
            alone = entry.batch == 1 and len(entry.config.seeds) == 1
            seeds = [(seed,) for seed in self.seeds] if alone else [entry.config.seeds]
            configs = [replace(entry.config, seeds=s) for s in seeds]
            results = [train_tokens(generator, target, list(prompts), config) for config in configs]
        elif isinstance(entry.config, NoiseConfig):
            rows = [prompt for prompt in prompts for _ in self.seeds]
            results = [optimize_noise(generator, target, rows, entry.config, seeds=self.seeds * len(prompts))]
        images = sum(len(result.prompts) for result in results)
        found = {"seconds": (time.perf_counter() - started) / images, "evaluations": counter.take() / images}
        found |= self._gains(results, generator.device)
        if isinstance(entry.config, OptimizeConfig):
            for name, texts in (("fresh seeds", prompts), ("unseen prompts", unseen)):
                found[name] = [gain for r in results for gain in self._transfer(generator, target, r.best, texts)]
        return found

    @torch.no_grad()
    def _gains(self, results: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """Target before and after, gains of target and held-out reward, P(z): one value per image."""
        judge = self.reward(self.options.held_out)
        found: dict[str, Any] = {key: [] for key in ("start", "end", "target", "held-out", "P(z)")}
        for result in results:
            found["start"] += result.start_rewards.tolist()
            found["end"] += result.rewards.tolist()
            found["target"] += (result.rewards - result.start_rewards).tolist()
            pair = (judge.score(i.to(device), result.prompts) for i in (result.start_image, result.image))
            before, after = pair
            found["held-out"] += (after - before).tolist()
            found["P(z)"] += [] if result.probability is None else result.probability.tolist()
        return found

    @torch.no_grad()
    def _transfer(self, generator: Any, target: Any, tokens: Any, prompts: Sequence[str]) -> list[float]:
        """Gains on fresh seeds."""
        gains = []
        tokens = tokens.to(generator.device)
        noise = generator.draw_noise(FRESH)
        for prompt in prompts:
            raw = generator.encode([prompt]).select([0] * len(FRESH))
            texts = [prompt] * len(FRESH)
            after, before = (target.score(generator.generate(c, noise), texts) for c in (tokens.condition(raw), raw))
            gains += (after - before).tolist()
        return gains


def units(entry: Entry, prompts: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """(prompts trained on, prompts of the transfer test): one per prompt, or per whole group."""
    if entry.batch == 1:
        return [([prompt], []) for prompt in prompts]
    starts = range(0, len(prompts) - entry.batch + 1, entry.batch)
    groups = [list(prompts[start : start + entry.batch]) for start in starts]
    return [(group, [p for p in prompts if p not in group][:10]) for group in groups]


def cell(out: Path, entry: Entry, options: argparse.Namespace, group: Sequence[str], unseen: Sequence[str]) -> Path:
    """The file of one (settings, unit): everything that determines the result is in its name."""
    shared = {k: getattr(options, k) for k in ("model", "steps", "guidance", "sampler", "eta", "held_out", "seeds")}
    kind = type(entry.config).__name__
    what = [kind, asdict(entry.config), shared | entry.generator, entry.reward or options.reward, unseen]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    name = "-".join("".join(c if c.isalnum() else "_" for c in prompt) for prompt in group)[:80]
    return out / "cells" / digest / f"{name}.json"


def table_row(entry: Entry, done: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means with 95 % intervals over units, and the difference to the question's first entry, paired by prompt."""
    row: dict[str, Any] = {"setting": entry.label, "units": len(done)}
    for key in GAINS:
        values = [(unit, v) for unit, found in done.items() for v in found.get(key, [])]
        row[f"{key} gain"] = shown(interval([v for _, v in values], [u for u, _ in values])) if values else ""
    both = [u for u in done if u in reference]
    pairs = [(u, float(np.mean(done[u]["target"]) - np.mean(reference[u]["target"]))) for u in both]
    same = done is reference or not pairs
    row["minus first"] = "" if same else shown(interval([v for _, v in pairs], [u for u, _ in pairs]))
    chances = [v for found in done.values() for v in found["P(z)"]]
    row["P(z) median"] = f"{np.median(chances):.2g}" if chances else ""
    row["evaluations"] = round(float(np.mean([found["evaluations"] for found in done.values()])))
    row["seconds"] = f"{np.mean([found['seconds'] for found in done.values()]):.1f}"
    return row


def report(name: str, entries: list[Entry], prompts: Sequence[str], options: argparse.Namespace) -> str:
    """Table and figure of one question, of the cells that are there."""
    found: list[tuple[Entry, dict[str, dict[str, Any]]]] = []
    for entry in entries:
        files = {" / ".join(g): cell(options.out, entry, options, g, unseen) for g, unseen in units(entry, prompts)}
        done = {unit: json.loads(file.read_text()) for unit, file in files.items() if file.exists()}
        if done:
            found.append((entry, done))
    if not found:
        return f"{name}: nothing measured yet\n"
    rows = [table_row(entry, done, found[0][1]) for entry, done in found]
    draw(name, found, options.out / f"{name}.png")
    what = options.model or "demo model"
    title = (
        f"{name}: {entries[0].reward or options.reward} on the {what}, {options.seeds} seeds, {options.epochs} updates"
    )
    return write_table(rows, options.out / name, title)


def draw(name: str, found: list[tuple[Entry, dict[str, dict[str, Any]]]], path: Path) -> None:
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
    names = list(questions(Budget(1, 1e-3, 1)))
    parser.add_argument("--question", nargs="*", choices=[*names, "degenerate"], default=[*names, "degenerate"])
    parser.add_argument("--list", type=Path, default=PROMPTS, help="file of prompts, one per line")
    parser.add_argument("--prompts", type=int, default=20, help="how many of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50, help="updates of tokens and of noise alike")
    parser.add_argument("--token-lr", type=float, default=1e-3)
    parser.add_argument("--released-basis", type=int, default=15, help="N of the released-code preset (30 on SD1.5)")
    parser.add_argument("--reward", default="demo-clip")
    parser.add_argument("--held-out", default="demo-judge")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th unit, starting with the i-th")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("results/claims"))
    options = parser.parse_args()
    lines = [line for line in options.list.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = lines[: options.prompts]
    budget = Budget(options.epochs, options.token_lr, options.released_basis)
    table, runner = questions(budget), Runner(options)
    index, count = (int(part) for part in options.shard.split("/"))
    for name in options.question:
        if name == "degenerate":
            print(degenerate_table(options, prompts, options.out))
            continue
        # Unit by unit, not setting by setting: an interrupted run leaves comparable rows.
        jobs = [(i, entry, unit) for entry in table[name] for i, unit in enumerate(units(entry, prompts))]
        for i, entry, (group, unseen) in sorted(jobs, key=lambda job: job[0]):
            if i % count == index and not options.report:
                path = cell(options.out, entry, options, group, unseen)
                cached(path, lambda e=entry, g=group, u=unseen: runner.run(e, g, u))
                print(f"{name}: {entry.label}: {', '.join(group)}", flush=True)
        print(report(name, table[name], prompts, options), flush=True)


if __name__ == "__main__":
    main()
