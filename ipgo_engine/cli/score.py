"""`score`: rank pictures that exist."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..problems import check_prompts
from ..report import contact_sheet, environment, open_image, plain_table, save_image, write_csv, write_json
from ..report.grids import Tile
from ..rewards import begin_run, scores_of
from . import models
from .folder import RUN_FILE, ResultsFolder, plan_folder
from .inputs import PROMPT_FREE, Rewards, load_rewards, read_prompts

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def run(arguments: argparse.Namespace) -> int:
    """`ipgo score`."""
    files = find_pictures(arguments.images)
    prompts = _prompts(arguments, len(files))
    if arguments.top < 1:
        raise InputError(f"--top is {arguments.top}: use 1 or more.")
    folder = plan_folder(arguments.out, arguments.command)
    models.set_threads(arguments.threads)
    device = models.choose_device(arguments.device)
    rewards = load_rewards(arguments, device)
    begin_run(rewards.target, *rewards.monitors)
    started, records = time.time(), []
    try:
        for record in _score(files, prompts, rewards, device):
            records.append(record)
    finally:  # whatever ends it, what was scored is kept, and what was not is named
        rest = zip(files[len(records) :], prompts[len(records) :], strict=True)
        records += [{"file": str(file), "prompt": prompt, "score": math.nan} for file, prompt in rest]
        if any(math.isfinite(record["score"]) for record in records):
            seconds = time.time() - started
            _write(folder, records, rewards, {"device": str(device), "seconds": seconds}, arguments.top)
    problems = [record["problem"] for record in records if "problem" in record]
    if len(problems) == len(files):
        raise InputError(problems[0])
    for problem in problems:
        print(f"not scored: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _write(
    folder: ResultsFolder, records: Sequence[dict[str, Any]], rewards: Rewards, facts: dict[str, Any], most: int
) -> None:
    """Table, ranked sheet and run.json of the pictures scored so far; pictures without a score come last."""
    order = sorted(records, key=lambda record: (math.isnan(record["score"]), -record["score"]))
    ranked = [{"rank": place, **record} for place, record in enumerate(order, start=1)]
    top = [record for record in ranked[:most] if not math.isnan(record["score"])]
    tiles = [Tile(open_image(r["file"])[0], f"#{r['rank']}  {r['score']:.4g}  {Path(r['file']).name}") for r in top]
    record = {"command": "score", "rewards": rewards.names, "versions": environment(), **facts, "scores": ranked}
    with folder.writing(record):
        write_csv(folder / "scores.csv", ranked)
        save_image(folder / "contact-sheet.png", contact_sheet(tiles, title=f"best by {rewards.target.name}"))
        write_json(folder / RUN_FILE, record)
    print(plain_table([record | {"file": _end_of(record["file"])} for record in top]))
    count = sum(math.isfinite(row["score"]) for row in ranked)
    where = f"{folder / 'scores.csv'}; the best in pictures: {folder / 'contact-sheet.png'}"
    print(f"\n{count} of {len(ranked)} scored: {where}")


def _end_of(path: str, longest: int = 32) -> str:
    """What tells files apart: the end of a path."""
    return path if len(path) <= longest else "..." + path[3 - longest :]


def find_pictures(given: Sequence[str]) -> list[Path]:
    """The files, and the pictures inside the folders, in the order of their names as people count."""
    found: list[Path] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            inside = sorted((p for p in path.iterdir() if _is_picture(p)), key=_natural)
            if not inside:
                raise InputError(f"folder {path} holds no picture ({', '.join(sorted(PICTURES))}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path} does not exist: give picture files or folders of them.")
    return found


def _is_picture(path: Path) -> bool:
    """A file by its name; macOS puts a hidden `._name.png`, which is none, beside every file on foreign disks."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _prompts(arguments: argparse.Namespace, count: int) -> list[str]:
    """One prompt per picture."""
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        prompts += read_prompts(arguments.prompts_file)
    if not prompts:
        names = [text.partition("=")[0] for text in arguments.reward] + arguments.monitor
        if not names or not set(names) <= PROMPT_FREE:
            raise InputError("no prompt: give --prompt TEXT, which this reward compares the pictures with.")
        return [""] * count
    check_prompts(prompts)
    if len(prompts) == 1:
        return prompts * count
    if len(prompts) != count:
        raise InputError(f"{len(prompts)} prompts for {count} pictures: give one for all, or one per picture.")
    return prompts


def _score(files: Sequence[Path], prompts: Sequence[str], rewards: Rewards, device: Any) -> Iterator[dict[str, Any]]:
    """One picture at a time: sizes differ, and a long list must not fill the memory. NaN for one that is no picture."""
    import torch
    from tqdm import tqdm

    several = len(rewards.parts) > 1
    others = [*([reward for reward, _ in rewards.parts] if several else []), *rewards.monitors]
    for file, prompt in zip(tqdm(files, unit="picture", disable=None), prompts, strict=True):
        record: dict[str, Any] = {"file": str(file), "prompt": prompt, "score": math.nan}
        try:
            image = open_image(file).to(device)
        except InputError as error:
            yield record | {"problem": str(error)}
            continue
        with torch.no_grad():
            for name, reward in {"score": rewards.target, **{other.name: other for other in others}}.items():
                record[name] = float(scores_of(reward, image, [prompt])[0])
        yield record
