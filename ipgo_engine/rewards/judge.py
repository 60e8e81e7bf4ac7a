"""A vision-language model as judge, behind any endpoint that speaks OpenAI's chat format."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

from ..errors import BudgetSpentError, InputError, IPGOError, NonFiniteError
from .preprocess import check_inputs, to_uint8

TEMPLATE = (
    "You judge pictures made by an image generator. The prompt was:\n\n{prompt}\n\n"
    "Rate how well the picture shows what the prompt asks for and how good it looks, from {low:g} (worst) to {high:g} "
    "(best). Use the whole range and one decimal. Answer with one line and nothing else:\nScore: <number>"
)
_REMEMBERED = 2048
_LONGEST_ANSWER = 1 << 20
_LONGEST_TIMEOUT = 86400.0

# Where a score is looked for. All repetitions are bounded, so that no answer keeps the process busy.
_LOOKED_AT = 4000
_MARKS = r"[\s*_`\"'<\[]{0,20}"
_LABEL = re.compile(rf"score[\"'*_ ]{{0,20}}[:=]{_MARKS}(?=-?\d)", re.IGNORECASE)
_NUMBER = rf"{_MARKS}(-?\d{{1,9}}(?:\.\d{{1,20}})?)(?:{_MARKS}(?:/|out of){_MARKS}(\d{{1,9}}(?:\.\d{{1,20}})?))?"
_CLOSING = r"[\s*_`\"'.,;!)\]}>]{0,20}?"
_END = re.compile(r"(\s*(</s>|<\|[a-z_]{1,20}\|>)){1,5}\s*\Z")  # a model's own sign that it is done
_LABELLED = re.compile(rf"{_NUMBER}{_CLOSING}(?:$|\.\s|,\s*\")", re.IGNORECASE | re.MULTILINE)
_BARE = re.compile(rf"{_NUMBER}{_CLOSING}\Z", re.IGNORECASE)


class JudgeError(IPGOError):
    """The endpoint could not be reached, refused, or kept answering something that is not a score."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Where the judge is, what it is asked and what it may cost.

    An image leaves this process only towards `url`, exactly as typed: there is no default address, redirects are not
    followed, and proxies of the environment are not used.
    """

    url: str
    """Base address, such as http://127.0.0.1:8080/v1; `/chat/completions` is added where missing, a query is kept."""
    model: str = "default"
    template: str = TEMPLATE
    """May hold {prompt}, {low} and {high}; write other braces twice."""
    low: float = 0.0
    high: float = 10.0
    """A score outside [low, high] counts as no answer."""
    timeout: float = 60.0
    """Seconds to connect and send, and again for the whole answer."""
    retries: int = 2
    """Further attempts after a failure that may pass: no connection, no answer in time, busy, no score in the text."""
    concurrency: int = 2
    """Calls under way at once; 1 for a server that handles one at a time."""
    max_calls: int = 500
    """Calls of one run, retries included; when they are used up the run ends with its best so far."""
    max_tokens: int = 1024
    """Tokens of one answer at most; a model that thinks first needs room for that."""
    longest_side: int = 512
    """Larger images are shrunk to this, which bounds what one call costs."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key; a key itself is never stored in settings or results."""
    extra: dict[str, object] = field(default_factory=dict)
    """Further fields of the call's body, such as {"seed": 1}."""

    def __post_init__(self) -> None:
        _address(self.url)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"judge range is {self.low!r} to {self.high!r}: low must be below high.")
        least_of = {"retries": 0, "concurrency": 1, "max_calls": 1, "max_tokens": 1, "longest_side": 16}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise InputError(f"judge {name} is {getattr(self, name)!r}: use {least} or more.")
        if not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise InputError(
                f"judge timeout is {self.timeout!r}: use seconds above 0, {_LONGEST_TIMEOUT:g} (a day) at most."
            )
        try:
            asked = [self.template.format(prompt=prompt, low=self.low, high=self.high) for prompt in ("", "a")]
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"judge template cannot be filled in ({error}): write other braces twice.") from error
        if asked[0] == asked[1]:
            raise InputError("judge template does not mention {prompt}: the judge would not know what was asked for.")


