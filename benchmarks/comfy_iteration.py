"""Time and peak memory of one optimization step in a real ComfyUI, in units of its own KSampler and VAE Decode.

    python -m benchmarks.comfy_iteration
    python -m benchmarks.comfy_iteration --checkpoint sd15.safetensors --size 512 --gpu
    python -m benchmarks.comfy_iteration --random sd15 --size 256

`--random sd15` writes a full-size checkpoint with random weights for the stock loader: time does not depend on weights.

ComfyUI is found through COMFYUI_PATH or at ~/comfy/ComfyUI and runs in this process; the pack is loaded as a custom
node. COMFYUI_ARGUMENTS replaces its command line (`--cpu`, none with `--gpu`): `--cpu --use-pytorch-cross-attention` is
a GPU's attention on a CPU, and only an attention with a backward pass lets activations be stored. Stock calls and
optimization runs take turns. A step is what the nodes do: sampling, decode, reward (mean brightness, which costs
nothing), backward pass and update; the times are those that the run itself reports.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_table

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "red heart"


class Memory:
    """Peak memory of a call above what was held before: of the GPU, or of the process (Linux)."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu

    def measure(self, call: Callable[[], Any]) -> float:
        """MiB."""
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = self._status("VmRSS")
        call()
        return self._status("VmHWM") - before

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


@dataclass
class Measured:
    """Seconds of every repeat, and the largest peak."""

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0


class Bench:
    """One model; stock calls and runs of the engine on the generator that the nodes use."""

    def __init__(self, host: Any, options: argparse.Namespace) -> None:
        self.host, self.options = host, options
        import nodes as comfy_nodes

        self.comfy = comfy_nodes
        with host.node():
            if options.checkpoint or options.random:
                self.model, self.clip, self.vae = load(options.checkpoint, options.random)
            else:
                self.model, self.clip, self.vae = host.pack("nodes.host.demo").load_demo()
            self.positive, self.negative = self.encode(PROMPT), self.encode("")

    def encode(self, text: str) -> Any:
        """CLIP Text Encode."""
        return self.comfy.CLIPTextEncode().encode(self.clip, text)[0]

    def stock(self, steps: int, positive: Any = None) -> None:
        """KSampler and VAE Decode."""
        side = self.options.size // 8
        with self.host.node():
            latent = {"samples": torch.zeros(1, 4, side, side)}
            settings = (self.options.cfg, self.options.sampler, "normal")
            drawn = self.comfy.common_ksampler(
                self.model, 0, steps, *settings, positive or self.positive, self.negative, latent
            )[0]
            self.comfy.VAEDecode().decode(self.vae, drawn)[0].sum().item()

    def generator(self, steps: int) -> Any:
        """As the nodes make it."""
        module, choices = self.host.pack("nodes.host.generator"), self.host.pack("nodes.host.choices")
        sampling = module.Sampling.by_name(self.model, self.options.sampler, "normal", steps, self.options.cfg)
        latent = choices.empty_latent(self.options.size, self.options.size)
        return module.ComfyGenerator(self.model, self.vae, sampling, "", latent, clip=self.clip)

    def run(self, kind: str, steps: int, **settings: Any) -> list[float]:
        """Seconds of every update of one run."""
        optimize, config = self.host.pack("ipgo_engine.optimize"), self.host.pack("ipgo_engine.config")
        reward = self.host.pack("ipgo_engine.rewards").load("brightness")
        updates = self.options.updates
        with self.host.node(), self.generator(steps) as generator:
            if kind == "tokens":
                tokens = config.TokenConfig(basis_size=min(30, generator.dim))
                chosen = config.OptimizeConfig(epochs=updates, tokens=tokens, **settings)
                result = optimize.train_tokens(generator, reward, [PROMPT], chosen)
            else:
                chosen = config.NoiseConfig(iterations=updates, **settings)
                result = optimize.optimize_noise(generator, reward, [PROMPT], chosen)
        return [event.seconds for event in result.history][:-1]  # the last only looks

    def with_tokens(self) -> Any:
        """The prompt with twenty learned tokens: 97 against 77 of the negative."""
        tokens = torch.randn(10, self.positive[0][0].shape[-1])
        with self.host.node():
            return self.host.pack("nodes.host.conditioning").insert_tokens(self.positive, tokens, tokens)


