"""What a reward model of full size costs: loading, forward, backward, memory, and how good half precision is.

Every model gets random weights in its authors' file format and is loaded the ordinary way; each case runs in a process
of its own. Memory is the growth of the process (or of the GPU's allocations) above what it was before.

    python -m benchmarks.reward_models --markdown reward_models.md
    python -m benchmarks.reward_models --rewards hpsv2 --dtypes float16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipgo_engine import rewards

NAMES = ("clip", "aesthetic", "hpsv2", "pickscore", "imagereward")
PROMPT = "two dogs playing chess in the park, oil painting"
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
CLIPS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": {
        "vision_config": {**LARGE, "patch_size": 14, "hidden_act": "quick_gelu"},
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "projection_dim": 768,
    },
    "pickscore": {
        "vision_config": {**HUGE, "patch_size": 14, "hidden_act": "gelu"},
        "text_config": {**LARGE, "hidden_act": "gelu"},
        "projection_dim": 1024,
    },
}


def random_weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Values of the size a network's initialization gives them, so that nothing overflows or dies."""
    source, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=dtype)
        if len(shape) < 2:
            tensor.fill_(float(name.endswith("weight")))
        else:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=source)
        weights[name] = tensor
    if "logit_scale" in weights:
        weights["logit_scale"].fill_(4.6052)
    return weights


def save_clip(folder: Path, config: dict[str, Any]) -> None:
    """A transformers folder, float32, as published; the tokenizer is the one open_clip ships."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(random_weights(shapes, torch.float32), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))


def save_hps(folder: Path) -> None:
    """The authors' file: {"state_dict": ...}, float16."""
    import open_clip

    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = open_clip.CLIP(**(open_clip.get_model_config("ViT-H-14") or {}))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": random_weights(shapes, torch.float16)}, folder / "HPS_v2_compressed.pt")


def head_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """The rating head of the aesthetic predictor and of ImageReward."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"{prefix}{layer}.weight": shape for layer, shape in sizes.items()}
    return weights | {f"{prefix}{layer}.bias": shape[:1] for layer, shape in sizes.items()}


def save_imagereward(folder: Path) -> None:
    """The authors' file: BLIP's ViT-L/16 and BERT-base with cross-attention, float32."""
    folder.mkdir(parents=True)
    linear: dict[str, tuple[int, ...]] = {}
    norms: dict[str, int] = {"visual_encoder.norm": 1024, "text_encoder.embeddings.LayerNorm": 768}
    for i in range(24):
        block = f"visual_encoder.blocks.{i}."
        linear |= {f"{block}attn.qkv": (3072, 1024), f"{block}attn.proj": (1024, 1024)}
        linear |= {f"{block}mlp.fc1": (4096, 1024), f"{block}mlp.fc2": (1024, 4096)}
        norms |= {f"{block}norm1": 1024, f"{block}norm2": 1024}
    for i in range(12):
        layer = f"text_encoder.encoder.layer.{i}."
        for part, seen in (("attention", 768), ("crossattention", 1024)):
            linear |= {f"{layer}{part}.self.{name}": (768, seen) for name in ("key", "value")}
            linear |= {f"{layer}{part}.self.query": (768, 768), f"{layer}{part}.output.dense": (768, 768)}
            norms[f"{layer}{part}.output.LayerNorm"] = 768
        linear |= {f"{layer}intermediate.dense": (3072, 768), f"{layer}output.dense": (768, 3072)}
        norms[f"{layer}output.LayerNorm"] = 768
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    shapes |= {"visual_encoder.cls_token": (1, 1, 1024), "visual_encoder.pos_embed": (1, 197, 1024)}
    shapes |= {
        "visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "visual_encoder.patch_embed.proj.bias": (1024,),
    }
    shapes |= {"text_encoder.embeddings.word_embeddings.weight": (30524, 768)}
    shapes |= {"text_encoder.embeddings.position_embeddings.weight": (512, 768)}
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()} | head_shapes("mlp.layers.")
    torch.save(random_weights(shapes, torch.float32), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "dogs", "park", "oil", "painting", "in", "the"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def save(name: str, root: Path) -> Path:
    """The files of one reward below `root`; returns the path to load."""
    if name in ("clip", "aesthetic"):
        save_clip(root / "clip-vit-large-patch14", CLIPS["clip-vit-large-patch14"])
        if name == "clip":
            return root / "clip-vit-large-patch14"
        (root / name).mkdir()
        head = random_weights(head_shapes("layers."), torch.float32)
        torch.save(head, root / name / "sac+logos+ava1-l14-linearMSE.pth")
    elif name == "pickscore":
        save_clip(root / name, CLIPS[name])
    else:
        {"hpsv2": save_hps, "imagereward": save_imagereward}[name](root / name)
    return root / name


class Memory:
    """Peak growth since the object was made: of the process on the CPU, of the allocations on a GPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self._read("VmRSS", torch.cuda.memory_allocated)

    def peak(self) -> float:
        """GB."""
        return (self._read("VmHWM", torch.cuda.max_memory_allocated) - self.start) / 1e9

    def _read(self, field: str, of_gpu: Callable[[], int]) -> int:
        if self.gpu:
            return of_gpu()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def seconds(function: Callable[[], Any], repeats: int, device: str) -> float:
    """Shortest of `repeats` runs: wall-clock on a GPU, processor time on the CPU, which other programs do not disturb.

    Processor time adds up over threads: run with OMP_NUM_THREADS=1 to read it as seconds of one core.
    """
    taken = []
    gpu = device.startswith("cuda")
    clock = time.perf_counter if gpu else time.process_time
    for _ in range(repeats):
        started = clock()
        function()
        if gpu:
            torch.cuda.synchronize()
        taken.append(clock() - started)
    return min(taken)


