"""Run the demo workflows and make their thumbnails: `python -m tools.workflows.pictures --server http://127.0.0.1:8188`.

Workflows for a user's own checkpoint get a picture of their graph instead: see `graph_pictures`.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from PIL import Image, ImageDraw

from .prompt import to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
SIZE, MARGIN, LINE, PAPER = (640, 480), 10, 32, "#16313f"
SHOWN: dict[str, tuple[str, ...]] = {
    "1_demo_train_and_compare": ("Without tokens", "With tokens"),
    "2_demo_apply_saved_tokens": ("Without tokens", "With tokens"),
    "3_demo_optimize_noise": ("Before", "After"),
    "4_demo_rank_seeds": ("The best four, with rank and score",),
    "5_demo_black_box_jpeg": ("Before", "After"),
    "6_demo_joint": ("Before", "After"),
}
"""Titles of the preview nodes whose pictures a thumbnail shows."""


def run(server: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue a prompt and wait for its outputs."""
    request = Request(f"{server}/prompt", json.dumps({"prompt": prompt}).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        number = json.load(answer)["prompt_id"]
    while True:
        with urlopen(f"{server}/history/{number}") as answer:
            history = json.load(answer)
        if history:
            entry = history[number]
            if entry["status"]["status_str"] != "success":
                raise SystemExit(json.dumps(entry["status"]["messages"][-1], indent=1))
            return entry["outputs"]
        time.sleep(1)


def picture(server: str, entry: dict[str, str]) -> Image.Image:
    """One picture of an output."""
    with urlopen(f"{server}/view?{urlencode(entry)}") as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def thumbnail(pictures: list[Image.Image], names: tuple[str, ...]) -> Image.Image:
    """Pictures with their names below: side by side, or one below the other where they are wide."""
    sheet = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(sheet)
    rows = len(pictures) if all(one.width > 1.4 * one.height for one in pictures) else 1
    columns = len(pictures) // rows
    wide, high = SIZE[0] // columns, SIZE[1] // rows
    for i, (one, name) in enumerate(zip(pictures, names, strict=True)):
        left, top = (i % columns) * wide, (i // columns) * high
        room = (wide - 2 * MARGIN, high - MARGIN - LINE)
        scale = min(room[0] / one.width, room[1] / one.height)
        shown = one.resize((round(one.width * scale), round(one.height * scale)), Image.Resampling.LANCZOS)
        sheet.paste(shown, (left + (wide - shown.width) // 2, top + MARGIN + (room[1] - shown.height) // 2))
        draw.text((left + wide // 2, top + high - LINE // 2), name, fill="white", anchor="mm", font_size=20)
    return sheet


def main() -> int:
    """Make every thumbnail that can be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--only", help="a part of the names")
    parser.add_argument("--keep", type=Path, help="folder for the full pictures and texts of every run")
    arguments = parser.parse_args()
    with urlopen(f"{arguments.server}/object_info") as answer:
        info = json.load(answer)
    for path in sorted(FOLDER.glob(f"*{arguments.only or ''}*.json")):
        workflow = json.loads(path.read_text())
        if path.stem in SHOWN:
            started = time.time()
            outputs = run(arguments.server, to_prompt(workflow, info))
            titles = {
                node.get("title"): str(node["id"]) for node in workflow["nodes"] if node["type"] == "PreviewImage"
            }
            found = [picture(arguments.server, outputs[titles[name]]["images"][0]) for name in SHOWN[path.stem]]
            thumbnail(found, SHOWN[path.stem]).save(path.with_suffix(".jpg"), quality=85)
            print(f"{path.stem}: {time.time() - started:.0f} s")
            if arguments.keep:
                keep(arguments, path.stem, workflow, outputs)
    return 0


def keep(arguments: argparse.Namespace, name: str, workflow: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Everything a run showed, to look at."""
    folder = arguments.keep / name
    folder.mkdir(parents=True, exist_ok=True)
    titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
    for number, output in outputs.items():
        stem = f"{int(number):02} {titles[number]}".replace(":", "").replace("/", "-")
        for i, entry in enumerate(output.get("images", [])):
            picture(arguments.server, entry).save(folder / f"{stem} {i}.png")
        for text in output.get("text", []):
            (folder / f"{stem}.txt").write_text(str(text))


if __name__ == "__main__":
    raise SystemExit(main())
