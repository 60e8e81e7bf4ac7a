"""The parser: seven commands and what they share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..config import OptimizeConfig
from . import settings

EPILOG = (
    "Ctrl-C once stops a run, writes the best so far and exits with code 130; --resume goes on from there. "
    "Ctrl-C twice leaves at once. Exit codes: 0 done, 1 the run broke down, 2 bad input, 130 interrupted."
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; prompts and pictures may stand before, between and after the options."""
    parser = build_parser()
    typed = list(sys.argv[1:] if argv is None else argv)
    for text in typed:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python hands over bytes it cannot decode
            parser.error(f"argument {text!r} holds bytes that are not UTF-8 text")
    arguments, rest = parser.parse_known_args(typed)
    free = next((vars(arguments)[name] for name in ("prompts", "images") if name in arguments), None)
    if rest and (free is None or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if free is not None:
        free += rest
    return arguments


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="ipgo", description="Reward-guided optimization of prompts and noise.", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "demo", "everything once, on the embedded demo model", _demo_options)
    _add(commands, "train", "learn IPGO tokens for prompts", _train_options)
    _add(commands, "noise", "optimize the noise of every picture", _noise_options)
    _add(commands, "joint", "tokens and noise in one run", _joint_options)
    _add(commands, "generate", "pictures of prompts, with learned tokens or noise", _generate_options)
    _add(commands, "score", "score pictures that exist", _score_options)
    _add(commands, "download", "fetch the published weights of rewards, once", _download_options)
    return parser


def _add(commands: Any, name: str, text: str, options: Callable[[Any], None]) -> None:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EPILOG)
    options(parser)


# Each command imports what it needs when it runs: `--help` and a mistyped option should not wait for diffusers.


def _demo_options(parser: Any) -> None:
    from .demo import run

    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default: 0)")
    _add_output(parser, resume=False)
    _add_machine(parser)
    parser.set_defaults(run=run)


def _train_options(parser: Any) -> None:
    from .runs import run_train

    _add_run(parser)
    _add_token_run(parser)
    settings.add_options(settings.add_tokens(parser), "train_", OptimizeConfig, settings.TRAIN)
    settings.add_loop(parser)
    parser.set_defaults(run=run_train)


def _noise_options(parser: Any) -> None:
    from .runs import run_noise

    _add_run(parser)
    settings.add_noise(parser)
    parser.set_defaults(run=run_noise)


def _joint_options(parser: Any) -> None:
    from .runs import run_joint

    _add_run(parser)
    _add_token_run(parser)
    settings.add_options(settings.add_tokens(parser), "joint_", OptimizeConfig, settings.JOINT_TOKENS)
    settings.add_noise(parser)
    parser.set_defaults(run=run_joint)


def _generate_options(parser: Any) -> None:
    from .generate import run

    _add_prompts(parser)
    group = parser.add_argument_group("what was learned")
    group.add_argument("--tokens", metavar="FILE", help="tokens file written by train or joint")
    group.add_argument("--noise", metavar="FILE", help="noise file written by noise or joint; brings its prompts")
    _add_model(parser)
    _add_rewards(parser)
    _add_output(parser, resume=False)
    _add_machine(parser)
    parser.set_defaults(run=run)


def _score_options(parser: Any) -> None:
    from .score import run

    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="one for all, or one per picture")
    group.add_argument("--prompts-file", metavar="FILE", help="one per line; blank lines and # comments are skipped")
    parser.add_argument("--top", type=int, default=25, help="how many pictures the contact sheet shows (default: 25)")
    _add_rewards(parser)
    _add_output(parser, resume=False)
    _add_machine(parser, model=False)
    parser.set_defaults(run=run)


def _download_options(parser: Any) -> None:
    from .download import run

    parser.add_argument("rewards", nargs="*", metavar="REWARD", help="names; without any, what there is to fetch")
    parser.add_argument(
        "--to",
        default="models/rewards",
        metavar="FOLDER",
        help="the folder of all weights, such as ComfyUI's models/rewards (default: models/rewards)",
    )
    parser.add_argument("--yes", action="store_true", help="agree to sizes and licences without being asked")
    parser.add_argument("--host", metavar="URL", help="a mirror of the hub, with the same paths")
    parser.set_defaults(run=run)


