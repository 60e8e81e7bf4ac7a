"""From what the engine returned to pictures, curves, tables and files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.noise import LEARNED_WITH, write_noise
from ..loop import spread
from ..noise import CHANNEL_DIM, NoiseRegularizer
from ..optimize import Result
from ..report import before_after, draw_curves, plain_table, save_figure, save_image, slug, write_csv, write_json
from ..rewards import Reward
from ..tokens import IPGOTokens
from .evaluate import Attempts, best_of, images_at_equal_cost, rate, render
from .folder import RUN_FILE
from .session import Session

SCORES = "scores.csv"
IN_GRID = 24  # rows of the before/after picture; more would be a picture nobody can open


@dataclass
class Outcome:
    """What one call of the engine has learned."""

    name: str
    """The end of its files' names."""
    first: int
    """The number of its first row among those of all calls."""
    rows: list[tuple[str, int]]
    prompts: list[str]
    result: Result[Any]
    last_images: Tensor | None
    seconds: float
    pictures: list[Picture] = field(default_factory=list)
    shown: bool = False
    """Whether its pictures are written."""


@dataclass(frozen=True)
class Failure:
    """A call of the engine that broke down, with or without a best so far."""

    prompts: list[str]
    reason: str
    bad_input: bool


@dataclass
class Picture:
    """One prompt and seed: images (3, H, W) and what goes into the table."""

    number: int
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


def write_results(session: Session, outcomes: Sequence[Outcome], failures: Sequence[Failure], seconds: float) -> str:
    """Fill the results folder; the score table as text.

    First everything that is known, then, as far as it goes, what has to be rendered and scored for comparison.
    """
    attempts = Attempts()
    for outcome in outcomes:
        outcome.pictures = outcome.pictures or _pictures(session, outcome, attempts)
    pictures = [picture for outcome in outcomes for picture in outcome.pictures]
    record = _record(session, outcomes, failures, seconds)
    _write_scores(session, pictures, record)  # numbers first: where the disk is full, they still fit
    for outcome in outcomes:
        if not outcome.shown:
            _write_images(session, outcome)
    _write_curves(session, outcomes)
    _write_sheet(session, pictures)
    for outcome in outcomes:
        _score(session, outcome.pictures, attempts)
        attempts("P(z)", lambda o=outcome: _probabilities(session, o))
        _compare(session, outcome, attempts)
    records = _write_scores(session, pictures, record)
    _write_sheet(session, pictures)
    return plain_table(records + _mean(records))


def write_so_far(session: Session, outcomes: Sequence[Outcome]) -> None:
    """The pictures of the last outcome, and the table of all: a list of prompts takes hours.

    What finds no room here is written, or complained about, by `write_results`.
    """
    outcome = outcomes[-1]
    outcome.pictures = _pictures(session, outcome, Attempts())
    with suppress(InputError):
        write_csv(session.folder / SCORES, _records([picture for o in outcomes for picture in o.pictures]))
        _write_images(session, outcome)


def _record(
    session: Session, outcomes: Sequence[Outcome], failures: Sequence[Failure], seconds: float
) -> dict[str, Any]:
    """run.json without the scores."""
    runs = [
        {"prompts": o.prompts, "stopped": o.result.stopped, "seconds": o.seconds, "history": _history(o.result)}
        for o in outcomes
    ]
    early = [o.result.stopped for o in outcomes if o.result.stopped != "finished"]
    stopped = f"failed: {failures[0].reason}" if failures else early[-1] if early else "finished"
    if session.interrupt.requested:
        stopped = "cancelled"
    failed = [{"prompts": failure.prompts, "reason": failure.reason} for failure in failures]
    return {**session.record, "stopped": stopped, "seconds": seconds, "scores": [], "runs": runs, "failed": failed}


def _write_curves(session: Session, outcomes: Sequence[Outcome]) -> None:
    name = session.rewards.target.name
    names = [outcome.prompts[0] if outcome.name else session.command for outcome in outcomes]
    if len(set(names)) < len(names):  # the same prompt twice
        names = [outcome.name.removeprefix("-") for outcome in outcomes]
    histories = {name: outcome.result.history for name, outcome in zip(names, outcomes, strict=True)}
    figure = draw_curves(histories, reward=name, title=f"{session.command}: {name}")
    save_figure(session.folder / "curves.png", figure)


