"""The best so far, by reward alone: one choice for shared parameters, one per image for parameters of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gradients import Evaluation
from .problems import Problem, snapshot


@dataclass
class Best:
    """A snapshot of the parameters with its images and rewards; empty until the first `consider`.

    Only the snapshot is on the parameters' device, the rest on the CPU.
    """

    state: dict[str, Tensor] | None = None
    rewards: Tensor | None = None
    images: Tensor | None = None
    probability: Tensor | None = None

    def consider(
        self, problem: Problem, evaluation: Evaluation, probability: Tensor | None, limit: float | None
    ) -> None:
        """Keep the problem's present parameters where they earn more than anything before.

        Shared parameters are judged by the mean reward. Images whose P(z) is below `limit` are never better.
        """
        now, probability = snapshot(problem), None if probability is None else probability.cpu()
        if self.state is None or self.rewards is None or self.images is None:
            self.state, self.rewards, self.images = now, evaluation.rewards.clone(), evaluation.images.clone()
            self.probability = None if probability is None else probability.clone()
            return
        better = self._better(problem, evaluation, probability, limit)
        if not better.any():
            return
        shared = len(problem.shared)
        for key, value in now.items():
            if int(key) < shared:
                self.state[key] = value
            else:
                self.state[key][better] = value[better]
        self.rewards[better] = evaluation.rewards[better]
        self.images[better] = evaluation.images[better]
        if probability is not None and self.probability is not None:
            self.probability[better] = probability[better]

    def _better(
        self, problem: Problem, evaluation: Evaluation, probability: Tensor | None, limit: float | None
    ) -> Tensor:
        assert self.rewards is not None
        likely = torch.ones_like(self.rewards, dtype=torch.bool)
        if limit is not None and probability is not None:
            likely = probability >= limit
        if problem.shared:
            return ((evaluation.rewards.mean() > self.rewards.mean()) & likely.all()).expand_as(likely)
        return (evaluation.rewards > self.rewards) & likely
