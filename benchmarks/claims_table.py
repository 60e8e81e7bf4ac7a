"""The papers' questions: which settings answer each of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ipgo_engine import NoiseConfig, OptimizeConfig, TokenConfig
from ipgo_engine.config import LoopConfig


@dataclass(frozen=True)
class Entry:
    """One row of a question's table. The first entry of a question is what the others are compared with."""

    label: str
    config: LoopConfig
    generator: dict[str, Any] = field(default_factory=dict)  # sampler settings that differ from the command line's
    reward: str | None = None  # another target than the command line's
    batch: int = 1  # prompts that share one set of tokens
    among: str = "list"  # whom they share them with: "list" as they come, "category" its own, "mixed" one of each
    words: tuple[int, int] = (1, 1000)  # only prompts of so many words, from and to


@dataclass(frozen=True)
class Budget:
    """What the command line sets for every entry."""

    epochs: int
    token_rate: float
    noise_rate: float
    token_backprop: int | None
    noise_backprop: int | None
    basis: int  # N of the released-code preset, whose basis has N x M columns


def tokens(budget: Budget, shape: dict[str, Any] | None = None, **changes: Any) -> OptimizeConfig:
    """The paper's settings but for the budget and the changes."""
    base = OptimizeConfig(epochs=budget.epochs, checkpoint=False, learning_rate=budget.token_rate)
    base = replace(base, backprop_steps=budget.token_backprop)
    return replace(base, tokens=TokenConfig(**(shape or {})), **changes)


def noise(budget: Budget, **changes: Any) -> NoiseConfig:
    """The paper's settings but for the budget and the changes."""
    base = NoiseConfig(iterations=budget.epochs, checkpoint=False, learning_rate=budget.noise_rate)
    return replace(base, backprop_steps=budget.noise_backprop, **changes)


def scaled(rate: float, *factors: float) -> list[float]:
    """The rate itself, then its multiples."""
    return [rate, *(float(f"{rate * factor:.3g}") for factor in factors)]


def token_questions(b: Budget) -> dict[str, list[Entry]]:
    """IPGO, section 5.5 and appendices."""
    free: dict[str, Any] = {"orthonormal": False}
    sizes, lengths = (5, 10, 20, 30, 40), (0, 5, 10)
    released = TokenConfig.preset("released-code", basis_size=b.basis)
    notebook = OptimizeConfig.preset("released-code", tokens=released, epochs=b.epochs, checkpoint=False)
    notebook = replace(notebook, learning_rate=b.token_rate, backprop_steps=b.token_backprop)
    pairs = [(p, s) for p in reversed(lengths) for s in reversed(lengths) if p + s]
    shared = replace(tokens(b), decay=1.0)

    def both(length: int) -> OptimizeConfig:
        return tokens(b, {"prefix_length": length, "suffix_length": length})

    return {
        "constraints": [
            Entry("V + C + O", tokens(b)),
            Entry("V + C", tokens(b, free)),
            Entry("V", tokens(b, free, conformity=0.0)),
            Entry("none", tokens(b, free | {"value_bound": None}, conformity=0.0)),
        ],
        "rotation": [Entry("on", tokens(b)), Entry("off", tokens(b, {"rotation": False}))],
        "plain": [Entry("low rank", tokens(b)), Entry("plain embeddings", tokens(b, {"low_rank": False}))],
        "basis": [Entry(f"N = {n}", tokens(b, {"basis_size": n})) for n in sorted(sizes, key=lambda n: n != 30)],
        "lengths": [Entry(f"{p} + {s}", tokens(b, {"prefix_length": p, "suffix_length": s})) for p, s in pairs],
        "scale": [Entry(f"tokens x {s:g}", tokens(b, {"scale": s})) for s in (1.0, 3.0, 10.0)],
        "one-word": [Entry(f"{n} + {n}", both(n), words=(1, 1)) for n in (10, 5, 20, 40)],
        # Figure 8 is about a reward that does not read the prompt: does the picture still show it (held-out)?
        "over-parameterized": [
            Entry(f"{n} + {n}", both(n), reward="brightness", words=(1, 1)) for n in (10, 2, 5, 20, 40)
        ],
        "short-prompts": [Entry(f"{n} + {n}", both(n), words=(1, 2)) for n in (10, 2, 15)],
        "medium-prompts": [Entry(f"{n} + {n}", both(n), words=(3, 8)) for n in (10, 2, 15)],
        "long-prompts": [Entry(f"{n} + {n}", both(n), words=(9, 1000)) for n in (10, 2, 15)],
        "backprop": [Entry(f"K = {k or 'all'}", tokens(b, backprop_steps=k)) for k in (None, 1, 2, 4)],
        "rate": [Entry(f"lr {r:g}", tokens(b, learning_rate=r)) for r in scaled(b.token_rate, 0.05, 0.3, 3)],
        "preset": [Entry("paper", tokens(b)), Entry("released-code", notebook)],
        "seeds": [
            Entry("one seed each", tokens(b)),
            Entry("four seeds share tokens", tokens(b, seeds=(0, 1, 2, 3))),
        ],
        "batch": [Entry(f"B = {n}", shared, batch=n) for n in (4, 10)],
        "category": [Entry(f"B = 4, {among}", shared, batch=4, among=among) for among in ("category", "mixed")],
    }


def noise_questions(b: Budget) -> dict[str, list[Entry]]:
    """The noise paper, sections 3 to 5."""
    rates, scales = scaled(b.noise_rate, 0.1, 0.3, 3), (1.0, 0.1, 0.3, 3.0, 10.0)
    kinds = ("hybrid-noise", "hybrid-image", "zeroth-order")
    both = [(r, mu) for r in rates for mu in (1.0, 0.0)]
    return {
        "regularizer": [
            Entry(f"lr {r:g}, {'mu = 1' if mu else 'free'}", noise(b, learning_rate=r, regularization=mu))
            for r, mu in both
        ],
        "mu": [Entry(f"mu = {mu:g}", noise(b, regularization=mu)) for mu in scales],
        "block": [Entry(f"k = {k or 'chosen'}", noise(b, block_size=k)) for k in (None, 1, 2, 4, 16, 64)],
        "permutations": [Entry(f"b = {n}", noise(b, permutations=n)) for n in (100, 1, 10)],
        "which": [
            Entry("eta 1, all noises", noise(b), {"eta": 1.0}),
            Entry("eta 1, initial noise", noise(b, which="initial"), {"eta": 1.0}),
            Entry("eta 0", noise(b), {"eta": 0.0}),
        ],
        "black-box": [Entry(kind, noise(b, gradient=kind), reward="jpeg") for kind in kinds],
    }


def questions(budget: Budget) -> dict[str, list[Entry]]:
    """Every question, by name."""
    return token_questions(budget) | noise_questions(budget)
