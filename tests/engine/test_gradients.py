"""Estimated gradients: their formula, their size, and where their random directions come from."""

from __future__ import annotations

import pytest
import torch

from ipgo_engine import NoiseConfig, OptimizeConfig, optimize_noise
from ipgo_engine.gradients import ESTIMATORS, Task
from ipgo_engine.problems import NoiseProblem, TokenProblem
from tests.engine import reference
from tests.engine.test_loop import SMALL
from tests.engine.toys import ToyGenerator, ToyReward

PROMPTS = ["red heart", "pizza"]


class Noting(ToyReward):
    """A black box that keeps what it was shown and what it said."""

    def __init__(self):
        super().__init__(differentiable=False)
        self.images, self.scores = [], []

    def score(self, images, prompts):
        self.images.append(images.detach().clone())
        self.scores.append(super().score(images, prompts))
        return self.scores[-1]


def noise_gradient(name, reward=None, step=0, micro_batch=2, **settings):
    """The gradient for the noise of two pictures."""
    config = NoiseConfig(**({"regularization": 0.0, "perturbations": 2} | settings))
    problem = NoiseProblem(ToyGenerator(), PROMPTS, [0, 1], config)
    task = Task(ToyGenerator(), problem, reward or ToyReward(name == "exact"), config, micro_batch, None, True)
    ESTIMATORS[name](task, [0, 1], step)
    return problem.noise.grad


def token_gradient(name, **settings):
    """The gradient for tokens that two pictures share."""
    config = OptimizeConfig(tokens=SMALL, backprop_steps=None, **settings)
    problem = TokenProblem(ToyGenerator(), PROMPTS, config)
    task = Task(ToyGenerator(), problem, ToyReward(name == "exact"), config, 2, None, True)
    ESTIMATORS[name](task, [0, 1], 0)
    return torch.cat([parameter.grad.flatten() for parameter in problem.shared])


@pytest.mark.parametrize("name", ["hybrid-image", "hybrid-noise"])
def test_hybrid_gradient_is_the_direction_of_section_4_through_the_model(name):
    """g = h dM/dz with h = mean_i (r(y_i) - r(y)) (y_i - y), here per squared size of a perturbation."""
    reward, scale = Noting(), 1e-3
    found = noise_gradient(name, reward, perturbations=5, perturbation_scale=scale)
    assert len(reward.images) == 6
    assert all(shown.min() > 0 and shown.max() < 1 for shown in reward.images)  # none was cut off

    def direction(row):
        pictures = [shown[row].double().numpy() for shown in reward.images]
        scores = [float(score[row]) for score in reward.scores]
        return torch.as_tensor(reference.hybrid_direction(scores[1:], pictures[1:], scores[0], pictures[0]))

    generator = ToyGenerator()
    noise = generator.draw_noise([0, 1]).requires_grad_()
    image = generator.generate(generator.encode(PROMPTS), noise, checkpoint=False)
    towards = torch.stack([direction(0), direction(1)]).float() / scale**2
    (expected,) = torch.autograd.grad(image, noise, towards)
    torch.testing.assert_close(found, -expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_zeroth_order_on_shared_tokens_has_the_size_of_the_exact_gradient():
    exact = token_gradient("exact")
    estimate = token_gradient("zeroth-order", perturbations=600, perturbation_scale=0.02)
    assert float(estimate @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("name", ["zeroth-order", "hybrid-image"])
def test_every_picture_of_a_batch_has_a_gradient_of_the_full_size(name):
    exact, estimate = noise_gradient("exact"), noise_gradient(name, perturbations=1000, perturbation_scale=0.02)
    for slope, found in zip(exact.flatten(1), estimate.flatten(1), strict=True):
        assert float(found @ slope / (slope @ slope)) == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("name", ["zeroth-order", "hybrid-image", "hybrid-noise"])
def test_directions_differ_between_steps_and_seeds_and_repeat_for_the_same(name):
    found = noise_gradient(name, step=1, seed=1)
    assert torch.equal(found, noise_gradient(name, step=1, seed=1))
    for other in ({"step": 0, "seed": 1}, {"step": 1, "seed": 0}):
        assert not torch.isclose(found, noise_gradient(name, **other)).all()


@pytest.mark.parametrize("name", ["zeroth-order", "hybrid-image", "hybrid-noise"])
def test_how_many_pictures_fit_into_memory_changes_no_direction(name):
    torch.testing.assert_close(noise_gradient(name, micro_batch=1), noise_gradient(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_no_direction_is_a_noise_that_a_picture_starts_from(step):
    """Drawn with a small number as the seed, a direction would be the starting noise of that seed."""
    reward, scale = Noting(), 1e-3
    noise_gradient("hybrid-image", reward, step, perturbations=1, perturbation_scale=scale)
    directions = ((reward.images[1] - reward.images[0]) / scale).flatten(1)
    starts = ToyGenerator().draw_noise(range(20))[:, 0].flatten(1)
    likeness = torch.nn.functional.cosine_similarity(directions[:, None], starts, dim=-1)
    assert likeness.abs().max() < 0.5


@pytest.mark.parametrize(("differentiable", "chosen"), [(True, "exact"), (False, "hybrid-noise")])
def test_auto_is_exact_where_that_is_possible_and_hybrid_in_noise_otherwise(differentiable, chosen):
    def rewards(gradient):
        config = NoiseConfig(iterations=2, permutations=2, perturbations=2, gradient=gradient)
        history = optimize_noise(ToyGenerator(), ToyReward(differentiable), PROMPTS, config).history
        return [event.reward for event in history]

    assert rewards("auto") == rewards(chosen)
    assert rewards("auto") != rewards("hybrid-image")


@pytest.mark.parametrize("name", ["hybrid-noise", "hybrid-image"])
def test_what_a_generator_gives_beyond_white_and_black_is_not_cut_off(name):
    """Only perturbations are kept within its range: a cut picture would score by the cut, not by its direction."""

    class Harsh(ToyGenerator):
        def generate(self, *arguments, **options):
            return super().generate(*arguments, **options) * 3 - 1

    reward, scale = Noting(), 1e-3
    config = NoiseConfig(regularization=0.0, perturbations=1, perturbation_scale=scale)
    problem = NoiseProblem(Harsh(), PROMPTS, [0, 1], config)
    ESTIMATORS[name](Task(Harsh(), problem, reward, config, 2, None, True), [0, 1], 0)
    drawn, changed = reward.images
    assert drawn.max() > 1.5
    assert drawn.min() < -0.5
    assert (changed - drawn).abs().max() < 10 * scale
