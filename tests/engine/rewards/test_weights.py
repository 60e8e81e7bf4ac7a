"""The table of weights, their download, and files that are not what they claim to be."""

import hashlib
import http.client
import http.server
import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ipgo_engine import rewards
from ipgo_engine.errors import Cancelled, InputError
from ipgo_engine.rewards import clip_open, clip_transformers, files, weights
from ipgo_engine.rewards import fetch as fetching
from ipgo_engine.rewards.weights import WeightFile

from . import tiny
from .conftest import serving

VALUES = b"".join(struct.pack("<I", number) for number in range(319_980))
HEADER = json.dumps({"a": {"dtype": "U8", "shape": [len(VALUES)], "data_offsets": [0, len(VALUES)]}}).encode()
BODY = struct.pack("<Q", 72) + HEADER.ljust(72) + VALUES  # more than one chunk, and no two parts of it alike
OTHER = BODY[:80] + VALUES[::-1]
SHA256 = hashlib.sha256(BODY).hexdigest()


def item(**changes):
    values = {"folder": "model", "repository": "someone/model", "revision": "a" * 40, "file": "model.safetensors"}
    values |= {"size": len(BODY), "sha256": SHA256, "licence": "MIT", "sources": {"sha256": "test"}}
    return WeightFile(**{**values, **changes})


class Hub:
    """A hub that redirects large files to a store, as the real one does, and can misbehave."""

    def __init__(self, body=BODY, cut=None, ranges=True, states_hash=True, status=200, **how):
        self.body, self.cut, self.ranges, self.states_hash, self.status = body, cut, ranges, states_hash, status
        self.etag = how.get("etag")
        self.length = how.get("length", "stated")  # or "chunked" or "unknown"
        self.heeds_if_range = how.get("heeds_if_range", True)
        self.from_zero = how.get("from_zero", False)  # whatever start was asked for
        self.seen = []

    def handler(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(send=False)

            def do_GET(self):
                self.answer(send=True)

            def answer(self, send):
                hub.seen.append((self.command, self.path, self.headers.get("Range")))
                if hub.status != 200:
                    self.send_response(hub.status)
                    self.end_headers()
                elif self.path.startswith("/store"):
                    self.store(send)
                else:
                    self.send_response(302)
                    self.send_header("Location", "/store" + self.path)
                    if hub.states_hash:
                        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(hub.body).hexdigest()}"')
                        self.send_header("X-Linked-Size", str(len(hub.body)))
                    self.end_headers()

            def store(self, send):
                start = self.start()
                if start >= len(hub.body):
                    self.send_response(416)
                    self.end_headers()
                    return
                first = 0 if hub.from_zero else start
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {first}-{len(hub.body) - 1}/{len(hub.body)}")
                if hub.etag:
                    self.send_header("ETag", hub.etag)
                if hub.length == "stated":
                    self.send_header("Content-Length", str(len(hub.body) - first))
                if hub.length == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                body = hub.body[first : hub.cut]
                if hub.length == "chunked":
                    body = b"%x\r\n%b\r\n" % (len(body), body) + (b"0\r\n\r\n" if hub.cut is None else b"")
                if send:
                    self.wfile.write(body)

            def start(self):
                asked, tag = self.headers.get("Range"), self.headers.get("If-Range")
                changed = hub.heeds_if_range and tag not in (None, hub.etag)
                return 0 if not asked or changed or not hub.ranges else int(asked.removeprefix("bytes=").rstrip("-"))

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture
def table(monkeypatch):
    def use(*items):
        monkeypatch.setitem(weights.WEIGHTS, "clip", items)

    use(item())
    return use


def fetch(hub, root, **options):
    lines = []
    with serving(hub.handler()) as host:
        path = rewards.download("clip", root, report=lines.append, host=host, **options)
    return path, lines


def fetch_twice(root, first, second):
    """A transfer from `first` that breaks off, then one from `second` at the same address; returns what is there."""
    current = Hub()
    with serving(current.handler()) as host:
        current.__dict__ |= vars(first)
        with pytest.raises(InputError, match="run it again"):
            rewards.download("clip", root, report=str, host=host)
        current.__dict__ |= vars(second)
        return (rewards.download("clip", root, report=str, host=host) / "model.safetensors").read_bytes()


