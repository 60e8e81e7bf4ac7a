"""The download command, and that everything works without a network afterwards, tokenizers included."""

import hashlib
import http.server
import json
import os
import socket
import sys
from dataclasses import replace
from urllib.parse import unquote

import pytest
import torch

from ipgo_engine import cli, rewards
from ipgo_engine.errors import Cancelled, InputError
from ipgo_engine.rewards import files, hps, transfer, weights
from ipgo_engine.rewards.text import CLIP_L_FOLDER

from . import tiny
from .conftest import serving

ARCHITECTURE = {"model_cfg": tiny.ARCHITECTURE}


def published(root):
    """Small models as their authors publish them: repository -> folder."""
    folders = {
        "openai/clip-vit-large-patch14": root / "clip",
        "christophschuhmann/improved-aesthetic-predictor": root / "head",
        "xswu/HPSv2": root / "hps",
        "yuvalkirstain/PickScore_v1": root / "pickscore",
        "zai-org/ImageReward": root / "imagereward",
        "google-bert/bert-base-uncased": root / "imagereward",
    }
    for folder in folders.values():
        folder.mkdir(exist_ok=True, parents=True)
    tiny.transformers_clip(root / "clip", projection=768)
    tiny.save_fast_tokenizer(root / "clip")
    tiny.transformers_clip(root / "pickscore", tokenizer=False, processor=False, projection=1024)
    head = tiny.AuthorsHead(768)
    head.load_state_dict(tiny.fill(head.state_dict()))
    torch.save(head.state_dict(), root / "head" / "sac+logos+ava1-l14-linearMSE.pth")
    for name in hps.FILES.values():
        torch.save({"epoch": 1, "state_dict": tiny.open_clip_model().state_dict()}, root / "hps" / name)
    tiny.save_imagereward(root / "imagereward")
    return folders


