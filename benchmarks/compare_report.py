"""Table and figure of what `compare_methods` measured."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.common import cached, interval, shown, slug, write_table

METHODS = ("raw", "best-of-n", "random search", "ipgo", "noise", "noise, no regularizer", "joint")
LEARNING = ("ipgo", "noise", "joint")
ORDER = (
    "raw", "best of N for ipgo", "ipgo", "best of N for noise", "random search for noise", "noise, no regularizer",
    "noise", "best of N for joint", "joint",
)  # fmt: skip
START, END = "<!-- results: python -m benchmarks.compare_methods --report --readme -->", "<!-- end of results -->"
Found = dict[str, dict[str, dict[str, Any]]]  # method -> prompt -> scores, one per seed


def path_of(cells: Path, method: str, prompt: str) -> Path:
    """Where the scores of one cell are kept."""
    return cells / slug(method) / f"{slug(prompt)}.json"


def pick(candidates: list[dict[str, list[float]]], count: int) -> dict[str, list[float]]:
    """The best of the first `count` candidates of every seed, by the target."""
    chosen = [int(np.argmax(row["target"][:count])) for row in candidates]
    return {key: [row[key][i] for row, i in zip(candidates, chosen, strict=True)] for key in candidates[0]}


def collect(cells: Path, prompts: list[str]) -> Found:
    """What is there, with Best-of-N at the cost of each learning method and random search at that of noise.

    Prompts that lack a baseline are left out.
    """
    found: Found = {}
    for method in METHODS:
        files = {p: path_of(cells, method, p) for p in prompts}
        found[method] = {p: cached(f, dict) for p, f in files.items() if f.exists()}
    candidates, searched, raw = found.pop("best-of-n"), found.pop("random search"), found["raw"]
    complete = {p for p in prompts if p in raw and (p in candidates or not candidates)}
    found = {method: {p: row for p, row in rows.items() if p in complete} for method, rows in found.items()}
    pools = [(f"best of N for {method}", candidates, method) for method in LEARNING]
    for name, pool, method in [*pools, ("random search for noise", searched, "noise")]:
        found[name] = {
            prompt: at_equal_cost(pool[prompt]["candidates"], scores["evaluations"], raw[prompt]["evaluations"])
            for prompt, scores in found[method].items()
            if prompt in pool
        }
    return {method: rows for method, rows in found.items() if rows}


def at_equal_cost(pool: list[dict[str, list[float]]], cost: float, per_image: float) -> dict[str, Any]:
    """The best of as many candidates as the cost pays for."""
    count = min(len(pool[0]["target"]), max(1, round(cost / per_image)))
    return pick(pool, count) | {"evaluations": count * per_image, "n": count}


def gain(found: Found, method: str, key: str, base: str = "raw") -> tuple[float, float, float]:
    """Mean and interval of a method's score minus another's, paired by prompt and seed."""
    pairs = [(p, a - b) for p, row in found[method].items() for a, b in zip(row[key], found[base][p][key], strict=True)]
    return interval([d for _, d in pairs], [p for p, _ in pairs])


def report(out: Path, cells: Path, prompts: list[str], model: str) -> str:
    """Table and figure: means with 95 % intervals over prompts; gains are paired with the raw prompt."""
    found = collect(cells, prompts)
    rows = [table_row(found, method) for method in ORDER if method in found]
    title = f"{model}: {len(found['raw'])} prompts, target reward and held-out reward"
    text = write_table(rows, out / "table", title) + versus(found)
    (out / "table.md").write_text(text, encoding="utf-8")
    figure(found, out / "figure.png")
    return text


def table_row(found: Found, method: str) -> dict[str, Any]:
    """One row of the table."""
    rows = found[method]

    def values(key: str) -> list[float]:
        return [v for row in rows.values() for v in row[key]]

    groups = [p for p, row in rows.items() for _ in row["target"]]
    fresh = ""
    if all("fresh" in row for row in rows.values()):
        differences = np.subtract(values("fresh"), values("fresh_raw")).tolist()
        fresh = shown(interval(differences, [p for p, row in rows.items() for _ in row["fresh"]]))
    return {
        "method": method,
        "evaluations": round(float(np.mean([row["evaluations"] for row in rows.values()]))),
        "target": shown(interval(values("target"), groups)),
        "gain": shown(gain(found, method, "target")),
        "held-out": shown(interval(values("held_out"), groups)),
        "held-out gain": shown(gain(found, method, "held_out")),
        "P(z) median": f"{np.median(values('probability')):.2g}",
        "P(z) lowest": f"{np.min(values('probability')):.2g}",
        "fresh-seed gain": fresh,
    }


PLAIN = {
    "raw": "your prompt as it is",
    "best of N for noise": "best of {n} random seeds",
    "random search for noise": "random search around the best seed",
    "ipgo": "IPGO tokens",
    "noise": "noise, regularized",
    "noise, no regularizer": "noise, not regularized",
    "joint": "tokens and noise together",
}


def summary(found: Found) -> str:
    """The table of the README: what each method costs and gains, in words."""
    lines = [
        "| method | cost, in pictures | reward | held-out reward | smallest P(z) |",
        "| --- | --- | --- | --- | --- |",
    ]
    unit = np.mean([row["evaluations"] for row in found["raw"].values()])
    for method, name in PLAIN.items():
        if method in found:
            row = table_row(found, method)
            count = round(row["evaluations"] / unit)
            cells = [name.format(n=count), count, row["target"], row["held-out"], row["P(z) lowest"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def put_into_readme(out: Path, cells: Path, prompts: list[str]) -> None:
    """Replace the table between the README's two marks, and the figure in docs."""
    root = Path(__file__).resolve().parents[1]
    before, _, rest = (root / "README.md").read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    text = before + START + "\n" + summary(collect(cells, prompts)) + END + after
    (root / "README.md").write_text(text, encoding="utf-8")
    (root / "docs" / "results.png").write_bytes((out / "figure.png").read_bytes())