def measure(name: str, path: Path, dtype: torch.dtype, device: str, size: int, repeats: int) -> dict[str, Any]:
    """One row; the gradient is saved beside the weights, to compare precisions."""
    memory, started = Memory(device), time.perf_counter()
    reward: Any = rewards.load(name, path, device, dtype)
    row: dict[str, Any] = {"reward": name, "dtype": str(dtype).removeprefix("torch."), "size": size}
    row["parameters (M)"] = round(sum(p.numel() for p in reward.module.parameters()) / 1e6)
    row["load (s)"] = round(time.perf_counter() - started, 1)
    row["weights (GB)"] = round(sum(p.nbytes for p in reward.module.parameters()) / 1e9, 2)
    row["load peak (GB)"] = round(memory.peak(), 2)
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return reward.score(images, [PROMPT])

    def both() -> Tensor:
        (gradient,) = torch.autograd.grad(reward.score(images, [PROMPT]).sum(), images)
        return gradient

    forward()
    row["forward (s)"] = round(seconds(forward, repeats, device), 3)
    memory = Memory(device)
    gradient = both()
    row["forward + backward (s)"] = round(seconds(both, repeats, device), 3)
    row["peak of both (GB)"] = round(memory.peak(), 2)
    if device.startswith("cuda"):
        row["offloaded (s)"] = _offloaded(name, path, dtype, device, images, repeats)
    else:
        copy = lambda: [parameter.clone() for parameter in reward.module.parameters()]  # noqa: E731
        row["copy of the weights (s)"] = round(seconds(copy, repeats, device), 3)
    row["gradient cosine"] = _cosine(gradient.cpu(), path.parent / f"{name}.gradient.pt", dtype)
    return row


def _offloaded(name: str, path: Path, dtype: torch.dtype, device: str, images: Tensor, repeats: int) -> float:
    resting = rewards.Offloaded(rewards.load(name, path, "cpu", dtype), device)
    visit = lambda: torch.autograd.grad(resting.score(images, [PROMPT]).sum(), images)  # noqa: E731
    visit()
    return round(seconds(visit, repeats, device), 3)


def _cosine(gradient: Tensor, file: Path, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        torch.save(gradient, file)
        return 1.0
    reference = torch.load(file, weights_only=True) if file.exists() else gradient
    return round(float(torch.cosine_similarity(reference.flatten(), gradient.flatten(), dim=0)), 5)


def main() -> None:
    """Run every case in a process of its own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", help="where the random weights are written (default: a temporary folder)")
    parser.add_argument("--markdown", help="also write the table to this file")
    parser.add_argument("--one", nargs=2, metavar=("REWARD", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, path = arguments.one
        dtype = getattr(torch, arguments.dtypes[0])
        row = measure(name, Path(path), dtype, arguments.device, arguments.size, arguments.repeats)
        print(json.dumps(row))
        return
    rows = []
    for name in arguments.rewards:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
            path = save(name, Path(root))
            for dtype in arguments.dtypes:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.reward_models",
                    "--one",
                    name,
                    str(path),
                    "--dtypes",
                    dtype,
                ]
                command += ["--device", arguments.device, "--size", str(arguments.size)]
                done = subprocess.run(
                    [*command, "--repeats", str(arguments.repeats)], check=True, capture_output=True, text=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    print("\n".join(lines))
    if arguments.markdown:
        Path(arguments.markdown).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
