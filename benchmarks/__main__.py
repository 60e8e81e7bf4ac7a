"""The whole suite: every question's command, one after the other.

    python -m benchmarks --quick            # a first look on the embedded demo model
    python -m benchmarks                    # everything on the demo model; PAPERS.md says where it was made with less
    python -m benchmarks --jobs 2           # the long questions shared by two processes
    python -m benchmarks --model FOLDER --reward hpsv2 --reward-path FILE --held-out clip --held-out-path FOLDER
                                            # a diffusers model, settings near the papers': for a GPU
    python -m benchmarks --show             # the commands, without running them

Every command writes its table and its log below --out. Those that run many prompts go on where they stopped, so that a
second call finishes what the first one left; cells made with other settings are never taken for theirs. Not in here,
because they need files of others: released_code, reward_models, reward_runs. What a command lacks (a ComfyUI, peft)
fails that command alone; the end says which. Arguments that are not known here go to every command that samples.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

DEMO = "--steps 8 --eta 0"
LENGTHS = Path(__file__).parent / "demo_length_prompts.txt"  # ten short, ten medium, ten long
PAPER = "--steps 50 --guidance 7.5 --size 512"  # with DDIM and eta 1, the defaults and the noise paper's choice
LMS = "--sampler lms --eta 0"  # the IPGO paper's


@dataclass(frozen=True)
class Command:
    """One question: module, arguments, and whether several processes can share it."""

    name: str
    module: str
    arguments: str = ""
    samples: bool = True  # takes the sampler's settings
    own_list: bool = False  # has prompts of its own: --list is not for it
    shared: bool = False


def demo_commands(quick: bool) -> list[Command]:
    """Settings that move the demo model in few updates; the papers' are for models of another size."""
    size = "--prompts 2 --seeds 1" if quick else "--prompts 20 --seeds 3"
    small = size if quick else "--prompts 20 --seeds 1"
    tokens, noise = "--token-lr 0.02 --token-backprop 0", "--noise-lr 0.1 --noise-backprop 3"
    updates, least, longest = (2, 2, 4) if quick else (6, 10, 30)
    compare = (
        f"--epochs {2 if quick else 10} --iterations {2 if quick else 20} --most {4 if quick else 48} --free-lr 0.1"
    )
    claims = f"{tokens} {noise} {size}"
    token_questions = "rotation plain" if quick else (
        "plain rotation category batch backprop preset one-word basis lengths rate scale seeds"
    )  # fmt: skip
    longer_questions = "regularizer black-box" if quick else (
        "regularizer which mu block permutations black-box over-parameterized"
    )  # fmt: skip
    lengths = f"--list {shlex.quote(str(LENGTHS))} --prompts 30 --question short-prompts medium-prompts long-prompts"
    if quick:
        lengths = f"--list {shlex.quote(str(LENGTHS))} --question short-prompts"
    return [
        Command("compare", "compare_methods", f"{compare} {tokens} {noise} {size}", shared=True),
        Command("claims", "claims", f"--epochs {updates} {claims} --question constraints", shared=True),
        Command("claims", "claims", f"--epochs {2 if quick else 4} {claims} --question {token_questions}", shared=True),
        Command("claims", "claims", f"--epochs {least} {claims} --question {longer_questions}", shared=True),
        Command("claims", "claims", f"--epochs {2 if quick else 4} {claims} {lengths}", shared=True),
        Command("claims", "claims", f"{size} --question degenerate"),
        Command("whiteness", "whiteness", f"--learning-rate 0.05 --backprop 3 --iterations {longest}", own_list=True),
        Command("cheaper", "cheaper_updates", f"--learning-rate 0.02 --epochs {updates} {small}"),
        Command("draft", "draft", f"--epochs {3 if quick else 12} --token-lr 0.02 {size}"),
        Command("finetune", "finetune", f"{noise} {size} --iterations {least} --updates {20 if quick else 300}"),
        Command("robust", "robust_effect", f"{noise} --iterations {longest} --prompts {2 if quick else 6}"),
        *toys(quick),
        Command("iteration_cost", "iteration_cost", f"--repeats {1 if quick else 3}", samples=False),
        Command("comfy_iteration", "comfy_iteration", f"--repeats {1 if quick else 3}", samples=False),
    ]


