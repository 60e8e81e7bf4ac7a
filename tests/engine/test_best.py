"""What counts as the best so far: one choice where parameters are shared, one per picture where they are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ipgo_engine.best import Best
from ipgo_engine.gradients import Evaluation


def best_of(kind, *steps, limit=None):
    """After steps of (rewards, P(z)); the parameter is the number of the step, and so are the pictures."""
    parameter = torch.zeros(() if kind == "shared" else 2)
    shared, own = ([parameter], []) if kind == "shared" else ([], [parameter])
    problem, best = SimpleNamespace(shared=shared, own=own), Best()
    for number, (rewards, probability) in enumerate(steps):
        parameter.fill_(number)
        seen = Evaluation(torch.full((2, 3, 1, 1), float(number)), torch.tensor(rewards))
        best.consider(problem, seen, None if probability is None else torch.tensor(probability), limit)
    assert best.state is not None
    return best.state["0"].tolist(), best.images[:, 0, 0, 0].tolist(), best.rewards.tolist()


def test_shared_parameters_are_judged_by_the_mean():
    steps = ([1.0, 1.0], None), ([4.0, 0.0], None), ([1.5, 1.5], None)
    assert best_of("shared", *steps) == (1.0, [1.0, 1.0], [4.0, 0.0])


def test_every_picture_keeps_the_best_of_its_own():
    steps = ([1.0, 1.0], None), ([4.0, 0.0], None), ([1.5, 1.5], None)
    assert best_of("own", *steps) == ([1.0, 2.0], [1.0, 2.0], [4.0, 1.5])


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_what_earns_no_more_stays_as_it_was(kind):
    first, *_ = best_of(kind, ([1.0, 2.0], None), ([1.0, 2.0], None))
    assert not torch.tensor(first).any()


def test_noise_at_the_limit_is_probable_enough():
    steps = ([1.0, 1.0], [0.9, 0.9]), ([2.0, 2.0], [0.5, 0.49])
    assert best_of("own", *steps, limit=0.5)[0] == [1.0, 0.0]
    assert best_of("shared", *steps, limit=0.5)[0] == 0.0