class Judge:
    """The judge's rating of each image, from `low` to `high`. A black box: no gradient."""

    name = "judge"
    differentiable = False

    def __init__(self, config: JudgeConfig) -> None:
        """Nothing is sent before the first `score`. Raises `InputError` when the key variable holds no key."""
        self.config = config
        asked = ("model", "template", "low", "high", "longest_side", "extra")
        self.score_settings = {name: getattr(config, name) for name in asked}  # not the address: a server may move
        self.calls = 0
        self._address = _address(config.url)
        self._key = _read_key(config.key_variable)
        self._answers: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin_run(self) -> None:
        """A new run begins: its calls are counted from 0 again."""
        with self._lock:
            self.calls = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device; an image with the same prompt is sent once, in this batch and later.

        Cannot be cancelled while it waits, but takes no longer than 3 * `timeout` * (`retries` + 1) for every
        `concurrency` images: connecting, the answer, a pause.

        Raises `JudgeError` when the endpoint fails for good and `BudgetSpentError` when `max_calls` are used up.
        """
        check_inputs(images, prompts)
        if not torch.isfinite(images).all():
            raise NonFiniteError("images holds NaN or infinity: it cannot be shown to the judge.")
        pictures = [_png(pixels, self.config.longest_side) for pixels in to_uint8(images)]
        questions = list(zip(pictures, prompts, strict=True))
        different = list(dict.fromkeys(questions))
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            rated = dict(zip(different, pool.map(self._rate, different), strict=True))
        scores = [rated[question] for question in questions]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _rate(self, question: tuple[bytes, str]) -> float:
        picture, prompt = question
        key = hashlib.sha256(picture + b"\0" + prompt.encode()).hexdigest()
        score = self._answers.get(key)
        if score is None:
            score = self._ask_until_answered(picture, prompt)
            with self._lock:
                if len(self._answers) >= _REMEMBERED:
                    self._answers.clear()
                self._answers[key] = score
        return score

    def _ask_until_answered(self, picture: bytes, prompt: str) -> float:
        trouble, pause = "", 0.0
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(min(self.config.timeout, pause))
            pause = min(8.0, 0.5 * 2**attempt)
            try:
                text = self._ask(picture, prompt)
            except _MayPass as error:
                trouble, pause = str(error), max(pause, error.wait)
                continue
            score = parse_score(text, self.config.low, self.config.high)
            if score is not None:
                return score
            trouble = (
                f"answers {_short(text)!r}, which holds no score from {self.config.low:g} to {self.config.high:g}; "
                "make the template clearer, or raise max_tokens if the answer was cut off"
            )
        raise JudgeError(f"judge at {self.config.url}: {trouble} ({self.config.retries + 1} attempts).")

    def _ask(self, picture: bytes, prompt: str) -> str:
        """The text of one answer."""
        with self._lock:
            if self.calls >= self.config.max_calls:
                raise BudgetSpentError(
                    f"judge at {self.config.url}: all {self.config.max_calls} calls are used up, raise max_calls for "
                    "a longer run."
                )
            self.calls += 1
        status, wait, body = self._post(json.dumps(self._body(picture, prompt)).encode())
        if status in (408, 409, 425, 429) or status >= 500:
            raise _MayPass(f"answers {status}: {_short(body)!r}", wait)
        if 300 <= status < 400:
            raise JudgeError(f"judge at {self.config.url} redirects elsewhere: not followed, type the final address.")
        if status != 200:
            raise JudgeError(f"judge at {self.config.url} answers {status}: {_short(body)!r}.")
        return _text_of(body)

    def _post(self, body: bytes) -> tuple[int, float, str]:
        """Status, seconds to wait before another attempt, and text of one call."""
        target = self._address.path + (f"?{self._address.query}" if self._address.query else "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        line = _line(self._address, self.config.timeout)
        try:
            line.request("POST", target, body, headers)
            with _hanging_up(line.sock, self.config.timeout):
                answer = line.getresponse()
                text = answer.read(_LONGEST_ANSWER).decode("utf-8", "replace")
            return answer.status, _seconds(answer.getheader("Retry-After")), text
        except (OSError, http.client.HTTPException) as error:
            raise _MayPass(f"no answer ({error or type(error).__name__})") from error
        finally:
            line.close()

    def _body(self, picture: bytes, prompt: str) -> dict[str, object]:
        question = self.config.template.format(prompt=prompt, low=self.config.low, high=self.config.high)
        image = "data:image/png;base64," + base64.b64encode(picture).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            **self.config.extra,
        }


class _MayPass(Exception):
    """A failure after which another attempt makes sense, `wait` seconds later or more."""

    def __init__(self, trouble: str, wait: float = 0.0) -> None:
        super().__init__(trouble)
        self.wait = wait


def parse_score(text: str, low: float, high: float) -> float | None:
    """The score in an answer, or None: {"score": 7}, "Score: 7.5", "7/10", or a bare number, within [low, high].

    Reasoning inside <think> tags is skipped, and of several "Score:" lines the last one counts. A number that merely
    occurs in a sentence, goes on ("1e1", "7,5", "10-point") or is out of anything but `high` is not a score.
    """
    text = re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = _END.sub("", text.rpartition("</think>")[2].strip()[-_LOOKED_AT:])
    labels = list(_LABEL.finditer(text))
    found = _LABELLED.match(text, labels[-1].end()) if labels else _BARE.match(text)
    if found is None or (found[2] and float(found[2]) != high):
        return None
    return value if low <= (value := float(found[1])) <= high else None


def _text_of(body: str) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _MayPass(f"answers {_short(body)!r}, which is not a chat completion") from error
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


def _png(pixels: Tensor, longest_side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels.numpy())
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if variable not in os.environ:
        raise InputError(f"judge key_variable names {variable!r}, but no such environment variable is set.")
    key = os.environ[variable].strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(
            f"judge key_variable names {variable!r}, whose value is no key: it is empty or not plain ASCII."
        )
    return key


def _address(url: str) -> SplitResult:
    """Where calls go. Raises `InputError` for what could only fail later, at the first score."""
    url = url.strip()
    unusable = InputError(
        f"judge url is {url!r}: write an address such as http://127.0.0.1:8080/v1, in ASCII and without a login."
    )
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        fits = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError as error:  # a port or a bracket that cannot be read, a host with an empty or an overlong part
        raise unusable from error
    if not fits or not re.fullmatch(r"[!-~]+", url):
        raise unusable
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/chat/completions") else path + "/chat/completions")


def _line(address: SplitResult, timeout: float) -> http.client.HTTPConnection:
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    if address.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port, timeout=timeout)


@contextmanager
def _hanging_up(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Ends what goes on inside after so long: a socket's own timeout starts anew with every byte that comes."""
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with suppress(OSError):  # closed already
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise (TimeoutError("timed out") if late.is_set() else error) from error
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError("timed out")


def _seconds(header: str | None) -> float:
    """`Retry-After` in seconds; 0 for none, or for a date."""
    return float(header) if header and header.isdecimal() else 0.0
