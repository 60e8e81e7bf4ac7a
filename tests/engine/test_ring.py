"""Figures 1 and 2 of the noise paper on the two-dimensional ring.

Rewards rise; a learned model is hacked, and the regularizer holds it. Comments give the values measured.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ipgo_engine import NoiseConfig, NoiseRegularizer, optimize_noise
from tests.engine.ring import OUTER, RingGenerator, corner, exact_mean, learned_mean, on_ring, sample_ring, wavy

PROMPTS = ["a ring"] * 48
SETTINGS = {"iterations": 300, "learning_rate": 1e-2, "checkpoint": False}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def learned() -> RingGenerator:
    return RingGenerator(learned_mean())


def run(generator: RingGenerator, reward, **changes):
    return optimize_noise(generator, reward, PROMPTS, NoiseConfig(**(SETTINGS | changes)))


def probabilities(noise: torch.Tensor) -> torch.Tensor:
    return NoiseRegularizer().measure(noise)[1]


@pytest.mark.parametrize("variance", [0.95, 0.5, 0.1])
def test_exact_mean_is_the_posterior_mean(variance):
    rng = np.random.default_rng(0)
    radius, angle = np.sqrt(rng.uniform(0.8**2, 1.2**2, 4_000_000)), rng.uniform(0, 2 * np.pi, 4_000_000)
    clean = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    x = np.array([0.7, 0.25])
    weight = np.exp(-((x - np.sqrt(1 - variance) * clean) ** 2).sum(1) / (2 * variance))
    expected = (weight[:, None] * clean).sum(0) / weight.sum()
    found = exact_mean(torch.tensor(x[None], dtype=torch.float32), torch.tensor([variance]))[0].numpy()
    assert found == pytest.approx(expected, abs=3e-3)


def test_ring_samples_are_uniform_in_area():
    points = sample_ring(100_000, torch.Generator().manual_seed(0))
    assert on_ring(points, slack=0.0).all()
    assert points.mean(0).abs().max() < 0.01
    inner_half = (points.norm(dim=1) < np.sqrt((0.8**2 + 1.2**2) / 2)).float().mean()
    assert inner_half == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_typical_noise_lands_on_the_ring(eta):
    generator = RingGenerator(exact_mean, steps=50, eta=eta)
    with torch.no_grad():
        points = generator.generate(generator.encode([""] * 500), generator.draw_noise(range(500)))
    assert on_ring(points).float().mean() > 0.99  # 1.00
    assert points.mean(0).abs().max() < 0.15


def test_gradient_of_the_map_equals_finite_differences():
    generator = RingGenerator(lambda x, v: exact_mean(x, v), steps=5)
    noise = generator.draw_noise([3])
    (gradient,) = torch.autograd.grad(generator.generate(generator.encode([""]), noise.requires_grad_()).sum(), noise)
    with torch.no_grad():
        for index in range(noise.numel()):
            step = torch.zeros(noise.numel())
            step[index] = 1e-2
            moved = [
                generator.generate(generator.encode([""]), noise + sign * step.view_as(noise)).sum() for sign in (1, -1)
            ]
            slope = float(moved[0] - moved[1]) / 2e-2
            assert float(gradient.flatten()[index]) == pytest.approx(slope, abs=5e-3)


def test_figure_1_points_move_to_local_maxima_on_the_ring(learned):
    result = run(learned, wavy(), regularization=0.1)
    assert result.rewards.mean() > result.start_rewards.mean() + 1.0  # from -0.18 to 1.82
    assert on_ring(result.image, 0.1).float().mean() >= on_ring(result.start_image, 0.1).float().mean() - 0.15


def test_figure_2_a_learned_model_is_hacked_without_the_regularizer(learned):
    result = run(learned, corner(), regularization=0.0)
    assert on_ring(result.start_image).float().mean() > 0.85  # 0.91
    assert on_ring(result.image).float().mean() < 0.1  # 0.00: all left
    assert probabilities(result.best).median() < 1e-6
    assert result.image.flatten(1).norm(dim=1).max() > 1.7


def test_figure_2_the_regularizer_keeps_points_on_the_ring(learned):
    result = run(learned, corner(), regularization=1.0)
    assert result.rewards.mean() > result.start_rewards.mean() + 2.0  # from -4.5 to -0.8: the near side of the ring
    assert on_ring(result.image).float().mean() > 0.9
    assert probabilities(result.best).median() > 0.1


def test_an_exact_model_cannot_be_hacked_though_its_noise_becomes_unlikely():
    """The paper's explanation, seen from the other side: without network error nothing leaves the ring."""
    result = run(RingGenerator(exact_mean), corner(), regularization=0.0)
    assert result.image.flatten(1).norm(dim=1).max() <= OUTER
    assert probabilities(result.best).median() < 0.05


@pytest.mark.parametrize("gradient", ["hybrid-noise", "hybrid-image"])
def test_a_black_box_reward_is_climbed_too(learned, gradient):
    result = run(learned, corner(differentiable=False), gradient=gradient, perturbations=4, iterations=100)
    assert result.rewards.mean() > result.start_rewards.mean() + 1.5
