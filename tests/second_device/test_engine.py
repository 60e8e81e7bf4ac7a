"""The engine on a device that is not the CPU: the same results, and no tensor on the wrong device.

    python -m pytest tests/second_device

Not among the tests that run by themselves: the first start compiles, and the device stays in the process.
"""

import json

import pytest
import torch

from ipgo_engine import (
    JointConfig,
    NoiseConfig,
    NoiseRegularizer,
    OptimizeConfig,
    TokenConfig,
    cli,
    demo,
    optimize_jointly,
    optimize_noise,
    rewards,
    train_tokens,
)
from ipgo_engine.cli import inputs
from ipgo_engine.events import Silent
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.generators.samplers import SAMPLERS
from tests import second_device
from tests.engine.rewards.test_models import MAKERS, batch, root  # noqa: F401  root is a fixture
from tests.engine.rewards.tiny import PROMPTS

pytestmark = pytest.mark.skipif(second_device.MISSING is not None, reason=str(second_device.MISSING))
PROMPT = ["red heart"]


@pytest.fixture(scope="module")
def device():
    return second_device.start()


@pytest.fixture(scope="module")
def places(device):
    """(device, pipeline, target, held-out reward), here and there."""
    return [
        (where, demo.load_pipeline(device=where), *(rewards.load(name, None, where) for name in DEMO_REWARDS))
        for where in ("cpu", device)
    ]


DEMO_REWARDS = ("demo-clip", "demo-judge")


def generator_of(pipeline, **options):
    return DiffusersGenerator(pipeline, **{"steps": 3, "width": 64, "height": 64, **options})


def tokens(**changes):
    return lambda generator, reward, judge, **options: train_tokens(
        generator, reward, PROMPT, OptimizeConfig(**{"epochs": 2, "learning_rate": 0.02} | changes), **options
    )


def noise(**changes):
    return lambda generator, reward, judge, **options: optimize_noise(
        generator, reward, PROMPT, NoiseConfig(**{"iterations": 2, "learning_rate": 0.05} | changes), **options
    )


def black_box(run):
    return lambda generator, reward, judge, **options: run(generator, rewards.load("jpeg"), judge, **options)


def surrounded(wrap, run):
    return lambda generator, reward, judge, **options: run(generator, wrap(reward), judge, **options)


