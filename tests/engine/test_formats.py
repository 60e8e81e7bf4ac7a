"""Files that appear whole or not at all, and say what they are."""

import numpy as np
import pytest
import torch

from ipgo_engine.errors import InputError
from ipgo_engine.formats.files import write_whole
from ipgo_engine.formats.noise import read_noise, write_noise


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


def test_labels_that_are_no_plain_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="label of the noise file"):
        write_noise(tmp_path / "noise.safetensors", torch.zeros(1, 1, 4, 2, 2), seeds=np.arange(2))
    assert list(tmp_path.iterdir()) == []
