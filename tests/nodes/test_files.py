"""Help pages, names and workflows exist for every node and refer to nodes that exist."""

from __future__ import annotations

import json
import re

import pytest

from tests.nodes.sources import ROOT, node_ids

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NOTES = {"MarkdownNote", "Note"}


def test_there_is_a_help_page_for_every_node_and_no_other():
    pages = {path.parent.name for path in (ROOT / "web" / "docs").glob("*/en.md")}
    assert pages == set(node_ids())


def test_help_pages_have_substance():
    for node_id in node_ids():
        text = (ROOT / "web" / "docs" / node_id / "en.md").read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert "## Outputs" in text
        assert text.isascii()
        assert len(text) > 250, node_id


def test_names_file_matches_the_nodes():
    names = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(names) == set(node_ids())
    for node_id, node in names.items():
        source = node_ids()[node_id].read_text(encoding="utf-8")
        assert f'display_name="{node["display_name"]}"' in source
        entries = [*node.get("inputs", {}).values(), *node["outputs"].values()]
        assert all(entry["tooltip"] for entry in entries), node_id


def test_workflows_are_all_there():
    stems = {path.stem for path in WORKFLOWS}
    assert len(stems) == 10
    for subject in ("train", "apply", "noise", "rank", "black_box", "joint"):
        assert any("_demo_" in stem and subject in stem for stem in stems), subject
    for family in ("sd15", "sdxl"):
        assert {stem.split(family)[1] for stem in stems if family in stem} == {"_train_tokens", "_optimize_noise"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_consistent(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) == workflow["last_node_id"]
    for node in nodes.values():
        assert not node["type"].startswith("IPGO") or node["type"] in node_ids()
    for number, source, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        assert nodes[target]["inputs"][entry]["type"] == kind
    notes = [node["widgets_values"][0] for node in nodes.values() if node["type"] in NOTES]
    assert any("**Look at:**" in note or "Choose your" in note for note in notes)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_do_not_overlap(path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_a_compact_thumbnail(path):
    picture = path.with_suffix(".jpg")
    assert picture.is_file()
    assert picture.read_bytes()[:2] == b"\xff\xd8"
    assert picture.stat().st_size < 120_000


def test_workflows_name_no_machine():
    for path in WORKFLOWS:
        assert not re.search(r"/(home|root|work|tmp)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_model_file_a_workflow_names_can_be_found_by_the_missing_model_dialog(path):
    """The page joins `properties.models` of a node to the values of its widgets by name."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        values = [value for value in node.get("widgets_values", []) if isinstance(value, str)]
        files = {value for value in values if re.fullmatch(r".+\.(safetensors|ckpt|pt|pth|bin)", value)}
        links = {link["name"]: link for link in node["properties"].get("models", [])}
        assert set(links) == {name for name in files if node["type"] != "IPGOLoadTokens"}, node["type"]
        for name, link in links.items():
            assert link["directory"] == {"CheckpointLoaderSimple": "checkpoints"}[node["type"]]
            assert link["url"].startswith("https://huggingface.co/")
            assert link["url"].endswith(f"/{name}")
