"""Files that appear whole or not at all, and say what they are."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ipgo_engine.errors import InputError
from ipgo_engine.formats.files import write_whole
from ipgo_engine.formats.noise import FORMAT as NOISE_FORMAT
from ipgo_engine.formats.noise import read_noise, write_noise
from ipgo_engine.formats.state import FORMAT, read_state, write_state


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupted(part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_noise_file_do_not_overwrite_what_it_is(tmp_path):
    path = write_noise(tmp_path / "noise.safetensors", torch.zeros(1, 1, 4, 2, 2), format="x", sampler="ddim")
    assert read_noise(path)[1]["sampler"] == "ddim"


def test_a_part_of_a_noise_that_is_still_learned_can_be_written(tmp_path):
    noise = torch.rand(2, 3, 4, 2, 2).requires_grad_()[:, :1]
    found, _ = read_noise(write_noise(tmp_path / "noise.safetensors", noise))
    assert torch.equal(found, noise)


def test_labels_that_are_no_plain_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="label of the noise file"):
        write_noise(tmp_path / "noise.safetensors", torch.zeros(1, 1, 4, 2, 2), seeds=np.arange(2))
    assert list(tmp_path.iterdir()) == []


NOISE = torch.zeros(1, 1, 4, 2, 2)


@pytest.mark.parametrize(
    ("noise", "labels", "reason"),
    [
        (NOISE[0], {}, "tensor of shape"),
        (NOISE[:0], {}, "tensor of shape"),
        (NOISE.int(), {}, "int32 tensor"),
        (NOISE + math.nan, {}, "not finite"),
        ((NOISE + math.inf).to(torch.float8_e5m2), {}, "not finite"),
        (NOISE, {"format": "ipgo-tokens-1"}, "another kind"),
        (NOISE, {"format": None}, "another kind"),
        *(
            (NOISE, {"prompts": prompts}, "prompts cannot be read")
            for prompts in ("a", ["a", 3], ["a \ud800"], ["\udfff"])
        ),
        *((NOISE, {"seeds": seeds}, "seeds cannot be read") for seeds in (1, [-1], [2**64], [True], [1.0])),
    ],
)
def test_a_noise_file_that_cannot_be_used_says_why(tmp_path, noise, labels, reason):
    header = {"format": NOISE_FORMAT} | labels
    path = tmp_path / "noise.safetensors"
    save_file({"noise": noise}, path, metadata={key: json.dumps(value) for key, value in header.items()})
    with pytest.raises(InputError, match=rf"noise\.safetensors is not a noise file or is damaged.*{reason}"):
        read_noise(path)


def test_a_noise_file_that_is_not_there_or_says_nothing_is_named(tmp_path):
    with pytest.raises(InputError, match="gone does not exist"):
        read_noise(tmp_path / "gone")
    save_file({"noise": NOISE}, tmp_path / "bare")
    with pytest.raises(InputError, match="bare is not a noise file"):
        read_noise(tmp_path / "bare")


def test_every_text_and_every_seed_comes_back(tmp_path):
    labels = {"prompts": ["a ♥ 😀"], "seeds": [0, 2**64 - 1]}
    _, found = read_noise(write_noise(tmp_path / "noise.safetensors", NOISE, **labels))
    assert {key: found[key] for key in labels} == labels


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"update": 3, "best": {"images": torch.rand(1, 3, 2, 2)}, "history": [{"reward": None}, torch.ones(2)]}
    found = read_state(write_state(tmp_path / "state", state))
    assert (found["update"], found["history"][0]) == (3, {"reward": None})
    assert torch.equal(found["best"]["images"], state["best"]["images"])
    assert torch.equal(found["history"][1], torch.ones(2))


def test_a_state_that_is_not_there_or_says_nothing_is_named(tmp_path):
    with pytest.raises(InputError, match="gone does not exist"):
        read_state(tmp_path / "gone")
    for header in (None, {"format": "ipgo-state-0", "state": "{}"}):
        save_file({"noise": NOISE}, tmp_path / "bare", metadata=header)
        with pytest.raises(InputError, match="bare is not a resume file"):
            read_state(tmp_path / "bare")


def test_a_state_may_hold_one_tensor_twice_and_views_of_it(tmp_path):
    whole = torch.rand(3, 2, requires_grad=True)
    found = read_state(write_state(tmp_path / "state", {"a": whole, "b": whole, "c": [whole.T, whole[:, :1]]}))
    for tensor, expected in zip(
        (found["a"], found["b"], *found["c"]), (whole, whole, whole.T, whole[:, :1]), strict=True
    ):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("text", ['{"best": {"__tensor__": "7"}}', '{"best": {"__tensor__": ["0"]}}', "{"])
def test_a_state_that_names_what_it_does_not_hold_is_damaged(tmp_path, text):
    save_file({"0": torch.ones(1)}, tmp_path / "state", metadata={"format": FORMAT, "state": text})
    with pytest.raises(InputError, match="damaged"):
        read_state(tmp_path / "state")
