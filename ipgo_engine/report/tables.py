"""Score tables as CSV, JSON and text, and what a reader needs to repeat them."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.files import write_whole
from ..formats.tokens import engine_version

PACKAGES = ("torch", "torchvision", "numpy", "diffusers", "transformers", "open_clip_torch", "safetensors", "pillow")

Record = Mapping[str, Any]


def environment() -> dict[str, Any]:
    """Versions of the engine, of Python and of the packages that decide about numbers."""
    found = {"ipgo": engine_version(), "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file, whole or not at all."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def write_csv(path: str | Path, records: Sequence[Record]) -> Path:
    """One line per record, columns in the order in which they first appear; a cell that is missing stays empty."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: "" if value is None else value for key, value in record.items()})
    return write_text(path, text.getvalue())


def write_json(path: str | Path, value: Any) -> Path:
    """Dataclasses, tensors and paths included; numbers that are not finite become null, as JSON knows none."""
    return write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON has it; what is not finite becomes None, what JSON does not know becomes text."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def plain_table(records: Sequence[Record], *, longest: int = 32) -> str:
    """Columns aligned for a terminal; numbers to four digits, long texts shortened."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [[_cell(record.get(column), longest) for column in columns] for record in records]
    widths = [max([len(name)] + [len(row[i]) for row in cells]) for i, name in enumerate(columns)]
    numeric = [any(isinstance(record.get(column), int | float) for record in records) for column in columns]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(size) if right else text.ljust(size)
            for text, size, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(columns), line(["-" * size for size in widths]), *map(line, cells)])


def _cell(value: Any, longest: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    text = " ".join(str(value).split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
