"""What one update does and what a run remembers of it: rates, gradients, setbacks, penalties, probabilities."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ipgo_engine import (
    InputError,
    IPGOTokens,
    JointConfig,
    NoiseConfig,
    NoiseRegularizer,
    OptimizeConfig,
    TokenConfig,
    optimize_jointly,
    optimize_noise,
    train_tokens,
)
from ipgo_engine.formats.state import read_state
from ipgo_engine.noise import CHANNEL_DIM
from ipgo_engine.problems import JointProblem, NoiseProblem, TokenProblem
from tests.engine import reference
from tests.engine.test_loop import NOISE, SMALL, TOKENS, Moody, Watcher, run
from tests.engine.toys import ToyGenerator, ToyReward

FALLING = NoiseConfig(iterations=60, learning_rate=0.1, regularization=0.0, min_probability=0.01)


@contextmanager
def watching_updates():
    """The learning rates of every update made inside, and whether the optimizer remembered earlier ones."""
    rates, remembered = [], []

    def watch(optimizer, args, kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        remembered.append(bool(optimizer.state))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        yield rates, remembered
    finally:
        handle.remove()


def short(**changes):
    return NoiseConfig(**({"iterations": 3, "permutations": 2} | changes))


def joint(**changes):
    """A short joint run of one picture; the changes are the tokens'."""
    config = JointConfig(tokens=dataclasses.replace(TOKENS, **changes), noise=short())
    return optimize_jointly(ToyGenerator(), ToyReward(), ["a"], config)


# -- the learning rate ------------------------------------------------------------------------------------------------


def test_the_learning_rate_decays_as_set():
    config = short(iterations=5, learning_rate=0.1, decay=0.5, decay_every=2)
    with watching_updates() as (rates, _):
        optimize_noise(ToyGenerator(), ToyReward(), ["a"], config)
    assert rates == [pytest.approx([rate]) for rate in (0.1, 0.1, 0.05, 0.05, 0.025)]


def test_tokens_and_noise_of_a_joint_run_have_rates_of_their_own():
    with watching_updates() as (rates, _):
        joint(learning_rate=0.03)
    assert rates == [pytest.approx([0.03, NoiseConfig().learning_rate])] * 3


# -- the gradient -----------------------------------------------------------------------------------------------------


