"""Every field of the engine's settings as a command line option, with the engine's own default."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, NamedTuple

from ..config import GRADIENTS, JointConfig, NoiseConfig, OptimizeConfig, TokenConfig
from .inputs import parse_seeds


class Option(NamedTuple):
    """How one field is given: a converter, the permitted words, or `bool` for a switch."""

    help: str
    kind: Callable[[str], Any] = float
    choices: tuple[str, ...] | None = None
    flag: str | None = None
    none: str | None = None
    """The word that stands for None, where None is allowed."""
    default: str | None = None
    """What the command line starts from, where that is not the engine's default."""

    def parse(self, text: str) -> Any:
        """The value that was typed."""
        if self.none is not None and text == self.none:
            return None
        try:
            return self.kind(text)
        except ValueError:
            number = "a whole number" if self.kind is int else "a number"
            also = f" or '{self.none}'" if self.none else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {number}{also}") from None


def _method_seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


LOOP = {
    "learning_rate": Option("size of an update"),
    "decay": Option("the learning rate is multiplied by this ..."),
    "decay_every": Option("... after every so many epochs or iterations", int),
    "clip_norm": Option("largest gradient norm; 0 switches clipping off"),
    "backprop_steps": Option("K: gradients pass through the last K model steps", int, none="all"),
    "checkpoint": Option("recompute activations: slower by a third, far less memory", bool),
    "gradient": Option("how the reward's gradient is found", str, tuple(GRADIENTS)),
    "perturbations": Option("samples of one estimated gradient", int),
    "perturbation_scale": Option("size of a perturbation"),
    "micro_batch": Option("images generated at once", int, none="all", default="4"),
    "monitor_every": Option("steps between measurements of the held-out rewards", int),
    "patience": Option("stop after so many measurements without a better held-out reward", int, none="none"),
    "seed": Option("random numbers of the method itself, not of the pictures", _method_seed, flag="--method-seed"),
}
TOKENS = {
    "prefix_length": Option("tokens before the prompt", int),
    "suffix_length": Option("tokens after the prompt", int),
    "basis_size": Option("N, vectors of the basis", int),
    "low_rank": Option("basis times coefficients; off: plain embeddings", bool),
    "rotation": Option("rotate the basis", bool),
    "orthonormal": Option("keep the basis orthonormal", bool),
    "value_bound": Option("largest coefficient, or 'none'", none="none"),
    "scale": Option("the tokens are multiplied by this", flag="--token-scale"),
}
TRAIN = {
    "epochs": Option("passes over the prompts", int),
    "conformity": Option("gamma, weight of the conformity penalty"),
    "conformity_norm": Option("norm of the conformity penalty", str, ("l2-squared", "l1-mean")),
    "batch_size": Option("prompts of one update", int, none="all"),
}
NOISE = {
    "iterations": Option("updates", int),
    "regularization": Option("weight of the probability regularizer; 0 switches it off"),
    "which": Option("optimize the initial noise only, or every injected noise too", str, ("initial", "all")),
    "block_size": Option("k, block size of the regularizer", int, none="auto"),
    "permutations": Option("permutations of the regularizer", int),
    "min_probability": Option(
        "noise whose P(z) is below this is never the best; stop when that of every image is (with tokens: of any)",
        none="none",
    ),
}
JOINT_TOKENS = {key: TRAIN[key] for key in ("conformity", "conformity_norm")} | {
    "learning_rate": Option("size of an update of the tokens", flag="--token-learning-rate")
}


def add_options(group: Any, prefix: str, owner: type, options: Mapping[str, Option]) -> None:
    """Options for some fields of a settings class; what is not given stays out of the namespace."""
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(owner)}
    for field, option in options.items():
        flag = option.flag or "--" + field.replace("_", "-")
        text = f"{option.help} (default: {_shown(defaults[field], option)})".replace("%", "%%")
        common: dict[str, Any] = {"dest": prefix + field, "default": argparse.SUPPRESS, "help": text}
        if option.kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif option.choices:
            group.add_argument(flag, choices=option.choices, **common)
        else:
            group.add_argument(flag, type=option.parse, metavar="X", **common)


def _shown(value: Any, option: Option) -> str:
    if option.default or value is None:
        return option.default or option.none or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _given(arguments: argparse.Namespace, prefix: str, options: Mapping[str, Option]) -> dict[str, Any]:
    values = vars(arguments)
    return {field: values[prefix + field] for field in options if prefix + field in values}


def _loop(arguments: argparse.Namespace) -> dict[str, Any]:
    # All images at once would be the engine's default; a list of prompts would then fill the memory of any machine.
    return {"micro_batch": int(LOOP["micro_batch"].default or 1)} | _given(arguments, "loop_", LOOP)


def token_config(arguments: argparse.Namespace) -> OptimizeConfig:
    """Settings of `train`. Raises `InputError` for values that cannot be."""
    changes = _loop(arguments) | _given(arguments, "train_", TRAIN) | {"seeds": tuple(parse_seeds(arguments.seeds))}
    config = OptimizeConfig.preset(arguments.preset, batch=arguments.mode == "batch", **changes)
    return replace(config, tokens=_tokens(arguments))


def noise_config(arguments: argparse.Namespace) -> NoiseConfig:
    """Settings of `noise`."""
    return NoiseConfig(**_loop(arguments), **_given(arguments, "noise_", NOISE))


def joint_config(arguments: argparse.Namespace) -> JointConfig:
    """Settings of `joint`: loop and noise options are the noise's, the rest the tokens'."""
    changes = _given(arguments, "joint_", JOINT_TOKENS)
    learner = OptimizeConfig.preset(arguments.preset, seeds=tuple(parse_seeds(arguments.seeds)), **changes)
    return JointConfig(tokens=replace(learner, tokens=_tokens(arguments)), noise=noise_config(arguments))


def _tokens(arguments: argparse.Namespace) -> TokenConfig:
    return TokenConfig.preset(arguments.preset, **_given(arguments, "tokens_", TOKENS))


def add_loop(parser: Any) -> None:
    """Options of every optimization."""
    add_options(parser.add_argument_group("optimization"), "loop_", OptimizeConfig, LOOP)


def add_noise(parser: Any) -> None:
    """Options of `noise` and `joint`, whose learning rate and K differ from those of the tokens."""
    add_options(parser.add_argument_group("optimization"), "loop_", NoiseConfig, LOOP)
    add_options(parser.add_argument_group("noise"), "noise_", NoiseConfig, NOISE)


def add_tokens(parser: Any) -> Any:
    """Options of the tokens' shape; the group, for more."""
    group = parser.add_argument_group("tokens")
    group.add_argument("--preset", choices=("paper", "released-code"), default="paper", help="where defaults come from")
    add_options(group, "tokens_", TokenConfig, TOKENS)
    return group
