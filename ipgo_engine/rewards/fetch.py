"""Fetching published weights once, only when asked to, so that everything works offline afterwards."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from ..errors import Cancelled, InputError
from .files import convert_to_safetensors, read_json, read_weights
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
    there; a file appears under its name only when it is whole, its sha256 is right and it can be read. Of a pickle only
    its conversion to safetensors appears. `host` replaces the address of the table (a mirror). Raises `InputError` in
    one sentence, also while another process downloads into `root`.
    """
    files, root = files_of(name), Path(root).expanduser()
    for line in offer(name, root, host=host):
        report(line)
    if confirm is not None and not confirm():
        raise Cancelled("nothing was fetched.")
    complete = all(_present(item, root) for item in files)
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
        if answer.status != 200:
            return None
        linked = _number(headers.get("x-linked-size"))
        return _number(answer.getheader("Content-Length")) if linked is None else linked


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    expected = _transfer(item, part, remembered(item, root), progress, host)
    found = _sha256(part)
    if expected and found != expected:
        _discard(part)
        raise InputError(f"{item.file}: the server sent a file with sha256 {found}, expected {expected}; removed.")
    try:
        _check(part, path.suffix)
    except InputError as error:
        _discard(part)
        raise InputError(f"{item.file}: what the server sent is of no use and was removed: {error}") from error
    return _publish(item, root, part, found)


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
    converted = path.suffix in _PICKLES and not target.exists()
    if converted:
        convert_to_safetensors(part, target)
        record |= {"converted to": target.name, "converted sha256": _sha256(target)}
        done += f"; converted to {target.name}"
    if converted or not item.sha256 or not item.size:
        _write_json(_record_path(item, root), record)
    if not converted:
        os.replace(part, path)
    _discard(part)
    return done


def _record_path(item: WeightFile, root: Path) -> Path:
    path = item.path(root)
    return path.with_name(path.name + ".record.json")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(new, path)


# -- one transfer -----------------------------------------------------------------------------------------------------


def _transfer(
    item: WeightFile, part: Path, known: dict[str, Any], progress: Progress | None, host: str | None
) -> str | None:
    """Complete `part`; returns the sha256 it must have, where the table, the record or the server states one.

    Where nobody does, `part` is only continued with what it was begun from: the same address and entity tag.
    """
    url = item.url(host)
    begun = _begun(part, url)
    expected = known.get("sha256") or begun.get("sha256")
    start = part.stat().st_size if part.exists() and (expected or begun.get("etag")) else 0
    if start and start == known.get("size", begun.get("size")):
        return expected
    with _open(url, start=start, etag=None if expected else begun.get("etag")) as (answer, headers):
        if answer.status == 416 and start and expected:
            return expected  # nothing is left to send; the sha256 tells whether that is true
        if answer.status == 200 or (answer.status == 206 and _continues(answer, start, begun)):
            start = start if answer.status == 206 else 0
            expected = known.get("sha256") or _stated_hash(headers) or (begun.get("sha256") if start else None)
            total = _total(item, answer, headers, known.get("size"))
            if total is None and expected is None and not answer.chunked:  # chunks end with a mark
                raise InputError(f"{item.file}: the server states neither size nor sha256: use another host.")
            if not start:
                _begin(part, {"url": url, "etag": _etag(answer), "size": total, "sha256": expected})
            _append(item, part, _pieces(answer, url), total, progress)
            return expected
        if not start or answer.status not in (206, 416):
            raise InputError(f"{item.file}: {urlsplit(url).hostname} answers {answer.status}.")
    _discard(part)  # the server does not continue it
    return _transfer(item, part, known, progress, host)


def _append(
    item: WeightFile, part: Path, pieces: Iterator[bytes], total: int | None, progress: Progress | None
) -> None:
    """Write what comes behind what is there; `InputError` unless `part` then has the size `total`."""
    with part.open("ab") as target:
        done = target.tell()
        for piece in pieces:
            target.write(piece)
            done += len(piece)
            if total is not None and done > total:
                break
            if progress is not None:
                progress(item, done, total)
    if total is not None and done > total:
        _discard(part)
        raise InputError(f"{item.file}: the server sent more than the {total:,} bytes it stated; removed.")
    if total is not None and done < total:
        raise InputError(f"{item.file}: the transfer broke off at {done:,} of {total:,} bytes; run it again.")


