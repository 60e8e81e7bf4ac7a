"""Bayesian optimization of the token coefficients Z, for rewards without a gradient (IPGO paper, figure 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

MOST_DIMENSIONS = 128  # beyond this a Gaussian process learns nothing from as many images as anybody would make
INITIAL = 8  # space-filling points before the first model


class BayesianProposer:
    """Ask-and-tell over the coefficients of the tokens, scaled to the unit cube; basis and angles stay as they started.

    Points and scores are all the state there is. Needs botorch (the extra "bayesian"); raises `InputError` without it,
    and when there are more than 128 coefficients.
    """

    def __init__(self, coefficients: list[nn.Parameter], bound: float, seed: int) -> None:
        size = sum(c.numel() for c in coefficients)
        if not 0 < size <= MOST_DIMENSIONS:
            raise InputError(
                f"bayesian optimization would search {size} coefficients: it needs between 1 and {MOST_DIMENSIONS}. "
                "Use for example basis_size 4, prefix_length 2 and suffix_length 2 (16 coefficients), with low_rank."
            )
        try:
            import botorch  # noqa: F401
        except ImportError as error:
            raise InputError('gradient "bayesian" needs botorch: pip install "ipgo[bayesian]".') from error
        self._coefficients, self._bound, self._seed, self._size = coefficients, bound, seed, size
        self.points = torch.zeros(0, size, dtype=torch.float64)
        self.scores = torch.zeros(0, 1, dtype=torch.float64)

    @torch.no_grad()
    def step(self, score: float) -> None:
        """Learn the score of the present coefficients and replace them by the next ones to try."""
        flat = torch.cat([c.detach().flatten() for c in self._coefficients]).double().cpu()
        self.points = torch.cat((self.points, (flat / self._bound + 1)[None] / 2))
        self.scores = torch.cat((self.scores, torch.tensor([[score]], dtype=torch.float64)))
        with torch.random.fork_rng(), torch.enable_grad():  # botorch draws from torch's global stream
            torch.manual_seed((self._seed * 1_000_003 + len(self.points)) % (1 << 63))
            point = self._space_filling() if len(self.points) < INITIAL else self._most_promising()
        flat = (point * 2 - 1) * self._bound
        for coefficient, part in zip(
            self._coefficients, flat.split([c.numel() for c in self._coefficients]), strict=True
        ):
            coefficient.copy_(part.view_as(coefficient))

    def _space_filling(self) -> Tensor:
        sobol = torch.quasirandom.SobolEngine(self._size, scramble=True, seed=self._seed)
        return sobol.draw(len(self.points) + 1, dtype=torch.float64)[-1]

    def _most_promising(self) -> Tensor:
        from botorch.acquisition import LogExpectedImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.optim import optimize_acqf
        from gpytorch.mlls import ExactMarginalLogLikelihood

        model = SingleTaskGP(self.points, self.scores, outcome_transform=Standardize(m=1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        cube = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, self._size)
        acquisition = LogExpectedImprovement(model, best_f=self.scores.max())
        point, _ = optimize_acqf(acquisition, bounds=cube, q=1, num_restarts=4, raw_samples=128)
        return point.detach()[0]

    def state_dict(self) -> dict[str, Any]:
        """Points in the unit cube and their scores."""
        return {"points": self.points, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.points, self.scores = state["points"].double(), state["scores"].double()
