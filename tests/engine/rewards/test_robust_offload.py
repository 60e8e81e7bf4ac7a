"""Averages over changed images, and weights that visit their device for one call."""

import pytest
import torch
from torch import nn

from ipgo_engine import rewards
from ipgo_engine.errors import InputError
from ipgo_engine.rewards.precision import GradientScale

from . import tiny


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.transformers_clip(folder)
    return rewards.load("clip", folder)


def batch(height=40, width=56):
    return tiny.as_batch(tiny.picture(height, width), tiny.picture(height, width, 1))


class PixelCode:
    """A reward only an exact pixel grid earns: correlation with a checkerboard, the shape of an adversarial pattern."""

    name, differentiable = "pixel-code", True

    def score(self, images, prompts):
        rows, columns = (torch.arange(n) for n in images.shape[-2:])
        board = ((rows[:, None] + columns) % 2 * 2 - 1).float()
        return (images * board).mean((1, 2, 3))


def test_robust_is_the_mean_of_its_versions_and_deterministic(clip):
    robust = rewards.Robust(clip, samples=3, seed=5)
    versions = [batch(), *(change(batch()) for change in robust.augmentations)]
    expected = torch.stack([clip.score(v, tiny.PROMPTS) for v in versions]).mean(0)
    torch.testing.assert_close(robust.score(batch(), tiny.PROMPTS), expected)
    again = rewards.Robust(clip, samples=3, seed=5)
    assert torch.equal(robust.score(batch(), tiny.PROMPTS), again.score(batch(), tiny.PROMPTS))
    other = rewards.Robust(clip, samples=3, seed=6).score(batch(), tiny.PROMPTS)
    assert not torch.equal(other, robust.score(batch(), tiny.PROMPTS))
    assert robust.name == "robust(clip)"


class Watching:
    """Keeps what it is shown."""

    name, differentiable = "watching", True

    def __init__(self):
        self.shown = []

    def score(self, images, prompts):
        self.shown.append(images)
        return images.mean((1, 2, 3))


def versions_of(picture, **settings):
    """The changed versions of a picture that a reward sees."""
    watching = Watching()
    off = {"crop": 0.0, "resample": 0.0, "noise": 0.0}
    rewards.Robust(watching, samples=40, **(off | settings)).score(picture, [""])
    return watching.shown[1:]


def test_crops_are_windows_of_all_sizes_in_all_places():
    rows, columns = (torch.linspace(0, 1, size) for size in (100, 200))
    places = torch.stack(torch.broadcast_tensors(rows[:, None], columns[None], torch.zeros(())))[None]
    windows = versions_of(places, crop=0.15)
    heights, widths = zip(*(window.shape[-2:] for window in windows), strict=True)
    assert 85 <= min(heights) < 88 <= 97 < max(heights) <= 100
    assert 170 <= min(widths) < 176 <= 194 < max(widths) <= 200
    for axis, size in ((0, 100), (1, 200)):
        starts = [window[0, axis, 0, 0].item() * (size - 1) for window in windows]
        ends = [size - 1 - window[0, axis, -1, -1].item() * (size - 1) for window in windows]
        assert min(starts + ends) > -0.01
        assert max(starts) > 0.05 * size
        assert max(ends) > 0.05 * size


def test_resampled_versions_are_smaller_whole_pictures():
    ramp = torch.linspace(0, 1, 200).expand(1, 3, 100, 200)
    versions = versions_of(ramp, resample=0.3)
    heights = [version.shape[-2] for version in versions]
    assert 70 <= min(heights) < 76 <= 94 < max(heights) <= 100
    for version in versions:
        assert version.shape[-1] == pytest.approx(2 * version.shape[-2], abs=1)
        assert version[0, 0, 0, 0] < 0.01
        assert version[0, 0, 0, -1] > 0.99


