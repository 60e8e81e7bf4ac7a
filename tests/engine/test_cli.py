"""The command line on a toy model: what it writes, what it refuses, how it stops and goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ipgo_engine import IPGOTokens, OptimizeConfig, TokenConfig, cli, loop, train_tokens
from ipgo_engine.cli import arguments, demo, evaluate, models, results, settings
from ipgo_engine.cli.evaluate import images_at_equal_cost
from ipgo_engine.cli.inputs import gather_prompts, parse_seeds, parse_size, read_prompts
from ipgo_engine.config import NoiseConfig
from ipgo_engine.errors import Cancelled, InputError, NonFiniteError
from ipgo_engine.formats.noise import read_noise, write_noise
from ipgo_engine.noise import CHANNEL_DIM, NoiseRegularizer
from ipgo_engine.optimize import optimize_noise
from ipgo_engine.rewards import load
from tests.engine.toys import ToyGenerator, ToyReward

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "red heart", "--reward", "brightness", "--epochs", "3"]
NOISE = ["noise", "red heart", "--reward", "brightness", "--iterations", "3"]
JOINT = ["joint", "red heart", "--reward", "brightness", "--iterations", "3"]
SMALL_TOKENS = ["--basis-size", "4", "--prefix-length", "2", "--suffix-length", "2"]
TRAIN, JOINT = TRAIN + SMALL_TOKENS, JOINT + SMALL_TOKENS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toy for a model, and an empty folder to work in."""

    def make(settings: Any, device: Any, should_stop: Callable[[], bool]) -> ToyGenerator:
        def poll(call: int) -> None:
            if should_stop():
                raise Cancelled("stopped")

        return ToyGenerator(before_call=poll)

    monkeypatch.setattr(models, "make_generator", make)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_prompts_file_skips_blank_lines_and_comments(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred heart\r\n\r\n  # not me\n  black cat, 3D \nжук\n".encode())
    assert read_prompts(file) == ["red heart", "black cat, 3D", "жук"]
    assert gather_prompts(["first"], str(file)) == ["first", "red heart", "black cat, 3D", "жук"]


def test_only_the_end_of_a_line_ends_a_prompt(tmp_path: Path):
    """Text pasted from a page may hold other marks that Python counts as ends of lines."""
    file = tmp_path / "prompts.txt"
    file.write_text("red\u2028heart\nblack\x0bcat\n", encoding="utf-8")
    assert read_prompts(file) == ["red\u2028heart", "black\x0bcat"]


def test_seeds_and_sizes():
    assert parse_seeds("3") == [3]
    assert parse_seeds("0,5, 2-4,3") == [0, 5, 2, 3, 4]
    assert parse_size("512x768") == (512, 768)
    assert parse_size("64") == (64, 64)
    assert parse_size(None) == (None, None)
    for text in ("", "-1", "a", "4-2", "0-99999999", "1.5", "²"):
        with pytest.raises(InputError):
            parse_seeds(text)
    for text in ("", "0", "130", "512x", "x", "8x8x8", "-8", "8.0", "99999992"):
        with pytest.raises(InputError):
            parse_size(text)


BAD: dict[str, tuple[list[str], str]] = {
    "no prompt": (["train"], "no prompt"),
    "blank prompt": (["train", "ok", "  "], "prompt 2"),
    "missing prompts file": (["noise", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
    "empty prompts file": (["noise", "--prompts-file", "empty.txt"], "empty.txt"),
    "prompts file in another encoding": (["noise", "--prompts-file", "utf16.txt"], "utf16.txt"),
    "folder as prompts file": (["noise", "--prompts-file", "."], "prompts file ."),
    "unknown reward": ([*TRAIN, "--reward", "beauty"], "'beauty'"),
    "reward weight": ([*TRAIN, "--reward", "contrast=heavy"], "contrast=heavy"),
    "reward weight zero": ([*TRAIN, "--reward", "contrast=0"], "contrast=0"),
    "reward twice": ([*TRAIN, "--reward", "brightness"], "more than once"),
    "reward held out too": ([*TRAIN, "--monitor", "brightness"], "more than once"),
    "unknown monitor": ([*TRAIN, "--monitor", "beauty"], "'beauty'"),
    "reward path missing": ([*TRAIN, "--reward-path", "brightness=nowhere"], "nowhere does not exist"),
    "reward path without name": ([*TRAIN, "--reward-path", "nowhere"], "NAME=PATH"),
    "reward path of no reward": ([*TRAIN, "--reward-path", "clip=."], "'clip'"),
    "unknown sampler": ([*TRAIN, "--sampler", "magic"], "'magic'"),
    "size": ([*TRAIN, "--size", "130"], "multiples of 8"),
    "seeds": ([*TRAIN, "--seeds", "one"], "'one'"),
    "model folder": ([*TRAIN, "--model", "nowhere"], "nowhere does not exist"),
    "device": ([*TRAIN, "--device", "abacus"], "'abacus'"),
    "device without values": ([*TRAIN, "--device", "meta"], "'meta'"),
    "threads": ([*TRAIN, "--threads", "0"], "threads"),
    "too many threads": ([*TRAIN, "--threads", "100000"], "threads is 100000"),
    "two half precisions": ([*TRAIN, "--dtype", "bfloat16", "--autocast", "float16"], "--autocast float16"),
    "the demo in two half precisions": (["demo", "--dtype", "float16", "--autocast", "bfloat16"], "--dtype float16"),
    "bytes that are no text": (["train", "caf\udce9"], "UTF-8"),
    "long folder name": ([*TRAIN, "--out", "o" * 300], "--out ooo"),
    "long model name": ([*TRAIN, "--model", "m" * 300], "mmm"),
    "long method seed": ([*TRAIN, "--method-seed", "12345678901234567890"], "2^63"),
    "endless seed": ([*TRAIN, "--seeds", "1" * 5000], "whole numbers"),
    "best of fewer than one": ([*TRAIN, "--best-of-n", "-5"], "'-5'"),
    "fewer than no fresh seeds": ([*TRAIN, "--fresh-seeds", "-1"], "'-1'"),
    "noise and seeds": (["generate", "--noise", "other.safetensors", "--seeds", "3"], "leave --seeds out"),
    "out is a file": ([*TRAIN, "--out", "file.txt"], "is a file"),
    "out below a file": ([*TRAIN, "--out", "file.txt/deep/out"], "cannot be written"),
    "out not empty": ([*TRAIN, "--out", "full"], "not empty"),
    "resume without out": ([*TRAIN, "--resume"], "--out"),
    "resume of a damaged run": ([*TRAIN, "--resume", "--out", "broken"], "run.json is damaged"),
    "resume of nothing": ([*TRAIN, "--resume", "--out", "nowhere"], "no run to resume"),
    "setting out of range": ([*TRAIN, "--learning-rate", "-1"], "learning_rate"),
    "setting of no kind": ([*TRAIN, "--epochs", "many"], "'many'"),
    "unknown option": ([*TRAIN, "--frobnicate"], "--frobnicate"),
    "unknown command": (["paint"], "paint"),
    "basis too large": ([*TRAIN, "--basis-size", "99"], "basis_size"),
    "exact gradient of a black box": (["noise", "a", "--reward", "jpeg", "--gradient", "exact"], "not differentiable"),
    "missing tokens": (["generate", "a", "--tokens", "nowhere.safetensors"], "nowhere.safetensors"),
    "damaged tokens": (["generate", "a", "--tokens", "file.txt"], "file.txt"),
    "tokens for another encoder": (["generate", "a", "--tokens", "other.safetensors"], "another-encoder"),
    "tokens of another width": (["generate", "a", "--tokens", "wide.safetensors"], "32 wide"),
    "missing noise": (["generate", "--noise", "nowhere.safetensors"], "nowhere.safetensors"),
    "tokens for noise": (["generate", "--noise", "other.safetensors"], "noise file"),
    "noise and prompts": (["generate", "a", "--noise", "other.safetensors"], "leave the prompts out"),
    "missing picture": (["score", "nowhere.png", "--reward", "brightness"], "nowhere.png"),
    "no picture": (["score", "file.txt", "--reward", "brightness"], "file.txt"),
    "folder without pictures": (["score", "full", "--reward", "brightness"], "no picture"),
    "no prompt to compare with": (["score", "pictures", "--reward", "demo-clip"], "--prompt"),
    "prompts do not fit": (["score", "pictures", "--prompt", "a", "--prompt", "b", "--reward", "brightness"], "2 pro"),
    "top": (["score", "pictures", "--reward", "brightness", "--top", "0"], "--top"),
}


@pytest.fixture
def clutter(toy: Path) -> Path:
    """Files that bad commands can trip over."""
    (toy / "file.txt").write_text("text")
    (toy / "empty.txt").write_text("# nothing\n\n")
    (toy / "utf16.txt").write_bytes("cat".encode("utf-16"))
    (toy / "full").mkdir()
    (toy / "full" / "keep.txt").write_text("mine")
    (toy / "broken").mkdir()
    (toy / "broken" / "run.json").write_text("[]")
    (toy / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(toy / "pictures" / f"{number}.png")
    small = TokenConfig(basis_size=4, prefix_length=1, suffix_length=1)
    IPGOTokens(16, small).save(toy / "other.safetensors", encoder="another-encoder")
    IPGOTokens(32, small).save(toy / "wide.safetensors", encoder="toy-encoder")
    return toy


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(clutter: Path, capfd: pytest.CaptureFixture[str], case: str):
    arguments, expected = BAD[case]
    before = sorted(clutter.rglob("*"))
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert not out
    assert sorted(clutter.rglob("*")) == before


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]):
    for command in ("demo", "train", "noise", "joint", "generate", "score", "download"):
        assert cli.main([command, "--help"]) == 0
        assert ("--to" if command == "download" else "--out") in capsys.readouterr().out


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [TRAIN, NOISE, JOINT], ids=["train", "noise", "joint"])
def test_a_results_folder_holds_everything(toy: Path, command: list[str], capsys: pytest.CaptureFixture[str]):
    odd = 'a, "b" жук'
    assert cli.main([*command, odd, "--seeds", "0,4", "--monitor", "contrast", "--best-of-n", "--out", "run"]) == 0
    folder = toy / "run"
    for name in ("before-after.png", "curves.png"):
        assert Image.open(folder / name).size[0] > 200
    pictures = sorted(p.name for p in (folder / "images").iterdir())
    assert len(pictures) == 2 * 2 * 3
    assert pictures[0] == "001-red-heart-seed0-before.png"
    rows = csv_rows(folder / "scores.csv")
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in ("red heart", odd) for s in ("0", "4")]
    assert all(float(row["gain"]) == float(row["best"]) - float(row["raw"]) for row in rows)
    assert command is not NOISE or all(float(row["gain"]) >= 0 for row in rows)  # noise starts at the raw picture
    assert all(row["contrast raw"] and row["last"] for row in rows)
    found = record(folder)
    assert found["stopped"] == "finished"
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["seeds"] == [0, 4]
    assert found["prompts"] == ["red heart", odd]
    assert found["seconds"] > 0
    assert len(found["runs"][0]["history"]) == 4
    assert "images" not in found["runs"][0]["history"][0]
    assert found["generator"]["sampler"] == "ddim"
    assert found["device"] == "cpu"
    assert any(key.startswith("best of ") for key in found["scores"][0])
    assert "best of 1" not in found["scores"][0]
    table = capsys.readouterr().out
    assert "red heart" in table
    assert "mean of 4" in table
    assert "curves.png" in table
    assert (("P(z)" in table), ("fresh" in table)) == (command is not TRAIN, command is not NOISE)
    assert list(folder.glob("state-*.safetensors"))
    assert not list(folder.rglob("*.part"))


