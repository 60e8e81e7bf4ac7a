"""The vision-language judge against an endpoint on this machine."""

import base64
import http.server
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ipgo_engine import cli, rewards
from ipgo_engine.errors import BudgetSpentError, InputError, NonFiniteError
from ipgo_engine.rewards.judge import Judge, JudgeConfig, JudgeError, parse_score

from .conftest import serving


class Endpoint:
    """Answers like a chat server; `replies` (status, text, header ...) are used up in turn, then brightness scores."""

    def __init__(self, replies=(), together=None):
        self.replies, self.together = list(replies), together
        self.seen, self.running, self.most = [], 0, 0
        self.lock = threading.Lock()

    def handler(self):
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.seen.append((self.path, dict(self.headers), body))
                    endpoint.running += 1
                    endpoint.most = max(endpoint.most, endpoint.running)
                    reply = endpoint.replies.pop(0) if endpoint.replies else None
                if endpoint.together is not None:
                    endpoint.together.wait(60)
                brightest = (200, chat(f"Score: {10 * brightness(body):.2f}"))
                status, text, *headers = reply if reply is not None else brightest
                with endpoint.lock:
                    endpoint.running -= 1
                self.send_response(status)
                for header in headers:
                    self.send_header(*header)
                if 300 <= status < 400:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        return Handler