BLACK_BOXES = ("zeroth-order", "hybrid-image", "hybrid-noise")
RUNS = {
    "tokens": tokens(),
    "tokens, stored": tokens(checkpoint=False),
    "tokens, last step": tokens(backprop_steps=1),
    "tokens, two seeds": tokens(seeds=(0, 1), batch_size=1),
    "tokens, bayesian": tokens(gradient="bayesian", tokens=TokenConfig(basis_size=4, prefix_length=2, suffix_length=2)),
    "plain tokens": tokens(tokens=TokenConfig(low_rank=False)),
    "released code": tokens(tokens=TokenConfig.preset("released-code", basis_size=5)),
    "noise": noise(),
    "noise, stored": noise(checkpoint=False),
    "noise, micro-batches": noise(micro_batch=1),
    "both": lambda generator, reward, judge, **options: optimize_jointly(
        generator, reward, PROMPT, JointConfig(noise=NoiseConfig(iterations=2)), **options
    ),
    "sum": surrounded(lambda reward: rewards.Weighted([(reward, 1.0), (rewards.load("contrast"), 0.1)]), tokens()),
    "robust": surrounded(rewards.Robust, noise()),
    **{name: black_box(noise(gradient=name)) for name in BLACK_BOXES},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(places, name):
    found = []
    for _, pipeline, target, judge in places:
        found.append(RUNS[name](generator_of(pipeline), target, judge, monitors=[judge]))
    here, there = found
    assert there.image.device == there.rewards.device == torch.device("cpu")
    assert there.stopped == "finished"
    torch.testing.assert_close(there.start_image, here.start_image, rtol=0, atol=1e-3)
    # The rounding of the first gradient doubles with every update, so that only the first two steps are compared.
    # A black box's JPEG of 2 kB has differed by 14 bytes.
    relative = 1e-2 if name in BLACK_BOXES else 5e-3
    for event, other in zip(here.history[:2], there.history[:2], strict=True):
        assert other.reward == pytest.approx(event.reward, rel=relative, abs=1e-3)


@pytest.mark.parametrize(("run", "length"), [(tokens, "epochs"), (noise, "iterations")])
def test_a_run_goes_on_where_it_was_stopped(places, tmp_path, run, length):
    _, pipeline, target, judge = places[1]
    limit = {"min_probability": 1e-3} if run is noise else {}
    whole = run(**{length: 4}, **limit)(generator_of(pipeline), target, judge)
    state = tmp_path / "state.safetensors"
    run(**{length: 2}, **limit)(generator_of(pipeline), target, judge, state_file=state)
    resumed = run(**{length: 4}, **limit)(generator_of(pipeline), target, judge, state_file=state, resume=True)
    torch.testing.assert_close(resumed.rewards, whole.rewards)


class Watcher(Silent):
    """Where the pictures are that a run shows."""

    def __init__(self):
        self.seen = set()

    def on_step(self, event):
        self.seen.add(event.images.device.type)


def test_pictures_of_a_run_wait_in_main_memory(places):
    """Those of a list of prompts would fill the memory of the device."""
    _, pipeline, target, judge = places[1]
    watcher = Watcher()
    noise(preview_every=1)(generator_of(pipeline), target, judge, observer=watcher)
    assert watcher.seen == {"cpu"}


def test_a_large_noise_is_as_probable(device):
    z = 1.02 * torch.randn(2, 4, 128, 130, generator=torch.Generator().manual_seed(0))
    found = []
    for where in ("cpu", device):
        own = z.clone().to(where).requires_grad_()
        r, p = NoiseRegularizer(16, 8).measure(own, 1)
        r.sum().backward()
        found.append((r.detach().cpu(), p.cpu(), own.grad.cpu()))
    assert float(found[0][2].norm()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same(places, sampler):
    pictures = []
    for _, pipeline, *_ in places:
        generator = generator_of(pipeline, sampler=sampler)
        with torch.no_grad():
            pictures.append(generator.generate(generator.encode(PROMPT), generator.draw_noise([1])).cpu())
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(places, dtype):
    where, _, target, judge = places[1]
    generator = generator_of(demo.load_pipeline(dtype=dtype, device=where), steps=2)
    for run in (tokens(epochs=1), noise(iterations=1)):
        assert run(generator, target, judge).stopped == "finished"


@pytest.mark.parametrize("name", MAKERS)
def test_rewards_and_their_gradients_are_the_same(root, device, name):  # noqa: F811
    found = []
    for wrap, where in ((lambda r: r, "cpu"), (lambda r: r, device), (rewards.Offloaded, "cpu")):
        reward = wrap(MAKERS[name](root, device=where))
        images = batch().to("cpu" if where == "cpu" and wrap is not rewards.Offloaded else device).requires_grad_()
        scores = reward.score(images, PROMPTS)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient.device == images.device
        found.append((scores.detach().cpu(), gradient.cpu()))
    for scores, gradient in found[1:]:  # there, and resting here between visits there
        torch.testing.assert_close(scores, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_the_command_line_offloads_rewards(device, tmp_path, monkeypatch, capsys):
    """The same scores, and weights that rest in main memory."""
    loaded, scores = [], []
    monkeypatch.setattr(inputs, "load", lambda *place: loaded.append(rewards.load(*place)) or loaded[-1])
    for options in ([], ["--offload-rewards"]):
        out = tmp_path / f"run {len(scores)}"
        command = ["train", "red heart", "--steps", "2", "--size", "64", "--epochs", "1", "--out", str(out)]
        assert cli.main([*command, "--device", str(device), *options]) == 0
        scores.append([step["reward"] for step in json.loads((out / "run.json").read_text())["runs"][0]["history"]])
    there, offloaded = ({p.device.type for p in reward.module.parameters()} for reward in loaded)
    assert (there, offloaded) == ({device.type}, {"cpu"})
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