def test_what_was_learned_gives_the_pictures_again(toy: Path):
    assert cli.main([*TRAIN, "--out", "tokens"]) == 0
    assert cli.main(["generate", "red heart", "--tokens", "tokens/tokens.safetensors", "--out", "again"]) == 0
    one = Image.open(toy / "tokens/images/001-red-heart-seed0-best.png")
    two = Image.open(toy / "again/images/001-red-heart-seed0-learned.png")
    assert one.tobytes() == two.tobytes()
    assert cli.main([*NOISE, "--out", "noise"]) == 0
    assert cli.main(["generate", "--noise", "noise/noise.safetensors", "--reward", "brightness", "--out", "more"]) == 0
    one = Image.open(toy / "noise/images/001-red-heart-seed0-best.png")
    two = Image.open(toy / "more/images/001-red-heart-seed0-learned.png")
    assert one.tobytes() == two.tobytes()
    best = float(csv_rows(toy / "noise/scores.csv")[0]["best"])
    assert float(csv_rows(toy / "more/scores.csv")[0]["brightness learned"]) == pytest.approx(best, abs=1e-6)
    noise, labels = read_noise(toy / "noise/noise.safetensors")
    assert noise.shape == (1, *ToyGenerator.noise_shape)
    assert (labels["prompts"], labels["encoder"]) == (["red heart"], ToyGenerator.encoder)
    write_noise(toy / "foreign.safetensors", noise, **labels | {"encoder": "another-encoder"})
    assert cli.main(["generate", "--noise", "foreign.safetensors"]) == 2


OTHER = ["--steps", "7", "--cfg", "3", "--sampler", "euler", "--negative", "blur", "--size", "64", "--unpadded"]


def test_noise_brings_the_settings_it_was_made_with(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*NOISE, *OTHER, "--dtype", "bfloat16", "--out", "run"]) == 0
    command = ["generate", "--noise", "run/noise.safetensors"]
    made = record(toy / "run")["generator"]
    assert made["steps"] == 7
    assert cli.main([*command, "--out", "same"]) == 0
    assert cli.main([*command, *OTHER, "--out", "typed"]) == 0
    assert record(toy / "same")["generator"] == record(toy / "typed")["generator"] == made
    assert cli.main([*command, "--dtype", "float32", "--out", "wide"]) == 0  # rounding, not another picture
    assert record(toy / "wide")["generator"] == made | {"dtype": "float32"}
    for change in (["--steps", "8"], ["--cfg", "4"], ["--sampler", "ddim"], ["--negative", "x"], ["--size", "72"]):
        capsys.readouterr()
        assert cli.main([*command, *change]) == 2
        said = capsys.readouterr().err
        assert f"leave {change[0]} out" in said
        assert len(said.strip().splitlines()) == 1
    assert not (toy / "results").exists()


