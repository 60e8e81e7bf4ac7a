"""From what the engine returned to pictures, curves, tables and files."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Cancelled
from ..formats.noise import write_noise
from ..loop import spread
from ..noise import CHANNEL_DIM, NoiseRegularizer
from ..optimize import Result
from ..report import before_after, draw_curves, plain_table, save_figure, save_image, slug, write_csv, write_json
from ..tokens import IPGOTokens
from .evaluate import best_of, images_at_equal_cost, rate, render
from .folder import RUN_FILE
from .session import Session

IN_GRID = 24  # rows of the before/after picture; more would be a picture nobody can open


@dataclass
class Outcome:
    """One call of the engine."""

    rows: list[tuple[str, int]]
    prompts: list[str]
    result: Result[Any]
    last_images: Tensor | None
    seconds: float


@dataclass
class Picture:
    """One prompt and seed: images (3, H, W) and what goes into the table."""

    prompt: str
    seed: int
    before: Tensor
    best: Tensor
    last: Tensor | None = None
    scores: dict[str, Any] = field(default_factory=dict)


def tokens_of(result: Result[Any]) -> IPGOTokens | None:
    """The learned tokens, if any."""
    parts = result.best if isinstance(result.best, tuple) else (result.best,)
    return next((part for part in parts if isinstance(part, IPGOTokens)), None)


def noise_of(result: Result[Any]) -> Tensor | None:
    """The learned noise, if any."""
    parts = result.best if isinstance(result.best, tuple) else (result.best,)
    return next((part for part in parts if isinstance(part, Tensor)), None)


def write_results(session: Session, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Fill the results folder; the score table as text."""
    folder, several = session.folder, len(outcomes) > 1
    pictures: list[Picture] = []
    for number, outcome in enumerate(outcomes, start=1):
        name = f"-{number:02d}-{slug(outcome.prompts[0])}" if several else ""
        _write_learned(session, outcome, name)
        pictures += _pictures(session, outcome)
    _write_images(session, pictures)
    title = f"{session.command}: {session.rewards.target.name}"
    histories = {outcome.prompts[0] if several else session.command: outcome.result.history for outcome in outcomes}
    save_figure(folder / "curves.png", draw_curves(histories, reward=session.rewards.target.name, title=title))
    records = [{"prompt": p.prompt, "seed": p.seed, **p.scores} for p in pictures]
    write_csv(folder / "scores.csv", records)
    runs = [
        {"prompts": o.prompts, "stopped": o.result.stopped, "seconds": o.seconds, "history": _history(o.result)}
        for o in outcomes
    ]
    stopped = "finished" if all(o.result.stopped == "finished" for o in outcomes) else outcomes[-1].result.stopped
    if session.interrupt.requested:
        stopped = "cancelled"
    record = {**session.record, "stopped": stopped, "seconds": seconds, "scores": records, "runs": runs}
    write_json(folder / RUN_FILE, record)
    return plain_table(records + _mean(records))


def _history(result: Result[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in asdict(event).items() if key != "images"} for event in result.history]


