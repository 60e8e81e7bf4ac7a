"""The one loop: what a user relies on when a run is cancelled, resumed, starved of memory or fed nonsense."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence

import pytest
import torch

from ipgo_engine import (
    BudgetSpentError,
    Cancelled,
    InputError,
    JointConfig,
    NoiseConfig,
    NonFiniteError,
    OptimizeConfig,
    RunFailedError,
    TokenConfig,
    optimize_jointly,
    optimize_noise,
    train_tokens,
)
from ipgo_engine.bayesian import INITIAL
from ipgo_engine.config import LoopConfig
from ipgo_engine.formats.state import read_state, write_state
from ipgo_engine.gradients import ESTIMATORS, Task
from ipgo_engine.memory import is_out_of_memory
from ipgo_engine.problems import NoiseProblem, TokenProblem
from ipgo_engine.resume import comparable, differing
from ipgo_engine.rewards import Judge, JudgeConfig, Offloaded, Robust, Weighted
from ipgo_engine.rewards.base import settings_of
from ipgo_engine.rewards.jpeg import JpegSize
from tests.engine.toys import ToyGenerator, ToyReward

SMALL = TokenConfig(prefix_length=3, suffix_length=2, basis_size=4)
TOKENS = OptimizeConfig(tokens=SMALL, epochs=8, learning_rate=1e-2, backprop_steps=None)
NOISE = NoiseConfig(iterations=8, permutations=10)
JOINT = JointConfig(tokens=TOKENS, noise=NOISE)


class Watcher:
    """Records everything; cancels before step `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.events, self.messages, self.stop = [], [], stop

    def on_step(self, event) -> None:
        self.events.append(event)

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def cancelled(self) -> bool:
        return self.stop is not None and len(self.events) >= self.stop


def run(method: str, observer=None, reward=None, generator=None, **options):
    generator, reward = generator or ToyGenerator(), reward or ToyReward()
    if method == "tokens":
        return train_tokens(generator, reward, ["red heart", "pizza"], TOKENS, observer, **options)
    if method == "token batches":
        config = dataclasses.replace(TOKENS, batch_size=1, seeds=(0, 1), epochs=4)
        return train_tokens(generator, reward, ["red heart", "pizza", "dog"], config, observer, **options)
    if method == "noise":
        return optimize_noise(generator, reward, ["red heart", "pizza"], NOISE, observer, **options)
    if method == "joint":
        return optimize_jointly(generator, reward, ["red heart", "pizza"], JOINT, observer, **options)
    config = dataclasses.replace(NOISE, gradient=method, perturbations=2)
    return optimize_noise(generator, reward, ["red heart"], config, observer, **options)


def run_bayesian(observer=None, **options):
    tokens = TokenConfig(prefix_length=1, suffix_length=1, basis_size=3)
    config = OptimizeConfig(tokens=tokens, epochs=12, gradient="bayesian")
    return train_tokens(ToyGenerator(), ToyReward(False), ["red heart"], config, observer, **options)


METHODS = ["tokens", "token batches", "noise", "joint", "zeroth-order", "hybrid-image", "hybrid-noise"]


def tensors_of(result) -> list[torch.Tensor]:
    parts = result.best if isinstance(result.best, tuple) else (result.best,)
    found = [p if isinstance(p, torch.Tensor) else torch.cat((p.prefix(), p.suffix())) for p in parts]
    return [*found, result.image, result.rewards]


@pytest.mark.parametrize("method", ["tokens", "token batches", "noise", "joint"])
def test_reward_rises_and_the_best_image_is_what_the_best_parameters_make(method):
    result = run(method)
    assert result.rewards.mean() > result.start_rewards.mean() + 1e-3
    assert max(e.best for e in result.history) == pytest.approx(float(result.rewards.mean()), abs=1e-6)
    generator, prompts = ToyGenerator(), result.prompts
    tokens = result.best[0] if isinstance(result.best, tuple) else result.best
    conditioning = generator.encode(prompts)
    if not isinstance(tokens, torch.Tensor):
        conditioning = tokens.condition(conditioning)
    noise = result.best[-1] if isinstance(result.best, tuple) else result.best
    if not isinstance(noise, torch.Tensor):
        noise = generator.draw_noise([0] * 2 if method == "tokens" else [0, 1] * 3)
    with torch.no_grad():
        assert torch.allclose(generator.generate(conditioning, noise), result.image, atol=1e-6)


def test_step_zero_of_noise_optimization_is_the_stock_picture():
    result = run("noise")
    generator = ToyGenerator()
    with torch.no_grad():
        stock = generator.generate(generator.encode(result.prompts), generator.draw_noise([0, 1]))
    assert torch.equal(result.start_image, stock)
    assert result.history[0].reward == pytest.approx(float(result.start_rewards.mean()))


def test_first_token_update_is_adam_on_eq_12_followed_by_the_projection():
    config = dataclasses.replace(TOKENS, epochs=1, conformity=0.5, clip_norm=0.03)
    generator, reward = ToyGenerator(), ToyReward()
    problem = TokenProblem(generator, ["red heart"], config)
    tokens = problem.tokens
    optimizer = torch.optim.Adam(tokens.parameters(), lr=config.learning_rate)
    raw = generator.encode(["red heart"])
    grown = tokens.insert(raw.embeddings)
    penalty = (grown.mean(1) - raw.embeddings.mean(1)).square().sum()
    image = generator.generate(dataclasses.replace(raw, embeddings=grown), generator.draw_noise([0]))
    (-reward.score(image, ["red heart"])[0] + 0.5 * penalty).backward()
    norm = torch.nn.utils.clip_grad_norm_(tokens.parameters(), 0.03)
    optimizer.step()
    tokens.project_()

    result = train_tokens(generator, reward, ["red heart"], config)
    assert result.history[0].gradient_norm == pytest.approx(float(norm), rel=1e-4)
    with torch.no_grad():
        image = generator.generate(tokens.condition(raw), generator.draw_noise([0]))
        expected = float(reward.score(image, ["red heart"])[0])
    assert result.history[1].reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 5])
def test_cancelled_and_resumed_equals_uninterrupted(method, stop, tmp_path):
    whole = run(method)
    file = tmp_path / "state.safetensors"
    first = run(method, Watcher(stop), state_file=file)
    assert first.stopped == "cancelled"
    second = run(method, state_file=file, resume=True)
    assert second.stopped == "finished"
    for a, b in zip(tensors_of(whole), tensors_of(second), strict=True):
        assert torch.equal(a, b)
    values = [(e.step, e.reward, e.best, e.penalty) for e in whole.history]
    assert [(e.step, e.reward, e.best, e.penalty) for e in second.history] == values


@pytest.mark.parametrize("method", ["tokens", "noise", "joint"])
def test_a_run_that_is_not_to_be_resumed_begins_anew(method, tmp_path):
    watcher = Watcher()
    run(method, Watcher(3), state_file=tmp_path / "s")
    run(method, watcher, state_file=tmp_path / "s")
    assert [event.step for event in watcher.events] == list(range(9))


@pytest.mark.parametrize("method", ["tokens", "noise", "joint"])
def test_the_state_is_kept_as_often_as_asked(method, tmp_path):
    kept, file = [], tmp_path / "s"

    class Looking(Watcher):
        def on_step(self, event):
            super().on_step(event)
            kept.append(read_state(file)["update"] if file.exists() else None)

    run(method, Looking(), state_file=file, save_every=3)
    assert kept == [None, None, None, 3, 3, 3, 6, 6, 6]


def test_a_finished_run_can_be_prolonged(tmp_path):
    file = tmp_path / "state.safetensors"
    short = dataclasses.replace(NOISE, iterations=4)
    optimize_noise(ToyGenerator(), ToyReward(), ["a", "b"], short, state_file=file)
    longer = optimize_noise(ToyGenerator(), ToyReward(), ["a", "b"], NOISE, state_file=file, resume=True)
    whole = optimize_noise(ToyGenerator(), ToyReward(), ["a", "b"], NOISE)
    assert torch.equal(longer.best, whole.best)
    assert [e.step for e in longer.history] == list(range(9))


def test_resume_refuses_the_state_of_another_run(tmp_path):
    file = tmp_path / "state.safetensors"
    run("noise", state_file=file)
    with pytest.raises(InputError, match="prompts"):
        optimize_noise(ToyGenerator(), ToyReward(), ["x", "y"], NOISE, state_file=file, resume=True)
    other = dataclasses.replace(NOISE, learning_rate=0.5)
    with pytest.raises(InputError, match=r"different: learning_rate\)"):
        optimize_noise(ToyGenerator(), ToyReward(), ["red heart", "pizza"], other, state_file=file, resume=True)
    generator = ToyGenerator()
    generator.settings = {"sampler": "another"}
    with pytest.raises(InputError, match=r"different: .*sampler"):
        run("noise", generator=generator, state_file=file, resume=True)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        run("noise", state_file=file, resume=True)


class Measured(torch.nn.Module):
    """A reward of one weight, which its name does not tell."""

    name, differentiable = "measured", True

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.module.weight, sign)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Mean brightness, or minus that."""
        return self.module(images.mean((1, 2, 3))[:, None])[:, 0]


def judge(model: str) -> Judge:
    return Judge(JudgeConfig(url="http://127.0.0.1/v1", model=model))


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        (JpegSize(quality=95), JpegSize(quality=30), "quality"),
        (Robust(ToyReward(), noise=0.02), Robust(ToyReward(), noise=0.5), "augmentations"),
        (Weighted([(ToyReward(), 1.0)], [(0, 1)]), Weighted([(ToyReward(), 1.0)], [(0, 2)]), "scales"),
        (Weighted([(JpegSize(quality=95), 1.0)]), Weighted([(JpegSize(quality=30), 1.0)]), "parts"),
        (Measured(1), Measured(-1), "weights"),
        (Robust(Measured(1)), Robust(Measured(-1)), "weights"),
        (judge("a"), judge("b"), "model"),
    ],
)
def test_resume_refuses_another_reward_of_the_same_name(one, other, different):
    """Its scores do not compare with those that are kept: the gain would be that of the scale."""
    assert one.name == other.name
    assert differing(settings_of(one), settings_of(other)) == [different]
    assert json.loads(json.dumps(settings_of(one))) == comparable(settings_of(one))


def test_offloading_may_differ_after_a_resume_and_weights_may_not(tmp_path):
    def learn(reward, resume=True):
        generator, file = ToyGenerator(), tmp_path / "state.safetensors"
        return optimize_noise(generator, reward, ["red heart", "pizza"], NOISE, state_file=file, resume=resume)

    learn(Robust(Measured(1)), resume=False)
    assert learn(Robust(Offloaded(Measured(1)))).stopped == "finished"
    with pytest.raises(InputError, match=r"different: weights\)"):
        learn(Robust(Measured(-1)))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(["tokens", "noise", "joint"], 2)))
def test_resume_refuses_the_state_of_another_method(first, second, tmp_path):
    file = tmp_path / "state.safetensors"
    run(first, Watcher(2), state_file=file)
    with pytest.raises(InputError, match="belongs to another run"):
        run(second, state_file=file, resume=True)


@pytest.mark.parametrize("method", ["tokens", "noise", "joint"])
def test_interrupt_inside_a_model_call_keeps_the_best_so_far(method):
    def interrupt(call: int) -> None:
        if call == 30:
            raise Cancelled("stop")

    result = run(method, generator=ToyGenerator(interrupt))
    assert result.stopped == "cancelled"
    assert result.rewards.mean() >= result.start_rewards.mean()
    assert torch.is_grad_enabled()


def test_interrupt_before_anything_was_made_is_passed_on():
    def interrupt(call: int) -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        run("tokens", generator=ToyGenerator(interrupt))


class Moody(ToyReward):
    """Not a number on the given calls."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def score(self, images, prompts):
        self.calls += 1
        return super().score(images, prompts) * (float("nan") if self.calls in self.bad else 1.0)


def test_one_picture_without_a_score_is_enough_for_a_step_to_count_as_broken():
    class MoodyAboutOne(Moody):
        def score(self, images, prompts):
            return torch.cat([ToyReward.score(self, images[:1], prompts[:1]), super().score(images[1:], prompts[1:])])

    watcher = Watcher()
    result = run("noise", watcher, reward=MoodyAboutOne({NOISE.iterations + 1}))
    assert "reward 'toy' is not finite" in watcher.messages[-1]
    assert all(math.isfinite(event.reward) for event in result.history)


def test_a_reward_that_is_nan_once_is_reported_and_survived():
    watcher = Watcher()
    result = run("noise", watcher, reward=Moody({4}))
    assert result.stopped == "finished"
    assert torch.isfinite(result.image).all()
    assert result.rewards.mean() > result.start_rewards.mean()
    assert any("not finite" in m for m in watcher.messages)


def test_a_reward_that_stays_nan_ends_the_run_with_the_best_so_far():
    result = run("noise", reward=Moody(set(range(4, 100))))
    assert "not finite" in result.stopped
    assert torch.isfinite(result.rewards).all()


def test_a_reward_that_is_nan_from_the_start_is_an_error():
    with pytest.raises(NonFiniteError, match="toy"):
        run("noise", reward=Moody(set(range(100))))


def test_a_gradient_that_is_not_finite_does_not_reach_the_parameters():
    class Kink(ToyReward):
        calls = 0

        def score(self, images, prompts):
            self.calls += 1
            zero = images.sum(dim=(1, 2, 3)) * 0
            kink = torch.sqrt(zero) if self.calls > 2 else zero  # value 0, gradient inf * 0
            return super().score(images, prompts) + kink

    result = run("noise", reward=Kink())
    assert "gradient is not finite" in result.stopped
    assert result.rewards.mean() > result.start_rewards.mean()
    assert torch.isfinite(result.best).all()


class Hungry(ToyGenerator):
    """Runs out of memory with more than one image, without recomputation, or with gradients through two steps."""

    def generate(self, conditioning, noise, *, backprop_steps=None, checkpoint=True):
        graph = torch.is_grad_enabled()
        if graph and (len(noise) > 1 or not checkpoint or backprop_steps is None or backprop_steps > 1):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().generate(conditioning, noise, backprop_steps=backprop_steps, checkpoint=checkpoint)


def test_out_of_memory_backs_off_and_says_so():
    watcher = Watcher()
    config = dataclasses.replace(NOISE, checkpoint=False)
    result = optimize_noise(Hungry(), ToyReward(), ["a", "b"], config, watcher)
    assert result.stopped == "finished"
    assert result.rewards.mean() > result.start_rewards.mean()
    words = ["recomputed", "image(s)", "model step"]
    assert [any(word in m for word in words) for m in watcher.messages] == [True] * 3


def test_out_of_memory_that_cannot_be_helped_keeps_the_best():
    class Starving(ToyGenerator):
        def generate(self, conditioning, noise, **options):
            if self.calls > 30:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().generate(conditioning, noise, **options)

    with pytest.raises(RunFailedError, match="smaller picture") as caught:
        run("noise", generator=Starving())
    assert caught.value.result.rewards.mean() >= caught.value.result.start_rewards.mean()


def test_an_observer_that_breaks_does_not_lose_the_best():
    class Broken(Watcher):
        def on_step(self, event):
            super().on_step(event)
            if len(self.events) == 4:
                raise OSError("window closed")

    with pytest.raises(RunFailedError, match="window closed") as caught:
        run("joint", Broken())
    assert len(caught.value.result.history) == 4
    assert str(caught.value) == "The run failed at step 4 of 8: window closed"


def test_a_full_disk_costs_the_state_file_not_the_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    watcher = Watcher()
    result = run("noise", watcher, state_file=blocked / "state.safetensors", save_every=1)
    assert result.stopped == "finished"
    assert sum("was not saved" in m for m in watcher.messages) == 1


def test_a_save_that_fails_once_is_made_up_for(tmp_path, monkeypatch):
    writes = []

    def first_fails(path, state):
        writes.append(path)
        if len(writes) == 1:
            raise InputError("the disk is full")
        write_state(path, state)

    monkeypatch.setattr("ipgo_engine.loop.write_state", first_fails)
    file = tmp_path / "state.safetensors"
    run("noise", Watcher(6), state_file=file, save_every=1)
    assert run("noise", state_file=file, resume=True).rewards.equal(run("noise").rewards)


class Vast(ToyReward):
    """A held-out reward that never fits into memory."""

    def score(self, images, prompts):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_held_out_reward_without_room_does_not_change_the_run():
    watcher = Watcher()
    result = run("noise", watcher, monitors=[Vast(name="vast")])
    assert torch.allclose(result.best, run("noise").best, atol=1e-5)
    assert not any("model step" in m or "recomputed" in m for m in watcher.messages)
    assert any("'vast' has no score" in m for m in watcher.messages)


def test_what_needs_no_gradients_leaves_those_of_the_run_alone():
    """Pictures of the start and of a validation may be too many at once where single gradients fit."""

    class Narrow(ToyGenerator):
        def generate(self, conditioning, noise, **options):
            if len(noise) > 2 and not torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().generate(conditioning, noise, **options)

    watcher = Watcher()
    config = dataclasses.replace(TOKENS, batch_size=1, epochs=2, checkpoint=False)
    train_tokens(Narrow(), ToyReward(), ["a", "b", "c", "d", "e", "f"], config, watcher)
    assert [m for m in watcher.messages if "memory" in m] == [
        "Out of memory: 3 image(s) at a time from now on.",
        "Out of memory: 1 image(s) at a time from now on.",
    ]


def test_memory_is_halved_from_the_images_of_the_call():
    class Narrow(ToyGenerator):
        def generate(self, conditioning, noise, **options):
            if len(noise) > 2 and torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().generate(conditioning, noise, **options)

    watcher = Watcher()
    config = dataclasses.replace(TOKENS, batch_size=4, epochs=1)
    train_tokens(Narrow(), ToyReward(), [f"prompt {i}" for i in range(20)], config, watcher)
    assert [m for m in watcher.messages if "memory" in m] == ["Out of memory: 2 image(s) at a time from now on."]


def test_a_step_cancelled_inside_a_held_out_reward_is_in_the_history_after_a_resume(tmp_path):
    class Slow(ToyReward):
        calls = 0

        def score(self, images, prompts):
            self.calls += 1
            if self.calls == 4:
                raise Cancelled("in the middle of it")
            return super().score(images, prompts)

    config = dataclasses.replace(NOISE, monitor_every=1)
    options = {"state_file": tmp_path / "state.safetensors"}
    optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, monitors=[Slow(name="slow")], **options)
    whole = optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, monitors=[ToyReward(name="slow")])
    again = optimize_noise(
        ToyGenerator(), ToyReward(), ["a"], config, monitors=[ToyReward(name="slow")], resume=True, **options
    )
    assert [(e.step, e.reward, e.monitors) for e in again.history] == [
        (e.step, e.reward, e.monitors) for e in whole.history
    ]


def test_a_point_whose_gradient_is_not_finite_is_not_gone_back_to():
    class Cliff(ToyReward):
        """Higher than ever at its third call, where nothing can be followed."""

        calls = 0

        def score(self, images, prompts):
            self.calls += 1
            scores = super().score(images, prompts)
            if self.calls != 3:
                return scores
            scores = scores + 10
            scores.register_hook(lambda gradient: gradient * float("nan"))
            return scores

    watcher = Watcher()
    result = run("noise", watcher, reward=Cliff())
    assert result.stopped == "finished"
    assert result.rewards.max() < 5
    assert sum("back to the best" in m for m in watcher.messages) == 1


def test_what_writes_into_what_the_gradient_needs_is_named():
    """As tone mapping of latents does in ComfyUI; without a gradient it works."""

    class InPlace(ToyReward):
        def score(self, images, prompts):
            squares = images.square()
            images = images * 1.0
            product = squares * images
            images += 1
            return product.mean((1, 2, 3))

    with pytest.raises(InputError, match=r"writes into a tensor that the gradient needs.*zeroth-order"):
        run("noise", reward=InPlace())
    assert run("zeroth-order", reward=InPlace()).stopped == "finished"


def test_a_joint_run_ends_when_one_of_its_images_cannot_be_the_best_any_more():
    noise = NoiseConfig(iterations=60, learning_rate=0.1, regularization=0.0, min_probability=0.01, permutations=10)
    result = optimize_jointly(ToyGenerator(), ToyReward(), ["a", "b"], JointConfig(tokens=TOKENS, noise=noise))
    assert "an image that shares its tokens" in result.stopped
    assert len(result.history) < 60


@pytest.mark.parametrize("method", ["tokens", "noise"])
def test_seeds_of_numpy_are_seeds(method, tmp_path):
    import numpy as np

    state = {"state_file": tmp_path / "state.safetensors"}
    if method == "tokens":
        config = dataclasses.replace(TOKENS, seeds=tuple(np.arange(2)))
        result = train_tokens(ToyGenerator(), ToyReward(), ["a"], config, **state)
        result.best.save(tmp_path / "tokens.safetensors")
    else:
        optimize_noise(ToyGenerator(), ToyReward(), ["a", "b"], NOISE, seeds=np.arange(2), **state)
    assert (tmp_path / "state.safetensors").is_file()
    with pytest.raises(InputError, match="whole number"):
        optimize_noise(ToyGenerator(), ToyReward(), ["a"], NOISE, seeds=[0.5])


def test_whole_numbers_of_numpy_are_settings():
    import numpy as np

    config = OptimizeConfig(epochs=np.int64(3), seed=np.uint64(2**64 - 1), tokens=TokenConfig(basis_size=np.int32(4)))
    assert [type(n) for n in (config.epochs, config.seed, config.tokens.basis_size)] == [int] * 3
    assert config.seed == 2**64 - 1


def test_numbers_of_numpy_and_torch_are_settings(tmp_path):
    """They go into no JSON: the state was found impossible to write when the run was through."""
    import numpy as np

    config = dataclasses.replace(NOISE, learning_rate=np.float32(0.5), regularization=torch.tensor(2))
    assert (config.learning_rate, config.regularization, type(config.learning_rate)) == (0.5, 2.0, float)
    state = tmp_path / "state.safetensors"
    assert optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, state_file=state).stopped == "finished"


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_random_numbers_and_modes_are_untouched(method):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generator = ToyGenerator()
    with torch.inference_mode():
        result = run(method, generator=generator)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert not result.image.requires_grad


def test_micro_batches_change_nothing():
    whole = run("noise")
    config = dataclasses.replace(NOISE, micro_batch=1)
    split = optimize_noise(ToyGenerator(), ToyReward(), ["red heart", "pizza"], config)
    assert torch.allclose(whole.best, split.best, atol=1e-5)


def test_images_of_a_batch_are_problems_of_their_own():
    both = run("noise")
    alone = optimize_noise(ToyGenerator(), ToyReward(), ["pizza"], NOISE, seeds=[1])
    assert torch.allclose(both.best[1:], alone.best, atol=1e-5)


def test_initial_noise_only_leaves_the_injected_noises_alone():
    config = dataclasses.replace(NOISE, which="initial")
    result = optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, seeds=[3])
    drawn = ToyGenerator().draw_noise([3])
    assert torch.equal(result.best[:, 1:], drawn[:, 1:])
    assert not torch.equal(result.best[:, :1], drawn[:, :1])


def test_previews_come_at_their_steps_and_at_the_end():
    watcher = Watcher()
    config = dataclasses.replace(NOISE, preview_every=3)
    result = optimize_noise(ToyGenerator(), ToyReward(), ["red heart"], config, watcher)
    assert [event.step for event in watcher.events if event.images is not None] == [0, 3, 6, 8]
    assert all(event.images is None for event in result.history)  # pictures of all steps would fill the memory


def test_held_out_rewards_are_measured_and_stop_a_run_that_stops_helping():
    class Opposite(ToyReward):
        def score(self, images, prompts):
            return -super().score(images, prompts)

    monitor = Opposite(name="held-out")
    config = dataclasses.replace(NOISE, iterations=50, monitor_every=2, patience=3)
    result = optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, monitors=[monitor])
    assert "held-out" in result.stopped
    values = [e.monitors["held-out"] for e in result.history if e.monitors]
    assert len(values) - 1 - values.index(max(values)) == 3
    assert [e.step for e in result.history if e.monitors] == list(range(0, 2 * len(values), 2))
    score = float(monitor.score(result.start_image, ["a"])[0])
    assert result.history[0].monitors["held-out"] == pytest.approx(score, abs=1e-6)


def test_a_falling_probability_stops_the_run_and_improbable_noise_is_never_the_best():
    config = NoiseConfig(iterations=60, learning_rate=0.1, regularization=0.0, min_probability=0.01)
    result = optimize_noise(ToyGenerator(), ToyReward(), ["a"], config)
    assert "P(z)" in result.stopped
    assert result.history[-1].probability < 0.01
    assert result.probability is not None
    assert result.probability.min() >= 0.01


def test_a_run_that_ended_early_ends_there_again(tmp_path):
    """With a list of prompts a resume meets those that are done, and must leave them as they are."""
    held_out = Weighted([(ToyReward(), -1.0)])
    falling = dataclasses.replace(TOKENS, epochs=50, monitor_every=2, patience=2)
    improbable = NoiseConfig(iterations=60, learning_rate=0.1, regularization=0.0, min_probability=0.01)

    def tokens(patience=2, **options):
        config = dataclasses.replace(falling, patience=patience)
        return train_tokens(ToyGenerator(), ToyReward(), ["a"], config, monitors=[held_out], **options)

    def noise(**options):
        return optimize_noise(ToyGenerator(), ToyReward(), ["a"], improbable, **options)

    for name, method in (("tokens", tokens), ("noise", noise)):
        once = method(state_file=tmp_path / name)
        watcher = Watcher()
        again = method(state_file=tmp_path / name, resume=True, observer=watcher)
        assert once.stopped == again.stopped != "finished"
        assert torch.equal(once.rewards, again.rewards)
        assert [event.reward for event in once.history] == [event.reward for event in again.history]
        assert [event.step for event in watcher.events] == [once.history[-1].step]
    patient = tokens(patience=4, state_file=tmp_path / "tokens", resume=True)
    assert [event.reward for event in patient.history] == [event.reward for event in tokens(patience=4).history]


def test_the_regularizer_keeps_the_noise_probable():
    free = NoiseConfig(iterations=60, learning_rate=0.05, regularization=0.0)
    kept = dataclasses.replace(free, regularization=1.0)
    wild = optimize_noise(ToyGenerator(), ToyReward(), ["a"], free)
    tame = optimize_noise(ToyGenerator(), ToyReward(), ["a"], kept)
    assert wild.history[-1].probability < 1e-6
    assert tame.history[-1].probability > 1e-2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train_tokens(ToyGenerator(), ToyReward(), []), "prompts is empty"),
        (lambda: train_tokens(ToyGenerator(), ToyReward(), ["a", "  "]), "prompt 2"),
        (lambda: train_tokens(ToyGenerator(), ToyReward(), "red heart"), "one string"),
        (lambda: optimize_noise(ToyGenerator(), ToyReward(), "red heart"), "one string"),
        (lambda: optimize_noise(ToyGenerator(), ToyReward(), None), "prompts is None"),
        (lambda: optimize_noise(ToyGenerator(), ToyReward(), ["a"], seeds=3), "seeds is 3: give a list"),
        (lambda: optimize_noise(ToyGenerator(), ToyReward(), ["a"], seeds=[1, 2]), "2 seeds for 1 prompts"),
        (lambda: train_tokens(ToyGenerator(), ToyReward(), ["a"]), "basis_size gives 30"),
        (lambda: NoiseConfig(iterations=0), "iterations is 0"),
        (lambda: NoiseConfig(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: NoiseConfig(learning_rate="0.01"), "learning_rate is '0.01': use a positive number"),
        (lambda: NoiseConfig(regularization=None), "regularization is None"),
        (lambda: NoiseConfig(min_probability=[0.1]), r"min_probability is \[0.1\]"),
        (lambda: NoiseConfig(clip_norm="x"), "clip_norm is 'x'"),
        (lambda: NoiseConfig(block_size=1.5), "block_size is 1.5: use a whole number of 1 or more"),
        (lambda: NoiseConfig(regularization=math.inf), "regularization is inf"),
        (lambda: NoiseConfig(perturbation_scale=math.inf), "perturbation_scale is inf"),
        (lambda: NoiseConfig(seed=2**64), "seed is 18446744073709551616"),
        (lambda: NoiseConfig(monitor_every=True), "monitor_every is True"),
        (lambda: OptimizeConfig(epochs=2.5), "epochs is 2.5"),
        (lambda: OptimizeConfig(epochs=None), "epochs is None"),
        (lambda: OptimizeConfig(batch_size=0), "batch_size is 0"),
        (lambda: OptimizeConfig(seeds=(0, -1)), "seeds is -1: use a whole number from 0 to"),
        (lambda: OptimizeConfig(conformity=math.inf), "conformity is inf"),
        (lambda: OptimizeConfig(seeds=()), "seeds is"),
        (lambda: OptimizeConfig(seeds=3), "seeds is 3: give a list"),
        (lambda: OptimizeConfig(decay="fast"), "decay is 'fast'"),
        (lambda: OptimizeConfig.preset("best"), "preset is 'best'"),
        (lambda: TokenConfig(prefix_length=0, suffix_length=0), "at least one token"),
        (
            lambda: optimize_noise(ToyGenerator(), ToyReward(False), ["a"], NoiseConfig(gradient="exact")),
            "not differentiable",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (LoopConfig, "learning_rate", (0.0, -1.0, math.inf)),
        (LoopConfig, "decay", (0.0, 1.5, math.nan)),
        (LoopConfig, "decay_by", ("step",)),
        (LoopConfig, "clip_norm", (-1.0, math.nan)),
        (LoopConfig, "gradient", ("newton",)),
        (LoopConfig, "perturbation_scale", (0.0, math.nan)),
        (LoopConfig, "seed", (-1, 1.5, None)),
        *((LoopConfig, name, (0, None)) for name in ("decay_every", "perturbations", "monitor_every", "preview_every")),
        *((LoopConfig, name, (0, -1)) for name in ("backprop_steps", "micro_batch", "patience")),
        (OptimizeConfig, "conformity", (-0.1, math.nan)),
        (OptimizeConfig, "conformity_norm", ("l2",)),
        (NoiseConfig, "permutations", (0, None)),
        (NoiseConfig, "block_size", (0,)),
        (NoiseConfig, "regularization", (-1.0, math.nan)),
        (NoiseConfig, "which", ("none",)),
        (NoiseConfig, "min_probability", (0.0, 1.5, math.nan)),
    ],
)
def test_settings_outside_their_range_are_named(kind, name, values):
    for value in values:
        with pytest.raises(InputError, match=re.escape(f"{name} is {value!r}: ")):
            kind(**{name: value})


def test_settings_at_the_edge_of_their_range_are_taken():
    OptimizeConfig(decay=1.0, clip_norm=0, conformity=0, epochs=1, seeds=(0, 2**64 - 1), seed=2**64 - 1, batch_size=1)
    NoiseConfig(regularization=0, min_probability=1.0, block_size=1, permutations=1, iterations=1, patience=1)
    TokenConfig(prefix_length=0, suffix_length=1, basis_size=1, scale=-1.0)


# -- estimated gradients ----------------------------------------------------------------------------------------------


def gradient_of(name: str, perturbations: int, differentiable: bool = True, scale: float = 0.02) -> torch.Tensor:
    config = NoiseConfig(regularization=0.0, perturbations=perturbations, perturbation_scale=scale)
    generator, reward = ToyGenerator(), ToyReward(differentiable)
    problem = NoiseProblem(generator, ["a"], [0], config)
    task = Task(generator, problem, reward, config, 1, None, True)
    ESTIMATORS[name](task, [0], 0)
    assert problem.noise.grad is not None
    return problem.noise.grad.flatten()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_exact_gradient_agrees_with_finite_differences():
    exact = gradient_of("exact", 1)
    generator, reward = ToyGenerator(), ToyReward()
    z = generator.draw_noise([0])
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        direction = torch.randn(z.shape, generator=random)
        values = []
        for sign in (1, -1):
            image = generator.generate(generator.encode(["a"]), z + sign * 1e-2 * direction)
            values.append(reward.score(image, ["a"])[0])
        slope = float(values[0] - values[1]) / 2e-2
        assert -float(exact @ direction.flatten()) == pytest.approx(slope, rel=2e-2, abs=2e-5)


@pytest.mark.parametrize(("name", "least"), [("zeroth-order", 0.6), ("hybrid-image", 0.8), ("hybrid-noise", 0.5)])
def test_estimated_gradients_point_where_the_exact_one_points(name, least):
    """With many samples; the reward hides its gradient from autograd."""
    exact = gradient_of("exact", 1)
    estimate = gradient_of(name, 400, differentiable=False)
    assert cosine(exact, estimate) > least


def test_estimates_have_the_size_of_the_gradient_where_they_estimate_it():
    """Zeroth-order and image-space estimates are unbiased as the perturbation shrinks: <g_est, g> is near <g, g>."""
    exact = gradient_of("exact", 1)
    for name in ("zeroth-order", "hybrid-image"):
        estimate = gradient_of(name, 3000, differentiable=False)
        assert float(estimate @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.15)


def test_zeroth_order_needs_no_gradient_through_the_model():
    class NoGraph(ToyGenerator):
        def generate(self, *args, **options):
            assert not torch.is_grad_enabled()
            return super().generate(*args, **options)

    config = NoiseConfig(iterations=2, gradient="zeroth-order", regularization=0.0)
    optimize_noise(NoGraph(), ToyReward(False), ["a"], config)


def test_bayesian_optimization_of_tokens_improves_a_black_box_and_resumes(tmp_path):
    pytest.importorskip("botorch")
    whole = run_bayesian()
    assert whole.rewards.mean() > whole.history[0].reward
    assert all(side.coefficients.abs().max() <= 1 for side in whole.best.sides.values())
    file = tmp_path / "state.safetensors"
    run_bayesian(Watcher(10), state_file=file)
    again = run_bayesian(state_file=file, resume=True)
    assert torch.equal(whole.rewards, again.rewards)


def test_bayesian_optimization_refuses_what_it_cannot_search():
    with pytest.raises(InputError, match="480 coefficients"):
        train_tokens(
            ToyGenerator(),
            ToyReward(),
            ["a"],
            OptimizeConfig(gradient="bayesian", tokens=TokenConfig(basis_size=16, prefix_length=15, suffix_length=15)),
        )
    with pytest.raises(InputError, match="for tokens"):
        optimize_noise(ToyGenerator(), ToyReward(), ["a"], NoiseConfig(gradient="bayesian"))
    plain = OptimizeConfig(gradient="bayesian", tokens=TokenConfig(low_rank=False))
    with pytest.raises(InputError, match="would search 0 coefficients"):
        train_tokens(ToyGenerator(), ToyReward(), ["a"], plain)
    pairs = TokenConfig(prefix_length=1, suffix_length=1, basis_size=2)
    with pytest.raises(InputError, match="leave batch_size empty"):
        train_tokens(
            ToyGenerator(), ToyReward(), ["a", "b"], OptimizeConfig(gradient="bayesian", tokens=pairs, batch_size=1)
        )


@pytest.mark.parametrize(("bound", "largest"), [(0.5, 0.5), (2.0, 2.0), (None, 1.0)])
def test_bayesian_optimization_searches_all_that_the_bound_allows(bound, largest):
    pytest.importorskip("botorch")
    tokens = TokenConfig(prefix_length=1, suffix_length=1, basis_size=2, value_bound=bound)
    problem = TokenProblem(ToyGenerator(), ["a"], OptimizeConfig(gradient="bayesian", tokens=tokens))
    proposed = []
    for score in range(INITIAL - 1):
        problem.proposer.step(float(score))
        proposed += [side.coefficients.detach().abs().max() for side in problem.tokens.sides.values()]
    assert 0.8 * largest < max(proposed) <= largest


def test_learning_rate_schedules():
    prompt_wise = OptimizeConfig.preset("paper")
    assert [prompt_wise.learning_rate_factor(e) for e in (0, 9, 10, 25)] == pytest.approx([1, 1, 0.9, 0.81])
    batch = OptimizeConfig.preset("paper", batch=True)
    assert (batch.epochs, batch.batch_size, batch.backprop_steps) == (20, 4, 1)
    assert batch.learning_rate_factor(19) == 1.0
    assert LoopConfig().learning_rate_factor(1000) == 1.0


class Budgeted(ToyReward):
    """May be asked a number of times per run, as a judge behind an address may."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.left = most, 0

    def begin_run(self) -> None:
        self.left = self.most

    def score(self, images, prompts):
        if self.left == 0:
            raise BudgetSpentError(f"all {self.most} calls are used up.")
        self.left -= 1
        return super().score(images, prompts)


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: Weighted([(r, 1.0)]), lambda r: Robust(r, samples=1)])
@pytest.mark.parametrize("method", ["tokens", "noise", "joint"])
def test_a_spent_budget_ends_the_run_with_its_best_and_the_next_run_has_its_own(method, wrap):
    reward, watcher = wrap(Budgeted(8)), Watcher()
    first = run(method, watcher, reward)
    assert first.stopped == "all 8 calls are used up"
    assert len(first.history) > 1
    assert watcher.messages[-1].endswith("all 8 calls are used up.")
    assert first.rewards.mean() >= first.start_rewards.mean()
    assert run(method, None, reward).stopped == first.stopped  # neither used up already nor refilled in between
    with pytest.raises(BudgetSpentError):
        run(method, None, wrap(Budgeted(0)))


def test_a_held_out_reward_without_a_score_does_not_end_the_run():
    watcher, spent = Watcher(), Budgeted(2)
    result = run("noise", watcher, monitors=[spent])
    assert result.stopped == "finished"
    assert [event.step for event in result.history if event.monitors] == [0, 5]
    assert "has no score at step 8" in watcher.messages[0]
    assert len(watcher.messages) == 1


class StopsWhileReporting(Watcher):
    """Cancels from inside `on_step`, after the update and before the next one."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        super().__init__()
        self.step, self.error = step, error

    def on_step(self, event) -> None:
        super().on_step(event)
        if event.step == self.step:
            raise self.error("stopped")


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["tokens", "noise", "joint", "token batches"])
def test_stopped_while_a_step_is_reported_and_resumed_equals_uninterrupted(tmp_path, method, error):
    whole = run(method)
    assert run(method, StopsWhileReporting(3, error), state_file=tmp_path / "s").stopped == "cancelled"
    again = run(method, state_file=tmp_path / "s", resume=True)
    assert torch.equal(whole.rewards, again.rewards)
    assert [event.reward for event in whole.history] == [event.reward for event in again.history]


def test_a_held_out_reward_that_is_not_a_number_first_does_not_end_a_run_that_helps():
    config = dataclasses.replace(TOKENS, monitor_every=2, patience=2)
    result = train_tokens(ToyGenerator(), ToyReward(), ["a"], config, monitors=[Moody({1})])
    assert result.stopped == "finished"


def test_a_validation_that_is_not_a_number_is_never_the_best():
    """Calls of the reward: raw prompts, then one per update, and a validation at the start of every epoch."""
    config = dataclasses.replace(TOKENS, batch_size=1, epochs=6)
    prompts, watcher = ["red heart", "pizza", "dog"], Watcher()
    with pytest.raises(NonFiniteError, match="At the start"):
        train_tokens(ToyGenerator(), Moody({3}), prompts, config)
    result = train_tokens(ToyGenerator(), Moody({7}), prompts, config, watcher)
    assert "back to the best" in watcher.messages[0]
    assert torch.isfinite(result.rewards).all()
    assert result.rewards.mean() > result.start_rewards.mean()


def test_a_gradient_that_is_not_a_number_at_the_start_is_an_error():
    class Steep(ToyReward):
        def score(self, images, prompts):
            score = super().score(images, prompts)
            score.register_hook(lambda g: g * float("nan")) if score.requires_grad else None
            return score

    for method in ("tokens", "noise", "joint"):
        with pytest.raises(NonFiniteError, match="At the start the gradient is not finite"):
            run(method, None, Steep())


class Counting(ToyReward):
    """A held-out reward that depends on the prompt alone, and has room for so many images."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__(name="held out")
        self.room, self.sizes = room, []

    def score(self, images, prompts):
        self.sizes.append(len(prompts))
        if len(prompts) > self.room:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_held_out_rewards_compare_the_same_prompts_when_an_epoch_has_several_updates():
    config = dataclasses.replace(TOKENS, batch_size=1, epochs=4, monitor_every=1, patience=9)
    held_out = Counting()
    result = train_tokens(ToyGenerator(), ToyReward(), ["a", "bbb", "ccccc"], config, monitors=[held_out])
    assert result.stopped == "finished"
    assert {tuple(event.monitors.values()) for event in result.history if event.monitors} == {(3.0,)}
    assert [event.step for event in result.history if event.monitors] == [0, 3, 6, 9, 12]


def test_held_out_rewards_fit_into_memory_too():
    config = dataclasses.replace(NOISE, iterations=1, micro_batch=2, checkpoint=True)
    held_out, watcher = Counting(room=1), Watcher()
    prompts = ["a", "bb", "ccc"]
    result = optimize_noise(ToyGenerator(), ToyReward(), prompts, config, watcher, monitors=[held_out])
    assert held_out.sizes[0] == 2
    assert "1 image(s) at a time" in watcher.messages[0]
    assert [list(event.monitors.values()) for event in result.history] == [[2.0], [2.0]]


def test_held_out_rewards_of_one_name_are_both_shown():
    result = run("noise", monitors=[ToyReward(), ToyReward(), Counting()])
    assert list(result.history[0].monitors) == ["toy", "toy (2)", "held out"]


@pytest.mark.parametrize(
    "text", ["DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_memory_runs_out_in_many_words(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_what_only_shows_may_change_when_a_run_goes_on_and_what_differs_is_named(tmp_path):
    run("noise", Watcher(3), state_file=tmp_path / "s")

    def again(**changes):
        config = dataclasses.replace(NOISE, **changes)
        options = {"state_file": tmp_path / "s", "resume": True}
        return optimize_noise(ToyGenerator(), ToyReward(), ["red heart", "pizza"], config, **options)

    with pytest.raises(InputError, match=r"different: learning_rate, permutations\)"):
        again(learning_rate=0.5, permutations=3)
    again(monitor_every=2, preview_every=3, patience=5, checkpoint=False, micro_batch=1)


def test_the_released_code_decays_by_updates_and_goes_back_two_steps():
    """The notebook's scheduler counts batches: x 0.95 every 15 of them."""
    notebook = OptimizeConfig.preset("released-code", batch=True)
    assert [notebook.learning_rate_factor(u, 15) for u in (14, 15, 30)] == pytest.approx([1, 0.95, 0.95**2])
    assert (notebook.epochs, notebook.batch_size) == (20, 4)
    assert (notebook.backprop_steps, notebook.conformity_norm) == (2, "l1-mean")


@pytest.mark.parametrize("method", ["hybrid-image", "hybrid-noise"])
def test_black_boxes_see_pictures(method):
    """A reward of another pack may wrap around outside [0, 1]."""
    seen = []

    class Watching(ToyReward):
        def score(self, images, prompts):
            seen.append((float(images.min()), float(images.max())))
            return super().score(images, prompts)

    config = dataclasses.replace(NOISE, gradient=method, perturbation_scale=0.5, iterations=2)
    optimize_noise(ToyGenerator(), Watching(differentiable=False), ["red heart"], config)
    first = seen[0]
    assert first[0] >= 0
    assert first[1] <= 1
    assert min(low for low, _ in seen) >= 0
    assert max(high for _, high in seen) <= 1
