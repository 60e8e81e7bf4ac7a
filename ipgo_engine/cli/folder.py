"""The results folder: new or resumed, written to only when there is something to write, gone again if nothing came."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..report import write_json
from ..report.tables import plain
from ..resume import comparable, differing

RUN_FILE = "run.json"


class ResultsFolder:
    """Planned first (nothing is written), created when the inputs are known to be good."""

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path, self.resumed = path, resumed

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def writing(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Create the folder with its run.json; when the block fails before anything else is there, remove both."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            if not self.resumed:
                write_json(self / RUN_FILE, record)
            yield
        except BaseException:
            if not self.resumed:
                self._clear(missing)
            raise

    def _clear(self, created: list[Path]) -> None:
        """Remove run.json and the folders made for it, unless something else is in there by now."""
        with contextlib.suppress(OSError):
            if {path.name for path in self.path.iterdir()} <= {RUN_FILE}:
                (self / RUN_FILE).unlink(missing_ok=True)
        for path in created:
            with contextlib.suppress(OSError):  # not empty: somebody else's, or worth keeping
                path.rmdir()

    def previous(self) -> dict[str, Any]:
        """run.json of the run to go on with."""
        try:
            found = json.loads((self / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} holds no run to resume: its {RUN_FILE} cannot be read.") from error
        if not isinstance(found, dict):
            raise InputError(f"{self / RUN_FILE} is damaged: start anew in another folder.")
        return found


def plan_folder(out: str | None, command: str, *, resume: bool = False) -> ResultsFolder:
    """Where results will go. Raises `InputError` for a folder that is in use, or that has nothing to resume."""
    try:
        return _plan(out, command, resume)
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error.strerror or error}): give another folder.") from error


def _plan(out: str | None, command: str, resume: bool) -> ResultsFolder:
    if resume:
        if out is None:
            raise InputError("--resume needs --out: the folder of the run to go on with.")
        folder = ResultsFolder(Path(out), resumed=True)
        folder.previous()
        return folder
    if out is None:
        return ResultsFolder(_next_free(Path("results") / command))
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {out} is a file: give a folder.")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"--out {out} is not empty: give a new folder (or --resume where the command has it).")
    return ResultsFolder(path)


def _next_free(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def check_same(previous: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise `InputError` unless the run to resume was started with the same prompts, model, rewards and settings.

    The engine compares settings with those of a state, but a prompt that was not begun has none: it would be learned
    with other settings than the rest.
    """
    before, ours = comparable(previous), comparable(plain(now))
    different = []
    for key, value in ours.items():
        theirs = before.get(key)
        if key == "config":
            different += differing(theirs, value, key)
        elif isinstance(value, dict) and isinstance(theirs, dict):
            different += [name for name in value if theirs.get(name) != value[name]]
        elif theirs != value:
            different.append(key)
    if different:
        raise InputError(
            f"{where} belongs to another run (different: {', '.join(different)}): "
            "give the settings it was started with, or start anew in another folder."
        )
