"""Settings, one frozen dataclass per method, checked when they are made."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .errors import InputError

Gradient = Literal["auto", "exact", "zeroth-order", "hybrid-image", "hybrid-noise", "bayesian"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}: {rule}.")


def whole_number(name: str, value: Any) -> int:
    """The value as Python's own integer: those of numpy and torch count, but go into no JSON."""
    try:
        _require(not isinstance(value, bool), name, value, "use a whole number")
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {value!r}: use a whole number.") from error


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Shape and constraints of the learned tokens (IPGO, section 4.1 and appendix B).

    The defaults are the paper's. Switches exist for every ablation of the paper's section 5.5.
    """

    prefix_length: int = 10  # M_pre
    suffix_length: int = 10  # M_suf
    basis_size: int = 30  # N, per side; at most the embedding width
    low_rank: bool = True  # False: plain embeddings, V itself is the parameter
    rotation: bool = True  # R2 R1 of eqs. 4 and 5
    orthonormal: bool = True  # O: E^T E = I, eq. 8
    value_bound: float | None = 1.0  # V: coefficients in [-bound, bound]; None switches the constraint off
    scale: float = 1.0  # the tokens are multiplied by this; 1 is the paper
    # What only the released notebook does: a basis column for every (token, column) pair plus a bias, and coefficients
    # clamped inside the forward, which kills the gradient of every coefficient that leaves the bounds.
    wide_basis: bool = False
    clamp_in_forward: bool = False

    def __post_init__(self) -> None:
        for name in ("prefix_length", "suffix_length", "basis_size"):
            _require(isinstance(getattr(self, name), int), name, getattr(self, name), "use a whole number")
        for name in ("prefix_length", "suffix_length"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number of tokens cannot be negative")
        total = self.prefix_length + self.suffix_length
        _require(total > 0, "prefix_length + suffix_length", total, "at least one token must be learned")
        _require(self.basis_size > 0, "basis_size", self.basis_size, "the basis needs at least one vector")
        bound_ok = self.value_bound is None or self.value_bound > 0
        _require(bound_ok, "value_bound", self.value_bound, "use a positive number, or None for no bound")
        _require(math.isfinite(self.scale) and self.scale != 0, "scale", self.scale, "use a finite number other than 0")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TokenConfig:
        """`"paper"`: the defaults. `"released-code"`: what the authors' notebook computes."""
        if name == "paper":
            return cls(**changes)
        if name == "released-code":
            return replace(cls(rotation=False, wide_basis=True, clamp_in_forward=True), **changes)
        raise InputError(f"preset is {name!r}: use 'paper' or 'released-code'.")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every method shares: the update, the gradient, the budget and when to stop early."""

    learning_rate: float = 1e-3
    decay: float = 1.0  # the learning rate is multiplied by this ...
    decay_every: int = 10  # ... after every so many epochs, iterations or updates
    decay_by: Literal["epoch", "update"] = "epoch"  # the same unless an epoch has several updates
    clip_norm: float = 1.0  # of the gradient; 0 switches clipping off
    backprop_steps: int | None = None  # K: model steps that gradients pass through; None is all of them
    checkpoint: bool = True  # recompute activations: slower by about a third, memory flat in the number of steps
    gradient: Gradient = "auto"  # "exact" where the reward is differentiable, else "hybrid-noise"
    # ("bayesian" searches the token coefficients with a Gaussian process; tokens only)
    perturbations: int = 8  # samples per estimated gradient: zeroth-order, hybrid-image, hybrid-noise
    perturbation_scale: float = 0.05  # mu: size of one perturbation
    micro_batch: int | None = None  # images generated at once; None is all, halved when memory runs out
    monitor_every: int = 5  # steps between measurements of the held-out rewards
    patience: int | None = None  # stop after so many measurements without a new best held-out reward
    preview_every: int = 1  # steps between previews
    seed: int = 0  # of everything random in the method itself (never of the picture)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number("seed", self.seed))
        lr_ok = math.isfinite(self.learning_rate) and self.learning_rate > 0
        _require(lr_ok, "learning_rate", self.learning_rate, "use a positive number")
        _require(0 < self.decay <= 1, "decay", self.decay, "use a number above 0 and at most 1")
        _require(self.decay_by in ("epoch", "update"), "decay_by", self.decay_by, "use 'epoch' or 'update'")
        _require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "use 0 (no clipping) or more")
        for name in ("decay_every", "perturbations", "monitor_every", "preview_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in ("backprop_steps", "micro_batch", "patience"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use 1 or more, or None")
        _require(self.gradient in GRADIENTS, "gradient", self.gradient, f"use one of {', '.join(GRADIENTS)}")
        _require(self.perturbation_scale > 0, "perturbation_scale", self.perturbation_scale, "use a positive number")

    def learning_rate_factor(self, updates: int, updates_per_epoch: int = 1) -> float:
        """What the learning rate is multiplied by after so many updates."""
        done = updates if self.decay_by == "update" else updates // updates_per_epoch
        return self.decay ** (done // self.decay_every)


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig(LoopConfig):
    """Training of IPGO tokens. The defaults are the paper's prompt-wise settings (appendix B)."""

    tokens: TokenConfig = field(default_factory=TokenConfig)
    epochs: int = 50
    learning_rate: float = 1e-3
    decay: float = 0.9
    decay_every: int = 10
    backprop_steps: int | None = 1  # K = 1, as DRaFT-1
    conformity: float = 1e-3  # gamma of eq. 12
    conformity_norm: Literal["l2-squared", "l1-mean"] = "l2-squared"  # eq. 11; the notebook has a mean of |.|
    seeds: tuple[int, ...] = (0,)  # every update sees every prompt of its batch with each of these
    batch_size: int | None = None  # prompts per update; None is all of them in one update

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.epochs >= 1, "epochs", self.epochs, "use 1 or more")
        _require(self.conformity >= 0, "conformity", self.conformity, "use 0 or more")
        norms = ("l2-squared", "l1-mean")
        _require(self.conformity_norm in norms, "conformity_norm", self.conformity_norm, f"use one of {norms}")
        object.__setattr__(self, "seeds", tuple(whole_number("seeds", seed) for seed in self.seeds))
        _require(len(self.seeds) > 0, "seeds", self.seeds, "give at least one seed")
        batch_ok = self.batch_size is None or self.batch_size >= 1
        _require(batch_ok, "batch_size", self.batch_size, "use 1 or more, or None for all prompts at once")

    @classmethod
    def preset(cls, name: str, *, batch: bool = False, **changes: Any) -> OptimizeConfig:
        """`"paper"` or `"released-code"`; `batch` gives the settings for one set of tokens shared by many prompts."""
        tokens = TokenConfig.preset(name)
        if name == "paper":
            base = cls(tokens=tokens, epochs=20, decay=1.0, batch_size=4) if batch else cls(tokens=tokens)
        else:
            base = cls(tokens=tokens, backprop_steps=2, conformity_norm="l1-mean")
            if batch:
                base = replace(base, epochs=20, decay=0.95, decay_every=15, decay_by="update", batch_size=4)
        return replace(base, **changes)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(LoopConfig):
    """Probability-regularized noise optimization; one independent problem per image of the batch."""

    iterations: int = 50
    learning_rate: float = 1e-2  # with the regularizer; the paper uses 1e-3 without
    regularization: float = 1.0  # mu of eq. 9; 0 switches it off
    which: Literal["initial", "all"] = "all"  # the initial latent only, or every injected noise too
    block_size: int | None = None  # k; None chooses it from the number of values
    permutations: int = 100  # b
    # A noise whose P(z) is below this is never the best. The run ends when every image is below it or, where images
    # share tokens, when one is.
    min_probability: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.iterations >= 1, "iterations", self.iterations, "use 1 or more")
        _require(self.regularization >= 0, "regularization", self.regularization, "use 0 or more")
        _require(self.which in ("initial", "all"), "which", self.which, "use 'initial' or 'all'")
        _require(self.permutations >= 1, "permutations", self.permutations, "use 1 or more")
        block_ok = self.block_size is None or self.block_size >= 1
        _require(block_ok, "block_size", self.block_size, "use 1 or more, or None")
        limit = self.min_probability
        _require(limit is None or 0 < limit <= 1, "min_probability", limit, "use a probability above 0, or None")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Tokens and noise in one run: the loop's settings are the noise's, the tokens bring their own learning rate."""

    tokens: OptimizeConfig = field(default_factory=OptimizeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