def test_size_and_licence_are_shown_before_anything_is_fetched(table, tmp_path):
    hub = Hub()

    def stop(line):
        raise KeyboardInterrupt(line)

    with serving(hub.handler()) as host, pytest.raises(KeyboardInterrupt, match=r"model/model.safetensors: 1\.3 MB; "):
        rewards.download("clip", tmp_path, report=stop, host=host)
    assert hub.seen == []
    table(item(size=None, sha256=None))
    with serving(hub.handler()) as host, pytest.raises(KeyboardInterrupt, match=r"1\.3 MB; licence: MIT"):
        rewards.download("clip", tmp_path, report=stop, host=host)
    assert {method for method, _, _ in hub.seen} == {"HEAD"}
    assert list(tmp_path.iterdir()) == []


def test_download_verifies_renames_and_is_not_repeated(table, tmp_path):
    hub, steps = Hub(), []
    path, lines = fetch(hub, tmp_path, progress=lambda file, done, total: steps.append((done, total)))
    assert path == tmp_path / "model"
    assert (path / "model.safetensors").read_bytes() == BODY
    assert sorted(os.listdir(path)) == ["model.safetensors"]
    assert hub.seen[0][1] == f"/someone/model/resolve/{'a' * 40}/model.safetensors"
    assert steps[-1] == (len(BODY), len(BODY))
    assert "as in the table" in lines[-1]
    quiet = Hub()
    _, lines = fetch(quiet, tmp_path)
    assert quiet.seen == []
    assert "there already" in lines[-1]


def test_a_broken_transfer_is_resumed(table, tmp_path):
    with pytest.raises(InputError, match=r"broke off at 700,000 of 1,280,000 bytes; run it again"):
        fetch(Hub(cut=700_000), tmp_path)
    part = tmp_path / "model" / "model.safetensors.part"
    assert part.stat().st_size == 700_000
    assert not (tmp_path / "model" / "model.safetensors").exists()
    hub = Hub()
    fetch(hub, tmp_path)
    assert hub.seen[-1][2] == "bytes=700000-"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == BODY
    assert not part.exists()


def test_a_cancelled_transfer_is_resumed(table, tmp_path):
    def cancel(*_):
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        fetch(Hub(), tmp_path, progress=cancel)
    hub = Hub()
    path, _ = fetch(hub, tmp_path)
    assert hub.seen[-1][2] == f"bytes={1 << 20}-"
    assert (path / "model.safetensors").read_bytes() == BODY


def test_a_server_without_ranges_starts_over(table, tmp_path):
    with pytest.raises(InputError, match="run it again"):
        fetch(Hub(cut=700_000), tmp_path)
    path, _ = fetch(Hub(ranges=False), tmp_path)
    assert (path / "model.safetensors").read_bytes() == BODY


