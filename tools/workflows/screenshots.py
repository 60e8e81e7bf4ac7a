"""Pictures of the real page: `python -m tools.workflows.screenshots --server http://127.0.0.1:8188`.

Runs the first template in headless Chromium and writes docs/comfyui-running.png and docs/comfyui-finished.png. Needs
playwright, and chromium on the PATH.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from .pictures import FOLDER

DOCS = FOLDER.parent / "docs"
STARTED = "() => window.app && window.app.graph && window.app.extensionManager && window.LiteGraph"
LOAD = """async name => { const answer = await fetch(`/api/workflow_templates/ipgo/${name}.json`);
  await app.loadGraphData(await answer.json(), true, true, name);
  app.canvas.min_font_size_for_lod = 0; }"""  # text however small
FIT = """([left, right, top, bottom]) => { const canvas = app.canvas;
  const boxes = app.graph._nodes.map(n => [...n.pos, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])
    .filter(b => b[0] >= left && b[2] <= right && b[1] >= top && b[3] <= bottom);
  const x = Math.min(...boxes.map(b => b[0])) - 40, y = Math.min(...boxes.map(b => b[1])) - 110;
  const xx = Math.max(...boxes.map(b => b[2])) + 40, yy = Math.max(...boxes.map(b => b[3])) + 40;
  const wide = canvas.canvas.clientWidth - 90, high = canvas.canvas.clientHeight - 110;
  const scale = Math.min(wide / (xx - x), high / (yy - y));
  canvas.ds.scale = scale; canvas.ds.offset = [80 / scale - x, 70 / scale - y]; canvas.setDirty(true, true);
  return [80, 70, (xx - x) * scale, (yy - y) * scale]; }"""
"""Brings the nodes inside a box of the graph into view; gives their place on the page: x, y, width, height."""
HIDE = ".minimap-container, [data-testid=minimap-container], .graph-canvas-menu { display: none !important; }"
QUEUE_EMPTY = """async () => { const q = await (await fetch('/queue')).json();
  return !q.queue_running.length && !q.queue_pending.length }"""


@contextmanager
def page(server: str, width: int = 1800, height: int = 1100, scale: float = 1.0) -> Iterator[Any]:
    """The page of a server, started."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=scale
        ).new_page()  # fmt: skip
        opened.set_default_timeout(1_200_000)
        opened.goto(server, wait_until="domcontentloaded")
        opened.wait_for_function(STARTED)
        opened.wait_for_timeout(3000)
        opened.add_style_tag(content=HIDE)
        yield opened
        browser.close()


def shot(opened: Any, place: list[float]) -> Image.Image:
    """A part of the page."""
    opened.wait_for_timeout(1500)
    clip = dict(zip(("x", "y", "width", "height"), place, strict=True))
    return Image.open(io.BytesIO(opened.screenshot(clip=clip))).convert("RGB")


def save(picture: Image.Image, path: Path, largest: int = 300_000) -> None:
    """A PNG of 256 colours, made smaller until it is small enough."""
    while True:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < largest:
            return
        picture = picture.resize((picture.width * 9 // 10, picture.height * 9 // 10), Image.Resampling.LANCZOS)


def documentation(server: str, template: str, step: int) -> None:
    """The first template while it runs and when it is finished."""
    with page(server, 2000, 1250) as opened:
        opened.evaluate(LOAD, template)
        place = opened.evaluate(FIT, [-1e9, 900, -1e9, 1e9])
        opened.get_by_test_id("queue-button").click()
        opened.wait_for_function(
            """step => Object.values(app.graph._nodes).some(n => (n.widgets || []).some(
                 w => String(w.value).match(new RegExp(`^step ${step}/`))))""",
            arg=step, polling=200,
        )  # fmt: skip
        save(shot(opened, place), DOCS / "comfyui-running.png")
        while not opened.evaluate(QUEUE_EMPTY):  # wait_for_function takes the promise for an answer
            opened.wait_for_timeout(1000)
        opened.wait_for_timeout(4000)
        save(shot(opened, opened.evaluate(FIT, [400, 1e9, -1e9, 1e9])), DOCS / "comfyui-finished.png")


def main() -> int:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--step", type=int, default=6, help="step at which the run is photographed")
    arguments = parser.parse_args()
    documentation(arguments.server, "1_demo_train_and_compare", arguments.step)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
