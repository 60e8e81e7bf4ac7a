"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import InputError


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a neighbour of `path`, then rename it; on failure nothing changes.

    Raises `InputError` when the folder or the file cannot be written, a full disk included.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except BaseException as error:  # Ctrl-C, too, leaves nothing behind
        with suppress(OSError):
            part.unlink()
        if not isinstance(error, Exception):
            raise
        # Any exception: safetensors has one of its own for a full disk.
        raise InputError(f"{path} cannot be written ({error}): choose another folder or free some space.") from error
    return path