def versus(found: Found) -> str:
    """Paired differences: against Best-of-N and random search at equal cost, and of methods that share something."""
    lines, search = [], "random search for noise"
    pairs = [(method, f"best of N for {method}") for method in LEARNING]
    plain = [("noise", "noise, no regularizer"), ("joint", "noise"), ("joint", "ipgo")]
    for method, rival in [*pairs, (search, "best of N for noise"), ("noise", search), *plain]:
        if method not in found or rival not in found:
            continue
        both = {m: {p: found[m][p] for p in found[method] if p in found[rival]} for m in (method, rival)}
        count = np.mean([row.get("n", 0) for row in both[rival].values()])
        for key in ("target", "held_out"):
            triple = gain(both, method, key, rival)
            name = rival.split(" for ")[0].replace("of N", f"of {count:.0f}")
            lines.append(f"- {method} minus {name}, {key.replace('_', '-')}: {shown(triple)}")
    return "\n" + "\n".join(lines) + "\n"


def figure(found: Found, path: Path, shown_prompts: int = 6) -> None:
    """Gains with their intervals on the left; on the right seed 0 of the prompts that the raw prompt does worst on."""
    names = {m: PLAIN[m] for m in PLAIN if m in found and m != "noise, no regularizer"}
    names = {m: name.format(n=round(found[m][next(iter(found[m]))].get("n", 0))) for m, name in names.items()}
    methods = [m for m in names if m != "raw"]
    prompts = sorted(found["raw"], key=lambda p: found["raw"][p]["target"][0])[:shown_prompts]
    fig = Figure(figsize=(12, 1.35 * len(names) + 0.6), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1, 1.7])
    bars = left.subplots()
    for offset, key, label in ((-0.19, "target", "the reward that was optimized"), (0.19, "held_out", "held-out")):
        triples = [gain(found, method, key) for method in methods]
        means, low, high = (np.array(column) for column in zip(*triples, strict=True))
        places = np.arange(len(methods)) + offset
        bars.barh(places, means, 0.36, xerr=[means - low, high - means], capsize=3, label=label)
    bars.axvline(0, color="black", lw=0.8)
    bars.set_yticks(range(len(methods)), [fill(names[m], 18) for m in methods])
    bars.invert_yaxis()
    bars.set_xlabel("gain over the prompt as it is, 95 % interval", fontsize=8)
    bars.legend(fontsize=7)
    right.suptitle(f"first seed of the {len(prompts)} prompts that score lowest as they are", fontsize=9)
    grid = right.subplots(len(names), len(prompts), squeeze=False)
    for row, (method, name) in zip(grid, names.items(), strict=True):
        for ax, prompt in zip(row, prompts, strict=True):
            picture = found[method].get(prompt, {}).get("thumbnails", [None])[0]
            if picture is not None:
                ax.imshow(Image.open(io.BytesIO(base64.b64decode(picture))))
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(fill(name, 14), fontsize=7)
    for ax, prompt in zip(grid[0], prompts, strict=True):
        ax.set_title(prompt, fontsize=8)
    fig.savefig(path, dpi=110)