def test_noise_of_a_model_folder_that_moved(toy: Path):
    (toy / "old").mkdir()
    (toy / "other").mkdir()
    assert cli.main([*NOISE, "--model", "old", "--out", "run"]) == 0
    command = ["generate", "--noise", "run/noise.safetensors", "--model"]
    assert cli.main([*command, "other"]) == 2
    (toy / "old").rename(toy / "new")
    assert cli.main([*command, "new"]) == 0
    assert cli.main(command[:-1]) == 2


def test_joint_noise_needs_its_tokens(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*JOINT, "black cat", "--out", "run"]) == 0
    command = ["generate", "--noise", "run/noise-01-red-heart.safetensors"]
    tokens = "tokens-01-red-heart.safetensors"
    assert cli.main(command) == 2
    assert f"--tokens {tokens}" in capsys.readouterr().err
    assert cli.main([*command, "--tokens", f"run/{tokens}", "--out", "again"]) == 0
    one = Image.open(toy / "run/images/001-red-heart-seed0-best.png")
    two = Image.open(toy / "again/images/001-red-heart-seed0-learned.png")
    assert one.tobytes() == two.tobytes()
    noise, labels = read_noise(toy / "run/noise-01-red-heart.safetensors")
    labels.pop("learned_with")  # a file of an earlier version
    write_noise(toy / "noise-01-red-heart.safetensors", noise, **labels)
    assert cli.main(["generate", "--noise", "noise-01-red-heart.safetensors"]) == 2
    assert f"--tokens {tokens}" in capsys.readouterr().err


NOISE_LABELS: dict[str, Any] = {"prompts": ["a"], "seeds": [0]}
BAD_NOISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "no prompts": (1.0, {"prompts": None}),
    "prompts of numbers": (1.0, {"prompts": [3]}),
    "prompts that are no text": (1.0, {"prompts": ["\ud800"]}),
    "seeds of letters": (1.0, {"seeds": ["a"]}),
    "negative seeds": (1.0, {"seeds": [-1]}),
    "NaN": (float("nan"), {}),
    "whole numbers": (1, {}),
}