def _mean(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A last line with the means, where there is more than one picture."""
    if len(records) < 2:
        return []
    line: dict[str, Any] = {"prompt": f"mean of {len(records)}", "seed": None}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if isinstance(record.get(key), float)]
        if len(values) == len(records):
            line[key] = statistics.fmean(values)
    return [line]


def _write_learned(session: Session, outcome: Outcome, name: str) -> None:
    tokens, noise = tokens_of(outcome.result), noise_of(outcome.result)
    settings = {"generator": session.settings, "config": json.loads(json.dumps(asdict(session.config)))}
    if tokens is not None:
        tokens.save(session.folder / f"tokens{name}.safetensors", preset=session.arguments.preset, run=settings)
    if noise is not None:
        rows = {"prompts": [p for p, _ in outcome.rows], "seeds": [s for _, s in outcome.rows]}
        labels = {"encoder": session.generator.encoder, "reward": session.rewards.target.name, "run": settings}
        write_noise(session.folder / f"noise{name}.safetensors", noise, **rows, **labels)


def _pictures(session: Session, outcome: Outcome) -> list[Picture]:
    """Images of every row, with their scores."""
    rows, before, best = _all_rows(session, outcome)
    last = outcome.last_images
    last = last.float().cpu() if last is not None and len(last) == len(rows) else None
    pictures = [
        Picture(prompt, seed, before[i], best[i], None if last is None else last[i])
        for i, (prompt, seed) in enumerate(rows)
    ]
    _score(session, pictures)
    _probabilities(session, outcome, pictures)
    with contextlib.suppress(Cancelled):  # Ctrl-C while comparing: the columns that are missing stay empty
        _compare(session, outcome, pictures)
    return pictures


def _all_rows(session: Session, outcome: Outcome) -> tuple[list[tuple[str, int]], Tensor, Tensor]:
    """Rows, images before and best. The engine reports a part of the rows when tokens learn from many prompts."""
    result, rows = outcome.result, outcome.rows
    reported = rows if len(result.image) == len(rows) else [rows[i] for i in spread(len(rows), len(result.image))]
    if reported is not rows:
        prompts, seeds = [p for p, _ in rows], [s for _, s in rows]
        with contextlib.suppress(Cancelled):
            before = render(session.generator, prompts, seeds, size=session.size)
            best = render(session.generator, prompts, seeds, tokens=tokens_of(result), size=session.size)
            return rows, before, best
    return reported, result.start_image, result.image


def _score(session: Session, pictures: Sequence[Picture]) -> None:
    """Raw, last and best; parts of a sum and held-out rewards before and after."""
    prompts, device = [p.prompt for p in pictures], session.generator.device
    before, best = (torch.stack([getattr(p, name) for p in pictures]) for name in ("before", "best"))
    target = session.rewards.target
    columns: dict[str, Sequence[float | None]] = {"raw": rate(target, before, prompts, device)}
    last = [p.last for p in pictures if p.last is not None]
    columns["last"] = rate(target, torch.stack(last), prompts, device) if last else [None] * len(pictures)
    columns["best"] = rate(target, best, prompts, device)
    parts = [reward for reward, _ in session.rewards.parts] if len(session.rewards.parts) > 1 else []
    for reward in [*parts, *session.rewards.monitors]:
        columns[f"{reward.name} raw"] = rate(reward, before, prompts, device)
        columns[f"{reward.name} best"] = rate(reward, best, prompts, device)
    for i, picture in enumerate(pictures):
        picture.scores.update({name: values[i] for name, values in columns.items()})
        picture.scores["gain"] = picture.scores["best"] - picture.scores["raw"]


def _probabilities(session: Session, outcome: Outcome, pictures: Sequence[Picture]) -> None:
    """P(z) of the noise as drawn and of the best, where noise was optimized."""
    if outcome.result.probability is None:
        return
    config: Any = session.loop
    start = session.generator.draw_noise([p.seed for p in pictures])
    count = 1 if config.which == "initial" else start.shape[1]
    regularizer = NoiseRegularizer(config.block_size, config.permutations, config.seed)
    raw = regularizer.measure(start[:, :count], CHANNEL_DIM)[1].tolist()
    for picture, low, high in zip(pictures, raw, outcome.result.probability.tolist(), strict=True):
        picture.scores.update({"P(z) raw": low, "P(z)": high})


def _compare(session: Session, outcome: Outcome, pictures: Sequence[Picture]) -> None:
    """Tokens on seeds they were not trained with, and the best of N random seeds."""
    tokens, generator, reward = tokens_of(outcome.result), session.generator, session.rewards.target
    fresh = [max(session.seeds) + 1 + i for i in range(session.arguments.fresh_seeds)]
    for prompt in outcome.prompts:
        found: dict[str, float] = {}
        if session.interrupt.requested:
            return
        if tokens is not None and fresh:
            prompts = [prompt] * len(fresh)
            for name, used in (("fresh raw", None), ("fresh", tokens)):
                images = render(generator, prompts, fresh, tokens=used, size=session.size)
                found[name] = statistics.fmean(rate(reward, images, prompts, generator.device))
        if session.arguments.best_of_n is not None:
            count = session.arguments.best_of_n or _equal_cost(session, outcome)
            found[f"best of {count}"] = best_of(generator, reward, prompt, count, session.size)[1]
        for picture in pictures:
            if picture.prompt == prompt:
                picture.scores.update(found)


def _equal_cost(session: Session, outcome: Outcome) -> int:
    differentiable = session.rewards.target.differentiable
    history, steps = outcome.result.history, session.generator.steps
    return images_at_equal_cost(session.loop, history, steps, differentiable=differentiable)


def _write_images(session: Session, pictures: Sequence[Picture]) -> None:
    folder = session.folder / "images"
    for number, picture in enumerate(pictures, start=1):
        stem = f"{number:03d}-{slug(picture.prompt)}-seed{picture.seed}"
        for name in ("before", "best", "last"):
            image = getattr(picture, name)
            if image is not None:
                save_image(folder / f"{stem}-{name}.png", image)
    shown = pictures[:IN_GRID]
    sheet = before_after(
        torch.stack([p.before for p in shown]),
        torch.stack([p.best for p in shown]),
        [f"{p.prompt}  (seed {p.seed})" for p in shown],
        [p.scores["raw"] for p in shown],
        [p.scores["best"] for p in shown],
        title=f"{session.command}: {session.rewards.target.name}",
    )
    save_image(session.folder / "before-after.png", sheet)


def describe(path: Path) -> str:
    """Where things are."""
    return f"\nPictures: {path / 'before-after.png'} and {path / 'images'}; curves: {path / 'curves.png'}; all: {path}"
