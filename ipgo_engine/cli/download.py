"""`download`: the published weights of rewards, after their sizes and licences were shown."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import Cancelled, InputError
from ..rewards import download
from ..rewards.weights import WEIGHTS, WeightFile, describe, files_of


def run(arguments: argparse.Namespace) -> int:
    """`ipgo download`."""
    if not arguments.rewards:
        for name in WEIGHTS:
            print(f"{name}\n  " + describe(name).replace("\n", "\n  "))
        return 0
    for name in arguments.rewards:
        files_of(name)  # a mistyped name is found before anything is fetched
    for name in dict.fromkeys(arguments.rewards):
        try:
            path = _download(name, arguments)
        except Cancelled:
            raise InputError(f"{name}: nothing was fetched; answer y, or add --yes.") from None
        print(f"{name}: use it with --reward-path {name}={path}")
    return 0


def _download(name: str, arguments: argparse.Namespace) -> Path:
    """The path for `rewards.load`; one bar per file where a person watches."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def progress(item: WeightFile, done: int, total: int | None) -> None:
        if item.file not in bars:
            bars[item.file] = tqdm(total=total, unit="B", unit_scale=True, desc=item.file, disable=None)
        bars[item.file].update(done - bars[item.file].n)

    try:
        return download(
            name,
            arguments.to,
            report=print,
            confirm=None if arguments.yes else _agreed,
            progress=progress,
            host=arguments.host,
        )
    finally:
        for bar in bars.values():
            bar.close()


def _agreed() -> bool:
    """Ask; where nobody can answer, that is no consent."""
    if not sys.stdin.isatty():
        return False
    return input("Fetch these files on these terms? [y/N] ").strip().lower() in ("y", "yes")