@pytest.mark.parametrize("case", BAD_NOISE)
def test_damaged_noise_is_refused(toy: Path, case: str, capsys: pytest.CaptureFixture[str]):
    value, labels = BAD_NOISE[case]
    noise = torch.ones((1, *ToyGenerator.noise_shape), dtype=torch.as_tensor(value).dtype)
    noise[0, 0, 0, 0, 0] = value  # one bad number is enough
    write_noise(toy / "noise.safetensors", noise, **NOISE_LABELS | labels)
    with pytest.raises(InputError, match=r"noise\.safetensors is not a noise file or is damaged"):
        read_noise(toy / "noise.safetensors")
    assert cli.main(["generate", "--noise", "noise.safetensors"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("run", [{"generator": {"steps": "many"}}, {"generator": {"eta": True}}])
def test_damaged_settings_of_noise_are_refused(toy: Path, run: Any, capsys: pytest.CaptureFixture[str]):
    write_noise(toy / "noise.safetensors", torch.ones(1, *ToyGenerator.noise_shape), **NOISE_LABELS, run=run)
    assert cli.main(["generate", "--noise", "noise.safetensors"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_generate_scores_as_far_as_it_goes(toy: Path, monkeypatch, capsys):
    spoil(monkeypatch, breaks)
    command = ["generate", "a", "b", "--reward", "brightness", "--monitor", "contrast", "--out", "run"]
    assert cli.main(command) == 1
    assert "does not answer" in capsys.readouterr().err
    assert len(list((toy / "run/images").iterdir())) == 2
    row = csv_rows(toy / "run/scores.csv")[0]
    assert (row["brightness raw"], bool(row["contrast raw"])) == ("", True)


def test_prompt_wise_and_batch_tokens(toy: Path):
    assert cli.main([*TRAIN, "black cat", "--out", "wise"]) == 0
    assert len(list((toy / "wise").glob("tokens-*.safetensors"))) == 2
    assert cli.main([*TRAIN, "black cat", "--mode", "batch", "--out", "batch"]) == 0
    tokens = IPGOTokens.load(toy / "batch/tokens.safetensors")
    assert tokens.metadata["prompts"] == ["red heart", "black cat"]
    assert tokens.metadata["preset"] == "paper"
    assert tokens.metadata["run"]["generator"]["sampler"] == "ddim"


def test_many_prompts_all_get_pictures(toy: Path):
    """The engine reports 16 validation rows of a batch run; the folder has all."""
    (toy / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    command = ["train", "--prompts-file", "p.txt", "--mode", "batch", "--reward", "brightness", "--epochs", "1"]
    options = ["--learning-rate", "3", "--fresh-seeds", "0", "--out", "run"]
    assert cli.main([*command, *SMALL_TOKENS, *options]) == 0
    rows, generator = csv_rows(toy / "run/scores.csv"), ToyGenerator()
    tokens = IPGOTokens.load(toy / "run/tokens.safetensors")
    assert len(rows) == len(list((toy / "run/images").glob("*-best.png"))) == 20
    conditioning = tokens.condition(generator.encode([row["prompt"] for row in rows]))
    images = generator.generate(conditioning, generator.draw_noise([0] * 20)).detach()
    assert [float(row["best"]) for row in rows] == pytest.approx(images.mean((1, 2, 3)).tolist(), abs=1e-5)
    assert all(abs(float(row["gain"])) > 1e-3 for row in rows)
    assert all(float(row["gain"]) == float(row["best"]) - float(row["raw"]) for row in rows)


def test_sheets_of_many_pictures_can_be_opened(toy: Path):
    """Every row is some 280 pixels high, and many programs show no more than 65,535."""
    assert cli.main([*TRAIN, "--out", "run"]) == 0
    many = ["generate", "red heart", "--seeds", "0-119"]
    assert cli.main([*many, "--out", "plain"]) == 0
    assert cli.main([*many, "--tokens", "run/tokens.safetensors", "--reward", "brightness", "--out", "learned"]) == 0
    assert len(list((toy / "plain/images").iterdir())) == len(csv_rows(toy / "learned/scores.csv")) == 120
    for sheet in ("plain/pictures.png", "learned/before-after.png"):
        with Image.open(toy / sheet) as picture:
            assert max(picture.size) < 8000


def test_settings_reach_the_engine(toy: Path):
    flags = ["--learning-rate", "0.5", "--no-checkpoint", "--backprop-steps", "2", "--which", "initial"]
    assert cli.main([*NOISE, *flags, "--block-size", "auto", "--min-probability", "0.01", "--out", "run"]) == 0
    config = record(toy / "run")["config"]
    assert (config["learning_rate"], config["checkpoint"], config["backprop_steps"]) == (0.5, False, 2)
    assert (config["which"], config["block_size"], config["min_probability"]) == ("initial", None, 0.01)
    command = ["train", "a", "--reward", "brightness=2", "--reward", "contrast=-0.5", "--preset", "released-code"]
    flags = ["--basis-size", "2", "--prefix-length", "1", "--suffix-length", "1", "--value-bound", "none"]
    assert cli.main([*command, *flags, "--epochs", "1", "--out", "code"]) == 0
    found = record(toy / "code")
    assert found["config"]["tokens"]["wide_basis"]
    assert found["config"]["tokens"]["value_bound"] is None
    assert found["config"]["conformity_norm"] == "l1-mean"
    assert found["rewards"]["reward"] == {"brightness": 2.0, "contrast": -0.5}
    assert "brightness raw" in found["scores"][0]
    assert "contrast best" in found["scores"][0]


def a_value(option: Any, default: Any) -> tuple[list[str], Any]:
    """Something to type for an option, and what it means, unlike its default."""
    if option.kind is bool:
        return [], not default
    if option.choices:
        (value, *_) = [choice for choice in option.choices if choice != default]
        return [value], value
    return (["7"], 7) if option.kind in (int, settings._method_seed) else (["0.5"], 0.5)


def test_every_option_reaches_the_engine():
    tables: list[tuple[str, Callable[[Any], Any], dict[str, Any], Callable[[Any], Any]]] = [
        ("train", settings.token_config, settings.LOOP | settings.TRAIN, lambda config: config),
        ("train", settings.token_config, settings.TOKENS, lambda config: config.tokens),
        ("noise", settings.noise_config, settings.LOOP | settings.NOISE, lambda config: config),
        ("joint", settings.joint_config, settings.LOOP | settings.NOISE, lambda config: config.noise),
        ("joint", settings.joint_config, settings.JOINT_TOKENS, lambda config: config.tokens),
        ("joint", settings.joint_config, settings.TOKENS, lambda config: config.tokens.tokens),
    ]
    for command, make, options, part in tables:
        for field, option in options.items():
            default = getattr(part(make(arguments.parse([command, "a"]))), field)
            typed, value = a_value(option, default)
            flag = option.flag or "--" + field.replace("_", "-")
            flag = flag if typed or value else flag.replace("--", "--no-", 1)
            assert getattr(part(make(arguments.parse([command, "a", flag, *typed]))), field) == value != default, flag
            if option.none:
                found = getattr(part(make(arguments.parse([command, "a", flag, option.none]))), field)
                assert found is None, flag
    for command, make in (("train", settings.token_config), ("joint", settings.joint_config)):
        config = make(arguments.parse([command, "a", "--preset", "released-code", "--seeds", "4-6"]))
        tokens = config if command == "train" else config.tokens
        assert (tokens.conformity_norm, tokens.tokens.wide_basis, tokens.seeds) == ("l1-mean", True, (4, 5, 6))
    batch = settings.token_config(arguments.parse(["train", "a", "--mode", "batch"]))
    assert (batch.epochs, batch.batch_size, batch.decay, batch.micro_batch) == (20, 4, 1.0, 4)


def pixels(path: Path) -> torch.Tensor:
    """A picture file as (1, 3, H, W) in [0, 1]."""
    with Image.open(path) as picture:
        flat = torch.tensor(list(picture.convert("RGB").tobytes()))
        return flat.reshape(1, picture.height, picture.width, 3).movedim(-1, 1) / 255


@pytest.mark.parametrize("command", [TRAIN, NOISE], ids=["train", "noise"])
def test_scores_in_the_table_are_those_of_the_pictures_beside_it(toy: Path, command: list[str]):
    options = ["--learning-rate", "3", "--seeds", "0,4", "--monitor", "contrast", "--out", "run"]
    assert cli.main([*command, "black cat", *options]) == 0
    rewards, pictures = {"": load("brightness"), "contrast ": load("contrast")}, {"raw": "before"}
    for number, row in enumerate(csv_rows(toy / "run/scores.csv"), start=1):
        for column in ("raw", "last", "best", "contrast raw", "contrast best"):
            which = column.split()[-1]
            name = f"{number:03d}-*-seed{row['seed']}-{pictures.get(which, which)}.png"
            (path,) = (toy / "run/images").glob(name)
            score = float(rewards[column.removesuffix(which)].score(pixels(path), [""]))
            assert float(row[column]) == pytest.approx(score, abs=5e-4), column
        assert "brightness raw" not in row  # the column `raw` says it
        assert not any(column.startswith("best of") for column in row)  # nobody asked for it
    rows = csv_rows(toy / "run/scores.csv")
    assert any(float(row["best"]) > max(float(row["raw"]), float(row["last"])) + 1e-3 for row in rows)


def test_tokens_are_compared_on_fresh_seeds_and_with_the_best_of_others(toy: Path):
    options = ["--seeds", "0,4", "--fresh-seeds", "2", "--best-of-n", "6", "--out", "run"]
    assert cli.main([*TRAIN, "black cat", "--learning-rate", "3", *options]) == 0
    generator = ToyGenerator()
    for row in csv_rows(toy / "run/scores.csv"):
        (path,) = (toy / "run").glob(f"tokens-*-{row['prompt'].replace(' ', '-')}.safetensors")
        prompt, tokens = generator.encode([row["prompt"]] * 2), IPGOTokens.load(path)
        fresh = generator.draw_noise([5, 6])  # those after the seeds of the run
        for column, conditioning in (("fresh raw", prompt), ("fresh", tokens.condition(prompt))):
            images = generator.generate(conditioning, fresh).detach()
            assert float(row[column]) == pytest.approx(float(images.mean()), abs=1e-5), column
        others = [evaluate.FIRST_OF_N + i for i in range(6)]
        images = generator.generate(generator.encode([row["prompt"]] * 6), generator.draw_noise(others))
        assert float(row["best of 6"]) == pytest.approx(float(images.mean((1, 2, 3)).max()), abs=1e-5)
    assert evaluate.FIRST_OF_N > 100_000  # no seed that anybody types


def test_probabilities_are_those_of_the_noise_that_was_optimized(toy: Path):
    options = ["--which", "initial", "--permutations", "7", "--block-size", "4", "--method-seed", "5"]
    assert cli.main([*NOISE, *options, "--learning-rate", "0.3", "--seeds", "0,4", "--out", "run"]) == 0
    measure = NoiseRegularizer(4, 7, 5).measure
    raw, best = ToyGenerator().draw_noise([0, 4]), read_noise(toy / "run/noise.safetensors")[0]
    for column, noise in (("P(z) raw", raw), ("P(z)", best)):
        found = [float(row[column]) for row in csv_rows(toy / "run/scores.csv")]
        assert found == pytest.approx(measure(noise[:, :1], CHANNEL_DIM)[1].tolist(), rel=1e-4), column
    assert read_noise(toy / "run/noise.safetensors")[1]["seeds"] == [0, 4]


def test_a_list_of_prompts_needs_the_memory_of_one(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """The noises of 300 prompts, with their gradients and averages, would be gigabytes."""
    drawn: list[int] = []
    draw = ToyGenerator.draw_noise
    monkeypatch.setattr(ToyGenerator, "draw_noise", lambda self, s: (drawn.append(len(s)), draw(self, s))[1])
    options = ["--reward", "brightness", "--iterations", "3", "--seeds", "0,4"]
    assert cli.main(["noise", "red heart", "black cat", "rocket", *options, "--out", "list"]) == 0
    assert max(drawn) == 2
    assert cli.main(["noise", "black cat", *options, "--out", "alone"]) == 0
    names = ["noise-01-red-heart", "noise-02-black-cat", "noise-03-rocket"]
    assert sorted(path.stem for path in (toy / "list").glob("noise*")) == names
    found, labels = read_noise(toy / "list/noise-02-black-cat.safetensors")
    assert found.equal(read_noise(toy / "alone/noise.safetensors")[0])
    assert (labels["prompts"], labels["seeds"]) == (["black cat"] * 2, [0, 4])
    assert csv_rows(toy / "list/scores.csv")[2:4] == csv_rows(toy / "alone/scores.csv")


def test_the_same_prompt_twice_has_two_curves(toy: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[list[str]] = []
    plot = results.draw_curves
    monkeypatch.setattr(results, "draw_curves", lambda runs, **rest: (drawn.append(list(runs)), plot(runs, **rest))[1])
    assert cli.main([*NOISE, "red heart", "--out", "run"]) == 0
    assert cli.main([*NOISE, "black cat", "--out", "other"]) == 0
    assert drawn == [["01-red-heart", "02-red-heart"], ["red heart", "black cat"]]


def test_why_a_run_ended_early_is_recorded(toy: Path):
    early = ["--monitor", "contrast", "--monitor-every", "1", "--patience", "1", "--iterations", "500"]
    assert cli.main([*NOISE, *early, "--learning-rate", "0.3", "--out", "run"]) == 0
    found = record(toy / "run")
    assert found["stopped"] == found["runs"][0]["stopped"] != "finished"
    assert len(found["runs"][0]["history"]) < 500


def test_black_box_reward(toy: Path):
    assert cli.main(["noise", "a", "--reward", "jpeg", "--iterations", "2", "--perturbations", "2"]) == 0
    assert cli.main(["noise", "a", "--reward", "jpeg", "--iterations", "1", "--gradient", "zeroth-order"]) == 0
    assert sorted(p.name for p in (toy / "results").iterdir()) == ["noise", "noise-2"]


@pytest.mark.parametrize(("count", "batch"), [(1, None), (8, 4), (20, 4)])
def test_best_of_n_costs_what_the_run_cost(count: int, batch: int | None):
    """Validations between the updates of an epoch are model evaluations like any other."""
    generator, evaluations = ToyGenerator(), [2 * 20 * count]  # a backward through one step counts as two
    model = generator._model

    def counting(x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        evaluations[0] += len(x)
        return model(x, embeddings)

    generator._model = counting  # type: ignore[method-assign]
    config = OptimizeConfig(epochs=20, batch_size=batch, tokens=TokenConfig(basis_size=4))
    result = train_tokens(generator, ToyReward(), [f"cat {i}" for i in range(count)], config)
    cost = images_at_equal_cost(config, result.history, generator.steps, rows=count)
    assert cost == pytest.approx(evaluations[0] / generator.steps / count, abs=1)


COSTS = [
    (NoiseConfig(iterations=20, permutations=5), True),
    (NoiseConfig(iterations=20, permutations=5, checkpoint=False, backprop_steps=2), True),
    (NoiseConfig(iterations=20, permutations=5, perturbations=3), False),
    (NoiseConfig(iterations=20, permutations=5, gradient="zeroth-order", perturbations=3), False),
    (NoiseConfig(iterations=20, permutations=5, gradient="hybrid-image", perturbations=3), False),
    (OptimizeConfig(epochs=20, backprop_steps=7, tokens=TokenConfig(basis_size=4)), True),
]


@pytest.mark.parametrize(("config", "differentiable"), COSTS)
def test_best_of_n_costs_what_any_gradient_costs(config: Any, differentiable: bool):
    """Forward passes, recomputed ones included, are counted as they come; a backward through a step counts as two."""
    generator, evaluations = ToyGenerator(), [0]

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            evaluations[0] += 2
            return grads[0]

    model = generator._model

    def counting(x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        evaluations[0] += len(x)
        return Backward.apply(model(x, embeddings))  # type: ignore[return-value]

    generator._model = counting  # type: ignore[method-assign]
    method = optimize_noise if isinstance(config, NoiseConfig) else train_tokens
    result: Any = method(generator, ToyReward(differentiable), ["cat"], config)
    cost = images_at_equal_cost(config, result.history, generator.steps, differentiable=differentiable)
    assert cost == pytest.approx(evaluations[0] / generator.steps, abs=1)


# -- what breaks ------------------------------------------------------------------------------------------------------


def spoil(patch: pytest.MonkeyPatch, spoiled: Callable[[torch.Tensor, list[str]], torch.Tensor]) -> None:
    """Another `score` for the reward "brightness"."""
    patch.setattr(
        "ipgo_engine.rewards.brightness.Brightness.score", lambda self, images, prompts: spoiled(images, prompts)
    )


def not_a_number(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3)) * (float("nan") if "bad" in prompts else 1.0)


def no_answer(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    if "bad" in prompts:
        raise RuntimeError("the server does not answer")
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(("spoiled", "reason"), [(not_a_number, "not finite"), (no_answer, "does not answer")])
def test_a_bad_prompt_costs_itself_only(toy: Path, spoiled: Any, reason: str, capsys: pytest.CaptureFixture[str]):
    command = [*TRAIN, "bad", "black cat", "--out", "run"]
    learned = ["tokens-01-red-heart.safetensors", "tokens-03-black-cat.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, spoiled)
        assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "1 of 3 prompts broke down ('bad')" in said
    assert reason in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (toy / "run").glob("tokens*")) == learned
    pictures = sorted(path.name for path in (toy / "run/images").glob("*-best.png"))
    assert pictures == ["001-red-heart-seed0-best.png", "003-black-cat-seed0-best.png"]
    assert [row["prompt"] for row in csv_rows(toy / "run/scores.csv")] == ["red heart", "black cat"]
    found = record(toy / "run")
    assert found["stopped"].startswith("failed: ")
    assert found["failed"][0]["prompts"] == ["bad"]
    assert reason in found["failed"][0]["reason"]
    (toy / "run/state-01.safetensors").write_bytes(b"half")
    assert cli.main([*command, "--resume"]) == 1
    assert "state-01.safetensors" in capsys.readouterr().err
    assert [row["prompt"] for row in csv_rows(toy / "run/scores.csv")] == ["bad", "black cat"]
    (toy / "run/state-01.safetensors").unlink()
    assert cli.main([*command, "--resume"]) == 0
    assert len(list((toy / "run").glob("tokens*"))) == 3
    assert record(toy / "run")["stopped"] == "finished"


@pytest.mark.parametrize("prompts", [["bad"], ["bad", "bad bad"]])
def test_nothing_learned_leaves_nothing(toy: Path, prompts: list[str], monkeypatch, capsys):
    def refuse(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise RuntimeError("the server does not answer")

    spoil(monkeypatch, refuse)
    assert cli.main(["train", *prompts, *TRAIN[2:]]) == 1
    assert "RuntimeError: the server does not answer" in capsys.readouterr().err
    assert list(toy.iterdir()) == []


def test_what_one_job_learned_is_written_before_the_next_begins(toy: Path, monkeypatch: pytest.MonkeyPatch):
    def look(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if "black cat" in prompts:
            assert (toy / "run/tokens-01-red-heart.safetensors").exists()
            assert (toy / "run/images/001-red-heart-seed0-best.png").exists()
            assert [row["prompt"] for row in csv_rows(toy / "run/scores.csv")] == ["red heart"]
        return images.mean((1, 2, 3))

    spoil(monkeypatch, look)
    assert cli.main([*TRAIN, "black cat", "--out", "run"]) == 0


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the server does not answer")


def test_a_comparison_that_breaks_costs_its_cells_only(toy: Path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr("ipgo_engine.cli.results.rate", breaks)
    monkeypatch.setattr("ipgo_engine.cli.results.best_of", lambda *_: tried.append(1) or breaks())
    command = [*TRAIN, "black cat", "--monitor", "contrast", "--best-of-n", "3", "--out", "run"]
    assert cli.main(command) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ipgo:")]
    assert len(said) == 1
    assert "does not answer" in said[0]
    assert len(tried) == 1  # not again for the second prompt
    for row in csv_rows(toy / "run/scores.csv"):
        assert float(row["gain"]) == float(row["best"]) - float(row["raw"])
        assert [row[name] for name in ("last", "contrast best", "fresh", "best of 3")] == [""] * 4
    assert record(toy / "run")["stopped"] == "finished"
    assert len(list((toy / "run/images").iterdir())) == 2 * 3
    assert len(list((toy / "run").glob("tokens-*.safetensors"))) == 2
    assert Image.open(toy / "run/before-after.png")


def test_numbers_are_written_where_pictures_have_no_room(toy: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: Any) -> None:
        raise InputError(f"{path} cannot be written (no space left on device)")

    monkeypatch.setattr("ipgo_engine.cli.results.save_image", full)
    assert cli.main([*TRAIN, "black cat", "--out", "run"]) == 1
    assert [float(row["best"]) > 0 for row in csv_rows(toy / "run/scores.csv")] == [True, True]
    assert record(toy / "run")["stopped"] == "finished"


def test_groups_of_pictures_keep_their_prompts_seeds_and_noises():
    class OfThePrompt(ToyReward):
        def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            return images.mean((1, 2, 3)) + torch.tensor([float(prompt.split()[-1]) for prompt in prompts])

    generator = ToyGenerator()
    prompts, seeds, reward = [f"cat {i}" for i in range(10)], list(range(10, 20)), OfThePrompt()
    noise = generator.draw_noise(seeds)
    whole = generator.generate(generator.encode(prompts), noise)
    torch.testing.assert_close(evaluate.render(generator, prompts, seeds, size=4), whole)
    torch.testing.assert_close(evaluate.render(generator, prompts, [0] * 10, noise=noise, size=4), whole)
    found = evaluate.rate(reward, whole, prompts, generator.device)
    assert found == pytest.approx(reward.score(whole, prompts).tolist())


def test_pictures_are_made_one_at_a_time_when_memory_runs_out(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """More than one picture at a time is too much wherever the loop does not say how many steps need gradients."""
    make, sizes = ToyGenerator.generate, []

    def narrow(self: Any, conditioning: Any, noise: Any, **options: Any) -> Any:
        if not options:
            sizes.append(len(noise))
            if len(noise) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return make(self, conditioning, noise, **options)

    monkeypatch.setattr(ToyGenerator, "generate", narrow)
    (toy / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    command = ["train", "--prompts-file", "p.txt", "--mode", "batch", "--reward", "brightness", "--epochs", "1"]
    assert cli.main([*command, *SMALL_TOKENS, "--fresh-seeds", "0", "--out", "run"]) == 0
    assert len(list((toy / "run/images").glob("*-best.png"))) == 20
    assert all(float(row["best"]) for row in csv_rows(toy / "run/scores.csv"))
    assert sizes[-42:] == [4, *[1] * 20] * 2  # before and after


def test_a_picture_that_alone_is_too_large_is_said_in_one_line(toy: Path, monkeypatch, capsys):
    def too_large(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ToyGenerator, "generate", too_large)
    assert cli.main(["generate", "a", "b", "--out", "run"]) == 1
    said = capsys.readouterr().err
    assert "Out of memory with one picture at a time: use a smaller picture" in said
    assert len(said.strip().splitlines()) == 1
    assert not (toy / "run").exists()


# -- stopping and going on --------------------------------------------------------------------------------------------


def press_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C at this model call."""
    make = models.make_generator

    def stopping(settings: Any, device: Any, should_stop: Any) -> ToyGenerator:
        generator: Any = make(settings, device, should_stop)
        poll = generator.before_call

        def press(number: int) -> None:
            if number == call:
                should_stop._handle(signal.SIGINT, None)
            poll(number)

        generator.before_call = press
        return generator

    patch.setattr(models, "make_generator", stopping)


@pytest.mark.parametrize("command", [TRAIN, NOISE, JOINT], ids=["train", "noise", "joint"])
def test_interrupted_and_resumed_equals_uninterrupted(
    toy: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = [*command, "black cat", "--seeds", "0,1"]
    assert cli.main([*command, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        press_at(patch, 15)
        assert cli.main([*command, "--out", "parts"]) == 130
    assert record(toy / "parts")["stopped"] == "cancelled"
    assert Image.open(toy / "parts/before-after.png")
    said = capsys.readouterr().err
    assert "Ctrl-C again" in said
    assert "broke down" not in said
    assert cli.main([*command, "--out", "parts", "--resume"]) == 0
    assert csv_rows(toy / "parts/scores.csv") == csv_rows(toy / "whole/scores.csv")
    for path in sorted((toy / "whole/images").iterdir()):
        assert (toy / "parts/images" / path.name).read_bytes() == path.read_bytes()


def test_interrupted_before_anything_was_learned_leaves_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch):
    press_at(monkeypatch, 1)
    assert cli.main([*TRAIN, "--out", "deep/run"]) == 130
    assert list(toy.iterdir()) == []


def test_pictures_of_one_update_are_not_taken_for_those_of_other_rows(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """Four prompts of an update with four seeds are as many pictures as the rows that a batch run reports."""
    press_at(monkeypatch, 100)
    prompts = [f"cat {i}" for i in range(5)]
    command = ["train", *prompts, "--mode", "batch", "--reward", "brightness", "--epochs", "40", "--seeds", "0-3"]
    assert cli.main([*command, *SMALL_TOKENS, "--micro-batch", "16", "--out", "run"]) == 130
    rows = csv_rows(toy / "run/scores.csv")
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompts[row // 4], str(row % 4)) for row in loop.spread(20, 16)
    ]
    assert {row["last"] for row in rows} == {""}
    for number, row in zip(loop.spread(20, 16), rows, strict=True):  # the picture is that of its line
        (path,) = (toy / "run/images").glob(f"{number + 1:03d}-*-before.png")
        generator = ToyGenerator()
        image = generator.generate(generator.encode([row["prompt"]]), generator.draw_noise([int(row["seed"])]))
        assert torch.allclose(pixels(path), image, atol=3e-3)


def test_ctrl_c_between_two_prompts_is_recorded(toy: Path, monkeypatch: pytest.MonkeyPatch):
    def then_press(session: Any, outcome: Any) -> None:
        results.write_learned(session, outcome)
        session.interrupt.requested = True

    command = [*TRAIN, "black cat", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr("ipgo_engine.cli.runs.write_learned", then_press)
        assert cli.main(command) == 130
    assert record(toy / "run")["stopped"] == "cancelled"
    assert [row["prompt"] for row in csv_rows(toy / "run/scores.csv")] == ["red heart"]
    assert cli.main([*command, "--resume"]) == 0
    assert record(toy / "run")["stopped"] == "finished"
    assert len(csv_rows(toy / "run/scores.csv")) == 2


def test_an_interrupted_run_names_its_files_like_a_whole_one(toy: Path, monkeypatch: pytest.MonkeyPatch):
    command = [*TRAIN, "black cat", "--out", "run"]
    with monkeypatch.context() as patch:
        press_at(patch, 9)
        assert cli.main(command) == 130
    assert [path.name for path in (toy / "run").glob("tokens*")] == ["tokens-01-red-heart.safetensors"]
    assert cli.main([*command, "--resume"]) == 0
    assert len(list((toy / "run").glob("tokens*"))) == 2


def test_a_resume_that_is_interrupted_loses_nothing_of_the_table(toy: Path, monkeypatch: pytest.MonkeyPatch):
    command = [*TRAIN, "black cat", "rocket", "--fresh-seeds", "0", "--out", "run"]
    with monkeypatch.context() as patch:
        press_at(patch, 2 * 18 + 9)
        assert cli.main(command) == 130
    before = csv_rows(toy / "run/scores.csv")
    assert [row["prompt"] for row in before] == ["red heart", "black cat", "rocket"]
    with monkeypatch.context() as patch:
        press_at(patch, 2)
        assert cli.main([*command, "--resume"]) == 130
    after = csv_rows(toy / "run/scores.csv")
    assert [(row["prompt"], row["best"]) for row in after] == [(row["prompt"], row["best"]) for row in before]
    assert cli.main([*command, "--resume"]) == 0
    assert cli.main([*command[:-1], "whole"]) == 0
    assert csv_rows(toy / "run/scores.csv") == csv_rows(toy / "whole/scores.csv")


def test_generate_interrupted_keeps_what_is_drawn(toy: Path, monkeypatch: pytest.MonkeyPatch):
    press_at(monkeypatch, 2 * 3 + 1)  # three steps per batch of four: in the third batch
    prompts = [f"cat {i}" for i in range(12)]
    assert cli.main(["generate", *prompts, "--reward", "brightness", "--out", "run"]) == 130
    assert len(list((toy / "run/images").iterdir())) == 8
    assert Image.open(toy / "run/pictures.png")
    assert [row["prompt"] for row in csv_rows(toy / "run/scores.csv")] == prompts[:8]
    assert record(toy / "run")["stopped"] == "cancelled"
    press_at(monkeypatch, 1)
    assert cli.main(["generate", "a", "--out", "none"]) == 130
    assert not (toy / "none").exists()


def test_generate_finds_an_unwritable_folder_before_it_draws(toy: Path, monkeypatch: pytest.MonkeyPatch):
    (toy / "file").write_text("mine")
    monkeypatch.setattr(ToyGenerator, "generate", lambda *_, **__: pytest.fail("a picture was drawn"))
    assert cli.main(["generate", "a", "--out", "file/out"]) == 2


def test_resume_refuses_another_run(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*NOISE, "--out", "run"]) == 0
    kept = {path: path.read_bytes() for path in (toy / "run").rglob("*") if path.is_file()}
    for change, expected in (
        (["--steps", "7"], "steps"),
        (["--seeds", "1"], "seeds"),
        (["--learning-rate", "0.5"], "settings"),
        (["--reward", "contrast=0.1"], "reward"),
        (["another prompt"], "prompts"),
    ):
        capsys.readouterr()
        assert cli.main([*NOISE, *change, "--out", "run", "--resume"]) == 2
        assert expected in capsys.readouterr().err
    assert cli.main([*TRAIN, "--out", "run", "--resume"]) == 2
    assert {path: path.read_bytes() for path in (toy / "run").rglob("*") if path.is_file()} == kept


def test_resume_with_other_settings_is_refused_before_the_prompts_that_were_not_begun(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for number, command in enumerate((TRAIN, JOINT)):
        run = [*command, "black cat", "--clip-norm", "inf", "--out", f"run-{number}"]
        with monkeypatch.context() as patch:
            press_at(patch, 12)
            assert cli.main(run) == 130
        kept = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
        assert cli.main([*run, "--conformity", "0.5", "--resume"]) == 2
        assert "(different: conformity)" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == kept
        assert cli.main([*run, "--monitor-every", "2", "--resume"]) == 0


def test_a_longer_run_goes_on(toy: Path):
    assert cli.main([*NOISE, "--out", "run"]) == 0
    assert cli.main([*NOISE, "--iterations", "5", "--out", "run", "--resume"]) == 0
    assert cli.main([*NOISE, "--iterations", "5", "--out", "whole"]) == 0
    assert csv_rows(toy / "run/scores.csv") == csv_rows(toy / "whole/scores.csv")


def test_a_damaged_state_file_is_named(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*NOISE, "--out", "run"]) == 0
    (toy / "run/state-01.safetensors").write_bytes(b"half")
    assert cli.main([*NOISE, "--out", "run", "--resume"]) == 2
    assert "state-01.safetensors" in capsys.readouterr().err


SCRIPT = """
    import sys, time
    from ipgo_engine import cli
    from ipgo_engine.cli import models
    from ipgo_engine.errors import Cancelled
    from tests.engine.toys import ToyGenerator

    def make(settings, device, should_stop):
        def slow(call):
            if call == 30:
                print("half-way", flush=True)
            if should_stop():
                raise Cancelled("stopped")
            time.sleep(0.01)
        return ToyGenerator(before_call=slow)

    models.make_generator = make
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_from_outside(tmp_path: Path, presses: int):
    command = [*NOISE[:-1], "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "half-way"
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.003)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    if presses == 1:
        assert Image.open(tmp_path / "run/before-after.png")
        assert record(tmp_path / "run")["stopped"] == "cancelled"
        assert csv_rows(tmp_path / "run/scores.csv")


# -- demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_demo(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo with the toy for a model and simple rewards."""
    simple = {"demo-clip": "brightness", "demo-judge": "contrast"}
    monkeypatch.setattr(demo, "load", lambda name, *_: load(simple.get(name, name)))
    return toy


def test_demo_shows_every_method(toy_demo: Path, capsys: pytest.CaptureFixture[str]):
    plan = demo.Plan(prompts=("red heart", "black cat"), steps=3, epochs=2, iterations=2, hack_iterations=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", plan)
        assert cli.main(["demo", "--quick", "--out", "demo"]) == 0
    out = capsys.readouterr().out
    assert "index.html" in out
    folder = toy_demo / "demo"
    page = (folder / "index.html").read_text(encoding="utf-8")
    pictures = ["before-after.png", "brightness.png", "curves-tokens.png", "curves-noise.png", "curves-brightness.png"]
    for name in pictures:
        assert f'src="{name}"' in page
        assert Image.open(folder / name).size[0] > 200
    methods = [row["method"] for row in csv_rows(folder / "scores.csv")]
    expected = ["IPGO tokens", "noise, regularized", "noise, not regularized", "best of 7 seeds"]
    assert list(dict.fromkeys(methods)) == [*expected, "regularized", "not regularized"]
    assert record(folder)["stopped"] == "finished"
    assert record(folder)["config"]["noise-free"]["regularization"] == 0
    assert IPGOTokens.load(folder / "tokens-black-cat.safetensors").dim == ToyGenerator.dim
    labels = read_noise(folder / "noise.safetensors")[1]
    assert labels["prompts"] == ["red heart", "black cat"]
    assert labels["run"]["generator"]["steps"] == 3


@pytest.mark.parametrize("call", [9, 30, 50])
def test_demo_interrupted_shows_what_there_is(toy_demo: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    press_at(monkeypatch, call)
    assert cli.main(["demo", "--quick", "--out", "demo"]) == 130
    assert record(toy_demo / "demo")["stopped"] == "cancelled"
    assert (toy_demo / "demo/index.html").exists()
    assert csv_rows(toy_demo / "demo/scores.csv")


def test_demo_interrupted_at_the_start_of_a_prompt(toy_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(demo, "QUICK", demo.Plan(prompts=("red heart", "black cat"), steps=3, epochs=1, iterations=1))
    train, prompts = demo.train_tokens, []

    def stop_at_the_second(generator: Any, target: Any, given: Any, config: Any, progress: Any, **options: Any) -> Any:
        prompts.append(given)
        if len(prompts) == 2:
            progress.interrupt.requested = True
            raise Cancelled("before the first picture")
        return train(generator, target, given, config, progress, **options)

    monkeypatch.setattr(demo, "train_tokens", stop_at_the_second)
    assert cli.main(["demo", "--quick", "--out", "demo"]) == 130
    assert "nothing was written" not in capsys.readouterr().err
    assert record(toy_demo / "demo")["stopped"] == "cancelled"
    assert (toy_demo / "demo/index.html").exists()
    assert [row["prompt"] for row in csv_rows(toy_demo / "demo/scores.csv")] == ["red heart"]


def test_demo_that_breaks_down_says_so(toy_demo: Path, monkeypatch: pytest.MonkeyPatch):
    def break_down(*_: Any, **__: Any) -> Any:
        raise NonFiniteError("the image is not finite")

    monkeypatch.setattr(demo, "optimize_noise", break_down)
    assert cli.main(["demo", "--quick", "--out", "demo"]) == 1
    assert record(toy_demo / "demo")["stopped"] == "failed: the image is not finite"
    assert csv_rows(toy_demo / "demo/scores.csv")


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_ranks_by_reward(toy: Path, capsys: pytest.CaptureFixture[str]):
    levels = {"a2.png": 40, "a10.png": 250, "a1.jpg": 120}
    (toy / "in").mkdir()
    for name, level in levels.items():
        Image.new("RGB", (16, 24), (level,) * 3).save(toy / "in" / name)
    Image.new("RGB", (200, 8), (90,) * 3).save(toy / "alone.png")
    (toy / "in" / "notes.txt").write_text("no picture")
    command = ["score", "in", "alone.png", "--reward", "brightness", "--monitor", "jpeg", "--top", "2", "--out", "run"]
    assert cli.main(command) == 0
    rows = csv_rows(toy / "run/scores.csv")
    assert [Path(row["file"]).name for row in rows] == ["a10.png", "a1.jpg", "alone.png", "a2.png"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[0]["score"]) == pytest.approx(250 / 255, abs=1e-6)
    assert float(rows[0]["jpeg"]) < 0
    assert Image.open(toy / "run/contact-sheet.png").size[0] > 300
    out = capsys.readouterr().out
    assert "a10.png" in out
    assert "alone.png" not in out.split("\n\n")[0]
    assert record(toy / "run")["versions"]


def test_score_keeps_what_it_has_when_files_or_the_reward_fail(toy: Path, monkeypatch, capsys):
    folder = toy / "a folder with a rather long name"
    (folder / "sub.png").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i * 100,) * 3).save(folder / f"{i}.png")
    (folder / "._0.png").write_bytes(b"what macOS leaves on foreign disks")
    (folder / "9.png").write_bytes((folder / "1.png").read_bytes()[:40])
    assert cli.main(["score", str(folder), "--reward", "brightness", "--out", "run"]) == 1
    rows = csv_rows(toy / "run/scores.csv")
    assert [Path(row["file"]).name for row in rows] == ["2.png", "1.png", "0.png", "9.png"]
    assert "9.png" in rows[-1]["problem"]
    said = capsys.readouterr()
    assert "9.png" in said.err
    assert "/2.png" in said.out

    def breaks_at_the_third(self, images, prompts, seen=[]):  # noqa: B006
        seen.append(prompts)
        if len(seen) == 3:
            raise NonFiniteError("the reward broke down")
        return images.mean((1, 2, 3))

    monkeypatch.setattr("ipgo_engine.rewards.brightness.Brightness.score", breaks_at_the_third)
    assert cli.main(["score", str(folder), "--reward", "brightness", "--out", "again"]) == 1
    rows = csv_rows(toy / "again/scores.csv")
    assert [bool(row["score"]) and row["score"] != "nan" for row in rows] == [True, True, False, False]
    assert "2 of 4 scored" in capsys.readouterr().out


def test_precision_and_places_of_rewards(toy: Path, monkeypatch):
    """Half precision for the rewards alone, and ~ in a path, which no shell expands behind an equals sign."""
    monkeypatch.setenv("HOME", str(toy))
    monkeypatch.setenv("USERPROFILE", str(toy))
    (toy / "weights").mkdir()
    seen = []
    monkeypatch.setattr("ipgo_engine.cli.inputs.load", lambda *place: seen.append(place) or load("brightness"))
    Image.new("RGB", (8, 8)).save(toy / "a.png")
    command = ["score", "a.png", "--prompt", "x", "--reward", "clip", "--reward-path", "clip=~/weights"]
    assert cli.main([*command, "--reward-dtype", "float16"]) == 0
    assert seen[0][0] == "clip"
    assert seen[0][3] == torch.float16


def test_offloaded_rewards_rest_in_main_memory_and_score_the_same(toy: Path, monkeypatch):
    """cpu:0 stands for the second device that machines without a GPU lack."""
    loaded = []

    def noting(name, place, device, dtype):
        loaded.append((name, str(device)))
        return load(name, place, device, dtype)

    monkeypatch.setattr("ipgo_engine.cli.inputs.load", noting)
    monkeypatch.setattr("ipgo_engine.cli.models.choose_device", lambda _: torch.device("cpu", 0))
    Image.new("RGB", (64, 64), (200, 30, 30)).save(toy / "a.png")
    command = ["score", "a.png", "--prompt", "red heart", "--reward", "demo-clip", "--reward", "brightness=0.5"]
    assert cli.main([*command, "--out", "plain"]) == 0
    assert cli.main([*command, "--out", "offloaded", "--offload-rewards"]) == 0
    assert loaded == [("demo-clip", "cpu:0"), ("brightness", "cpu:0"), ("demo-clip", "cpu"), ("brightness", "cpu")]
    plain, offloaded = (csv_rows(toy / name / "scores.csv")[0]["score"] for name in ("plain", "offloaded"))
    assert plain == offloaded


def test_score_gives_each_picture_its_prompt(toy: Path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(toy / name)
    (toy / "p.txt").write_text("one, two\nthree\n", encoding="utf-8")
    assert cli.main(["score", "b.png", "a.png", "--prompts-file", "p.txt", "--reward", "brightness"]) == 0
    found = {Path(row["file"]).name: row["prompt"] for row in csv_rows(toy / "results/score/scores.csv")}
    assert found == {"b.png": "one, two", "a.png": "three"}


# -- a real pipeline --------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    from tests.engine import tiny_pipelines

    monkeypatch.chdir(tmp_path)
    tiny_pipelines.sd().save_pretrained(tmp_path / "model")
    options = ["--model", "model", "--steps", "2", "--cfg", "3", "--sampler", "euler_ancestral"]
    capfd.readouterr()
    assert cli.main([*NOISE, *options, "--iterations", "2", "--size", "16", "--out", "run"]) == 0
    assert Image.open("run/images/001-red-heart-seed0-best.png").size == (16, 16)
    assert record(tmp_path / "run")["noise_shape"][0] == 2
    capfd.readouterr()
    assert cli.main([*NOISE, *options, "--sampler", "lms", "--eta", "1", "--out", "bad"]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
    assert not Path("bad").exists()
