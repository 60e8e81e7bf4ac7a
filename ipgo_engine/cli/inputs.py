"""From what was typed to prompts, rewards and generator settings, or one clear `InputError`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..problems import check_prompts
from ..rewards import Offloaded, Reward, Weighted, load

# Rewards that look at the picture alone.
PROMPT_FREE = frozenset({"brightness", "darkness", "contrast", "jpeg", "jpeg-incompressibility", "aesthetic"})
LARGEST_SIDE = 8192
MOST_SEEDS = 10_000


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line; blank lines and lines that start with # are skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts file {path} is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise InputError(f"prompts file {path} cannot be read ({error.strerror or error}).") from error
    lines = [line.strip() for line in text.split("\n")]  # not splitlines: it also breaks at marks inside a line
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt: write one per line.")
    return prompts


def gather_prompts(typed: Sequence[str], file: str | None) -> list[str]:
    """Prompts from the command line, then those of the file."""
    prompts = list(typed) + (read_prompts(file) if file is not None else [])
    if not prompts:
        raise InputError('no prompt: type one in quotes ("red heart"), or give --prompts-file.')
    return check_prompts(prompts)


def parse_seeds(text: str | None) -> list[int]:
    """Seeds of "3", "0,1,7" or "0-9", each once; seed 0 where nothing was typed."""
    seeds: list[int] = []
    if text is None:
        return [0]
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise InputError(f"seeds is {text!r}: write whole numbers such as 3, or 0,1,7, or 0-9.")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 1 << 63 or high - low >= MOST_SEEDS:
            raise InputError(f"seeds is {text!r}: a range goes up, below 2^63, with at most {MOST_SEEDS} seeds.")
        seeds += range(low, high + 1)
    return list(dict.fromkeys(seeds))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 30


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of "512" or "512x768"; (None, None) leaves both to the model."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(map(_is_number, parts)):
        raise InputError(f"size is {text!r}: use a number of pixels such as 512, or WIDTHxHEIGHT such as 512x768.")
    width, height = int(parts[0]), int(parts[-1])
    for side in (width, height):
        if not 8 <= side <= LARGEST_SIDE or side % 8:
            raise InputError(f"size is {text!r}: both sides must be multiples of 8, from 8 to {LARGEST_SIDE} pixels.")
    return width, height


@dataclass(frozen=True)
class Rewards:
    """What is maximized, its parts, and what is only measured."""

    target: Reward
    parts: list[tuple[Reward, float]]
    monitors: list[Reward]
    names: dict[str, Any]
    """What was asked for, for run.json."""


def load_rewards(arguments: argparse.Namespace, device: Any) -> Rewards:
    """The rewards of --reward, --reward-path and --monitor; the demo model brings its own CLIP."""
    wanted = [_weighted(text) for text in arguments.reward]
    if not wanted:
        if getattr(arguments, "model", None) not in ("demo", None):
            raise InputError("no reward: give --reward NAME, for example --reward clip --reward-path clip=FOLDER.")
        wanted = [("demo-clip", 1.0)]
    paths = _paths(arguments.reward_path, [name for name, _ in wanted] + arguments.monitor)
    names = [name for name, _ in wanted]
    for name in names + arguments.monitor:
        if (names + arguments.monitor).count(name) > 1:
            raise InputError(f"reward {name!r} is given more than once: what is optimized cannot also be held out.")
    parts = [(_load(name, paths.get(name), arguments, device), weight) for name, weight in wanted]
    monitors = [_load(name, paths.get(name), arguments, device) for name in arguments.monitor]
    single = len(parts) == 1 and parts[0][1] == 1.0
    target = parts[0][0] if single else Weighted(parts)
    asked = {"reward": dict(wanted), "monitor": list(arguments.monitor), "reward_path": paths}
    asked["reward_dtype"] = arguments.reward_dtype
    return Rewards(target, parts, monitors, asked)


def _load(name: str, place: Any, arguments: argparse.Namespace, device: Any) -> Reward:
    """One reward, its weights on the device or, offloaded, in main memory between its calls."""
    import torch

    dtype = getattr(torch, arguments.reward_dtype)
    if not arguments.offload_rewards:
        return load(name, place, device, dtype)
    reward = load(name, place, "cpu", dtype)
    return Offloaded(reward, device) if getattr(reward, "module", None) is not None else reward


def _weighted(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight) or weight == 0:
        raise InputError(
            f"--reward {text}: write NAME or NAME=WEIGHT with a weight other than 0, for example clip=0.5."
        )
    return name, weight


def _paths(texts: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """A path per reward, or a mapping for a reward made of parts (NAME:PART=PATH)."""
    paths: dict[str, Any] = {}
    for text in texts:
        key, _, path = text.partition("=")
        name, _, part = key.partition(":")
        if not name or not path:
            raise InputError(f"--reward-path {text}: write NAME=PATH, or NAME:PART=PATH for a reward made of parts.")
        if name not in names:
            raise InputError(f"--reward-path {text}: {name!r} is neither a --reward nor a --monitor.")
        if name != "judge" and not Path(path).expanduser().exists():  # a judge has an address
            raise InputError(f"--reward-path {text}: {path} does not exist.")
        if part:
            paths.setdefault(name, {})
        if isinstance(paths.get(name), dict) != bool(part):
            raise InputError(f"--reward-path {text}: {name!r} has both a path and parts; give one or the other.")
        if part:
            paths[name][part] = path
        else:
            paths[name] = path
    return paths
