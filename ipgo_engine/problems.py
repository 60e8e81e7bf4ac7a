"""What is optimized: tokens, noise, or both. The loop in `optimize.py` treats the three alike.

A *row* is one image: a prompt and a seed. Parameters are either shared by all rows (tokens) or belong to one row each
(noise, leading size = number of rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .bayesian import BayesianProposer
from .config import JointConfig, NoiseConfig, OptimizeConfig
from .errors import InputError
from .generators.base import Conditioning, Generator
from .noise import CHANNEL_DIM, FEWEST_VALUES, NoiseRegularizer
from .tokens import IPGOTokens

State = dict[str, Tensor]


class Problem(Protocol):
    """Parameters, how rows depend on them, and what they cost."""

    prompts: list[str]  # one per row
    shared: list[nn.Parameter]
    own: list[nn.Parameter]  # leading size = number of rows
    updates_per_epoch: int
    proposer: BayesianProposer | None  # proposes the next parameters where there is no gradient

    def rows(self, update: int) -> list[int]:
        """The rows of one update."""
        ...

    def inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """Conditioning and noise of these rows, differentiable in the parameters."""
        ...

    def start_inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """The same before anything was learned: what the stock sampler would get."""
        ...

    def regularize(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What is added to the loss, summed over these rows, and P(z) of each (None where no noise is optimized)."""
        ...

    def project_(self) -> None:
        """Enforce the constraints after an update."""
        ...


def learned(problem: Problem) -> list[nn.Parameter]:
    """Every parameter, shared first."""
    return [*problem.shared, *problem.own]


def snapshot(problem: Problem) -> State:
    """A copy of every parameter, by position."""
    return {str(i): p.detach().clone() for i, p in enumerate(learned(problem))}