def test_first_update_for_two_prompts_is_adam_on_the_mean_of_eq_12():
    prompts, config = ["red heart", "pizza"], dataclasses.replace(TOKENS, epochs=1, conformity=0.5, clip_norm=0.03)
    generator, reward, tokens = ToyGenerator(), ToyReward(), IPGOTokens(ToyGenerator.dim, SMALL)
    optimizer = torch.optim.Adam(tokens.parameters(), lr=config.learning_rate)
    raw, noise = generator.encode(prompts), generator.draw_noise([0, 0])
    grown = tokens.insert(raw.embeddings)
    penalty = 0.5 * (grown.mean(1) - raw.embeddings.mean(1)).square().sum(1).mean()
    image = generator.generate(dataclasses.replace(raw, embeddings=grown), noise)
    (penalty - reward.score(image, prompts).mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(tokens.parameters(), 0.03)
    optimizer.step()
    tokens.project_()

    first, second = train_tokens(generator, reward, prompts, config).history
    assert first.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert first.penalty == pytest.approx(float(penalty.detach()), rel=1e-4)
    with torch.no_grad():
        expected = reward.score(generator.generate(tokens.condition(raw), noise), prompts).mean()
    assert second.reward == pytest.approx(float(expected), abs=1e-6)


def test_a_bayesian_search_is_told_the_reward_less_the_penalty(tmp_path):
    pytest.importorskip("botorch")
    tokens = TokenConfig(prefix_length=1, suffix_length=1, basis_size=3)
    config = OptimizeConfig(tokens=tokens, epochs=4, gradient="bayesian", conformity=0.5)
    prompts, file = ["red heart", "pizza"], tmp_path / "state"
    history = train_tokens(ToyGenerator(), ToyReward(False), prompts, config, state_file=file).history
    told = read_state(file)["proposer"]["scores"].flatten().tolist()
    assert told == pytest.approx([event.reward - event.penalty for event in history[:-1]], rel=1e-5)
    assert min(event.penalty for event in history) > 0.01


# -- setbacks ---------------------------------------------------------------------------------------------------------


def test_after_a_setback_updates_are_half_as_large_and_forget_their_momentum():
    with watching_updates() as (rates, remembered):
        optimize_noise(ToyGenerator(), Moody({4}), ["a"], short(iterations=6))
    full = NoiseConfig().learning_rate
    assert rates == [pytest.approx([rate]) for rate in (full, full, full, full / 2, full / 2)]
    assert remembered == [False, True, True, False, True]


def test_after_a_setback_the_run_goes_on_from_the_best():
    class Falling(ToyReward):
        """The third picture is worse than it was, the fourth is not a number."""

        calls = 0

        def score(self, images, prompts):
            self.calls += 1
            change = {3: -1.0, 4: float("nan")}.get(self.calls, 0.0)
            return super().score(images, prompts) + change

    history = optimize_noise(ToyGenerator(), Falling(), ["a"], short(iterations=5, regularization=0.0)).history
    assert [event.step for event in history] == [0, 1, 2, 4, 5]
    assert history[3].reward == pytest.approx(history[1].reward, abs=1e-6)
    assert history[1].reward == max(event.reward for event in history[:3])


def test_resumed_after_a_setback_equals_uninterrupted(tmp_path):
    whole = run("noise", reward=Moody({4}))
    run("noise", Watcher(5), Moody({4}), state_file=tmp_path / "s")
    again = run("noise", state_file=tmp_path / "s", resume=True)
    assert [event.reward for event in whole.history] == [event.reward for event in again.history]


@pytest.mark.parametrize("method", ["tokens", "noise", "joint"])
def test_interrupted_inside_an_update_and_resumed_equals_uninterrupted(method, tmp_path):
    whole, updates = run(method), []

    def interrupt(optimizer, args, kwargs):
        updates.append(optimizer)
        if len(updates) == 4:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(interrupt)
    try:
        assert run(method, state_file=tmp_path / "s", save_every=1).stopped == "cancelled"
    finally:
        handle.remove()
    again = run(method, state_file=tmp_path / "s", resume=True)
    assert torch.equal(whole.rewards, again.rewards)
    assert [event.reward for event in whole.history] == [event.reward for event in again.history]


# -- resume -----------------------------------------------------------------------------------------------------------


def test_held_out_rewards_keep_their_rhythm_after_a_resume(tmp_path):
    def measured(observer=None, **options):
        config = dataclasses.replace(NOISE, monitor_every=3)
        monitors = [ToyReward(name="held out")]
        result = optimize_noise(ToyGenerator(), ToyReward(), ["a"], config, observer, monitors=monitors, **options)
        return [event.step for event in result.history if event.monitors]

    whole = measured()
    measured(Watcher(5), state_file=tmp_path / "s")
    assert measured(state_file=tmp_path / "s", resume=True) == whole == [0, 3, 6, 8]


@pytest.mark.parametrize("other", ["reward", "encoder"])
def test_resume_refuses_the_state_of_another_reward_or_encoder(other, tmp_path):
    run("noise", Watcher(2), state_file=tmp_path / "s")
    generator, reward = ToyGenerator(), ToyReward(name="another" if other == "reward" else "toy")
    if other == "encoder":
        generator.encoder = "another"
    with pytest.raises(InputError, match=rf"different: {other}\)"):
        run("noise", None, reward, generator, state_file=tmp_path / "s", resume=True)


# -- probabilities ----------------------------------------------------------------------------------------------------


def test_history_shows_the_probability_of_the_least_likely_picture():
    def shown(prompts, seeds):
        return optimize_noise(ToyGenerator(), ToyReward(), prompts, NOISE, seeds=seeds).history[0].probability

    alone = [shown([prompt], [seed]) for prompt, seed in (("a", 0), ("b", 1), ("c", 2))]
    assert shown(["a", "b", "c"], [0, 1, 2]) == pytest.approx(min(alone), rel=1e-5)
    assert max(alone) > 1.1 * min(alone)


def test_the_probability_of_a_result_is_that_of_its_noise():
    config = dataclasses.replace(FALLING, iterations=8, permutations=10)
    result = optimize_noise(ToyGenerator(), ToyReward(), ["a", "b"], config)
    measure = NoiseRegularizer(permutations=10).measure
    torch.testing.assert_close(result.probability, measure(result.best, CHANNEL_DIM)[1])
    start = measure(ToyGenerator().draw_noise([0, 1]), CHANNEL_DIM)[1]
    assert not torch.isclose(result.probability, start).any()


def test_one_improbable_picture_is_enough_for_a_joint_run_not_to_be_the_best():
    config = JointConfig(tokens=TOKENS, noise=FALLING)
    result = optimize_jointly(ToyGenerator(), ToyReward(), ["a", "b"], config)
    assert result.history[-1].probability < 0.01
    assert result.history[-1].reward > result.rewards.mean()
    assert result.probability.min() >= 0.01


def test_every_picture_of_a_batch_is_regularized_as_if_it_were_alone():
    problem = NoiseProblem(ToyGenerator(), ["a", "b"], [1, 2], short(regularization=3.0))
    with torch.no_grad():
        problem.noise *= 1.2
    alone = [
        float(NoiseRegularizer(permutations=2).log_probability(z, CHANNEL_DIM - 1)) for z in problem.noise.detach()
    ]
    penalty, probability = problem.regularize([0, 1])
    assert float(penalty.detach()) == pytest.approx(-3 * sum(alone), rel=1e-5)
    assert max(alone) < -1
    assert probability.shape == (2,)


def test_a_noise_of_very_few_values_can_be_optimized_unregularized():
    class Tiny(ToyGenerator):
        noise_shape = (1, 3, 2, 2)

    penalty, probability = NoiseProblem(Tiny(), ["a"], [0], short(regularization=0.0)).regularize([0])
    assert (float(penalty), probability) == (0, None)
    with pytest.raises(InputError, match="12 values is too small"):
        NoiseProblem(Tiny(), ["a"], [0], short()).regularize([0])


# -- what is learned --------------------------------------------------------------------------------------------------


def test_a_joint_run_pays_for_the_distance_of_its_tokens_from_the_prompt():
    tokens, embeddings = IPGOTokens(ToyGenerator.dim, SMALL), ToyGenerator().encode(["a"]).embeddings[0].numpy().T
    pre, suf = (side.detach().numpy().T for side in (tokens.prefix(), tokens.suffix()))
    distance = reference.conformity(reference.insert(pre, embeddings, suf), embeddings)
    free, paid = joint(conformity=0.0), joint(conformity=5.0)
    assert paid.history[0].penalty - free.history[0].penalty == pytest.approx(5 * distance, rel=1e-4)


def test_tokens_of_a_joint_run_obey_the_constraints():
    result = joint(learning_rate=0.5)
    assert result.rewards.mean() > result.history[0].reward
    for side in result.best[0].sides.values():
        np.testing.assert_allclose(side.basis.T @ side.basis, np.eye(SMALL.basis_size), atol=1e-4)
        assert side.coefficients.abs().max() <= 1


@pytest.mark.parametrize("method", ["tokens", "joint"])
def test_tokens_start_as_their_seed_says(method):
    config = dataclasses.replace(TOKENS, seed=5)
    if method == "tokens":
        problem = TokenProblem(ToyGenerator(), ["a"], config)
    else:
        problem = JointProblem(ToyGenerator(), ["a"], [0], JointConfig(tokens=config, noise=short(seed=7)))
    assert torch.equal(problem.tokens.prefix(), IPGOTokens(ToyGenerator.dim, SMALL, seed=5).prefix())


def test_every_noise_is_optimized_however_many_a_sampler_draws():
    class Longer(ToyGenerator):
        steps, noise_shape = 5, (5, 3, 8, 8)

    result = optimize_noise(Longer(), ToyReward(), ["a"], short(regularization=0.0))
    moved = (result.best - Longer().draw_noise([0])).flatten(2).abs().amax(-1)
    assert (moved > 0).all()


def test_what_the_stock_sampler_gets_stays_as_it_was_while_the_noise_changes():
    problem = NoiseProblem(ToyGenerator(), ["a"], [3], short())
    with torch.no_grad():
        problem.noise += 1
    assert torch.equal(problem.start_inputs([0])[1], ToyGenerator().draw_noise([3]))


def test_every_epoch_sees_all_prompts_in_an_order_of_its_own():
    class Noting(ToyReward):
        def __init__(self):
            super().__init__()
            self.seen = []

        def score(self, images, prompts):
            self.seen += prompts if len(prompts) == 1 else []  # the others are validations
            return super().score(images, prompts)

    prompts, reward = [f"prompt {number}" for number in range(6)], Noting()
    train_tokens(ToyGenerator(), reward, prompts, dataclasses.replace(TOKENS, batch_size=1, epochs=3))
    epochs = [reward.seen[start : start + 6] for start in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [prompts] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_file_of_learned_tokens_says_what_they_were_learned_from(tmp_path):
    config = dataclasses.replace(TOKENS, epochs=1, seeds=(3, 8))
    alone = train_tokens(ToyGenerator(), ToyReward(), ["a", "b"], config).best
    together = optimize_jointly(
        ToyGenerator(), ToyReward(), ["a", "b"], JointConfig(tokens=TOKENS, noise=short()), seeds=[3, 8]
    ).best[0]
    for tokens in (alone, together):
        labels = IPGOTokens.load(tokens.save(tmp_path / "t.safetensors")).metadata
        assert labels["seeds"] == [3, 8]
        assert (labels["prompts"], labels["reward"], labels["encoder"]) == (["a", "b"], "toy", "toy-encoder")