def _at_least(least: int) -> Callable[[str], int]:
    """A converter for whole numbers from `least` on."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return number

    return convert


def _add_run(parser: Any) -> None:
    """What train, noise and joint share."""
    _add_prompts(parser)
    _add_model(parser)
    _add_rewards(parser)
    _add_output(parser, resume=True)
    _add_machine(parser)
    parser.add_argument(
        "--best-of-n",
        nargs="?",
        type=_at_least(1),
        const=0,
        metavar="N",
        help="also score the best of N random seeds; without N, of as many as cost the same model evaluations",
    )


def _add_prompts(parser: Any) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts")
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt per line; blank lines and # comments are skipped"
    )


def _add_token_run(parser: Any) -> None:
    """What train and joint share."""
    parser.add_argument(
        "--fresh-seeds",
        type=_at_least(0),
        default=1,
        metavar="N",
        help="seeds not trained on that tokens are tried with (default: 1)",
    )
    parser.add_argument(
        "--mode",
        choices=("prompt-wise", "batch"),
        default="prompt-wise",
        help="one set of tokens per prompt, or one that all prompts share, with other defaults: --epochs 20, "
        "--batch-size 4 and no decay, or the released code's (default: prompt-wise)",
    )


def _add_model(parser: Any) -> None:
    from ..generators.samplers import SAMPLERS

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="FOLDER", help='local diffusers folder, or "demo" (default)')
    group.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: ddim)")
    group.add_argument("--eta", type=float, help="DDIM's: 0 is deterministic, 1 injects noise (default: 0)")
    group.add_argument("--steps", type=int, help="model steps (default: 25)")
    group.add_argument("--cfg", type=float, default=None, help="guidance scale (default: 7.5, demo model: its own)")
    group.add_argument("--size", default=None, metavar="N|WxH", help="pixels, multiples of 8 (default: the model's)")
    group.add_argument("--negative", default=None, metavar="TEXT", help="negative prompt")
    group.add_argument("--seeds", metavar="LIST", help="of the pictures: 3, or 0,1,7, or 0-9 (default: 0)")
    group.add_argument("--unpadded", action="store_true", help="cut prompts after their last token, no padding to 77")


def _add_rewards(parser: Any) -> None:
    group = parser.add_argument_group("rewards")
    group.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="what to maximize; several are summed by weight (default with the demo model: demo-clip)",
    )
    group.add_argument(
        "--reward-path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file or folder of a reward's weights, aesthetic:head=PATH and aesthetic:clip=PATH for its two parts; the "
        "address of a judge, which pictures are then sent to, judge:url=, judge:model=, judge:max_calls= and so on for "
        "its settings",
    )
    group.add_argument(
        "--reward-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the rewards' weights; half of the memory at half precision (default: float32)",
    )
    group.add_argument(
        "--offload-rewards",
        action="store_true",
        help="keep the rewards' weights in main memory and copy them to the device for each call: slower, needs less "
        "memory there",
    )
    group.add_argument(
        "--monitor", action="append", default=[], metavar="NAME", help="held-out reward: measured, not optimized"
    )


def _add_output(parser: Any, *, resume: bool) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out", metavar="FOLDER", help="new folder for the results (default: results/COMMAND, numbered)"
    )
    if resume:
        group.add_argument("--resume", action="store_true", help="go on with the run in --out")


def _add_machine(parser: Any, *, model: bool = True) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    if model:
        kinds = ("float32", "float16", "bfloat16")
        group.add_argument("--dtype", choices=kinds, help="of the model's weights (default: float32)")
        group.add_argument(
            "--autocast",
            choices=("none", "bfloat16", "float16"),
            help="compute UNet and VAE in this type (default: none)",
        )
    group.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads")