def test_a_finished_part_only_needs_its_name(table, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.part").write_bytes(BODY)
    hub = Hub()
    path, _ = fetch(hub, tmp_path)
    assert hub.seen == []
    assert (path / "model.safetensors").read_bytes() == BODY


def test_another_file_than_expected_is_removed(table, tmp_path):
    with pytest.raises(InputError, match="the server offers 4 bytes, expected 1,280,000"):
        fetch(Hub(body=b"oops"), tmp_path)
    with pytest.raises(InputError, match=r"sent a file with sha256 .*; removed"):
        fetch(Hub(body=BODY[::-1]), tmp_path)
    assert os.listdir(tmp_path / "model") == []


def test_what_the_table_does_not_know_is_recorded_shown_and_held_to(table, tmp_path):
    table(item(size=None, sha256=None))
    path, lines = fetch(Hub(), tmp_path)
    assert f"sha256 {SHA256} (recorded; the table has none to compare with)" in lines[-1]
    record = json.loads((path / "model.safetensors.record.json").read_text())
    assert (record["sha256"], record["size"], record["revision"]) == (SHA256, len(BODY), "a" * 40)
    (path / "model.safetensors").write_bytes(BODY[:-1])
    with pytest.raises(InputError, match=f"expected {SHA256}: delete it"):
        fetch(Hub(), tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="sha256"):
        fetch(Hub(body=BODY[::-1]), tmp_path)


def test_the_hash_the_hub_states_is_checked_when_the_table_has_none(table, tmp_path):
    table(item(size=None, sha256=None))
    hub = Hub()
    handler = hub.handler()
    plain = handler.send_header

    def lie(self, name, value):
        plain(self, name, f'"{"0" * 64}"' if name == "X-Linked-Etag" else value)

    handler.send_header = lie
    with serving(handler) as host, pytest.raises(InputError, match="expected 0000"):
        rewards.download("clip", tmp_path, report=lambda line: None, host=host)


def test_a_part_is_continued_with_the_same_content_only(table, tmp_path):
    """Where nobody knows the sha256, nothing would tell a mixture of two files from a file."""
    table(item(size=None, sha256=None))
    cut = Hub(cut=700_000, states_hash=False, etag='"one"')
    second = Hub(states_hash=False, etag='"one"')
    assert fetch_twice(tmp_path / "same", cut, second) == BODY
    assert second.seen[-1][2] == "bytes=700000-"
    for number, heeds in enumerate((True, False)):  # not every server heeds If-Range
        second = Hub(OTHER, states_hash=False, etag='"two"', heeds_if_range=heeds)
        assert fetch_twice(tmp_path / f"changed{number}", cut, second) == OTHER
    for number, tag in enumerate((None, 'W/"one"')):
        cut.etag, second = tag, Hub(OTHER, states_hash=False, etag=tag)
        assert fetch_twice(tmp_path / f"no tag{number}", cut, second) == OTHER
        assert second.seen[-1][2] is None


def test_a_part_of_another_revision_or_of_unknown_origin_is_not_continued(table, tmp_path):
    table(item(size=None, sha256=None))
    current = Hub(cut=700_000, states_hash=False, etag='"same"')
    with serving(current.handler()) as host:
        with pytest.raises(InputError, match="run it again"):
            rewards.download("clip", tmp_path, report=str, host=host)
        table(item(size=None, sha256=None, revision="b" * 40))
        current.cut, current.body = None, OTHER
        path = rewards.download("clip", tmp_path, report=str, host=host) / "model.safetensors"
    assert path.read_bytes() == OTHER
    for note in (None, "{", '{"url": 1}'):
        path.unlink()
        path.with_name("model.safetensors.record.json").unlink()
        path.with_name("model.safetensors.part").write_bytes(BODY[:1000])
        if note:
            path.with_name("model.safetensors.part.json").write_text(note)
        fetch(Hub(OTHER, states_hash=False, etag='"same"'), tmp_path)
        assert path.read_bytes() == OTHER
        assert sorted(os.listdir(path.parent)) == ["model.safetensors", "model.safetensors.record.json"]


@pytest.mark.parametrize("known", [SHA256, None])
def test_a_server_that_sends_from_the_start_whatever_is_asked(table, tmp_path, known):
    table(item(sha256=known))
    hub = Hub(etag='"one"', from_zero=True, states_hash=False)
    assert fetch_twice(tmp_path, Hub(cut=700_000, etag='"one"', states_hash=False), hub) == BODY


def test_nothing_left_to_send(table, tmp_path):
    table(item(size=None))
    (tmp_path / "model").mkdir()
    part = tmp_path / "model" / "model.safetensors.part"
    part.write_bytes(BODY)
    hub = Hub(states_hash=False)
    path, _ = fetch(hub, tmp_path)
    assert hub.seen[-1][2] == f"bytes={len(BODY)}-"
    assert (path / "model.safetensors").read_bytes() == BODY
    table(item(size=None, sha256=None))
    short = struct.pack("<Q", 2) + b"{}"  # became shorter than what is there of it
    hub = Hub(short, states_hash=False, etag='"one"', heeds_if_range=False)
    assert fetch_twice(tmp_path / "b", Hub(cut=700_000, states_hash=False, etag='"one"'), hub) == short


def test_a_file_whose_end_nobody_can_tell_is_refused(table, tmp_path):
    table(item(size=None, sha256=None))
    with pytest.raises(InputError, match="states neither size nor sha256"):
        fetch(Hub(cut=700_000, length="unknown", states_hash=False), tmp_path)
    with pytest.raises(InputError, match="transfer failed"):
        fetch(Hub(cut=700_000, length="chunked", states_hash=False), tmp_path)
    with pytest.raises(InputError, match="broke off at 700,000 of 1,280,000"):  # the hub said how large it is
        fetch(Hub(cut=700_000, length="unknown"), tmp_path)
    assert "model.safetensors" not in os.listdir(tmp_path / "model")
    fetch(Hub(length="chunked", states_hash=False), tmp_path)  # the end of chunks is marked
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == BODY


def test_more_than_was_stated_is_removed(table, tmp_path):
    table(item(sha256=None))
    with pytest.raises(InputError, match="more than the 1,280,000 bytes"):
        fetch(Hub(BODY + b"x", length="unknown", states_hash=False), tmp_path)
    assert os.listdir(tmp_path / "model") == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "w.pt", "pytorch_model.bin"])
