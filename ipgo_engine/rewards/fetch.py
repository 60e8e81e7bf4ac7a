"""Fetching published weights once, only when asked to, so that everything works offline afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import Cancelled, InputError
from .files import convert_to_safetensors, read_json, read_weights
from .transfer import Progress, discard, offered_size, transfer, write_json
from .weights import WeightFile, files_of, shown_size

Report = Callable[[str], None]

_CHUNK = 1 << 20
_PICKLES = (".pt", ".pth", ".bin")


def download(
    name: str,
    root: str | Path,
    *,
    report: Report,
    confirm: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    host: str | None = None,
) -> Path:
    """Fetch the files of reward `name` below `root` and return the path to give to `rewards.load`.

    `report` receives, before anything is fetched, one line per file with its size and licence, and afterwards what was
    verified. `confirm` is asked in between; `Cancelled` is raised, and nothing fetched, when it says False. A file that
    is there and verified is not fetched again. A broken transfer leaves a `.part` file and the next call goes on from
    there; a file appears under its name only when it is whole, its sha256 is right and it can be read. Of a pickle only
    its conversion to safetensors appears. `host` replaces the hub's address (a mirror). Raises `InputError` in
    one sentence, also while another process downloads into `root`.
    """
    files, root = files_of(name), Path(root).expanduser()
    for line in offer(name, root, host=host):
        report(line)
    if confirm is not None and not confirm():
        raise Cancelled("nothing was fetched.")
    complete = all(_is_there(item, root) for item in files)
    with nullcontext() if complete else _alone(root):
        for item in files:
            with _disk(root):
                line = _fetch(item, root, progress, host)
            report(line)
    return root / files[0].folder


def offer(name: str, root: str | Path, *, host: str | None = None) -> list[str]:
    """One line per file of reward `name`, with its size and licence; the server is asked for a size nobody knows."""
    lines, root = [], Path(root).expanduser()
    for item in files_of(name):
        if _is_there(item, root):
            shown = "there already"
        else:
            size = remembered(item, root).get("size") or offered_size(item, host)
            shown = shown_size(int(size)) if size else "the server does not say how large"
        lines.append(f"{item.folder}/{item.file}: {shown}; licence: {item.licence}")
    return lines


def _present(item: WeightFile, root: Path) -> Path | None:
    """The file, or what an earlier download converted it to."""
    path = item.path(root)
    if path.exists():
        return path
    converted = path.with_suffix(".safetensors")
    return converted if converted.exists() and "converted sha256" in remembered(item, root) else None


def remembered(item: WeightFile, root: Path) -> dict[str, Any]:
    """Size and sha256 of the table or, where it has none, of the record that an earlier download left."""
    known = _record(item, root)
    known |= {"size": item.size} if item.size is not None else {}
    known |= {"sha256": item.sha256} if item.sha256 is not None else {}
    return known


def _record(item: WeightFile, root: Path) -> dict[str, Any]:
    """What an earlier download of this revision recorded; `InputError` when the record is damaged."""
    path = _record_path(item, root)
    if not path.exists():
        return {}
    try:
        record = read_json(path)
        hashes = (record["sha256"], record.get("converted sha256", ""))
        sound = isinstance(record["size"], int) and all(isinstance(value, str) for value in hashes)
    except (InputError, KeyError):
        sound, record = False, {}
    if not sound:
        raise InputError(f"{str(path)!r} is damaged: delete it and download again.")
    return record if record.get("revision") == item.revision else {}


def verify(item: WeightFile, root: Path) -> str:
    """sha256 of the file on disk; `InputError` when it is not the one of the table or of the record."""
    path, known = _present(item, root) or item.path(root), remembered(item, root)
    expected = known.get("sha256" if path == item.path(root) else "converted sha256")
    found = _sha256(path)
    if expected and found != expected:
        raise InputError(f"{str(path)!r} has sha256 {found}, expected {expected}: delete it and download again.")
    return found


def _fetch(item: WeightFile, root: Path, progress: Progress | None, host: str | None) -> str:
    path, present = item.path(root), _present(item, root)
    if present is not None:
        return f"{present.name}: there already, sha256 {verify(item, root)}"
    if _is_somebody_elses(item, root):
        return f"{path.with_suffix('.safetensors').name}: there already, not from a download: kept and not verified"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    expected = transfer(item, part, remembered(item, root), progress, host)
    found = _sha256(part)
    if expected and found != expected:
        discard(part)
        raise InputError(f"{item.file}: the server sent a file with sha256 {found}, expected {expected}; removed.")
    try:
        _check(part, path.suffix)
    except InputError as error:
        discard(part)
        raise InputError(f"{item.file}: what the server sent is of no use and was removed: {error}") from error
    return _publish(item, root, part, found)


def _is_there(item: WeightFile, root: Path) -> bool:
    """Whether nothing has to be fetched for it."""
    return _present(item, root) is not None or _is_somebody_elses(item, root)


def _is_somebody_elses(item: WeightFile, root: Path) -> bool:
    """Whether the user has put the conversion of a pickle there: no download left a record of it."""
    converted = item.path(root).with_suffix(".safetensors")
    return item.path(root).suffix in _PICKLES and converted.exists() and not _record_path(item, root).exists()


def _check(part: Path, suffix: str) -> None:
    """`InputError` when `part` cannot be read as what it will be called: servers send pages, too."""
    from safetensors import SafetensorError, safe_open

    if suffix == ".json":
        read_json(part)
    elif suffix in _PICKLES:
        read_weights(part)
    elif suffix == ".safetensors":
        try:
            with safe_open(str(part), framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"it is not a whole safetensors file ({error}).") from error


def _publish(item: WeightFile, root: Path, part: Path, found: str) -> str:
    """Give the verified `part` its name, a pickle after conversion; returns the line for the report.

    When a conversion cannot be written `part` stays, and the next call converts it without fetching it again.
    """
    path, size = item.path(root), part.stat().st_size
    record = {"file": item.file, "revision": item.revision, "size": size, "sha256": found, "licence": item.licence}
    how = "as in the table" if item.sha256 else "recorded; the table has none to compare with"
    done = f"{path.name}: {size:,} bytes, sha256 {found} ({how}); licence: {item.licence}"
    target = path.with_suffix(".safetensors")
    converted = path.suffix in _PICKLES
    if converted:
        convert_to_safetensors(part, target)  # over the conversion of another revision, if there is one
        record |= {"converted to": target.name, "converted sha256": _sha256(target)}
        done += f"; converted to {target.name}"
    if converted or not item.sha256 or not item.size:
        write_json(_record_path(item, root), record)
    if not converted:
        os.replace(part, path)
    discard(part)
    return done


def _record_path(item: WeightFile, root: Path) -> Path:
    path = item.path(root)
    return path.with_name(path.name + ".record.json")


@contextmanager
def _disk(root: Path) -> Iterator[None]:
    """`InputError` that says the disk is at fault; what goes wrong on the line is one already."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{str(root)!r} cannot be written to ({reason}): make room or choose another folder."
        ) from error


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else downloads into `root` meanwhile, else `InputError`; the system frees the lock of a dead process."""
    with _disk(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".download.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{str(root)!r}: another process downloads into this folder; wait for it.") from None
    try:
        yield
    finally:
        lock.release()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