def test_noise_has_the_size_asked_for_and_differs_between_versions():
    versions = versions_of(torch.full((1, 3, 64, 64), 0.5), noise=0.05)
    assert all(version.std().item() == pytest.approx(0.05, rel=0.1) for version in versions)
    assert all(version.mean().item() == pytest.approx(0.5, abs=0.005) for version in versions)
    assert not torch.equal(versions[0], versions[1])


def test_robust_leaves_the_callers_random_numbers_alone():
    before = torch.random.get_rng_state()
    rewards.Robust(rewards.load("brightness")).score(batch(), ["", ""])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_robust_gradient_agrees_with_finite_differences(clip):
    robust = rewards.Robust(clip, samples=2)
    x = batch().mul(0.9).add(0.05).requires_grad_()
    (gradient,) = torch.autograd.grad(robust.score(x, tiny.PROMPTS).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (robust.score(x + s * 0.05 * direction, tiny.PROMPTS).double().sum() for s in (1, -1))
    assert gradient.norm().item() == pytest.approx(((up - down) / 0.1).item(), rel=1e-2)


def test_a_pattern_of_one_pixel_grid_earns_little_under_augmentation():
    rows, columns = torch.arange(64)[:, None], torch.arange(64)
    board = ((rows + columns) % 2).float().expand(1, 3, 64, 64)
    plain = PixelCode().score(board, [""]).item()
    augmented = rewards.Robust(PixelCode(), samples=8).score(board, [""]).item()
    assert plain == pytest.approx(0.5)
    assert augmented < 0.25 * plain


def test_robust_takes_black_boxes_and_every_size():
    robust = rewards.Robust(rewards.load("jpeg"), samples=2)
    assert not robust.differentiable
    for size in ((1, 1), (3, 200), (64, 64)):
        assert torch.isfinite(robust.score(torch.rand(2, 3, *size), ["", ""])).all()


@pytest.mark.parametrize("settings", [{"samples": 0}, {"crop": 1.0}, {"resample": -0.1}, {"noise": float("nan")}])
def test_robust_settings(settings):
    with pytest.raises(InputError):
        rewards.Robust(rewards.load("jpeg"), **settings)


def test_offloaded_scores_and_gradients_are_the_rewards_own(clip):
    offloaded = rewards.Offloaded(clip, "cpu")
    resting = [p.data_ptr() for p in clip.module.parameters()]
    plain, moved = batch().requires_grad_(), batch().requires_grad_()
    weights = torch.tensor([2.0, -3.0])
    expected, scores = clip.score(plain, tiny.PROMPTS), offloaded.score(moved, tiny.PROMPTS)
    torch.testing.assert_close(scores, expected)
    assert type(scores.grad_fn).__name__ == "_ScoreNowBackward"  # nothing of the reward is kept for the backward pass
    (expected * weights).sum().backward()
    (scores * weights).sum().backward()
    torch.testing.assert_close(moved.grad, plain.grad)
    assert [p.data_ptr() for p in clip.module.parameters()] == resting
    with torch.no_grad():
        assert not offloaded.score(moved, tiny.PROMPTS).requires_grad
    torch.testing.assert_close(rewards.Offloaded(clip).score(batch(), tiny.PROMPTS), expected)  # where the images are
    assert not hasattr(offloaded, "module")  # a host that moves the weights of rewards leaves these alone


def test_a_sum_shows_the_weights_of_its_parts_but_not_the_offloaded_ones(clip):
    parts = [(clip, 1.0), (rewards.load("contrast"), 1.0), (rewards.Robust(clip), 2.0)]
    shown = {id(p) for p in rewards.Weighted(parts).module.parameters()}
    assert shown == {id(p) for p in clip.module.parameters()}
    assert rewards.Weighted([(rewards.load("jpeg"), 1.0), (rewards.Offloaded(clip), 1.0)]).module is None
    both, x = rewards.Offloaded(rewards.Weighted(parts)), batch().requires_grad_()
    both.score(x, tiny.PROMPTS).sum().backward()
    assert x.grad.abs().sum() > 0


def test_offloaded_weights_visit_for_the_call_only():
    class Probe:
        name, differentiable = "probe", True

        def __init__(self):
            self.module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
            self.module.tied = nn.Linear(3, 3, bias=False)
            self.module.tied.weight = self.module[0].weight
            self.seen = []

        def score(self, images, prompts):
            self.seen.append([*self.module.parameters(), *self.module.buffers()])
            if len(self.seen) == 2:
                raise RuntimeError("out of memory")
            return images.mean((1, 2, 3))

    probe = Probe()
    resting = [*probe.module.parameters(), *probe.module.buffers()]
    offloaded = rewards.Offloaded(probe, "meta")  # a device that every machine has
    offloaded.score(torch.rand(1, 3, 4, 4), [""])
    assert len(probe.seen[0]) == len(resting)  # what two places share stays one
    assert {tensor.device.type for tensor in probe.seen[0]} == {"meta"}
    assert not any(tensor.requires_grad for tensor in probe.seen[0])

    def is_back():
        return all(a is b for a, b in zip([*probe.module.parameters(), *probe.module.buffers()], resting, strict=True))

    assert is_back()
    with pytest.raises(RuntimeError, match="out of memory"):
        offloaded.score(torch.rand(1, 3, 4, 4), [""])
    assert is_back()  # even after a failure


class Noting:
    """Keeps whether a gradient was wanted, where its weights were, and how many runs began."""

    name = "noting"

    def __init__(self, differentiable=True):
        self.module, self.differentiable = nn.Linear(1, 1).requires_grad_(False), differentiable
        self.graded, self.places, self.runs = [], [], 0

    def begin_run(self):
        self.runs += 1

    def score(self, images, prompts):
        self.graded.append(torch.is_grad_enabled())
        self.places.append(self.module.weight.device.type)
        return images.mean((1, 2, 3))


def test_an_offloaded_reward_computes_a_gradient_only_where_one_is_wanted():
    wanted = torch.rand(1, 3, 4, 4, requires_grad=True)
    for differentiable in (True, False):
        noting = Noting(differentiable)
        offloaded = rewards.Offloaded(noting)
        offloaded.score(wanted, [""])
        offloaded.score(wanted.detach(), [""])
        with torch.no_grad():
            offloaded.score(wanted, [""])
        assert noting.graded == [differentiable, False, False]


@pytest.mark.parametrize(
    ("device", "images", "place"), [(None, "cpu", "cpu"), (None, "meta", "meta"), ("meta", "cpu", "meta")]
)
def test_offloaded_weights_go_where_they_are_sent_or_where_the_images_are(device, images, place):
    noting = Noting()
    pixels = torch.rand(1, 3, 4, 4, device=images)
    rewards.Offloaded(noting, device).score(pixels, [""])
    rewards.Offloaded(noting, device).score(pixels.requires_grad_(), [""])
    assert noting.places == [place, place]


def test_a_run_begins_for_the_offloaded_reward_too():
    noting = Noting()
    rewards.Offloaded(noting).begin_run()
    assert noting.runs == 1


def test_offloading_needs_weights():
    with pytest.raises(InputError, match="no weights"):
        rewards.Offloaded(rewards.load("jpeg"), "cpu")


def test_wrappers_compose(clip):
    both = rewards.Weighted([(rewards.Robust(rewards.Offloaded(clip, "cpu")), 1.0), (rewards.load("contrast"), 0.1)])
    x = batch().requires_grad_()
    both.score(x, tiny.PROMPTS).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert both.differentiable


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-6, 1.0, 1e6, 0.0, float("inf"), float("nan")])
def test_gradient_scale_is_exact_for_every_size(size):
    scale = GradientScale()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    scale.leave(scale.enter(x) * torch.tensor([3.0, -5.0])).backward(torch.tensor([size, size]))
    torch.testing.assert_close(x.grad, torch.tensor([3.0, -5.0]) * size, rtol=0, atol=0, equal_nan=True)
