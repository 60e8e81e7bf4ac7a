"""Rules of the node files that can be checked by reading them."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest

from tests.nodes.sources import NODES, ROOT, imports, node_ids, tree

COMFY = ("comfy", "folder_paths", "server", "nodes", "execution", "latent_preview")


def test_every_class_in_nodes_is_listed_once():
    for path in (ROOT / "nodes").glob("*.py"):
        classes = [
            c.name
            for c in tree(path).body
            if isinstance(c, ast.ClassDef) and "io.ComfyNode" in map(ast.unparse, c.bases)
        ]
        listed = [
            ast.unparse(element)
            for item in tree(path).body
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "NODES"
            for element in item.value.elts
        ]
        assert classes == listed, path.name


def test_node_ids_are_the_class_names_and_ours():
    for node_id, path in node_ids().items():
        assert node_id.startswith("IPGO")
        assert f"class {node_id}(io.ComfyNode)" in path.read_text()
    assert len(node_ids()) == 23


def test_every_module_with_nodes_is_loaded():
    with_nodes = {path.stem for path in node_ids().values()}
    extension = (ROOT / "nodes" / "extension.py").read_text()
    listed = re.search(r"MODULES = \((.*?)\)", extension, re.DOTALL)[1]
    assert with_nodes == {name.strip() for name in listed.split(",") if name.strip()}


def test_only_the_host_folder_knows_comfyui():
    for path in (ROOT / "nodes").glob("*.py"):
        bad = [m for level, m in imports(path) if level == 0 and m.split(".")[0] in COMFY]
        assert bad == [], path.name


def test_imports_inside_the_pack_are_relative():
    for path in NODES:
        assert not [m for level, m in imports(path) if level == 0 and m.split(".")[0] == "ipgo_engine"], path.name


def test_the_root_is_importable_without_comfyui_and_says_only_two_things():
    spec = importlib.util.spec_from_file_location("ipgo_root_under_test", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {name for name in vars(module) if not name.startswith("_")} == {"WEB_DIRECTORY", "comfy_entrypoint"}
    for path in NODES:
        assert "NODE_CLASS_MAPPINGS" not in path.read_text()


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_files_are_short_and_plain(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= 310
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.FunctionDef) and item.name != "define_schema":
            assert item.end_lineno - item.lineno < 50, f"{path.name}: {item.name}"


def test_isinstance_is_not_used_on_engine_classes():
    """The engine may be imported twice, as the pack's own and as an installed one."""
    for path in (ROOT / "nodes").glob("*.py"):
        assert "isinstance(" not in path.read_text(), path.name
