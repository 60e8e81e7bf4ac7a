"""Fetching published weights once, only when asked to, so that everything works offline afterwards."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import Cancelled, InputError
from .files import convert_to_safetensors
from .weights import WeightFile, files_of, shown_size

Report = Callable[[str], None]
Progress = Callable[[WeightFile, int, int | None], None]

_CHUNK = 1 << 20
_MOST_REDIRECTS = 5
_TIMEOUT = 60.0
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
    there; a file appears under its name only when it is whole and its sha256 is right. A pickle is then converted to
    safetensors, once, and removed. `host` replaces the address of the table (a mirror). Raises `InputError` in one
    sentence.
    """
    files, root = files_of(name), Path(root).expanduser()
    for line in offer(name, root, host=host):
        report(line)
    if confirm is not None and not confirm():
        raise Cancelled("nothing was fetched.")
    for item in files:
        try:
            report(_fetch(item, root, progress, host))
        except OSError as error:
            raise InputError(f"{item.file}: {str(root)!r} cannot be written to ({error.strerror or error}).") from error
    return root / files[0].folder


def offer(name: str, root: str | Path, *, host: str | None = None) -> list[str]:
    """One line per file of reward `name`, with its size and licence; the server is asked for a size nobody knows."""
    lines, root = [], Path(root).expanduser()
    for item in files_of(name):
        if _present(item, root) is not None:
            shown = "there already"
        else:
            size = remembered(item, root).get("size") or _offered(item, host)
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


def _offered(item: WeightFile, host: str | None) -> int | None:
    """What the server says the file's size is, without fetching it."""
    with _open(item.url(host), method="HEAD") as (answer, headers):
        stated = headers.get("x-linked-size") or headers.get("content-length") if answer.status == 200 else None
    return int(stated) if stated and stated.isdigit() else None


def remembered(item: WeightFile, root: Path) -> dict[str, Any]:
    """Size and sha256 of the table or, where it has none, of the record that an earlier download left."""
    known: dict[str, Any] = {}
    record = _record_path(item, root)
    if record.is_file():
        try:
            noted = json.loads(record.read_text(encoding="utf-8"))
            known = noted if noted.get("revision") == item.revision else {}
        except (ValueError, AttributeError) as error:
            raise InputError(f"{str(record)!r} is damaged: delete it and download again.") from error
    known |= {"size": item.size} if item.size is not None else {}
    known |= {"sha256": item.sha256} if item.sha256 is not None else {}
    return known


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part, known = path.with_name(path.name + ".part"), remembered(item, root)
    told = _transfer(item, part, known, progress, host)
    found, size = _sha256(part), part.stat().st_size
    expected = known.get("sha256") or told
    if expected and found != expected:
        part.unlink()
        raise InputError(f"{item.file}: the server sent a file with sha256 {found}, expected {expected}; removed.")
    record = {"file": item.file, "revision": item.revision, "size": size, "sha256": found, "licence": item.licence}
    if not item.sha256 or not item.size:
        _write_record(item, root, record)
    os.replace(part, path)
    how = "as in the table" if item.sha256 else "recorded; the table has none to compare with"
    done = f"{path.name}: {size:,} bytes, sha256 {found} ({how}); licence: {item.licence}"
    if path.suffix not in _PICKLES or path.with_suffix(".safetensors").exists():
        return done
    converted = convert_to_safetensors(path)
    _write_record(item, root, record | {"converted to": converted.name, "converted sha256": _sha256(converted)})
    path.unlink()
    return f"{done}; converted to {converted.name}"


def _write_record(item: WeightFile, root: Path, record: dict[str, Any]) -> None:
    _record_path(item, root).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _record_path(item: WeightFile, root: Path) -> Path:
    path = item.path(root)
    return path.with_name(path.name + ".record.json")


def _transfer(
    item: WeightFile, part: Path, known: dict[str, Any], progress: Progress | None, host: str | None
) -> str | None:
    """Complete `part`; returns the sha256 the server states, where it does."""
    start = part.stat().st_size if part.exists() else 0
    size = known.get("size")
    if start and start == size:
        return None
    with _open(item.url(host), start=start) as (answer, headers):
        if answer.status == 416:  # nothing is left to send
            return _stated_hash(headers)
        if answer.status not in (200, 206):
            raise InputError(f"{item.file}: {urlsplit(item.url(host)).hostname} answers {answer.status}.")
        start = start if answer.status == 206 else 0
        length = answer.length
        total = None if length is None else start + length
        if size is not None and total is not None and total != size:
            raise InputError(f"{item.file}: the server offers {total:,} bytes, expected {size:,}: not fetched.")
        with part.open("ab" if start else "wb") as target:
            done = start
            while chunk := answer.read(_CHUNK):
                target.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(item, done, total)
        if total is not None and done < total:
            raise InputError(f"{item.file}: the transfer broke off at {done:,} of {total:,} bytes; run it again.")
        return _stated_hash(headers)


def _stated_hash(headers: dict[str, str]) -> str | None:
    """The hub states the sha256 of a large file as the entity tag of what it links to."""
    tag = headers.get("x-linked-etag", "").strip('"')
    return tag if len(tag) == 64 and all(c in "0123456789abcdef" for c in tag) else None


@contextmanager
def _open(url: str, method: str = "GET", start: int = 0) -> Iterator[tuple[http.client.HTTPResponse, dict[str, str]]]:
    """The answer after redirects, and the headers of all answers on the way, in lower case."""
    headers: dict[str, str] = {}
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(url)
        line = _line(url)
        try:
            line.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=_ask(start))
            answer = line.getresponse()
            headers |= {name.lower(): value for name, value in answer.getheaders()}
            if answer.status not in (301, 302, 303, 307, 308):
                yield answer, headers
                return
            following = urljoin(url, answer.getheader("Location") or "")
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{parts.hostname}: the transfer failed ({error}); run it again to go on.") from error
        finally:
            line.close()
        if parts.scheme == "https" and urlsplit(following).scheme != "https":
            raise InputError(f"{parts.hostname} redirects to an unencrypted address: not followed.")
        url = following
    raise InputError(f"{urlsplit(url).hostname}: too many redirects.")


def _ask(start: int) -> dict[str, str]:
    agent = {"User-Agent": "ipgo", "Accept-Encoding": "identity"}
    return agent | ({"Range": f"bytes={start}-"} if start else {})


def _line(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT, context=context)
    if parts.scheme == "http" and parts.hostname:
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT)
    raise InputError(f"{url!r} is not an http or https address.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
