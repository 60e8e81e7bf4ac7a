"""Training states and logs on disk, so that every part can be trained on."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch


def resume(file: Path, model: Any, average: Any, optimizer: Any, device: str) -> int:
    """Load what was saved, if anything; the number of steps done."""
    if not file.exists():
        return 0
    state = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save(file: Path, model: Any, average: Any, optimizer: Any, step: int, **more: float) -> None:
    """Everything a resumed training needs."""
    state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step} | more, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def steps_done(path: Path) -> int:
    """The step of the last line of a training log; 0 without one."""
    if not path.exists():
        return 0
    with path.open(newline="") as file:
        return int(list(csv.DictReader(file))[-1]["step"])


def log(path: Path, **values: Any) -> None:
    """Append one row, with the time; the first row brings the header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["time", *values])
        writer.writerow([round(time.time()), *values.values()])
    print(path.stem, {k: round(v, 4) for k, v in values.items()}, flush=True)
