"""`generate`: pictures of prompts, plain and with learned tokens or noise."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Cancelled, EncoderMismatchError, InputError
from ..formats.noise import LEARNED_WITH, read_noise
from ..formats.tokens import read_metadata
from ..generators.base import Generator
from ..report import before_after, contact_sheet, environment, plain_table, save_image, slug, write_csv, write_json
from ..report.grids import Tile
from ..tokens import IPGOTokens
from . import models
from .evaluate import Attempts, in_groups, rate, render_at_once
from .folder import RUN_FILE, ResultsFolder, plan_folder
from .inputs import Rewards, gather_prompts, load_rewards, parse_seeds
from .interrupt import Interrupt
from .results import IN_GRID

AT_ONCE = 4
IN_SHEET = 100  # pictures of the contact sheet; all of them are in the folder beside it


@dataclass
class Pictures:
    """What was drawn so far, row by row: without and, where there is something, with what was learned."""

    rows: list[tuple[str, int]]
    raw: list[Tensor] = field(default_factory=list)
    learned: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> list[tuple[str, int]]:
        """The rows that are drawn."""
        return self.rows[: len(self.raw)]


def run(arguments: argparse.Namespace) -> int:
    """`ipgo generate`."""
    from . import INTERRUPTED

    rows, noise, labels = _rows(arguments)
    settings = models.model_settings(arguments, _of_run(labels, "generator"), arguments.noise)
    arguments.model = settings["model"]  # a noise file may have brought it
    folder = plan_folder(arguments.out, arguments.command)
    if arguments.tokens is not None:
        read_metadata(arguments.tokens)  # a missing file is better found before the model is loaded
    models.set_threads(arguments.threads)
    device = models.choose_device(arguments.device)
    rewards = load_rewards(arguments, device) if arguments.reward or arguments.monitor else None
    interrupt = Interrupt()
    generator = models.make_generator(settings, device, interrupt)
    tokens = _tokens(arguments, generator)
    _check_noise(noise, labels, generator, arguments.noise)
    record = _record(arguments, settings, generator, rewards)
    pictures, records, attempts = Pictures(rows), [], Attempts()
    started = time.time()
    with interrupt, folder.writing(record):
        try:
            _draw(folder, pictures, generator, tokens, noise)
        except Cancelled:
            if not pictures.done:
                raise
        finally:  # whatever ends it, what was drawn is kept
            if pictures.done:
                early = "cancelled" if interrupt.requested else "failed"
                record |= {"stopped": "finished" if pictures.done == rows else early, "seconds": time.time() - started}
                _write(folder, pictures, record)
        if rewards is not None:
            records = _score(pictures, rewards, device, attempts)
            record["seconds"] = time.time() - started
            _write(folder, pictures, record, records, rewards.target.name)
    if records:
        print(plain_table(records))
    print(f"\nPictures: {folder.path}")
    if pictures.done != rows:
        return INTERRUPTED
    return 1 if attempts.broken else 0


def _record(
    arguments: argparse.Namespace, settings: dict[str, Any], generator: Generator, rewards: Rewards | None
) -> dict[str, Any]:
    """What run.json says from the beginning."""
    return {
        "command": "generate",
        "generator": settings,
        "encoder": generator.encoder,
        "tokens": arguments.tokens,
        "noise": arguments.noise,
        "rewards": rewards.names if rewards else None,
        "device": str(generator.device),
        "versions": environment(),
        "stopped": "running",
    }


def _rows(arguments: argparse.Namespace) -> tuple[list[tuple[str, int]], Tensor | None, dict[str, Any]]:
    """(prompt, seed) of every picture; a noise file brings its own."""
    if arguments.noise is None:
        prompts = gather_prompts(arguments.prompts, arguments.prompts_file)
        return [(p, s) for p in prompts for s in parse_seeds(arguments.seeds)], None, {}
    if arguments.prompts or arguments.prompts_file:
        raise InputError("--noise brings its own prompts and seeds: leave the prompts out.")
    if arguments.seeds is not None:
        raise InputError("--noise brings its own prompts and seeds: leave --seeds out.")
    noise, labels = read_noise(arguments.noise)
    prompts, seeds = labels.get("prompts", []), labels.get("seeds", [])
    if not len(prompts) == len(seeds) == len(noise):
        raise InputError(f"{arguments.noise} is damaged: prompts, seeds and noises do not fit each other.")
    partner = _learned_with(labels, arguments.noise)
    if partner is not None and arguments.tokens is None:
        raise InputError(
            f"{arguments.noise} was learned together with tokens: give their file too (--tokens {partner})."
        )
    return list(zip(prompts, seeds, strict=True)), noise, labels


def _of_run(labels: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings of one kind that a noise file was made with; empty where it does not say."""
    run = labels.get("run")
    found = run.get(key) if isinstance(run, dict) else None
    return found if isinstance(found, dict) else {}