@torch.no_grad()
def restore(problem: Problem, state: Mapping[str, Tensor]) -> None:
    """Put a snapshot back."""
    for i, parameter in enumerate(learned(problem)):
        parameter.copy_(state[str(i)])


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; `InputError` when there are none or one of them is blank."""
    if isinstance(prompts, str):
        raise InputError("prompts is one string: give a list of strings, one per image.")
    try:
        found = list(prompts)
    except TypeError as error:
        raise InputError(f"prompts is {prompts!r}: give a list of strings, one per image.") from error
    if not found:
        raise InputError("prompts is empty: give at least one prompt.")
    for number, prompt in enumerate(found, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {number} is {prompt!r}: a prompt must be a text that is not blank.")
    return found


class TokenProblem:
    """One set of tokens for all prompts, every prompt with every seed (IPGO, algorithm 1)."""

    def __init__(self, generator: Generator, prompts: Sequence[str], config: OptimizeConfig) -> None:
        self.config, self._given = config, check_prompts(prompts)
        self.tokens = IPGOTokens(generator.dim, config.tokens, seed=config.seed).to(generator.device)
        self._conditioning = generator.encode(self._given)
        self._noise = generator.draw_noise(config.seeds).to(generator.device)
        self._pairs = [(p, s) for p in range(len(self._given)) for s in range(len(config.seeds))]
        self.prompts = [self._given[p] for p, _ in self._pairs]
        self.shared = list(self.tokens.parameters())
        self.own: list[nn.Parameter] = []
        size = config.batch_size or len(self._given)
        self._batch = min(size, len(self._given))
        self.updates_per_epoch = -(-len(self._given) // self._batch)
        self.proposer = self._make_proposer() if config.gradient == "bayesian" else None

    def _make_proposer(self) -> BayesianProposer:
        if self.updates_per_epoch > 1:
            raise InputError("gradient bayesian compares whole batches of prompts: leave batch_size empty.")
        named = self.tokens.named_parameters()
        coefficients = [parameter for name, parameter in named if name.endswith("coefficients")]
        return BayesianProposer(coefficients, self.config.tokens.value_bound or 1.0, self.config.seed)

    def rows(self, update: int) -> list[int]:
        """One batch of prompts with all their seeds; every epoch shuffles the prompts anew, by seed and epoch alone."""
        epoch, position = divmod(update, self.updates_per_epoch)
        order = list(range(len(self._given)))
        if self.updates_per_epoch > 1:
            shuffle = torch.Generator().manual_seed((self.config.seed * 1_000_003 + epoch) % (1 << 63))
            order = torch.randperm(len(order), generator=shuffle).tolist()
        chosen = set(order[position * self._batch : (position + 1) * self._batch])
        return [row for row, (p, _) in enumerate(self._pairs) if p in chosen]

    def start_inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """Raw prompts with the noise of their seeds."""
        pairs = [self._pairs[row] for row in rows]
        return self._conditioning.select([p for p, _ in pairs]), self._noise[[s for _, s in pairs]]

    def inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """Prompts with the tokens inserted, and the noise of their seeds."""
        conditioning, noise = self.start_inputs(rows)
        return self.tokens.condition(conditioning), noise

    def regularize(self, rows: Sequence[int]) -> tuple[Tensor, None]:
        """gamma * p_conf (eq. 12), summed over the rows."""
        return _conformity(self.tokens, self.start_inputs(rows)[0], self.config), None

    def project_(self) -> None:
        """The constraints of eq. 10."""
        self.tokens.project_()


class NoiseProblem:
    """One noise per row, each a problem of its own: maximize r(M(z)) + mu R(z) (eq. 9)."""

    def __init__(self, generator: Generator, prompts: Sequence[str], seeds: Sequence[int], config: NoiseConfig) -> None:
        self.config, self.prompts = config, check_prompts(prompts)
        if len(seeds) != len(self.prompts):
            raise InputError(f"{len(seeds)} seeds for {len(self.prompts)} prompts: give one seed per image.")
        unique = list(dict.fromkeys(self.prompts))
        self._conditioning = generator.encode(unique).select([unique.index(p) for p in self.prompts])
        self.start = generator.draw_noise(seeds).to(generator.device)
        count = 1 if config.which == "initial" else self.start.shape[1]
        self.noise = nn.Parameter(self.start[:, :count].detach().float().clone())
        self.regularizer = NoiseRegularizer(config.block_size, config.permutations, config.seed)
        self.shared: list[nn.Parameter] = []
        self.own = [self.noise]
        self.updates_per_epoch = 1
        self.proposer: BayesianProposer | None = None
        if config.gradient == "bayesian":
            raise InputError("gradient bayesian is for tokens: a noise has too many values; use hybrid-noise.")

    def rows(self, update: int) -> list[int]:
        """All of them."""
        return list(range(len(self.prompts)))

    def start_inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """The noise the stock sampler would draw."""
        rows = list(rows)
        return self._conditioning.select(rows), self.start[rows]

    def inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """The optimized noise, completed by the injected noises that are left as drawn."""
        rows = list(rows)
        return self._conditioning.select(rows), self.full_noise(self.noise)[rows]

    def full_noise(self, noise: Tensor) -> Tensor:
        """All noises of every row: those optimized, followed by those left as drawn."""
        return torch.cat((noise, self.start[:, noise.shape[1] :]), dim=1)

    def finished_noise(self) -> Tensor:
        """All noises as they are now, on the CPU."""
        return self.full_noise(self.noise.detach()).cpu()

    def regularize(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """-mu R(z) summed over the rows, and P(z) of each; both over the noises that are optimized.

        A noise of very few values, unregularized, has no P(z): None.
        """
        if not self.config.regularization and self.noise[0].numel() < FEWEST_VALUES:
            return self.noise.new_zeros(()), None
        noise = self.noise if self.config.regularization else self.noise.detach()
        log_probability, probability = self.regularizer.measure(noise[list(rows)], CHANNEL_DIM)
        return -self.config.regularization * log_probability.sum(), probability

    def project_(self) -> None:
        """Noise is not constrained, only regularized."""


class JointProblem:
    """Tokens shared by all rows and one noise per row, learned together."""

    def __init__(self, generator: Generator, prompts: Sequence[str], seeds: Sequence[int], config: JointConfig) -> None:
        self.config = config
        self.noise = NoiseProblem(generator, prompts, seeds, config.noise)
        learner = config.tokens
        self.tokens = IPGOTokens(generator.dim, learner.tokens, seed=learner.seed).to(generator.device)
        self.prompts = self.noise.prompts
        self.shared = list(self.tokens.parameters())
        self.own = self.noise.own
        self.updates_per_epoch = 1
        self.proposer: BayesianProposer | None = None
        self.rows, self.start_inputs = self.noise.rows, self.noise.start_inputs

    def inputs(self, rows: Sequence[int]) -> tuple[Conditioning, Tensor]:
        """Prompts with tokens inserted, and the optimized noise."""
        conditioning, noise = self.noise.inputs(rows)
        return self.tokens.condition(conditioning), noise

    def regularize(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Both penalties, summed over the rows, and P(z) of each."""
        penalty, probability = self.noise.regularize(rows)
        return penalty + _conformity(self.tokens, self.start_inputs(rows)[0], self.config.tokens), probability

    def project_(self) -> None:
        """The constraints of eq. 10."""
        self.tokens.project_()


def _conformity(tokens: IPGOTokens, raw: Conditioning, config: OptimizeConfig) -> Tensor:
    """gamma * p_conf, summed over the rows of the raw prompts (eq. 12)."""
    penalty = tokens.conformity_penalty(raw.embeddings, raw.mask, config.conformity_norm)
    return config.conformity * len(raw) * penalty