def _write_scores(session: Session, pictures: Sequence[Picture], record: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that hold scores: what the table says of every picture."""
    records = _records(pictures)
    write_csv(session.folder / SCORES, records)
    write_json(session.folder / RUN_FILE, record | {"scores": records})
    return records


def _records(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    return [{"prompt": p.prompt, "seed": p.seed, **p.scores} for p in pictures]


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


def write_learned(session: Session, outcome: Outcome) -> None:
    """The tokens file and the noise file of one job."""
    tokens, noise = tokens_of(outcome.result), noise_of(outcome.result)
    settings = {"generator": session.settings, "config": json.loads(json.dumps(asdict(session.config)))}
    tokens_file = f"tokens{outcome.name}.safetensors"
    if tokens is not None:
        tokens.save(session.folder / tokens_file, preset=session.arguments.preset, run=settings)
    if noise is not None:
        rows = {"prompts": [p for p, _ in outcome.rows], "seeds": [s for _, s in outcome.rows]}
        labels = {"encoder": session.generator.encoder, "reward": session.rewards.target.name, "run": settings}
        labels[LEARNED_WITH] = None if tokens is None else tokens_file
        write_noise(session.folder / f"noise{outcome.name}.safetensors", noise, **rows, **labels)


def _pictures(session: Session, outcome: Outcome, attempts: Attempts) -> list[Picture]:
    """Images of every row, with the scores the run itself has found.

    The engine reports a part of the rows when tokens learn from many prompts; the others are rendered.
    """
    result, rows = outcome.result, list(enumerate(outcome.rows, outcome.first))
    if len(result.image) < len(rows):
        drawn: list[Picture] = []
        if attempts("rendering every prompt", lambda: drawn.extend(_rendered(session, outcome))):
            return drawn
        rows = [rows[i] for i in spread(len(rows), len(result.image))]
    last = outcome.last_images
    # Fewer images than rows are those of one update, whatever rows are shown here.
    last = last.float().cpu() if last is not None and len(last) == len(outcome.rows) else None
    pictures = []
    for i, (number, (prompt, seed)) in enumerate(rows):
        before, best = result.start_image[i], result.image[i]
        picture = Picture(number, prompt, seed, before, best, None if last is None else last[i])
        raw, best = float(result.start_rewards[i]), float(result.rewards[i])
        picture.scores |= {"raw": raw, "last": None, "best": best, "gain": best - raw}
        pictures.append(picture)
    return pictures


def _rendered(session: Session, outcome: Outcome) -> list[Picture]:
    prompts, seeds = [p for p, _ in outcome.rows], [s for _, s in outcome.rows]
    before = render(session.generator, prompts, seeds, size=session.size)
    best = render(session.generator, prompts, seeds, tokens=tokens_of(outcome.result), size=session.size)
    return [Picture(outcome.first + i, p, s, before[i], best[i]) for i, (p, s) in enumerate(outcome.rows)]


def _score(session: Session, pictures: Sequence[Picture], attempts: Attempts) -> None:
    """What the run has not measured: rendered and last images, parts of a sum, held-out rewards before and after."""
    target = session.rewards.target
    columns = [(target, "raw", "before"), (target, "last", "last"), (target, "best", "best")]
    parts = [reward for reward, _ in session.rewards.parts] if len(session.rewards.parts) > 1 else []
    for reward in [*parts, *session.rewards.monitors]:
        columns += [(reward, f"{reward.name} raw", "before"), (reward, f"{reward.name} best", "best")]
    for reward, column, images in columns:
        for picture in pictures:
            picture.scores.setdefault(column, None)
        missing = [p for p in pictures if p.scores[column] is None and getattr(p, images) is not None]
        if missing:
            attempts(
                f"scoring by {reward.name!r}",
                lambda r=reward, c=column, i=images, m=missing: _rate(session, r, c, i, m),
            )
    for picture in pictures:
        raw, best = picture.scores["raw"], picture.scores["best"]
        picture.scores["gain"] = None if raw is None or best is None else best - raw


def _rate(session: Session, reward: Reward, column: str, images: str, pictures: Sequence[Picture]) -> None:
    stacked = torch.stack([getattr(picture, images) for picture in pictures])
    values = rate(reward, stacked, [picture.prompt for picture in pictures], session.generator.device)
    for picture, value in zip(pictures, values, strict=True):
        picture.scores[column] = value


def _probabilities(session: Session, outcome: Outcome) -> None:
    """P(z) of the noise as drawn and of the best, where noise was optimized."""
    if outcome.result.probability is None:
        return
    config: Any = session.loop
    start = session.generator.draw_noise([p.seed for p in outcome.pictures])
    count = 1 if config.which == "initial" else start.shape[1]
    regularizer = NoiseRegularizer(config.block_size, config.permutations, config.seed)
    raw = regularizer.measure(start[:, :count], CHANNEL_DIM)[1].tolist()
    for picture, low, high in zip(outcome.pictures, raw, outcome.result.probability.tolist(), strict=True):
        picture.scores.update({"P(z) raw": low, "P(z)": high})


def _compare(session: Session, outcome: Outcome, attempts: Attempts) -> None:
    """Tokens on seeds they were not trained with, and the best of N random seeds."""
    tokens, asked = tokens_of(outcome.result), session.arguments.best_of_n
    count = 0 if asked is None else asked or _equal_cost(session, outcome)
    for prompt in outcome.prompts:
        shown = [picture for picture in outcome.pictures if picture.prompt == prompt]
        if tokens is not None and session.arguments.fresh_seeds:
            _fill(shown, ("fresh raw", "fresh"), lambda p=prompt: _fresh(session, p, tokens), attempts, "fresh seeds")
        if count:
            _fill(shown, (f"best of {count}",), lambda p=prompt: _best_of(session, p, count), attempts, "best of N")


def _fill(
    pictures: Sequence[Picture],
    columns: Sequence[str],
    measure: Callable[[], Sequence[float]],
    attempts: Attempts,
    name: str,
) -> None:
    """Measured values, the same for every picture of a prompt; empty cells where nothing can be measured."""
    found: list[float] = []
    done = attempts(f"the comparison with {name}", lambda: found.extend(measure()))
    for picture in pictures:
        picture.scores |= dict(zip(columns, found, strict=True)) if done else dict.fromkeys(columns)


def _fresh(session: Session, prompt: str, tokens: IPGOTokens) -> list[float]:
    """Means of the raw prompt and of the tokens."""
    seeds = [max(session.seeds) + 1 + i for i in range(session.arguments.fresh_seeds)]
    prompts, generator = [prompt] * len(seeds), session.generator
    images = [render(generator, prompts, seeds, tokens=used, size=session.size) for used in (None, tokens)]
    return [statistics.fmean(rate(session.rewards.target, part, prompts, generator.device)) for part in images]


def _best_of(session: Session, prompt: str, count: int) -> list[float]:
    return [best_of(session.generator, session.rewards.target, prompt, count, session.size)[1]]


def _equal_cost(session: Session, outcome: Outcome) -> int:
    differentiable = session.rewards.target.differentiable
    history, steps, rows = outcome.result.history, session.generator.steps, len(outcome.rows)
    return images_at_equal_cost(session.loop, history, steps, differentiable=differentiable, rows=rows)


def _write_images(session: Session, outcome: Outcome) -> None:
    folder = session.folder / "images"
    for picture in outcome.pictures:
        stem = f"{picture.number:03d}-{slug(picture.prompt)}-seed{picture.seed}"
        for name in ("before", "best", "last"):
            image = getattr(picture, name)
            if image is not None:
                save_image(folder / f"{stem}-{name}.png", image)
    outcome.shown = True


def _write_sheet(session: Session, pictures: Sequence[Picture]) -> None:
    shown = pictures[:IN_GRID]
    low, high = ([p.scores[name] for p in shown if p.scores.get(name) is not None] for name in ("raw", "best"))
    known = len(low) == len(high) == len(shown)
    sheet = before_after(
        torch.stack([p.before for p in shown]),
        torch.stack([p.best for p in shown]),
        [f"{p.prompt}  (seed {p.seed})" for p in shown],
        low if known else None,
        high if known else None,
        title=f"{session.command}: {session.rewards.target.name}",
    )
    save_image(session.folder / "before-after.png", sheet)


def describe(path: Path) -> str:
    """Where things are."""
    return f"\nPictures: {path / 'before-after.png'} and {path / 'images'}; curves: {path / 'curves.png'}; all: {path}"