def _learned_with(labels: dict[str, Any], path: str) -> str | None:
    """The tokens file that belongs to a noise; files of earlier versions tell by their settings that there is one."""
    if LEARNED_WITH in labels:
        return labels[LEARNED_WITH]
    return Path(path).name.replace("noise", "tokens", 1) if "tokens" in _of_run(labels, "config") else None


def _draw(
    folder: ResultsFolder, pictures: Pictures, generator: Generator, tokens: IPGOTokens | None, noise: Tensor | None
) -> None:
    """Draw the rows, a few at a time, and save each picture at once."""

    def draw(part: slice) -> None:
        prompts, seeds = zip(*pictures.rows[part], strict=True)
        raw, learned = render_at_once(generator, prompts, seeds), None
        if tokens is not None or noise is not None:
            learned = render_at_once(generator, prompts, seeds, tokens, None if noise is None else noise[part])
        for i, (prompt, seed) in enumerate(pictures.rows[part]):
            stem = f"{part.start + i + 1:03d}-{slug(prompt)}-seed{seed}"
            save_image(folder / "images" / f"{stem}-raw.png", raw[i])
            if learned is not None:
                save_image(folder / "images" / f"{stem}-learned.png", learned[i])
        pictures.learned += [] if learned is None else list(learned)
        pictures.raw += list(raw)

    in_groups(len(pictures.rows), AT_ONCE, draw)


def _tokens(arguments: argparse.Namespace, generator: Generator) -> IPGOTokens | None:
    if arguments.tokens is None:
        return None
    return IPGOTokens.load(arguments.tokens, encoder=generator.encoder, dim=generator.dim)


def _check_noise(noise: Tensor | None, labels: dict[str, Any], generator: Generator, path: str | None) -> None:
    if noise is None:
        return
    if tuple(noise.shape[1:]) != tuple(generator.noise_shape):
        raise InputError(
            f"{path} holds noise of shape {tuple(noise.shape[1:])}, this model and sampler consume "
            f"{tuple(generator.noise_shape)}: give the --model, --sampler, --eta, --steps and --size it was made with."
        )
    encoder = labels.get("encoder")
    if encoder is not None and encoder != generator.encoder:
        raise EncoderMismatchError(f"{path} was made with text encoder {encoder}, not {generator.encoder}.")


def _score(pictures: Pictures, rewards: Rewards, device: Any, attempts: Attempts) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"prompt": prompt, "seed": seed} for prompt, seed in pictures.done]
    prompts = [prompt for prompt, _ in pictures.done]
    parts = [reward for reward, _ in rewards.parts] if len(rewards.parts) > 1 else []
    for reward in [rewards.target, *parts, *rewards.monitors]:
        for name, images in (("raw", pictures.raw), ("learned", pictures.learned)):
            if images:
                column, stacked = f"{reward.name} {name}", torch.stack(images)
                values: list[float] = []
                score = lambda r=reward, s=stacked, v=values: v.extend(rate(r, s, prompts, device))  # noqa: E731
                known = attempts(f"scoring by {reward.name!r}", score)
                for i, record in enumerate(records):
                    record[column] = values[i] if known else None
    return records


def _write(
    folder: ResultsFolder,
    pictures: Pictures,
    record: dict[str, Any],
    records: Sequence[dict[str, Any]] = (),
    target: str = "",
) -> None:
    """The sheet of the first pictures, run.json and, once there are scores, their table."""
    shown = IN_GRID if pictures.learned else IN_SHEET
    captions = [f"{prompt}  (seed {seed})" for prompt, seed in pictures.done[:shown]]
    if pictures.learned:
        low, high = ([line[f"{target} {name}"] for line in records[:shown]] for name in ("raw", "learned"))
        known = bool(records) and None not in (*low, *high)
        sides = torch.stack(pictures.raw[:shown]), torch.stack(pictures.learned[:shown])
        sheet = before_after(*sides, captions, low if known else None, high if known else None)
        save_image(folder / "before-after.png", sheet)
    else:
        tiles = [Tile(image, text) for image, text in zip(pictures.raw[:shown], captions, strict=True)]
        sheet = contact_sheet(tiles)
        save_image(folder / "pictures.png", sheet)
    if records:
        write_csv(folder / "scores.csv", records)
    scores = records or [{"prompt": prompt, "seed": seed} for prompt, seed in pictures.done]
    write_json(folder / RUN_FILE, record | {"scores": scores})