def chat(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


def brightness(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    return np.asarray(image).mean() / 255


def batch(*values, size=32):
    return torch.stack([torch.full((3, size, size), value) for value in values])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("ipgo_engine.rewards.judge.time.sleep", lambda seconds: None)


def judge(url, **settings):
    return Judge(JudgeConfig(url=url + "/v1", **settings))


def test_settings_come_by_name_as_texts():
    place = {"url": "http://127.0.0.1:9/v1", "model": "my-vlm", "max_calls": "2000", "timeout": "5"}
    judge = rewards.load("judge", place)
    assert (judge.config.model, judge.config.max_calls, judge.config.timeout) == ("my-vlm", 2000, 5.0)
    for wrong, message in (({"colour": "red"}, "no setting 'colour'"), ({"max_calls": "many"}, "max_calls is 'many'")):
        with pytest.raises(InputError, match=message):
            rewards.load("judge", place | wrong)


def test_calibration_is_a_run_of_its_own():
    """A judge whose calls an earlier run has used up can be calibrated with."""
    with serving(Endpoint().handler()) as host:
        judge = Judge(JudgeConfig(url=f"{host}/v1", max_calls=2, concurrency=1))
        used, images = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        judge.score(used, ["a", "a"])
        assert rewards.Weighted([(judge, 1.0)]).calibrated(images, ["a", "a"]).scales[0][1] > 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7.5", 7.5),
        ("score = 3", 3),
        ("**Score:** 8/10", 8),
        ('{"score": 6.25, "why": "10 of 10 dogs"}', 6.25),
        ("7", 7),
        ("7.5/10", 7.5),
        ("  *9.5*. ", 9.5),
        ("The sky is odd.\nScore: 2\nOn reflection, Score: 4", 4),
        ("<think>Score: 9</think>Score: 1", 1),
        ("the tag came with the question, Score: 9</think>7", 7),
        ("<think>never finished, Score: 9", None),
        ("**8**/10", 8),
        ("Score:\n8", 8),
        ("Score: 8\r\nA fine picture.", 8),
        ("Score: 7.5. The sky is odd.", 7.5),
        ("**Score: 8 out of 10.**", 8),
        ("Score: 8/10.0", 8),
        ('{\n  "score": "7",\n  "why": "odd sky"\n}', 7),
        ('```json\n{"why":"sky","score":7.5}\n```', 7.5),
        ("Score: <7.5>", 7.5),
        ("Score: [7.5]", 7.5),
        ("Score: 7.5</s>", 7.5),
        ("8<|im_end|>", 8),
        ("Score: <1-10>", None),
        ("4/5", None),
        ("8/100", None),
        ("Score: 8 out of 100", None),
        ("Score: 8, out of 100", None),
        ("Score: 8\nScore: 9 out of 100", None),
        ("Score: 7,5", None),
        ("7,5", None),
        ("Score: 10-point scale: 6", None),
        ("Score: 1e1", None),
        ("Score: 80%", None),
        ("Score: 8 dogs", None),
        ("I like it", None),
        ("I see 3 dogs", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: NaN", None),
        ("", None),
    ],
)
def test_parse_score(text, score):
    assert parse_score(text, 0, 10) == score


def test_a_score_is_out_of_high():
    assert parse_score("0.5/1", 0, 1) == 0.5
    assert parse_score("Score: 80 out of 100", 0, 100) == 80
    assert parse_score("Score: 8/10", 0, 100) is None


@pytest.mark.parametrize(
    "text",
    ["1" * 40_000, f"Score: {'1' * 40_000}.1.1", "score:" * 40_000, "7 " * 40_000, "<think>" * 40_000],
    ids=lambda text: text[:10],
)
def test_a_long_answer_does_not_hold_the_process(text):
    started = time.process_time()
    assert parse_score(text, 0, 10) is None
    assert time.process_time() - started < 1
    assert parse_score(text.replace("<think>", "") + "\nScore: 4", 0, 10) == 4


def test_scores_prompt_and_picture_reach_the_endpoint():
    endpoint = Endpoint()
    with serving(endpoint.handler()) as url:
        reward = judge(url, model="tiny-vlm", max_tokens=77, extra={"seed": 1})
        assert isinstance(reward, rewards.Reward)
        assert not reward.differentiable
        scores = reward.score(batch(0.0, 0.5, 1.0), ["black", "grey {x}", "white"])
    torch.testing.assert_close(scores, torch.tensor([0.0, 5.02, 10.0]))
    assert {path for path, _, _ in endpoint.seen} == {"/v1/chat/completions"}
    bodies = [body for _, _, body in endpoint.seen]
    texts = " ".join(body["messages"][0]["content"][1]["text"] for body in bodies)
    assert "grey {x}" in texts
    assert "from 0 (worst) to 10 (best)" in texts
    sent = {(body["model"], body["seed"], body["temperature"], body["max_tokens"]) for body in bodies}
    assert sent == {("tiny-vlm", 1, 0, 77)}
    assert not any("Authorization" in headers for _, headers, _ in endpoint.seen)


def test_an_image_is_sent_once_shrunk_and_within_the_limit_of_calls_at_once():
    endpoint = Endpoint(together=threading.Barrier(2))  # a call is answered only when two are under way
    with serving(endpoint.handler()) as url:
        reward = judge(url, concurrency=2, longest_side=64)
        images = batch(*torch.linspace(0, 1, 6).tolist(), size=200)
        first = reward.score(images, ["x"] * 6)
        assert torch.equal(reward.score(images, ["x"] * 6), first)
        assert reward.calls == len(endpoint.seen) == 6
        assert endpoint.most == 2
        endpoint.together = None
        reward.score(images[:1], ["another prompt"])
        assert reward.calls == 7
    url = endpoint.seen[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (64, 64)


def test_the_same_picture_and_prompt_in_one_batch_are_sent_once():
    endpoint = Endpoint(together=threading.Barrier(2))  # a call is answered only when two are under way
    with serving(endpoint.handler()) as url:
        scores = judge(url, concurrency=2).score(batch(0.5, 0.5, 0.0, 0.0), ["x"] * 4)
    torch.testing.assert_close(scores, torch.tensor([5.02, 5.02, 0.0, 0.0]))
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize(
    "bad",
    [
        *((status, "later") for status in (408, 409, 425, 429, 500, 503)),
        *((200, text) for text in ("not json", chat("lovely!"), "{}", "[" * 100_000)),
    ],
    ids=lambda bad: f"{bad[0]} {bad[1][:20]}",
)
def test_a_failure_that_may_pass_is_tried_again(bad):
    endpoint = Endpoint([bad, (200, chat("Score: 4"))])
    with serving(endpoint.handler()) as url:
        assert judge(url).score(batch(0.5), ["x"]).item() == 4
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize(
    ("header", "pause"), [("3", 3), ("9999", 20), ("0", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5)]
)
def test_a_busy_server_says_how_long_to_wait(header, pause, monkeypatch):
    pauses = []
    monkeypatch.setattr("ipgo_engine.rewards.judge.time.sleep", pauses.append)
    endpoint = Endpoint([(503, "loading the model", ("Retry-After", header))])
    with serving(endpoint.handler()) as url:
        judge(url, timeout=20).score(batch(0.5), ["x"])
    assert pauses == [pause]


@pytest.mark.parametrize(
    ("replies", "message", "calls"),
    [
        ([(200, chat("what a nice picture"))] * 9, r"'what a nice picture', which holds no score from 0 to 10", 3),
        ([(503, "down")] * 9, "answers 503", 3),
        ([(401, "no key")], "answers 401: 'no key'", 1),
        ([(307, "")], "redirects elsewhere: not followed", 1),
    ],
)
def test_a_failure_for_good_is_one_clear_sentence(replies, message, calls):
    endpoint = Endpoint(replies)
    with serving(endpoint.handler()) as url, pytest.raises(JudgeError, match=message):
        judge(url).score(batch(0.5), ["x"])
    assert len(endpoint.seen) == calls


def test_nobody_there_and_too_slow():
    with pytest.raises(JudgeError, match="no answer"):
        Judge(JudgeConfig(url="http://127.0.0.1:9", retries=0, timeout=2)).score(batch(0.5), ["x"])
    endpoint = Endpoint()
    release = threading.Event()
    handler = endpoint.handler()
    original = handler.do_POST
    handler.do_POST = lambda self: (release.wait(5), original(self))
    with serving(handler) as url:
        try:
            with pytest.raises(JudgeError, match="timed out"):
                judge(url, timeout=0.3, retries=0).score(batch(0.5), ["x"])
        finally:
            release.set()


def test_an_answered_call_leaves_no_clock_running():
    """It would keep the whole program waiting for the rest of the timeout."""
    with serving(Endpoint().handler()) as url:
        judge(url, timeout=30.0).score(batch(0.5), ["grey"])
    clocks = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for clock in clocks:
        clock.join(5.0)  # stopped, it ends by itself
    assert not any(clock.is_alive() for clock in clocks)


@pytest.mark.parametrize("slow", ["headers", "body"])
def test_a_call_ends_in_time_though_bytes_keep_coming(slow):
    release, handler = threading.Event(), Endpoint().handler()

    def trickle(self):
        if slow == "body":
            self.send_response(200)
            self.end_headers()
        try:
            while not release.wait(0.05):
                self.wfile.write(b"H")
        except OSError:  # the judge has hung up
            pass

    handler.do_POST = trickle
    with serving(handler) as url:
        watchdog = threading.Timer(5, release.set)
        watchdog.start()
        started = time.monotonic()
        try:
            with pytest.raises(JudgeError, match="timed out"):
                judge(url, timeout=0.5, retries=0).score(batch(0.5), ["x"])
        finally:
            watchdog.cancel()
            release.set()
    assert time.monotonic() - started < 4


def test_the_cost_is_bounded_and_ends_the_run_with_its_best():
    endpoint = Endpoint()
    with serving(endpoint.handler()) as url:
        reward = judge(url, max_calls=3, concurrency=1)
        reward.score(batch(0.1, 0.2, 0.3), ["x"] * 3)
        with pytest.raises(BudgetSpentError, match="all 3 calls are used up, raise max_calls"):
            reward.score(batch(0.4), ["x"])
        assert reward.score(batch(0.1), ["x"]).item() == pytest.approx(1.02, abs=0.01)  # remembered, not sent
        assert len(endpoint.seen) == 3
        reward.begin_run()
        reward.score(batch(0.4), ["x"])
    assert reward.calls == 1


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("  {}/v1/ ", "/v1/chat/completions"),
        ("{}", "/chat/completions"),
        ("{}/v1/chat/completions", "/v1/chat/completions"),
        ("{}/v1?api-version=1", "/v1/chat/completions?api-version=1"),
    ],
)
def test_addresses_as_people_type_them(typed, path):
    endpoint = Endpoint()
    with serving(endpoint.handler()) as url:
        Judge(JudgeConfig(url=typed.format(url))).score(batch(0.5), ["x"])
        host = url.removeprefix("http://")
    assert [(seen, headers["Host"]) for seen, headers, _ in endpoint.seen] == [(path, host)]


