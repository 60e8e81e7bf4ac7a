"""The authors' released code against this engine: same weights, noise and reward, in one run.

    python -m benchmarks.released_code --ipgo ../ipgo --noise ../dno                  # a small random SD1.5-style model
    python -m benchmarks.released_code --ipgo ../ipgo --noise ../dno --weights sd15 --size 64
    python -m benchmarks.released_code --ipgo ../ipgo --noise ../dno --weights demo --basis 15

`--ipgo` and `--noise` are checkouts of the papers' repositories; their code runs as it is, but for the substitutions
that `released_sources.py` names. Agreement: gradients of the first iteration, before clipping. Time: whole iterations
of both public loops, taken in turns; processor time on a CPU, wall time on CUDA. Everything in
float32. Weights are random unless --weights demo.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import cached, write_table
from benchmarks.released_compare import Comparison
from benchmarks.turns import Calls


def report(found: dict[str, dict[str, Any]], out: Path, title: str) -> str:
    """Two tables: agreement, and cost as ratios of the released code."""
    same, cost = [], []
    for name, result in found.items():
        for what, numbers in result["agreement"].items():
            if "cosine" in numbers:
                row = {"comparison": name, "what": what, "cosine": f"{numbers['cosine']:.8f}"}
                same.append(row | {"relative error": f"{numbers['relative error']:.1e}"})
        for who, record in result.get("cost", {}).items():
            reference = result["cost"]["released"]
            row = {"comparison": name, "who": who, "seconds": f"{record['seconds']:.3f}"}
            row["released / this"] = f"{reference['seconds'] / record['seconds']:.2f}"
            row["peak MiB"] = f"{record['peak MiB']:.0f}"
            cost.append(row | {k: f"{v:g}" for k, v in record["calls"].items()})
        for who, seconds in result.get("seconds", {}).items():
            row = {"comparison": name, "who": who, "seconds": f"{seconds:.3f}"}
            row["released / this"] = f"{result['seconds']['released'] / seconds:.1f}"
            cost.append(row | dict.fromkeys(("peak MiB", *Calls.NAMES), ""))
    first = write_table(same, out / "agreement", f"First gradients, ours against the released code: {title}")
    return first + "\n" + write_table(cost, out / "cost", f"One iteration: {title}")


def main() -> None:
    """Run what is not there yet and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipgo", type=Path, required=True, help="checkout of the IPGO notebook's repository")
    parser.add_argument("--noise", type=Path, required=True, help="checkout of the noise paper's repository")
    parser.add_argument("--weights", choices=["small", "sd15", "demo"], default="small")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--basis", type=int, default=30, help="N; the notebook's basis has ten times as many columns")
    parser.add_argument("--token-steps", type=int, default=50)
    parser.add_argument("--noise-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="names of comparisons")
    parser.add_argument("--out", type=Path, default=Path("results/released_code"))
    options = parser.parse_args()
    bench = Comparison(options)
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        "tokens, prompt of 57": lambda: bench.tokens(57),
        "tokens, prompt of 4": lambda: bench.tokens(4),
        "noise, eta 0": lambda: bench.noise(0.0),
        "noise, eta 1": lambda: bench.noise(1.0),
        "regularizer, typical noise": lambda: bench.regularizer(1.0),
        "regularizer, noise x 1.02": lambda: bench.regularizer(1.02),
    }
    steps = f"{options.token_steps} steps for tokens, {options.noise_steps} for noise"
    folder = options.out / f"{options.weights}-{options.size}-{options.token_steps}-{options.noise_steps}"
    found = {}
    for name in options.only or cells:
        found[name] = cached(folder / f"{name.replace(' ', '-')}.json", cells[name])
        print(name, json.dumps(found[name])[:300], flush=True)
    what = "the demo model" if options.weights == "demo" else f"random weights, {options.weights} layout"
    print(report(found, folder, f"{what}, {options.size} px, {steps}, float32"))


if __name__ == "__main__":
    main()
