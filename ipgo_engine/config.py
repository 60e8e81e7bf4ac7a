"""Settings, one frozen dataclass per method, checked when they are made."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .errors import InputError

Gradient = Literal["auto", "exact", "zeroth-order", "hybrid-image", "hybrid-noise", "bayesian"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}: {rule}.")


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as Python's own integer: those of numpy and torch count, but go into no JSON."""
    rule = f"use a whole number of {least} or more" if most is None else f"use a whole number from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {value!r}: {rule}.") from error
    fits = least <= number and (most is None or number <= most)
    _require(fits and not isinstance(value, bool), name, value, rule)
    return number


def seed_number(name: str, value: Any) -> int:
    """A seed that torch takes, from 0 to 2^64 - 1, as Python's own integer."""
    return whole_number(name, value, 0, 2**64 - 1)


def seed_numbers(seeds: Any) -> tuple[int, ...]:
    """Seeds that torch takes; `InputError` for a single number, too."""
    try:
        found = tuple(seeds)
    except TypeError as error:
        raise InputError(f"seeds is {seeds!r}: give a list of whole numbers.") from error
    return tuple(seed_number("seeds", seed) for seed in found)


def _whole_numbers(config: Any, least: int, *names: str, or_none: bool = False) -> None:
    """Make these settings Python's own integers."""
    for name in names:
        value = getattr(config, name)
        if not (or_none and value is None):
            object.__setattr__(config, name, whole_number(name, value, least))


def _is_positive(number: float) -> bool:
    return 0 < number < math.inf


def _number(config: Any, name: str, fits: Callable[[float], bool], rule: str, or_none: bool = False) -> None:
    """Make this setting Python's own number. What is none becomes NaN, which fits no rule."""
    value = getattr(config, name)
    if or_none and value is None:
        return
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    _require(fits(number), name, value, rule)
    object.__setattr__(config, name, number)


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
        _whole_numbers(self, 0, "prefix_length", "suffix_length")
        _whole_numbers(self, 1, "basis_size")
        total = self.prefix_length + self.suffix_length
        _require(total > 0, "prefix_length + suffix_length", total, "at least one token must be learned")
        _number(self, "value_bound", _is_positive, "use a positive number, or None for no bound", or_none=True)
        _number(self, "scale", lambda n: math.isfinite(n) and n != 0, "use a finite number other than 0")

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
        object.__setattr__(self, "seed", seed_number("seed", self.seed))
        _number(self, "learning_rate", _is_positive, "use a positive number")
        _number(self, "decay", lambda n: 0 < n <= 1, "use a number above 0 and at most 1")
        _require(self.decay_by in ("epoch", "update"), "decay_by", self.decay_by, "use 'epoch' or 'update'")
        _number(self, "clip_norm", lambda n: n >= 0, "use 0 (no clipping) or more")
        _whole_numbers(self, 1, "decay_every", "perturbations", "monitor_every", "preview_every")
        _whole_numbers(self, 1, "backprop_steps", "micro_batch", "patience", or_none=True)
        _require(self.gradient in GRADIENTS, "gradient", self.gradient, f"use one of {', '.join(GRADIENTS)}")
        _number(self, "perturbation_scale", _is_positive, "use a positive number")

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
        _whole_numbers(self, 1, "epochs")
        _whole_numbers(self, 1, "batch_size", or_none=True)
        _number(self, "conformity", lambda n: 0 <= n < math.inf, "use 0 or more")
        norms = ("l2-squared", "l1-mean")
        _require(self.conformity_norm in norms, "conformity_norm", self.conformity_norm, f"use one of {norms}")
        object.__setattr__(self, "seeds", seed_numbers(self.seeds))
        _require(len(self.seeds) > 0, "seeds", self.seeds, "give at least one seed")

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
        _whole_numbers(self, 1, "iterations", "permutations")
        _whole_numbers(self, 1, "block_size", or_none=True)
        _number(self, "regularization", lambda n: 0 <= n < math.inf, "use 0 or more")
        _require(self.which in ("initial", "all"), "which", self.which, "use 'initial' or 'all'")
        rule = "use a probability above 0, or None"
        _number(self, "min_probability", lambda n: 0 < n <= 1, rule, or_none=True)


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Tokens and noise in one run: the loop's settings are the noise's, the tokens bring their own learning rate."""

    tokens: OptimizeConfig = field(default_factory=OptimizeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
