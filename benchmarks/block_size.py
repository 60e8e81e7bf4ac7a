"""Which block size k makes the probability regularizer useful? Measures false alarms, power and gradients.

For every size n of the optimized noise and every block size k: log p1, log p2 and P(z) (eqs. 6 to 8 of the noise
paper) and R(z) (eq. 9) on fresh Gaussian noise and on typical degenerate noises, with the identity order ("runs"
along a row of the latent) apart from the shuffled ones. Prints one CSV row per case, Markdown tables, a conclusion.

    python benchmarks/block_size.py --csv block_size.csv --markdown block_size.md
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

LOG2 = math.log(2.0)
SHAPES: dict[str, tuple[int, int, int, int]] = {  # (noises, channels, height, width) of the latents
    "demo model, initial": (1, 4, 16, 16),
    "demo model, 10 noises": (10, 4, 16, 16),
    "SD1.5, initial": (1, 4, 64, 64),
    "SDXL, initial": (1, 4, 128, 128),
    "SD1.5, 51 noises": (51, 4, 64, 64),
}
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)
RUN = 64  # neighbours that `--orders runs` keeps together, as the regularizer does in a noise of 65,536 values or more

CONCLUSION = """
k(n) = the largest power of two with n >= 256 k^2, from 1 to 64 (`ipgo_engine.noise.choose_block_size`), because

- false alarms do not choose k: fresh Gaussian noise has P(z) < 0.01 at no k;
- global faults (scale, mean, half zero, zeros) lose power like 1 / k: with k near m / 100 a latent scaled by 0.9 passes
  (n = 16,384), and where k / m > 0.17 a noise of zeros does;
- local structure (channel offsets, slow waves) gains power with k, and only the identity order sees it: with uniformly
  shuffled orders alone it passes at every k. So the identity is always among the orders, and weighs half in R(z);
- affine orders have the false alarms of uniform ones and at least their power;
- so have affine orders of runs of 64 neighbours where there are many (n >= 65,536): as few false alarms, the power of
  single values on global faults, more on slow waves and repeated halves, somewhat less on channel offsets at k >= 32.
"""


# --- noises -----------------------------------------------------------------------------------------------------


def lag_one(z: Tensor, rho: float) -> Tensor:
    """Autoregressive along the flat order, unit variance (truncated moving-average form)."""
    terms = math.ceil(math.log(1e-4) / math.log(rho))
    flat = sum(rho**i * torch.roll(z.flatten(), i) for i in range(terms))
    return (flat * math.sqrt(1 - rho**2)).view_as(z)


def channel_offset(z: Tensor, size: float) -> Tensor:
    """What a brightness reward does to a latent: each channel drifts by a constant, signs differ."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(z.shape[1])[: z.shape[1]]
    return z + size * signs.view(1, -1, 1, 1)


def smooth(z: Tensor, size: float) -> Tensor:
    """One slow wave per channel, the same in every injected noise, RMS `size`."""
    _, channels, height, width = z.shape
    rows = torch.linspace(0, 2 * math.pi, height).view(1, -1, 1)
    columns = torch.linspace(0, 2 * math.pi, width).view(1, 1, -1)
    phase = torch.arange(channels).view(-1, 1, 1) * 1.3
    wave = torch.cos(rows + phase) + torch.cos(columns - phase)
    return z + size * wave / wave.square().mean().sqrt()


def whitened(z: Tensor) -> Tensor:
    """Mean 0 and variance 1 exactly: what a mean and norm regularizer cannot see."""
    return (z - z.mean()) / z.std(unbiased=False)


