"""Brightness, darkness, contrast, JPEG size, the weighted sum, and `load`."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipgo_engine import rewards
from ipgo_engine.errors import InputError, NonFiniteError
from ipgo_engine.rewards.base import Reward

SIMPLE = ["brightness", "darkness", "contrast", "jpeg", "jpeg-incompressibility"]
DIFFERENTIABLE = ["brightness", "darkness", "contrast"]


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_contract(name, size, dtype):
    reward = rewards.load(name)
    scores = reward.score(images(3, 3, *size).to(dtype), ["a"] * 3)
    assert isinstance(reward, Reward)
    assert reward.name == name
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_known_values():
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    half = torch.cat([black, white], dim=3)
    assert rewards.load("brightness").score(torch.cat([black, white]), ["", ""]).tolist() == [0, 1]
    assert rewards.load("darkness").score(torch.cat([black, white]), ["", ""]).tolist() == [1, 0]
    assert rewards.load("contrast").score(half, [""]).item() == pytest.approx(0.5, abs=1e-6)
    assert rewards.load("contrast").score(white, [""]).item() == pytest.approx(0.0, abs=1e-5)


def test_contrast_is_the_spread_of_pillows_luma():
    batch = images(1, 3, 32, 48)
    pixels = batch[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float).std() / 255
    assert rewards.load("contrast").score(batch, [""]).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_agrees_with_finite_differences(name):
    reward = rewards.load(name)
    x = images(2, 3, 6, 5, seed=1).mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(x, ["", ""]).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (reward.score(x + s * step * direction, ["", ""]).sum() for s in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-3)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_finite_on_flat_images_and_alive_outside_the_range(name):
    reward = rewards.load(name)
    flat = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    reward.score(flat, [""]).sum().backward()
    assert torch.isfinite(flat.grad).all()
    beyond = images(1, 3, 4, 4).mul(3).sub(1).requires_grad_()
    reward.score(beyond, [""]).sum().backward()
    assert (beyond.grad != 0).all()


@pytest.mark.parametrize("name", SIMPLE)
def test_values_outside_the_range_score_as_the_nearest_displayable(name):
    beyond = images(2, 3, 16, 16).mul(3).sub(1)
    reward = rewards.load(name)
    torch.testing.assert_close(reward.score(beyond, ["", ""]), reward.score(beyond.clamp(0, 1), ["", ""]))


def test_jpeg_is_the_size_of_pillows_file():
    batch = images(2, 3, 40, 56)
    sizes = []
    for image in batch:
        file = io.BytesIO()
        Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert rewards.load("jpeg").score(batch, ["", ""]).tolist() == pytest.approx([-s for s in sizes])
    assert rewards.load("jpeg-incompressibility").score(batch, ["", ""]).tolist() == pytest.approx(sizes)
    flat = torch.full_like(batch, 0.5)
    assert (rewards.load("jpeg").score(flat, ["", ""]) > rewards.load("jpeg").score(batch, ["", ""])).all()


def test_jpeg_refuses_nan():
    with pytest.raises(NonFiniteError, match="NaN"):
        rewards.load("jpeg").score(torch.full((1, 3, 4, 4), float("nan")), [""])


def test_weighted_sum_raw_and_scaled():
    batch, prompts = images(4, 3, 16, 16), ["x"] * 4
    bright, contrast = rewards.load("brightness"), rewards.load("contrast")
    both = rewards.Weighted([(bright, 2.0), (contrast, -0.5)])
    expected = 2 * bright.score(batch, prompts) - 0.5 * contrast.score(batch, prompts)
    torch.testing.assert_close(both.score(batch, prompts), expected)
    assert both.name == "2*brightness + -0.5*contrast"
    scaled = rewards.Weighted([(bright, 2.0)], scales=[(0.5, 0.1)])
    torch.testing.assert_close(scaled.score(batch, prompts), 2 * (bright.score(batch, prompts) - 0.5) / 0.1)
    assert [name for name, _ in both.raw(batch, prompts)] == ["brightness", "contrast"]


def test_calibration_gives_every_part_mean_zero_and_spread_one():
    batch = torch.linspace(0, 1, 6).view(6, 1, 1, 1) * images(6, 3, 16, 16)
    parts = [(rewards.load("brightness"), 1.0), (rewards.load("jpeg"), 1.0)]
    calibrated = rewards.Weighted(parts).calibrated(batch, ["x"] * 6)
    for (reward, _), (mean, std) in zip(calibrated.parts, calibrated.scales, strict=True):
        z = (reward.score(batch, ["x"] * 6) - mean) / std
        assert z.mean().item() == pytest.approx(0, abs=1e-5)
        assert z.std().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="alike"):
        rewards.Weighted(parts).calibrated(torch.zeros(3, 3, 8, 8), [""] * 3)


def test_calibration_keeps_the_weights():
    batch, prompts = torch.linspace(0, 1, 6).view(6, 1, 1, 1) * images(6, 3, 16, 16), ["x"] * 6
    parts = [(rewards.load("brightness"), 2.0), (rewards.load("contrast"), -0.5)]
    found = rewards.Weighted(parts).calibrated(batch, prompts)
    scores = [(weight, reward.score(batch, prompts)) for reward, weight in parts]
    expected = sum(weight * (score - score.mean()) / score.std() for weight, score in scores)
    torch.testing.assert_close(found.score(batch, prompts), expected)
    assert found.name == rewards.Weighted(parts).name


def test_weighted_is_differentiable_only_when_every_part_is():
    bright, size = rewards.load("brightness"), rewards.load("jpeg")
    assert rewards.Weighted([(bright, 1.0)]).differentiable
    assert not rewards.Weighted([(bright, 1.0), (size, 1.0)]).differentiable


def documented_blocks():
    """The Python of docs/rewards.md that tells other packs how to supply a reward."""
    text = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text[text.index("## Your own reward") :], re.DOTALL)


def test_the_documented_reward_of_another_pack_works_everywhere():
    names = {}
    for block in documented_blocks():
        exec(compile(block, "docs/rewards.md", "exec"), names)
    (node,) = names["NODE_CLASS_MAPPINGS"].values()
    (reward,) = node().make()
    assert isinstance(reward, Reward)
    assert node.RETURN_TYPES == ("IPGO_REWARD",)
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    for wrapped in (reward, rewards.Weighted([(reward, 1.0)]), rewards.Robust(reward, noise=0.0)):
        assert wrapped.score(red, ["red"]).item() == pytest.approx(1)
    red.requires_grad_()
    rewards.Weighted([(reward, 3.0), (rewards.load("contrast"), 0.1)]).score(red, ["red"]).sum().backward()
    assert (red.grad[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("batch", "prompts", "hint"),
    [
        (torch.zeros(3, 8, 8), [""], "leading axis"),
        (torch.zeros(1, 4, 8, 8), [""], r"B, 3, H, W"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""], "divide by 255"),
        (torch.zeros(2, 3, 8, 8), ["one"], "one prompt per image"),
        (torch.zeros(1, 3, 8, 8), "t", "one prompt per image"),
        ([[0.0]], [""], "images is list"),
        (torch.zeros(1, 3, 0, 8), [""], "at least one entry"),
    ],
)
def test_bad_input_is_one_clear_error(batch, prompts, hint):
    for name in SIMPLE:
        with pytest.raises(InputError, match=hint):
            rewards.load(name).score(batch, prompts)


def test_bad_settings():
    with pytest.raises(InputError, match="brightness, darkness"):
        rewards.load("brightnes")
    for parts in ([], [(rewards.load("jpeg"), 0.0)], [(rewards.load("jpeg"), float("nan"))]):
        with pytest.raises(InputError):
            rewards.Weighted(parts)
    for scales in ([], [(0.0, 0.0)], [(float("inf"), 1.0)], [(0.0, float("inf"))]):
        with pytest.raises(InputError, match="scale"):
            rewards.Weighted([(rewards.load("jpeg"), 1.0)], scales=scales)


class Odd:
    name, differentiable = "odd", False

    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts):
        return self.answer


@pytest.mark.parametrize("answer", [torch.zeros(3, 1), torch.tensor(0.5), torch.zeros(2), [0.1, 0.2, 0.3], 0.5, None])
@pytest.mark.parametrize("wrap", [lambda r: rewards.Weighted([(r, 1.0)]), rewards.Robust])
def test_a_score_of_another_shape_is_one_sentence_and_no_broadcast(answer, wrap):
    with pytest.raises(InputError, match=r"odd.*3 image.*shape \(3,\)"):
        wrap(Odd(answer)).score(torch.rand(3, 3, 16, 16), ["x"] * 3)


def test_every_version_of_a_picture_that_a_reward_sees_is_a_picture():
    """Other packs' rewards may wrap around outside [0, 1]."""
    seen = []

    class Watching:
        name, differentiable = "watching", True

        def score(self, images, prompts):
            seen.append((float(images.detach().min()), float(images.detach().max())))
            return images.mean((1, 2, 3))

    images = torch.cat([torch.zeros(1, 3, 24, 24), torch.ones(1, 3, 24, 24)]).requires_grad_()
    rewards.Robust(Watching(), noise=0.2).score(images, ["x", "x"]).sum().backward()
    assert min(low for low, _ in seen) >= 0
    assert max(high for _, high in seen) <= 1
    assert images.grad is not None
    assert images.grad.abs().min() > 0