def test_a_page_instead_of_a_file_is_removed(table, tmp_path, file):
    table(item(file=file, size=None, sha256=None))
    for _ in range(2):
        with pytest.raises(InputError, match=f"{file}: what the server sent is of no use and was removed"):
            fetch(Hub(b"<html>please log in</html>", states_hash=False), tmp_path)
        assert os.listdir(tmp_path / "model") == []
    hub = Hub(b"<html>please log in</html>")
    handler, plain = hub.handler(), hub.handler().send_header

    def state(self, name, value):
        plain(self, name, "1280000" if name == "X-Linked-Size" else value)

    handler.send_header = state
    with serving(handler) as host, pytest.raises(InputError, match="offers 26 bytes, expected 1,280,000"):
        rewards.download("clip", tmp_path, report=str, host=host)


def checkpoint(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_pickle_that_would_run_code_does_not_stay(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = checkpoint({"evil": Evil()})
    for known in (None, hashlib.sha256(evil).hexdigest()):
        table(item(file="w.pt", size=None, sha256=known))
        for _ in range(2):
            with pytest.raises(InputError, match=r"w\.pt: what the server sent .* would run code"):
                fetch(Hub(evil), tmp_path)
            assert os.listdir(tmp_path / "model") == []


def test_a_conversion_that_cannot_be_written_is_made_at_the_next_call(table, tmp_path, monkeypatch):
    hub = Hub(checkpoint({"a": torch.arange(1000)}))
    table(item(file="w.pt", size=None, sha256=None))

    def full(weights, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with serving(hub.handler()) as host:
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", full)
            with pytest.raises(InputError, match=r"w\.safetensors' cannot be written .*No space left"):
                rewards.download("clip", tmp_path, report=str, host=host)
        assert sorted(os.listdir(tmp_path / "model")) == ["w.pt.part", "w.pt.part.json"]
        hub.seen.clear()
        path = rewards.download("clip", tmp_path, report=str, host=host)
    assert {method for method, _, _ in hub.seen} == {"HEAD"}
    assert sorted(os.listdir(path)) == ["w.pt.record.json", "w.safetensors"]
    assert files.read_weights(path / "w.safetensors")["a"].tolist() == list(range(1000))


def test_two_downloads_at_once(table, tmp_path):
    (tmp_path / ".download.lock").touch()  # what a process that died leaves behind does not matter
    said = []

    def again(*_):
        with pytest.raises(InputError, match="another process downloads into this folder") as caught:
            fetch(Hub(OTHER), tmp_path)
        said.append(caught)

    path, _ = fetch(Hub(), tmp_path, progress=again)
    assert said
    assert (path / "model.safetensors").read_bytes() == BODY


def test_a_full_disk_is_not_blamed_on_the_server(table, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(Hub().handler()) as host:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
            with pytest.raises(InputError, match=r"cannot be written to \(File too large\)") as caught:
                rewards.download("clip", tmp_path, report=str, host=host)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "127.0.0.1" not in str(caught.value)
        path = rewards.download("clip", tmp_path, report=str, host=host)
    assert (path / "model.safetensors").read_bytes() == BODY


ODD = [
    "http://127.0.0.1:99999",
    "http://[::1",
    "http://a..b",
    "http://127.0.0.1:9/\xe4",
    "http://127.0.0.1:x",
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_addresses(table, tmp_path, odd):
    with pytest.raises(InputError, match="not an http or https address"):
        rewards.download("clip", tmp_path, report=str, host=odd)
    handler, plain = Hub().handler(), Hub().handler().send_header

    def elsewhere(self, name, value):
        plain(self, name, odd if name == "Location" else value)

    handler.send_header = elsewhere
    with serving(handler) as host, pytest.raises(InputError, match="not an http or https address"):
        rewards.download("clip", tmp_path, report=str, host=host)


def test_a_redirect_from_https_to_http_is_not_followed(table, tmp_path, monkeypatch):
    def without_encryption(host, port, timeout, context):
        return http.client.HTTPConnection(host, port, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPSConnection", without_encryption)
    hub = Hub()
    handler, plain = hub.handler(), hub.handler().send_header

    def unencrypted(self, name, value):
        plain(self, name, f"http://{self.headers['Host']}{value}" if name == "Location" else value)

    with serving(handler) as host:
        address = host.replace("http://", "https://")
        assert rewards.download("clip", tmp_path / "relative", report=str, host=address).is_dir()
        hub.seen.clear()
        handler.send_header = unencrypted
        with pytest.raises(InputError, match="redirects to an unencrypted address: not followed"):
            rewards.download("clip", tmp_path / "absolute", report=str, host=address)
    assert hub.seen
    assert not any(path.startswith("/store") for _, path, _ in hub.seen)


@pytest.mark.parametrize("change", [{"size": "big"}, {"sha256": 5}, {"sha256": None}, {"converted sha256": []}])
def test_a_damaged_record(table, tmp_path, change):
    table(item(size=None, sha256=None))
    path, _ = fetch(Hub(), tmp_path)
    record = path / "model.safetensors.record.json"
    sound = json.loads(record.read_text())
    for text in (json.dumps(sound | change), "[]", "{", "\xff", "{}", ""):
        record.write_text(text, encoding="latin-1")
        for present in (True, False):
            (path / "model.safetensors").write_bytes(BODY) if present else (path / "model.safetensors").unlink()
            with pytest.raises(InputError, match=r"record\.json' is damaged: delete it"):
                fetch(Hub(), tmp_path)


def test_failures_are_one_clear_sentence(table, tmp_path):
    with pytest.raises(InputError, match="answers 404"):
        fetch(Hub(status=404), tmp_path)
    with pytest.raises(InputError, match="transfer failed"):
        rewards.download("clip", tmp_path, report=lambda line: None, host="http://127.0.0.1:9")
    with pytest.raises(InputError, match="no published weights: use one of clip, aesthetic"):
        rewards.download("jpeg", tmp_path, report=lambda line: None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        fetch(Hub(), tmp_path / "file")
    with pytest.raises(InputError, match="not an http"):
        rewards.download("clip", tmp_path, report=lambda line: None, host="file:///etc")


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/passwd", "a/../../b", "c:\\x", ""])
def test_a_path_that_escapes_is_refused(name):
    with pytest.raises(InputError, match="leave the weights folder"):
        item(file=name)
    with pytest.raises(InputError, match="leave the weights folder"):
        item(folder=name)


def test_the_table():
    for name, items in weights.WEIGHTS.items():
        assert name in rewards.NAMES
        for entry in items:
            assert len(entry.revision) == 40
            assert entry.sha256 is None or len(entry.sha256) == 64
            assert entry.licence
            known = {key for key in ("size", "sha256") if getattr(entry, key) is not None}
            assert set(entry.sources) == {"revision", "licence"} | known, f"{name}/{entry.file}: a value without source"
            assert entry.url().startswith("https://")
        assert "licence" in weights.describe(name)
    head = weights.WEIGHTS["aesthetic"][0]
    assert head.url().endswith("/sac%2Blogos%2Bava1-l14-linearMSE.pth")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def refused(path, message, loader=files.read_weights):
    with pytest.raises(InputError, match=message) as caught:
        loader(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_executes_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(2)}, "evil": Evil()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "would run code")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / "b.pth", "refused|not a PyTorch checkpoint")
    assert not (tmp_path / "evil-was-here").exists()


def test_corrupt_truncated_and_wrong_files(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:500])
    refused(tmp_path / "cut.safetensors", "corrupt or not a safetensors")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    refused(tmp_path / "page.safetensors", "corrupt or not a safetensors")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:1500])
    refused(tmp_path / "cut.pt", "corrupt, cut short")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "corrupt, cut short")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "no named tensors")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/code/__torch__.py", b"")
    refused(tmp_path / "script.pt", "TorchScript")
    refused(tmp_path / "nowhere.pt", "not a file")
    refused(tmp_path, "not a file")


