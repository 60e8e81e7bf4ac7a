"""Tokens and noise are optimized by every kind of reward: small models of real architectures, black boxes, a sum."""

from collections.abc import Iterator

import pytest
import torch

from ipgo_engine import NoiseConfig, OptimizeConfig, TokenConfig, optimize_noise, rewards, train_tokens
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.rewards import loading
from ipgo_engine.rewards.judge import Judge, JudgeConfig

from .. import tiny_pipelines
from . import tiny
from .conftest import serving
from .test_judge import Endpoint
from .test_simple import documented_blocks

PROMPT = "red heart"
DIFFERENTIABLE = ("clip", "aesthetic", "sum", "robust", "offloaded", "another pack's")
BLACK_BOXES = ("jpeg", "judge")


def drawing(**size):
    pipeline = tiny_pipelines.sd(contrast=4.0)
    return DiffusersGenerator(pipeline, steps=3, guidance_scale=2.0, sampler="ddim", eta=1.0, **size)


@pytest.fixture(scope="module")
def generator():
    return drawing()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Iterator[dict]:
    root = tmp_path_factory.mktemp("weights")
    (root / "aesthetic").mkdir()
    tiny.transformers_clip(root / loading.CLIP_L_FOLDER, projection=768)
    head = tiny.AuthorsHead(768)
    head.load_state_dict(tiny.fill(head.state_dict()))
    torch.save(head.state_dict(), root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    clip, aesthetic = rewards.load("clip", root / loading.CLIP_L_FOLDER), rewards.load("aesthetic", root / "aesthetic")
    with serving(Endpoint().handler()) as url:
        yield {
            "clip": clip,
            "aesthetic": aesthetic,
            "sum": rewards.Weighted([(clip, 1.0), (aesthetic, 0.5)], scales=[(0.0, 0.1), (5.0, 1.0)]),
            "robust": rewards.Robust(clip, samples=1),
            "offloaded": rewards.Offloaded(clip, "cpu"),
            "another pack's": documented_reward(),
            "jpeg": rewards.load("jpeg"),
            "judge": Judge(JudgeConfig(url=url + "/v1")),
        }


def documented_reward():
    names: dict = {}
    exec(documented_blocks()[0], names)
    return names["Redness"]()


def gradient_of(name):
    if name in DIFFERENTIABLE:
        return {}
    return {"gradient": "hybrid-noise", "perturbations": 3, "perturbation_scale": 0.1}


@pytest.mark.parametrize("name", DIFFERENTIABLE + BLACK_BOXES)
def test_noise(generator, kinds, name):
    config = NoiseConfig(iterations=5, regularization=0.1, learning_rate=0.05, permutations=4, **gradient_of(name))
    result = optimize_noise(generator, kinds[name], [PROMPT], config, seeds=[1], monitors=[rewards.load("contrast")])
    assert len(result.history) == 6
    assert result.rewards[0] > result.start_rewards[0]
    torch.testing.assert_close(kinds[name].score(result.image, [PROMPT]), result.rewards, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", DIFFERENTIABLE + BLACK_BOXES)
def test_tokens(generator, kinds, name):
    if name == "jpeg":  # a file of 16 x 16 pixels is nearly all header: tokens change it by a byte or not at all
        generator = drawing(width=64, height=64)
    tokens = TokenConfig(prefix_length=2, suffix_length=2, basis_size=4, scale=3.0)
    config = OptimizeConfig(tokens=tokens, epochs=5, learning_rate=0.05, seeds=(1,), **gradient_of(name))
    result = train_tokens(generator, kinds[name], [PROMPT], config)
    assert len(result.history) == 6
    assert result.rewards.mean() > result.history[0].reward