def test_the_key_comes_from_a_named_variable_only(monkeypatch):
    with pytest.raises(InputError, match="IPGO_TEST_KEY"):
        Judge(JudgeConfig(url="http://127.0.0.1:9", key_variable="IPGO_TEST_KEY"))
    monkeypatch.setenv("IPGO_TEST_KEY", "secret\n")
    endpoint = Endpoint()
    with serving(endpoint.handler()) as url:
        reward = judge(url, key_variable="IPGO_TEST_KEY")
        reward.score(batch(0.5), ["x"])
    assert endpoint.seen[0][1]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(reward.config)
    for unusable in ("", "geheim\u00e4"):
        monkeypatch.setenv("IPGO_TEST_KEY", unusable)
        with pytest.raises(InputError, match="whose value is no key"):
            judge(url, key_variable="IPGO_TEST_KEY")


@pytest.mark.parametrize(
    "settings",
    [
        {"url": ""},
        {"url": "localhost:8080"},
        {"url": "ftp://example.org"},
        {"url": "http://user:password@example.org"},
        {"url": "http://127.0.0.1:99999/v1"},
        {"url": "http://127.0.0.1:0/v1"},
        {"url": "http://127.0.0.1:abc/v1"},
        {"url": "http://[::1/v1"},
        {"url": "http://a..b/v1"},
        {"url": "http://127.0.0.1:9/v\u00e4"},
        {"url": "http://127.0.0.1:9/v 1"},
        {"low": 5, "high": 5},
        {"retries": -1},
        {"concurrency": 0},
        {"max_calls": 0},
        {"max_tokens": 0},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"longest_side": 2},
        {"template": "rate it"},
        {"template": "rate {{prompt}}"},
        {"template": "{prompt} {unknown}"},
        {"template": "{prompt} {"},
        {"template": "{prompt} {low.x}"},
        {"template": "{prompt} {low[0]}"},
        {"template": "{prompt[0]}"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(InputError):
        JudgeConfig(**{"url": "http://127.0.0.1:9", **settings})


def test_a_broken_image_is_never_sent():
    with pytest.raises(NonFiniteError):
        Judge(JudgeConfig(url="http://127.0.0.1:9")).score(batch(float("nan")), ["x"])


def test_the_score_command_asks_a_judge(tmp_path, monkeypatch, capsys):

    monkeypatch.chdir(tmp_path)
    for level in (40, 200):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / f"{level}.png")
    endpoint = Endpoint()
    with serving(endpoint.handler()) as address:
        path = f"judge={address}/v1"
        command = ["score", "40.png", "200.png", "--reward", "judge", "--reward-path", path, "--prompt", "a wall"]
        assert cli.main([*command, "--out", "run"]) == 0
    assert len(endpoint.seen) == 2
    lines = (tmp_path / "run" / "scores.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["200.png", "40.png"]
    assert cli.main(["score", "40.png", "--reward", "judge", "--prompt", "a wall"]) == 2
    assert "url" in capsys.readouterr().err