def test_every_loader_refuses_them_the_same_way(tmp_path):
    torch.save({"evil": Evil()}, tmp_path / "x.pt")
    for name, file in {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}.items():
        (tmp_path / file).write_bytes((tmp_path / "x.pt").read_bytes())
        refused(tmp_path, "would run code", lambda path, name=name: rewards.load(name, path))
    (tmp_path / "ImageReward.pt").write_bytes((tmp_path / "x.pt").read_bytes())
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    refused(tmp_path, "would run code", lambda path: rewards.load("imagereward", path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "x.pt").read_bytes())
    refused(tmp_path, "would run code", lambda path: rewards.load("pickscore", path))
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not readable as JSON", lambda path: rewards.load("clip", path))


JUNK = ("x", -1, None, [1, 2, 3])


def damaged(settings, start=()):
    """The settings with one value after the other replaced by something that does not belong there."""
    for key, value in settings.items():
        for junk in JUNK:
            yield ".".join([*start, key]), {**settings, key: junk}
        if isinstance(value, dict):
            for name, changed in damaged(value, (*start, key)):
                yield name, {**settings, key: changed}


SETTINGS = ("config.json", "preprocessor_config.json", "open_clip_config.json", "med_config.json")


@pytest.mark.parametrize("file", SETTINGS)
def test_damaged_settings_are_one_clear_sentence_or_harmless(tmp_path, file, monkeypatch):
    for module in (clip_transformers, clip_open):  # reading a vocabulary takes longer than all the rest
        monkeypatch.setattr(module, "load_clip_tokenizer", lambda *_, **__: lambda prompts: torch.tensor([[1, 2, 3]]))
    if file == "open_clip_config.json":
        save_file(tiny.open_clip_model().state_dict(), tmp_path / "open_clip_model.safetensors")
        mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
        preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
        (tmp_path / file).write_text(json.dumps({"model_cfg": tiny.ARCHITECTURE, "preprocess_cfg": preprocess}))
    elif file == "med_config.json":
        tiny.save_imagereward(tmp_path)
    else:
        tiny.transformers_clip(tmp_path)
    name = "imagereward" if file == "med_config.json" else "clip"
    sound, said, images = json.loads((tmp_path / file).read_text()), [], torch.rand(1, 3, 40, 40)
    for where, settings in damaged(sound):
        (tmp_path / file).write_text(json.dumps(settings))
        try:
            rewards.load(name, tmp_path).score(images, ["red heart"])
        except InputError as error:
            said.append(f"{where}: {error}")
    assert len(said) > 5
    assert [line for line in said if "\n" in line] == []


