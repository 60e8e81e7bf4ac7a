"""Thumbnails of the workflows that need a checkpoint, drawings of their graphs.

`python -m tools.workflows.graph_pictures`; no server is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .pictures import FOLDER, PAPER, SHOWN, SIZE

FINE = 3
"""Drawn so many times larger, then made smaller: smooth lines."""
LINKS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
}  # fmt: skip
"""Colours that the page gives to links."""
NAMES = json.loads((FOLDER.parent / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
OURS, OTHER, NOTE, TEXT = "#355e66", "#353535", "#53503a", "#e8e8e8"


def draw_graph(workflow: dict[str, Any], title: str) -> Image.Image:
    """Nodes with their titles, and links between them, below a headline."""
    places, sizes = ([node[key] for node in workflow["nodes"]] for key in ("pos", "size"))
    left, top = min(x for x, _ in places), min(y for _, y in places) - 30
    right = max(x + width for (x, _), (width, _) in zip(places, sizes, strict=True))
    bottom = max(y + height for (_, y), (_, height) in zip(places, sizes, strict=True))
    head = 44 * FINE
    wide, high = SIZE[0] * FINE, SIZE[1] * FINE - head
    scale = 0.94 * min(wide / (right - left), high / (bottom - top))
    x0, y0 = (wide - (right - left) * scale) / 2, head + (high - (bottom - top) * scale) / 2

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + (x - left) * scale, y0 + (y - top) * scale

    sheet = Image.new("RGB", (wide, SIZE[1] * FINE), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((wide / 2, head * 0.55), title, fill="white", anchor="mm", font_size=26 * FINE)
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for _, source, out, target, entry, kind in workflow["links"]:
        a, b = by_id[source], by_id[target]
        start = place(a["pos"][0] + a["size"][0], a["pos"][1] + 14 + 20 * out)
        end = place(b["pos"][0], b["pos"][1] + 14 + 20 * entry)
        draw.line([start, end], fill=LINKS.get(kind, "#9fbf9f"), width=FINE)
    for node in workflow["nodes"]:
        _draw_node(draw, node, place, scale)
    return sheet.resize(SIZE, Image.Resampling.LANCZOS)


def _draw_node(
    draw: ImageDraw.ImageDraw, node: dict[str, Any], place: Callable[[float, float], tuple[float, float]], scale: float
) -> None:
    """A box, and its title in letters that fit."""
    (x, y), (width, height) = node["pos"], node["size"]
    fill = NOTE if node["type"] == "MarkdownNote" else OURS if node["type"].startswith("IPGO") else OTHER
    draw.rounded_rectangle([place(x, y - 30), place(x + width, y + height)], 4 * FINE, fill=fill)
    name = node.get("title") or NAMES.get(node["type"], {}).get("display_name", node["type"])
    size = min(34 * scale, 1.7 * width * scale / len(name))
    draw.text(place(x + 12, y - 4), name, fill=TEXT, anchor="lm", font_size=size)


def main() -> int:
    """Draw every graph that has no picture of a run."""
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem not in SHOWN:
            save(path)
            print(path.stem)
    return 0


def save(path: Path) -> None:
    """The thumbnail beside its workflow; the headline is that of its note."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    note = next(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    headline = note.splitlines()[0].lstrip("# ")
    draw_graph(workflow, headline).save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    raise SystemExit(main())