class Hub:
    """Serves the folders under the addresses of the table."""

    def __init__(self, folders):
        self.folders, self.seen, self.replaced = folders, [], {}

    def handler(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                hub.seen.append((self.command, self.path))
                parts = unquote(self.path).strip("/").split("/")
                file = hub.folders["/".join(parts[:2])] / parts[-1]
                body = hub.replaced.get(file.name) or file.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(source, monkeypatch):
    """The real table, without sizes and checksums, which small models do not have."""
    for name, items in weights.WEIGHTS.items():
        free = tuple(replace(item, size=None, sha256=None, host=weights.HUB) for item in items)
        monkeypatch.setitem(weights.WEIGHTS, name, free)
    return Hub(source)


def load(name, path):
    if name.startswith("hpsv2"):
        return hps.load_hps(path, "v2.0" if name == "hpsv2" else "v2.1", architecture=ARCHITECTURE)
    return rewards.load(name, path)


def no_network(*_):
    raise AssertionError("something asked for a network")


@pytest.mark.parametrize("name", list(weights.WEIGHTS))
def test_everything_works_without_a_network_afterwards(hub, source, tmp_path, monkeypatch, name):
    with serving(hub.handler()) as host:
        path = rewards.download(name, tmp_path, report=lambda line: None, host=host)
    expected = load(name, tmp_path / path.name)  # with open_clip's tokenizer where that is installed
    images = tiny.as_batch(tiny.picture(40, 56), tiny.picture(40, 56, 1))
    scores = expected.score(images, tiny.PROMPTS)
    del expected
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # ComfyUI does not bring it along
    torch.testing.assert_close(load(name, path).score(images, tiny.PROMPTS), scores)
    again = []
    rewards.download(name, tmp_path, report=again.append, host="http://127.0.0.1:9")
    half = len(again) // 2
    assert all("there already; licence" in line for line in again[:half])
    assert all("there already, sha256" in line for line in again[half:])


def test_pickles_are_converted_once_and_held_to_their_record(hub, source, tmp_path):
    with serving(hub.handler()) as host:
        lines = []
        path = rewards.download("hpsv2.1", tmp_path, report=lines.append, host=host)
        assert any(line.endswith("converted to HPS_v2.1_compressed.safetensors") for line in lines)
        assert not list(path.glob("*.pt"))
        original = source["xswu/HPSv2"] / "HPS_v2.1_compressed.pt"
        record = json.loads((path / "HPS_v2.1_compressed.pt.record.json").read_text())
        assert record["sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()
        for name, tensor in files.read_weights(original).items():
            assert torch.equal(files.read_weights(path / "HPS_v2.1_compressed.safetensors")[name], tensor)
        hub.seen.clear()
        rewards.download("hpsv2.1", tmp_path, report=lines.append, host=host)
        assert hub.seen == []
        target = path / "HPS_v2.1_compressed.safetensors"
        target.write_bytes(target.read_bytes()[:-1] + b"x")
        with pytest.raises(InputError, match=r"HPS_v2\.1_compressed\.safetensors' has sha256 .* delete it"):
            rewards.download("hpsv2.1", tmp_path, report=lines.append, host=host)


def test_a_conversion_of_ones_own_is_kept_and_nothing_fetched_for_it(hub, tmp_path):
    (tmp_path / "hpsv2").mkdir()
    mine, lines = tmp_path / "hpsv2" / "HPS_v2_compressed.safetensors", []
    mine.write_bytes(b"mine")
    with serving(hub.handler()) as host:
        rewards.download("hpsv2", tmp_path, report=lines.append, host=host)
    assert mine.read_bytes() == b"mine"
    assert not any("HPS_v2_compressed" in path for _, path in hub.seen)
    assert any("HPS_v2_compressed.safetensors: there already" in line and "not verified" in line for line in lines)


def test_the_conversion_of_another_revision_is_replaced(hub, source, tmp_path, monkeypatch):
    with serving(hub.handler()) as host:
        rewards.download("hpsv2", tmp_path, report=lambda line: None, host=host)
        converted = tmp_path / "hpsv2" / "HPS_v2_compressed.safetensors"
        before = converted.read_bytes()
        newer = tuple(replace(item, revision="f" * 40) for item in weights.WEIGHTS["hpsv2"])
        monkeypatch.setitem(weights.WEIGHTS, "hpsv2", newer)
        state = {name: tensor + 1 for name, tensor in tiny.open_clip_model().state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "newer.pt")
        monkeypatch.setitem(hub.replaced, "HPS_v2_compressed.pt", (tmp_path / "newer.pt").read_bytes())
        rewards.download("hpsv2", tmp_path, report=lambda line: None, host=host)
    assert converted.read_bytes() != before
    assert not (tmp_path / "hpsv2" / "HPS_v2_compressed.pt").exists()


def test_a_mirror_stands_for_the_hub_and_for_no_other_host():
    head, *clip = weights.WEIGHTS["aesthetic"]
    assert head.url("https://mirror.example").startswith(weights.GITHUB)
    assert all(item.url("https://mirror.example").startswith("https://mirror.example/openai/") for item in clip)


def test_consent_is_asked_after_sizes_and_licences_and_before_anything_is_fetched(hub, tmp_path):
    lines = []

    def decline():
        assert len(lines) == 3
        assert all("licence: " in line and ("kB" in line or "MB" in line) for line in lines)
        return False

    with serving(hub.handler()) as host, pytest.raises(Cancelled, match="nothing was fetched"):
        rewards.download("imagereward", tmp_path, report=lines.append, confirm=decline, host=host)
    assert {method for method, _ in hub.seen} == {"HEAD"}
    assert os.listdir(tmp_path) == []


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_lists_what_there_is_without_a_network(monkeypatch, capsys):
    monkeypatch.setattr(transfer, "_open", no_network)
    assert cli.main(["download"]) == 0
    out = capsys.readouterr().out
    for name, items in weights.WEIGHTS.items():
        assert f"\n{name}\n" in f"\n{out}"
        assert all(item.url() in out and item.licence in out for item in items)
    assert "sha256 not known: recorded and shown at the first download" in out


def test_the_command_fetches_nothing_without_consent(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    with serving(hub.handler()) as host:
        assert cli.main(["download", "imagereward", "--to", str(tmp_path), "--host", host]) == 2
    out, err = capsys.readouterr()
    assert "licence: Apache-2.0" in out
    assert err.strip() == "ipgo: imagereward: nothing was fetched; answer y, or add --yes."
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 2), ("no", 2)])
def test_the_command_asks_a_person(hub, tmp_path, monkeypatch, answer, code):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    with serving(hub.handler()) as host:
        assert cli.main(["download", "imagereward", "--to", str(tmp_path), "--host", host]) == code
    assert (tmp_path / "imagereward" / "ImageReward.safetensors").is_file() == (code == 0)


def test_the_command_fetches_several_and_says_how_to_use_them(hub, tmp_path, capsys):
    with serving(hub.handler()) as host:
        assert cli.main(["download", "clip", "aesthetic", "--yes", "--to", str(tmp_path), "--host", host]) == 0
    out = capsys.readouterr().out
    assert f"aesthetic: use it with --reward-path aesthetic={tmp_path / 'aesthetic'}" in out
    assert sum(method == "GET" and "model.safetensors" in path for method, path in hub.seen) == 1  # shared by the two
    assert rewards.load("aesthetic", tmp_path / "aesthetic").name == "aesthetic"
    assert (tmp_path / CLIP_L_FOLDER / "vocab.json").is_file()


def test_a_mistyped_name_is_one_line(tmp_path, capsys):
    assert cli.main(["download", "clip", "pickscor", "--yes", "--to", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "reward 'pickscor' has no published weights: use one of clip" in err
    assert not out
    assert os.listdir(tmp_path) == []