def load(checkpoint: Path | None, family: str) -> Any:
    """(MODEL, CLIP, VAE) of the stock loader, from the file or from one with random weights."""
    import comfy.sd

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if checkpoint is None:
            import checkpoints

            checkpoint = Path(folder) / f"{family}.safetensors"
            checkpoints.write(family, checkpoint)
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]


def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    memory, rows = Memory(options.gpu), []
    applied = bench.with_tokens()
    plan: list[tuple[str, int, dict[str, Callable[[], Any]]]] = [
        ("tokens", options.token_steps, {
            "stock KSampler with the tokens": lambda: bench.stock(options.token_steps, applied),
            "IPGO update, K = 1": lambda: bench.run("tokens", options.token_steps, backprop_steps=1),
        }),
        ("noise", options.noise_steps, {
            "noise update, all steps": lambda: bench.run("noise", options.noise_steps),
            "noise update, all steps, stored": lambda: bench.run("noise", options.noise_steps, checkpoint=False),
        }),
    ]  # fmt: skip
    for kind, steps, calls in plan:
        all_calls: dict[str, Callable[[], Any]] = {
            "stock KSampler + VAE Decode": lambda s=steps: bench.stock(s),
            **calls,
        }
        found = {name: take(all_calls[name], memory) for name in all_calls}  # the first round warms up
        for one in found.values():
            one.seconds.clear()
        for _ in range(options.repeats):
            for name, call in all_calls.items():
                again = take(call, memory)
                found[name].seconds += again.seconds
                found[name].peak = max(found[name].peak, again.peak)
        unit = next(iter(found.values()))
        for name, one in found.items():
            rows.append(row(kind, steps, name, one, unit))
            print(rows[-1], flush=True)
    return rows


def take(call: Callable[[], Any], memory: Memory) -> Measured:
    """One call: its own seconds where it reports them, else the clock's."""
    out = Measured()

    def timed() -> None:
        started = time.perf_counter()
        reported = call()
        out.seconds = reported or [time.perf_counter() - started]

    out.peak = memory.measure(timed)
    return out


def row(kind: str, steps: int, name: str, one: Measured, unit: Measured) -> dict[str, Any]:
    """A line of the table."""
    seconds, base = statistics.median(one.seconds), statistics.median(unit.seconds)
    return {
        "group": kind, "step": name, "model steps": steps, "n": len(one.seconds), "seconds": f"{seconds:.3f}",
        "spread": f"{min(one.seconds):.3f} to {max(one.seconds):.3f}", "x stock": f"{seconds / base:.2f}",
        "peak MiB": f"{one.peak:.0f}", "x stock memory": f"{one.peak / max(unit.peak, 1e-9):.2f}",
    }  # fmt: skip


def main() -> None:
    """Start ComfyUI, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint for the stock loader; default: the demo model")
    parser.add_argument("--random", choices=["sd15"], help="random weights in full size instead")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--token-steps", type=int, default=20)
    parser.add_argument("--noise-steps", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--gpu", action="store_true", help="on ComfyUI's device instead of the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/comfy_iteration"))
    options = parser.parse_args()
    os.environ.setdefault("COMFYUI_ARGUMENTS", "" if options.gpu else "--cpu")
    sys.path.insert(0, str(ROOT / "tests" / "comfy"))
    import host  # a real ComfyUI from here on

    torch.set_num_threads(options.threads)
    rows = measure(Bench(host, options), options)
    name = options.checkpoint.stem if options.checkpoint else options.random or "demo"
    version = (host.COMFYUI / "comfyui_version.py").read_text().split('"')[-2]
    where = "GPU" if options.gpu else f"CPU, {options.threads} threads"
    title = f"One step in ComfyUI {version}: {name}, {options.size} px, {options.sampler}, cfg {options.cfg:g}, {where}"
    print(write_table(rows, options.out / name, title))


if __name__ == "__main__":
    main()
