"""A workflow in the format that ComfyUI's page saves and loads."""

from __future__ import annotations

import json
import textwrap
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .definitions import inputs_of, outputs_of

SLOT, WIDGET, MULTILINE, TITLE, GAP = 21, 24, 76, 40, 60
COLOURS = {"note": ("#432", "#653"), "ours": ("#233", "#355")}
LONGEST_LINE = 84  # letters in a note before it wraps, for its height
SHOWING = {"PreviewImage": 250, "SaveImage": 250, "PreviewAny": 150}
"""Room inside a node for what it shows when it has run."""
GROWS = dict.fromkeys(("IPGOTrainTokens", "IPGONoiseOptimize", "IPGOJointOptimize"), 340)
"""Room below a node that grows by its live preview."""


@dataclass(frozen=True)
class Link:
    """An output of a node that is in the graph."""

    node: int
    slot: int
    type: str


@dataclass
class Node:
    """One node, as the file has it."""

    data: dict[str, Any]

    @property
    def id(self) -> int:
        """Its number."""
        return self.data["id"]

    def out(self, name: str) -> Link:
        """The output of that name."""
        for slot, output in enumerate(self.data["outputs"]):
            if output["name"] == name:
                return Link(self.id, slot, output["type"])
        raise KeyError(f"{self.data['type']} has no output {name!r}: {[o['name'] for o in self.data['outputs']]}")

    def link_model(self, url: str, directory: str) -> None:
        """Where a file that the node names can be had: the page's dialog about missing models offers it."""
        link = {"name": url.rsplit("/", 1)[1], "url": url, "directory": directory}
        self.data["properties"].setdefault("models", []).append(link)


@dataclass
class Workflow:
    """Nodes are put into columns from left to right, each below the last."""

    info: dict[str, Any]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    _x: int = 0
    _y: int = 0
    _width: int = 0
    _top: int = 0
    _first: int = 0

    def column(self, width: int = 320, title: str | None = None) -> None:
        """Start a new column; a title draws a frame around it."""
        self._close_group()
        self._x += self._width + GAP if self._width else 0
        self._width, self._y, self._title, self._first = width, self._top, title, len(self.nodes)

    def _close_group(self) -> None:
        title = getattr(self, "_title", None)
        inside = self.nodes[self._first :]
        if title and inside:
            bottom = max(n["pos"][1] + n["size"][1] + GROWS.get(n["type"], 0) for n in inside)
            box = [self._x - 20, self._top - 90, self._width + 40, bottom - self._top + 110]
            self.groups.append(
                {
                    "id": len(self.groups) + 1,
                    "title": title,
                    "bounding": box,
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
        self._title = None

    def add(self, kind: str, title: str | None = None, tall: int | None = None, **values: Any) -> Node:
        """A node at the next place of the column; values are widget values or links."""
        info = self.info[kind]
        node = self._new(kind, title)
        specs = inputs_of(info)
        unknown = set(values) - {spec.name for spec in specs}
        if unknown:
            raise KeyError(f"{kind} has no input {sorted(unknown)}.")
        widget_values = []
        for spec in specs:
            value = values.get(spec.name)
            link = value if isinstance(value, Link) else None
            if not spec.is_widget or link is not None:
                self._input(node, spec.name, spec.type, link, spec.is_widget)
            if spec.is_widget:
                widget_values.append(spec.default if value is None or link is not None else value)
                if spec.has_control:
                    widget_values.append("fixed")
        node["outputs"] = [
            {"name": name, "type": output, "links": [], "slot_index": i}
            for i, (name, output) in enumerate(outputs_of(info))
        ]
        node["widgets_values"] = widget_values
        if kind.startswith("IPGO"):
            node["color"], node["bgcolor"] = COLOURS["ours"]
        node["size"] = [self._width, tall or self._height(info, node, specs)]
        self._y += node["size"][1] + GROWS.get(kind, 0) + GAP
        return Node(node)

    def note(self, text: str, title: str = "Note") -> None:
        """Text for the reader, in Markdown."""
        text = textwrap.dedent(text).strip()
        node = self._new("MarkdownNote", title)
        lines = sum(1 + len(line) // max(1, int(LONGEST_LINE * self._width / 420)) for line in text.split("\n"))
        node.update(widgets_values=[text], outputs=[], size=[self._width, 70 + 17 * lines])
        node["color"], node["bgcolor"] = COLOURS["note"]
        self._y += node["size"][1] + GAP

    def _new(self, kind: str, title: str | None) -> dict[str, Any]:
        node: dict[str, Any] = {
            "id": len(self.nodes) + 1, "type": kind, "pos": [self._x, self._y], "size": [self._width, 100],
            "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [],
            "properties": {} if kind == "MarkdownNote" else {"Node name for S&R": kind}, "widgets_values": [],
        }  # fmt: skip
        if title:
            node["title"] = title
        self.nodes.append(node)
        return node

    def _input(self, node: dict[str, Any], name: str, kind: str, link: Link | None, widget: bool) -> None:
        entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
        if widget:
            entry["widget"] = {"name": name}
        if link is not None:
            entry["link"] = len(self.links) + 1
            self.links.append([entry["link"], link.node, link.slot, node["id"], len(node["inputs"]), kind])
            self.nodes[link.node - 1]["outputs"][link.slot]["links"].append(entry["link"])
        node["inputs"].append(entry)

    def _height(self, info: dict[str, Any], node: dict[str, Any], specs: list[Any]) -> int:
        sockets = sum(1 for entry in node["inputs"] if "widget" not in entry)
        slots = max(sockets, len(node["outputs"]))
        shown = [spec for spec in specs if spec.is_widget]
        height = TITLE + SLOT * slots + SHOWING.get(node["type"], 0)
        for spec in shown:
            height += MULTILINE if spec.options.get("multiline") else WIDGET
            height += WIDGET if spec.has_control else 0
        return height

    def save(self, path: Path) -> None:
        """Write the file."""
        self._close_group()
        data = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, path.stem)), "revision": 0, "last_node_id": len(self.nodes),
            "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, "groups": self.groups,
            "config": {}, "extra": {"ds": {"scale": 0.6, "offset": [60, 140]}}, "version": 0.4,
        }  # fmt: skip
        path.write_text(json.dumps(data, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
