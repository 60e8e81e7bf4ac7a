"""The Bayesian search on a function whose maximum is known."""

from __future__ import annotations

import pytest
import torch

from ipgo_engine.bayesian import BayesianProposer

TARGET = torch.tensor([[1.6], [-1.4]])


def test_twenty_steps_find_the_maximum_of_a_parabola_within_the_bounds():
    pytest.importorskip("botorch")
    found = torch.nn.Parameter(torch.zeros(2, 1))
    proposer, tried = BayesianProposer([found], 2.0, 0), []
    for _ in range(20):
        tried.append(found.detach().clone())
        proposer.step(-float((found.detach() - TARGET).square().sum()))
    misses = sorted(float((point - TARGET).norm()) for point in tried[-8:])
    assert misses[4] < 0.4  # now and then it looks elsewhere
    assert max(float(point.abs().max()) for point in tried) <= 2
