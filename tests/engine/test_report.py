"""Curves, grids, tables: files that open, and numbers that survive."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from ipgo_engine import InputError, OptimizeConfig, StepEvent, report
from ipgo_engine.report.grids import Row, Tile


def history(steps: int = 12, *, probability: bool = True, drop: float = 0.0) -> list[StepEvent]:
    return [
        StepEvent(
            step=i,
            total=steps,
            reward=0.1 * i,
            best=0.1 * i,
            probability=10 ** (-drop * i) if probability else None,
            monitors={"judge": 0.5 - 0.01 * i} if i % 5 == 0 else {},
        )
        for i in range(steps + 1)
    ]


def test_pil_round_trip_is_exact_for_eight_bits():
    image = torch.randint(0, 256, (1, 3, 5, 7)).float() / 255
    assert torch.equal(report.from_pil(report.to_pil(image)), image)
    assert report.to_pil(image[0]).size == (7, 5)


def test_to_pil_refuses_batches():
    with pytest.raises(InputError, match="one image"):
        report.to_pil(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1"])
def test_pictures_of_every_mode(tmp_path: Path, mode: str):
    Image.new("RGB", (6, 4), "white").convert(mode).save(tmp_path / "a.png")
    image = report.open_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 4, 6)
    assert float(image.min()) == 1.0


def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path: Path):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert report.open_image(tmp_path / "a.png")[0, :, 0].tolist() == [pytest.approx([0, 0.5, 1], abs=1e-4)] * 3
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="floating-point"):
        report.open_image(tmp_path / "a.tiff")


def test_transparent_pixels_lie_on_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert float(report.open_image(tmp_path / "a.png").min()) == 1.0


def test_a_picture_that_is_none(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png"):
        report.open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="missing"):
        report.open_image(tmp_path / "missing.png")


def test_save_image_is_whole_or_absent(tmp_path: Path):
    report.save_image(tmp_path / "deep" / "a.png", torch.rand(3, 8, 8))
    assert Image.open(tmp_path / "deep" / "a.png").size == (8, 8)
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        report.save_image(blocked / "a.png", torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Red heart, 3D!", "red-heart-3d"), ("../../etc", "etc"), ("жук", "prompt"), ("é" * 99, "e" * 40)],
)
def test_slug(text: str, expected: str):
    assert report.slug(text) == expected


def test_curves_have_a_panel_for_each_kind_of_number():
    def axes(histories: dict[str, list[StepEvent]]) -> int:
        return len(report.draw_curves(histories).axes)

    plain = [StepEvent(step=0, total=1, reward=1.0, best=1.0)]
    assert axes({"a": plain}) == 1
    assert axes({"a": history(probability=False)}) == 2
    assert axes({"a": history(), "b": history(drop=5)}) == 3


def test_every_run_fits_into_the_probability_panel():
    axis = report.draw_curves({"kept": history(), "lost": history(drop=1)}).axes[-1]
    low, high = axis.get_ylim()
    assert low < -12
    assert high > 0


def test_many_runs_are_summed_up():
    """Run i rises by i per step from 0; the first ended after one step and keeps what it had."""
    runs = {
        f"run {i}": [
            StepEvent(step=step, total=3, reward=float(i * step), best=float(i * step), monitors={"held": float(i)})
            for step in range(2 if i == 1 else 4)
        ]
        for i in range(1, 12)
    }
    few = report.draw_curves(dict(list(runs.items())[:8])).axes[0]
    assert [text.get_text() for text in few.get_legend().get_texts()] == list(runs)[:8]
    reward, held = report.draw_curves(runs).axes
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["mean of 11"]
    assert len(reward.get_lines()) == len(held.get_lines()) == 12
    mean = reward.get_lines()[-1]
    assert list(mean.get_xdata()) == [0, 1, 2, 3]
    assert list(mean.get_ydata()) == pytest.approx([0, 6, (2 * 65 + 1) / 11, (3 * 65 + 1) / 11])
    assert list(held.get_lines()[-1].get_ydata()) == pytest.approx([6] * 4)


def test_curves_survive_a_probability_of_zero_and_odd_prompts(tmp_path: Path):
    events = [StepEvent(step=i, total=3, reward=0.1, best=0.1, probability=0.0) for i in range(4)]
    figure = report.draw_curves({"costs $5 and $6 {x} _y\nz": events}, title="100% $pure$")
    path = report.save_figure(tmp_path / "curves.png", figure)
    assert Image.open(path).size[0] > 300
    low, _ = figure.axes[-1].get_ylim()
    assert math.isfinite(low)


def test_curves_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    image = report.curve_tensor({"a": history()})
    assert image.shape[:2] == (1, 3)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before


def test_grid_keeps_pictures_where_they_belong():
    red, blue = torch.zeros(3, 300, 300), torch.zeros(3, 300, 300)
    red[0], blue[2] = 1, 1
    sheet = report.grid([Row("one", [Tile(red, "0.1"), None]), Row("two", [None, Tile(blue)])], ["left", "right"])
    pixels = np.array(sheet).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).sum() == 300 * 300


def test_before_after_takes_any_caption_and_size():
    before, after = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 16, 24)
    sheet = report.before_after(before, after, ["word " * 200, "жук 熊 🐻\nnew line"], [0.1, 0.2], [0.3, -1e9])
    assert sheet.width > 400
    assert report.before_after(before, after, ["", ""]).height < sheet.height


def test_contact_sheet_of_mixed_sizes():
    tiles = [Tile(torch.rand(3, 8 * i, 32), str(i)) for i in range(1, 8)]
    assert report.contact_sheet(tiles, columns=3).width < report.contact_sheet(tiles, columns=5).width


def test_csv_with_commas_newlines_quotes_and_unicode(tmp_path: Path):
    prompts = ["a, b", "two\nlines", 'say "hi"', "жук 熊 🐻", "=1+1", " spaces "]
    report.write_csv(tmp_path / "a.csv", [{"prompt": p, "raw": i / 3, "x": None} for i, p in enumerate(prompts)])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == prompts
    assert [float(row["raw"]) for row in rows] == [i / 3 for i in range(len(prompts))]
    assert {row["x"] for row in rows} == {""}


def test_json_takes_settings_tensors_and_infinities(tmp_path: Path):
    value = {"config": OptimizeConfig(), "tensor": torch.tensor([1.0, math.nan]), "path": tmp_path, "inf": math.inf}
    report.write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found["config"]["tokens"]["basis_size"] == 30
    assert found["tensor"] == [1.0, None]
    assert found["inf"] is None


def test_environment_names_what_decides_about_numbers():
    found = report.environment()
    assert found["torch"]
    assert found["python"]
    assert found["diffusers"]


def test_plain_table_lines_up():
    table = report.plain_table([{"prompt": "a\nb", "raw": 0.123456, "n": None}, {"prompt": "x" * 99, "raw": -2.0}])
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("a b")
    assert "0.1235" in lines[2]
    assert "..." in lines[3]
