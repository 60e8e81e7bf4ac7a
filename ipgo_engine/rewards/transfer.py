"""Bringing one file over, in pieces that a later call goes on from, never mixing two files into one."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import InputError
from .files import read_json
from .weights import WeightFile

Progress = Callable[[WeightFile, int, int | None], None]

_CHUNK = 1 << 20
_MOST_REDIRECTS = 5
_TIMEOUT = 60.0


def offered_size(item: WeightFile, host: str | None) -> int | None:
    """What the server says the file's size is, without fetching it."""
    with _open(item.url(host), method="HEAD") as (answer, headers):
        if answer.status != 200:
            return None
        linked = _number(headers.get("x-linked-size"))
        return _number(answer.getheader("Content-Length")) if linked is None else linked


def transfer(
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
    discard(part)  # the server does not continue it
    return transfer(item, part, known, progress, host)


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
        discard(part)
        raise InputError(f"{item.file}: the server sent more than the {total:,} bytes it stated; removed.")
    if total is not None and done < total:
        raise InputError(f"{item.file}: the transfer broke off at {done:,} of {total:,} bytes; run it again.")


def _begin(part: Path, source: dict[str, Any]) -> None:
    """Start `part` anew and note beside it what it comes from."""
    discard(part)
    write_json(_note_path(part), source)


def _begun(part: Path, url: str) -> dict[str, Any]:
    """What was noted when `part` was begun from `url`; nothing when it was not, or when nobody knows."""
    try:
        note = read_json(_note_path(part))
    except InputError:
        return {}
    return note if note.get("url") == url else {}


def discard(part: Path) -> None:
    """Remove a `.part` and what was noted about it."""
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(new, path)