def test_tensors_of_the_wrong_kind(tmp_path):
    """What `load` says when a file has the right names and nonsense behind them."""
    state = tiny.open_clip_model().state_dict()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.ARCHITECTURE}))
    for name in ("visual.conv1.weight", "visual.proj", "positional_embedding", "token_embedding.weight"):
        for tensor in (torch.zeros(()), torch.zeros(0), torch.zeros(3, 3)):
            save_file({**state, name: tensor}, tmp_path / "open_clip_model.safetensors")
            refused(tmp_path, "CLIP|reward 'clip'", lambda path: rewards.load("clip", path))
    numbers = {**state, "visual.transformer.resblocks.x.ln_1.weight": torch.zeros(2)}
    save_file(numbers, tmp_path / "open_clip_model.safetensors")
    refused(tmp_path, "CLIP|reward 'clip'", lambda path: rewards.load("clip", path))


def test_conversion_is_whole_or_not_there(tmp_path):
    torch.save({"state_dict": {"module.a": torch.arange(3.0), "b": torch.zeros(2, 2).half()}}, tmp_path / "w.pt")
    target = tmp_path / "w.safetensors"
    files.convert_to_safetensors(tmp_path / "w.pt", target)
    assert files.read_weights(target)["a"].tolist() == [0, 1, 2]
    assert files.read_weights(target)["b"].dtype == torch.float16
    assert fetching._sha256(target) == hashlib.sha256(target.read_bytes()).hexdigest()