def toys(quick: bool) -> list[Command]:
    """Questions that need no image model."""
    sizes = "--shapes 'demo model, initial' --samples 5" if quick else ""
    return [
        Command("ring", "ring", f"--iterations {60 if quick else 300}", samples=False),
        Command("block_size", "block_size", f"{sizes} --csv OUT.csv --markdown OUT.md", samples=False),
    ]


def paper_commands() -> list[Command]:
    """The papers' own rates, updates and K, which are the commands' defaults, and each paper's own sampler.

    Where both methods are compared there is one sampler, the noise paper's; cheaper updates need DDIM with eta 0.
    """
    from benchmarks.claims_table import Budget, noise_questions, token_questions

    budget = Budget(1, 1e-3, 1e-2, None, None, 30)
    tokens, noise = (" ".join(asked(budget)) for asked in (token_questions, noise_questions))
    return [
        Command("compare", "compare_methods", "--free-lr 0.001", shared=True),
        Command("claims", "claims", f"{LMS} --released-basis 30 --question {tokens}", shared=True),
        Command("claims", "claims", f"--question {noise} degenerate", shared=True),
        Command("whiteness", "whiteness", own_list=True),
        Command("cheaper", "cheaper_updates", "--eta 0 --epochs 50"),
        Command("draft", "draft", LMS),
        Command("finetune", "finetune", "--iterations 50"),
        Command("robust", "robust_effect"),
        Command("iteration_cost", "iteration_cost", "--random sd15 --size 512 --dtype float16", samples=False),
    ]


def settings_for(command: Command, rest: list[str]) -> list[str]:
    """What of the command line is for this command."""
    if not command.samples:
        return []
    if command.own_list and "--list" in rest:
        place = rest.index("--list")
        return rest[:place] + rest[place + 2 :]
    return rest


def run(command: Command, out: Path, rest: list[str], jobs: int) -> bool:
    """Run one command, in several processes where it can be shared; True when all went well."""
    place = out / command.name
    arguments = [sys.executable, "-m", f"benchmarks.{command.module}", *shlex.split(command.arguments)]
    arguments = [part.replace("OUT", str(place)) for part in arguments]
    arguments += [] if command.module == "block_size" else ["--out", str(place)]
    arguments += settings_for(command, rest)
    jobs = jobs if command.shared else 1
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    started, running = time.time(), []
    for i in range(jobs):
        shard = ["--shard", f"{i}/{jobs}"] if jobs > 1 else []
        log = (out / f"{command.name}-{i}.log").open("a")
        running.append(subprocess.Popen([*arguments, *shard], stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait() for process in running]
    good = not any(codes)
    if jobs > 1 and good:
        with (out / f"{command.name}-report.log").open("w") as log:
            good = subprocess.run([*arguments, "--report"], stdout=log, stderr=subprocess.STDOUT).returncode == 0
    minutes = (time.time() - started) / 60
    print(f"{command.name}: {minutes:.1f} min, {'done' if good else 'FAILED, see its log'}", flush=True)
    return good


def main() -> int:
    """Run the suite; the exit code is the number of commands that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small budgets: every command runs, no number means much")
    parser.add_argument("--model", help="a local diffusers folder; needs --reward and --held-out")
    parser.add_argument("--reward", help="what is optimized")
    parser.add_argument("--held-out", help="what is only watched")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the questions that can be shared")
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--show", action="store_true", help="print the commands and stop")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options, rest = parser.parse_known_args()
    if options.model and not (options.reward and options.held_out):
        from benchmarks.common import UNNAMED

        parser.error(UNNAMED)
    commands = paper_commands() if options.model else demo_commands(options.quick)
    named = {"--model": options.model, "--reward": options.reward, "--held-out": options.held_out}
    given = [part for option, value in named.items() if value for part in (option, value)]
    rest = [*(PAPER if options.model else DEMO).split(), *given, *rest]
    chosen = [command for command in commands if options.only is None or command.name in options.only]
    if options.show:
        for command in chosen:
            print("python -m", f"benchmarks.{command.module}", command.arguments, *settings_for(command, rest))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    return sum(not run(command, options.out, rest, options.jobs) for command in chosen)


if __name__ == "__main__":
    sys.exit(main())
