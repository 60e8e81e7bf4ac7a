"""The whole map, learned parameters -> tokens -> sampler -> VAE -> reward, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ipgo_engine import IPGOTokens, TokenConfig
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.generators.samplers import SAMPLERS

from . import tiny_pipelines as tiny

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:__array__ implementation")]
SETTINGS = [("ddim", 0.0), ("ddim", 1.0), *((name, 0.0) for name in SAMPLERS if name != "ddim")]
CONFIG = TokenConfig(prefix_length=2, suffix_length=2, basis_size=4, scale=3.0)
PROMPTS = ["a cat on the moon", "red dog"]


def reward(images: Tensor) -> Tensor:
    """Smooth, not symmetric, different for every channel."""
    weight = torch.tensor([1.0, -0.5, 0.25]).to(images).view(3, 1, 1)
    return (weight * images.square()).mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def pipelines() -> tuple[Any, Any]:
    return tiny.sd(contrast=0.2), tiny.sd(contrast=0.2).to(torch.float64)


def score(generator: DiffusersGenerator, tokens: IPGOTokens, noise: Tensor, **options: Any) -> Tensor:
    conditioning = tokens.condition(generator.encode(PROMPTS))
    return reward(generator.generate(conditioning, noise, **options)).sum()


def central_difference(value: Callable[[float], float], step: float = 1e-2) -> float:
    """Fourth order: a large step, because some schedulers of diffusers round to float32 whatever they are given."""
    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(("sampler", "eta"), SETTINGS)
def test_learned_parameters_and_every_noise_to_reward(pipelines, sampler, eta, checkpoint):
    generator, exact = (DiffusersGenerator(p, sampler=sampler, eta=eta, steps=4, guidance_scale=4.0) for p in pipelines)
    tokens = IPGOTokens(generator.dim, CONFIG)
    noise = generator.draw_noise([0, 1]).requires_grad_()
    variables = [*tokens.parameters(), noise]
    gradients = torch.autograd.grad(score(generator, tokens, noise, checkpoint=checkpoint), variables)

    random = torch.Generator().manual_seed(0)
    fine = IPGOTokens(generator.dim, CONFIG).double()
    points = [p.detach().double() for p in variables]

    def value(shifts: list[Tensor]) -> float:
        with torch.no_grad():
            for parameter, point, shift in zip(fine.parameters(), points, shifts, strict=False):
                parameter.copy_(point + shift)
            return float(score(exact, fine, points[-1] + shifts[-1]))

    for chosen in range(len(variables)):  # one variable at a time, or the noise would drown the tokens
        shift = [torch.zeros_like(p) for p in points]
        shift[chosen] = torch.randn(points[chosen].shape, generator=random, dtype=torch.float64)
        slope = central_difference(lambda step, shift=shift: value([step * s for s in shift]))
        found = float((gradients[chosen].double() * shift[chosen]).sum())
        size = float(gradients[chosen].norm() * shift[chosen].norm()) / points[chosen].numel() ** 0.5
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-3 * size)