def _begin(part: Path, source: dict[str, Any]) -> None:
    """Start `part` anew and note beside it what it comes from."""
    _discard(part)
    _write_json(_note_path(part), source)


def _begun(part: Path, url: str) -> dict[str, Any]:
    """What was noted when `part` was begun from `url`; nothing when it was not, or when nobody knows."""
    try:
        note = read_json(_note_path(part))
    except InputError:
        return {}
    return note if note.get("url") == url else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _continues(answer: http.client.HTTPResponse, start: int, begun: dict[str, Any]) -> bool:
    """Whether a part of a file (206) is the rest of what was begun: some servers ignore what they are asked."""
    first, _ = _range(answer)
    return first == start and (not begun.get("etag") or _etag(answer) in (None, begun["etag"]))


def _total(
    item: WeightFile, answer: http.client.HTTPResponse, headers: dict[str, str], known: int | None
) -> int | None:
    """The size of the whole file, None where nobody states it; `InputError` where statements differ."""
    sent = _range(answer)[1] if answer.status == 206 else answer.length
    stated = [size for size in (known, _number(headers.get("x-linked-size")), sent) if size is not None]
    for size in reversed(stated):
        if size != stated[0]:
            raise InputError(f"{item.file}: the server offers {size:,} bytes, expected {stated[0]:,}: not fetched.")
    return stated[0] if stated else None


def _range(answer: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """Where the bytes of this answer start in the file, and how many the file has."""
    found = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", answer.getheader("Content-Range", ""))
    return (_number(found[1]), _number(found[2])) if found else (None, None)


def _etag(answer: http.client.HTTPResponse) -> str | None:
    """The entity tag that promises the same bytes; a weak one does not."""
    tag = answer.getheader("ETag", "")
    return tag if tag and not tag.startswith("W/") else None


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _stated_hash(headers: dict[str, str]) -> str | None:
    """The hub states the sha256 of a large file as the entity tag of what it links to."""
    tag = headers.get("x-linked-etag", "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


# -- the line ---------------------------------------------------------------------------------------------------------


@contextmanager
def _open(
    url: str, *, method: str = "GET", start: int = 0, etag: str | None = None
) -> Iterator[tuple[http.client.HTTPResponse, dict[str, str]]]:
    """The answer after redirects, and the headers of all answers on the way, in lower case."""
    headers: dict[str, str] = {}
    for _ in range(_MOST_REDIRECTS + 1):
        with _asking(url):
            parts, line = urlsplit(url), _line(url)
        with closing(line):
            with _asking(url):
                line.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=_ask(start, etag))
                answer = line.getresponse()
            headers |= {name.lower(): value for name, value in answer.getheaders()}
            if answer.status not in (301, 302, 303, 307, 308):
                yield answer, headers
                return
        following = answer.getheader("Location", "")
        with _asking(following):
            following = urljoin(url, following)
            unencrypted = urlsplit(following).scheme != "https"
        if parts.scheme == "https" and unencrypted:
            raise InputError(f"{parts.hostname} redirects to an unencrypted address: not followed.")
        url = following
    raise InputError(f"{urlsplit(url).hostname}: too many redirects.")


def _pieces(answer: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    while True:
        with _asking(url):
            piece = answer.read(_CHUNK)
        if not piece:
            return
        yield piece


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """`InputError` for a `url` that is no address, and for whatever goes wrong on the line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, http.client.HTTPException) as error:
        host = urlsplit(url).hostname
        raise InputError(f"{host}: the transfer failed ({error}); run it again to go on.") from error
    except ValueError as error:  # a port out of range, a letter that no address has
        raise InputError(f"{url!r} is not an http or https address ({error}).") from error


def _ask(start: int, etag: str | None) -> dict[str, str]:
    asked = {"User-Agent": "ipgo", "Accept-Encoding": "identity"}
    asked |= {"Range": f"bytes={start}-"} if start else {}
    return asked | ({"If-Range": etag} if start and etag else {})


def _line(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT, context=context)
    if parts.scheme == "http" and parts.hostname:
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT)
    raise InputError(f"{url!r} is not an http or https address.")


# -- the disk ---------------------------------------------------------------------------------------------------------


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
        file = (root / ".download.lock").open("ab")  # stays: removing it could take it away from somebody else
    with file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{str(root)!r}: another process downloads into this folder; wait for it.") from None
        except OSError:
            pass  # some network drives have no locks
        yield


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