def repeated(z: Tensor) -> Tensor:
    """The second half equals the first (fig. 3 of the paper: repetitive noise)."""
    flat = z.flatten().clone()
    flat[flat.numel() // 2 :] = flat[: flat.numel() // 2]
    return flat.view_as(z)


def half_zero(z: Tensor) -> Tensor:
    """The second half is 0."""
    flat = z.flatten().clone()
    flat[flat.numel() // 2 :] = 0
    return flat.view_as(z)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda z: z,
    "x0.9": lambda z: 0.9 * z,
    "x0.97": lambda z: 0.97 * z,
    "x1.03": lambda z: 1.03 * z,
    "x1.1": lambda z: 1.1 * z,
    "x1.3": lambda z: 1.3 * z,
    "mean +0.02": lambda z: z + 0.02,
    "mean +0.05": lambda z: z + 0.05,
    "mean +0.1": lambda z: z + 0.1,
    "lag-1 rho 0.1": lambda z: lag_one(z, 0.1),
    "lag-1 rho 0.3": lambda z: lag_one(z, 0.3),
    "channels +-0.1": lambda z: channel_offset(z, 0.1),
    "channels +-0.2": lambda z: channel_offset(z, 0.2),
    "channels +-0.2, whitened": lambda z: whitened(channel_offset(z, 0.2)),
    "channels +-0.4, whitened": lambda z: whitened(channel_offset(z, 0.4)),
    "smooth 0.2": lambda z: smooth(z, 0.2),
    "smooth 0.2, whitened": lambda z: whitened(smooth(z, 0.2)),
    "smooth 0.4, whitened": lambda z: whitened(smooth(z, 0.4)),
    "repeated halves": repeated,
    "half zero": half_zero,
    "zeros": torch.zeros_like,
    "constant 1": torch.ones_like,
}


# --- the regularizer, as plain formulas -------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """log p1, log p2 of one order of the values, and the norms of their gradients."""

    log_p1: float
    log_p2: float
    gradient: Tensor | None


def measure(values: Tensor, k: int, want_gradient: bool) -> Order:
    """Eqs. 6 and 7 (corrected) for one order; the gradient by hand, in that order."""
    m = values.numel() // k
    blocks = values[: m * k].view(m, k)
    mean = blocks.mean(0)
    log_p1 = LOG2 - m * float(mean.square().sum()) / (2 * k)
    excess = blocks.T @ blocks / m - torch.eye(k)
    eigenvalues, vectors = torch.linalg.eigh(excess)
    top = int(eigenvalues.abs().argmax())
    norm = float(eigenvalues[top].abs())
    delta = max(math.sqrt(1 + norm) - 1 - math.sqrt(k / m), 0.0)
    log_p2 = LOG2 - m / 2 * delta**2
    gradient = None
    if want_gradient:
        gradient = torch.zeros_like(values)
        if log_p1 < 0:
            gradient[: m * k] += (-mean / k).expand(m, k).flatten()
        if log_p2 < 0:
            v = vectors[:, top]
            slope = -m * delta / (2 * math.sqrt(1 + norm)) * math.copysign(2 / m, float(eigenvalues[top]))
            gradient[: m * k] += (slope * (blocks @ v)[:, None] * v).flatten()
    return Order(min(log_p1, 0.0), min(log_p2, 0.0), gradient)


def uniform_orders(n: int, b: int, seed: int) -> Iterator[Tensor]:
    """b uniformly random permutations."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(n, generator=generator) for _ in range(b))


def affine_orders(n: int, b: int, seed: int) -> Iterator[Tensor]:
    """b permutations i -> (a i + c) mod (n - 1), gcd(a, n - 1) = 1, the last index stays: no sorting, no table.

    Modulo n itself, k | n would keep every residue class mod k together: the columns of the block matrix, and so M1,
    would never change. n - 1 shares no factor with k.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(n - 1)
    for _ in range(b):
        a = 0
        while math.gcd(a, n - 1) != 1:
            a = int(torch.randint(1, n - 1, (), generator=generator))
        shift = int(torch.randint(n - 1, (), generator=generator))
        yield torch.cat([(positions * a + shift) % (n - 1), torch.tensor([n - 1])])


def run_orders(n: int, b: int, seed: int) -> Iterator[Tensor]:
    """Affine orders of runs of 64 neighbours, each run as it lies; `apart` makes blocks of them."""
    lanes = torch.arange(RUN)
    for order in affine_orders(n // RUN, b, seed):
        yield (order[:, None] * RUN + lanes).flatten()


def apart(order: Tensor, k: int) -> Tensor:
    """The order in which k runs that follow one another make 64 blocks, each with one value of every run."""
    groups = order.numel() // (k * RUN)
    return order[: groups * k * RUN].view(groups, k, RUN).transpose(1, 2).flatten()


ORDERS = {"uniform": uniform_orders, "affine": affine_orders, "runs": run_orders}


@dataclass(frozen=True)
class Row:
    """One line of the table; log10 P is the minimum over orders, R the mean over the random orders alone."""

    noise: str
    n: int
    k: int
    m: int
    case: str
    orders: str
    b: int
    samples: int
    identity_log_p1: float
    identity_log_p2: float
    random_log_p1: float
    random_log_p2: float
    log10_p_random: float
    log10_p_all: float
    p_all: float
    alarms: float
    identity_gradient: float
    random_gradient: float


def evaluate(z: Tensor, sizes: list[int], kind: str, b: int, seed: int, gradients: bool) -> dict[int, dict[str, float]]:
    """All statistics of one noise for every block size."""
    flat = z.flatten()
    identity = {k: measure(flat, k, gradients) for k in sizes}
    random: dict[int, list[tuple[float, float]]] = {k: [] for k in sizes}
    total = {k: torch.zeros_like(flat) for k in sizes}
    for order in ORDERS[kind](flat.numel(), b, seed):
        shuffled = flat[order]
        for k in sizes:
            own, values = (apart(order, k), flat[apart(order, k)]) if kind == "runs" else (order, shuffled)
            found = measure(values, k, gradients)
            random[k].append((found.log_p1, found.log_p2))
            if found.gradient is not None:
                total[k][own] += found.gradient / b
    return {k: summarize(identity[k], random[k], total[k]) for k in sizes}


def summarize(identity: Order, random: list[tuple[float, float]], gradient: Tensor) -> dict[str, float]:
    """The identity order next to the random ones."""
    worst = min(min(pair) for pair in random)
    overall = min(worst, identity.log_p1, identity.log_p2)
    return {
        "identity_log_p1": identity.log_p1,
        "identity_log_p2": identity.log_p2,
        "random_log_p1": sum(p for p, _ in random) / len(random),
        "random_log_p2": sum(p for _, p in random) / len(random),
        "log10_p_random": worst / math.log(10),
        "log10_p_all": overall / math.log(10),
        "p_all": math.exp(overall),
        "alarms": float(overall < math.log(0.01)),
        "identity_gradient": 0.0 if identity.gradient is None else float(identity.gradient.norm()),
        "random_gradient": float(gradient.norm()),
    }


def table(name: str, cases: list[str], kind: str, b: int, samples: int, seed: int) -> Iterator[Row]:
    """Rows of one noise shape: means over `samples` noises."""
    shape = SHAPES[name]
    n = math.prod(shape)
    sizes = sorted({*BLOCK_SIZES, max(1, round(math.sqrt(n) / 10))})
    for case in cases:
        runs = []
        for sample in range(samples):
            torch.manual_seed(seed + sample)
            runs.append(evaluate(CASES[case](torch.randn(shape)), sizes, kind, b, seed + sample, case != "gaussian"))
        for k in sizes:
            mean = {key: sum(run[k][key] for run in runs) / samples for key in runs[0][k]}
            yield Row(name, n, k, n // k, case, kind, b, samples, **mean)


# --- output -----------------------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """One table per (shape, kind of order, b): log10 P(z) without / with the identity order, for every k."""
    lines = []
    for key in dict.fromkeys((row.noise, row.n, row.orders, row.b) for row in rows):
        group = [row for row in rows if (row.noise, row.n, row.orders, row.b) == key]
        sizes = sorted({row.k for row in group})
        lines += [f"\n### {key[0]}: n = {key[1]:,}, {key[3]} {key[2]} orders", ""]
        lines += ["log10 P(z) over random orders only / with the identity order as well.", ""]
        lines += ["| noise | " + " | ".join(f"k = {k}" for k in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        for case in dict.fromkeys(row.case for row in group):
            cells = [next(r for r in group if r.case == case and r.k == k) for k in sizes]
            lines.append(
                f"| {case} | " + " | ".join(f"{r.log10_p_random:.1f} / {r.log10_p_all:.1f}" for r in cells) + " |"
            )
        alarms = [next((r for r in group if r.case == "gaussian" and r.k == k), None) for k in sizes]
        lines.append(
            "| gaussian: share with P < 0.01 | " + " | ".join(f"{r.alarms:.2f}" if r else "" for r in alarms) + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--orders", default="uniform", choices=list(ORDERS))
    parser.add_argument("--permutations", type=int, default=100)
    parser.add_argument("--samples", type=int, default=None, help="noises per case; default 20, 3 for large n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for name in args.shapes:
        samples = args.samples or (20 if math.prod(SHAPES[name]) < 20_000 else 3)
        rows += table(name, args.cases, args.orders, args.permutations, samples, args.seed)
        print(f"{name}: done", file=sys.stderr)
    target = args.csv.open("w", newline="") if args.csv else sys.stdout
    writer = csv.DictWriter(target, fieldnames=list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    text = markdown(rows) + "\n" + CONCLUSION
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
