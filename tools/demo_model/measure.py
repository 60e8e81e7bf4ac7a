"""Measures the exported model and writes its card: reconstruction, caption ranking, a grid of samples, times."""

from __future__ import annotations

import csv
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ipgo_engine import demo

from .clip import MEAN, STD, tokenize, unit
from .data import SIZE, Drawer, Pictures
from .vae import psnr

STEPS, GUIDANCE = 12, demo.GUIDANCE_SCALE
PAUSE = 150  # seconds between two lines of a log that nothing but a pause explains
GRID = (
    "red heart",
    "dog face",
    "pizza",
    "black cat",
    "rocket",
    "grinning face",
    "green frog face",
    "banana",
    "strawberry",
    "hamburger",
    "sunflower",
    "cactus",
    "penguin",
    "blue fish",
    "turtle",
    "butterfly",
    "soccer ball",
    "guitar",
    "house",
    "red car",
    "airplane",
    "snowman",
    "yellow star",
    "rainbow",
    "robot, 3d",
    "robot, flat",
    "red apple on a blue background",
    "ghost on a black background",
    "owl",
    "donut",
)


@torch.no_grad()
def ranked_first(images: Tensor, captions: list[str], others: list[str], seed: int = 0) -> dict[str, float]:
    """How often the right caption scores highest among it and 99 others, for the small CLIP and for the judge."""
    clip, tokenizer = demo.load_clip()
    texts = unit(clip.get_text_features(input_ids=tokenize(tokenizer, others, "cpu")))
    towers = {
        "demo-clip": clip.get_image_features(pixel_values=(images - MEAN) / STD),
        "demo-judge": demo.load_judge()(images),
    }
    shares = {}
    for name, features in towers.items():
        scores, random, hits = unit(features) @ texts.T, torch.Generator().manual_seed(seed), 0
        for row, caption in zip(scores, captions, strict=True):
            right = others.index(caption)
            rivals = torch.randperm(len(others), generator=random)
            rivals = rivals[rivals != right][:99]
            hits += int((row[right] > row[rivals]).all())
        shares[name] = hits / len(captions)
    return shares


def held_out(pictures: Pictures) -> tuple[Tensor, list[str]]:
    """The pictures kept out of all training, as they are, on white."""
    rows = pictures.rows(held_out=True)
    glyphs = torch.nn.functional.interpolate(
        pictures.glyphs[rows].float() / 255, size=(SIZE, SIZE), mode="bilinear", antialias=True
    )
    images = (glyphs[:, :3] + 1 - glyphs[:, 3:]).clamp(0, 1)
    return images, [pictures.captions[int(row)] for row in rows]


def draw(pipeline: Any, prompts: list[str], seed: int = 0) -> Tensor:
    """One picture per prompt."""
    images = []
    for start in range(0, len(prompts), 10):
        some = prompts[start : start + 10]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        result = pipeline(
            some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt",
            height=SIZE, width=SIZE,
        )  # fmt: skip
        images.append(result.images.float())
    return torch.cat(images)


def sheet(images: Tensor, captions: list[str], columns: int = 10) -> Image.Image:
    """Pictures with their prompts beneath."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 18)), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (SIZE + 4), i // columns * (SIZE + 18)
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        page.paste(Image.fromarray(array), (x, y))
        pen.text((x + 2, y + SIZE + 2), caption[:22], fill="black")
    return page


def measure(pictures: Pictures, training: Path) -> dict[str, Any]:
    """Every number of the card."""
    pipeline = demo.load_pipeline()
    known = sorted({pictures.captions[int(row)] for row in pictures.rows(held_out=False)})
    random = torch.Generator().manual_seed(7)
    asked = [known[i] for i in torch.randperm(len(known), generator=random)[:100].tolist()]
    made = draw(pipeline, asked)
    real, names = held_out(pictures)
    images = Drawer(pictures, seed=1, held_out=True).batch(40)[0]
    started = time.perf_counter()
    draw(pipeline, ["red heart"])
    return {
        "psnr_held_out": psnr(pipeline.vae, images),
        "generated": ranked_first(made, asked, known),
        "held_out": ranked_first(real, names, known),
        "held_out_pictures": len(names),
        "pictures": len(pictures.captions) - len(names),
        "concepts": len(set(pictures.captions)),
        "seconds_per_picture": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "megabytes": sum(f.stat().st_size for f in demo.model_path().rglob("*.safetensors")) / 2**20,
        "parameters": {
            "unet": count(pipeline.unet),
            "vae": count(pipeline.vae),
            "text encoder": count(pipeline.text_encoder),
            "judge": count(demo.load_judge()),
            "clip picture tower": count(demo.load_clip()[0].vision_model),
        },
        "training": {part: last_row(training / f"{part}.csv") for part in ("vae", "clip", "judge", "unet")},
    }


def count(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def last_row(path: Path) -> dict[str, float]:
    """The last line of a training log, and the minutes between its lines, pauses between two runs left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {key: float(value) for key, value in rows[-1].items() if key != "time"}
    times = [float(row["time"]) for row in rows]
    gaps = [after - before for before, after in pairwise(times) if after - before < PAUSE]
    return found | {"minutes": sum(gaps) / 60}


def write_card(numbers: dict[str, Any], hardware: str) -> None:
    """MODEL_CARD.md, its numbers as JSON, and the sheet of samples, beside the weights."""
    folder = demo.model_path()
    (folder / "measured.json").write_text(json.dumps(numbers, indent=1))
    sheet(draw(demo.load_pipeline(), list(GRID)), list(GRID)).save(folder / "samples.png", optimize=True)
    template = (Path(__file__).parent / "card.md").read_text()
    flat = {
        "hardware": hardware,
        "psnr": f"{numbers['psnr_held_out']:.1f}",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "generated": ", ".join(f"{name} {value:.0%}" for name, value in numbers["generated"].items()),
        "held": ", ".join(f"{name} {value:.0%}" for name, value in numbers["held_out"].items()),
        "held_count": numbers["held_out_pictures"],
        "pictures": numbers["pictures"],
        "concepts": numbers["concepts"],
        "megabytes": f"{numbers['megabytes']:.1f}",
        "parameters": ", ".join(f"{name} {value:.1f} M" for name, value in numbers["parameters"].items()),
        "seconds": f"{numbers['seconds_per_picture']:.1f}",
        "threads": numbers["threads"],
        "training": "\n".join(
            f"| {part} | {row['step']:.0f} | {row['minutes']:.0f} | {row['loss']:.4f} |"
            for part, row in numbers["training"].items()
        ),
    }
    (folder / "MODEL_CARD.md").write_text(template.format(**flat), encoding="utf-8")
