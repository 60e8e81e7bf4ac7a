"""The archive as the registry would get it (tracked files but for `.comfyignore`), checked as its scanner does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
FLAGGED = (
    "os.environ.get(", "subprocess", "os.system", "urlopen", "requests", ".connect(", ".bind(",
    "importlib.import_module(", "eval(", "exec(", ".cuda(", "torch.autocast(", "sys.path", "__import__(",
)  # fmt: skip
"""Substrings that the registry's scanner or comfy-test object to."""
LARGEST = 60_000_000
CLI = os.environ.get("COMFY_CLI") or shutil.which("comfy")


def ignored(name: str, patterns: list[str]) -> bool:
    """True when `.comfyignore` leaves the file out; its patterns all start at the root, as a folder or with stars."""
    parts = name.split("/")
    return any(fnmatch(parts[0], pattern.strip("/")) for pattern in patterns)


def published(root: Path) -> list[str]:
    """Names of the files that are published: tracked, and not left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: the archive is made of tracked files")
    lines = (root / ".comfyignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    names = [name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]
    return [name for name in names if not ignored(name, patterns)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The zip file."""
    path = tmp_path_factory.mktemp("release") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in published(ROOT):
            file.write(ROOT / name, name)
    with zipfile.ZipFile(path) as file:
        yield path, {name: file.read(name) for name in file.namelist()}


def test_what_users_need_is_in_it(archive):
    _, files = archive
    for name in (
        "__init__.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "nodes/extension.py",
        "nodes/host/generator.py",
    ):
        assert name in files
    for pattern in (r"web/docs/.*/en\.md", r"workflows/.*\.json", r"workflows/.*\.jpg", r"locales/en/nodeDefs\.json"):
        assert any(re.fullmatch(pattern, name) for name in files), pattern


def test_the_demo_model_is_in_it(archive):
    _, files = archive
    assert "ipgo_engine/demo/model/model_index.json" in files
    assert any(name.startswith("ipgo_engine/demo/model/unet/") and name.endswith(".safetensors") for name in files)


def test_no_tests_tools_or_caches(archive):
    _, files = archive
    bad = [
        n for n in files if re.search(r"(^|/)(tests?|tools|benchmarks|__pycache__|\.git|\.ci)(/|$)|test_|conftest", n)
    ]
    assert bad == []


def test_scanner_finds_nothing(archive):
    _, files = archive
    found = [
        f"{name}: {word}" for name, data in files.items() if name.endswith((".py", ".js")) for word in FLAGGED
        if word in data.decode("utf-8")
    ]  # fmt: skip
    assert found == []


def test_source_is_cp1252_and_uses_no_raw_layers_in_nodes(archive):
    _, files = archive
    for name, data in files.items():
        if name.endswith(".py"):
            data.decode("utf-8").encode("cp1252")
        if name.startswith("nodes/") and name.endswith(".py"):
            assert not re.search(rb"nn\.(Linear|Conv\d?d?|LayerNorm|Embedding)\(", data), name


def test_size(archive):
    path, files = archive
    assert path.stat().st_size < LARGEST
    big = {name: len(data) for name, data in files.items() if len(data) > 1_000_000 and "demo/model" not in name}
    assert big == {}


def test_registry_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    comfy = project["tool"]["comfy"]
    assert comfy["DisplayName"]
    assert set(comfy) >= {"PublisherId", "DisplayName", "Icon"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["project"]["name"])
    assert (ROOT / "docs" / "icon.svg").is_file()
    assert all("==" not in requirement for requirement in project["project"]["dependencies"])


def test_only_what_comfyui_lacks_is_installed_into_it(archive):
    _, files = archive
    lines = [line for line in files["requirements.txt"].decode().splitlines() if line and not line.startswith("#")]
    assert lines == ["matplotlib>=3.7"]


def test_what_is_left_out_is_left_out_at_the_root_only():
    """`docs/` without a slash in front would leave out web/docs, the help pages, too."""
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("/") and "/" not in line.strip("/") for line in lines)


@pytest.mark.skipif(CLI is None, reason="no comfy-cli on the PATH (set COMFY_CLI): `comfy node validate` was not run")
def test_comfy_cli_packs_the_same_files_and_validates_them(tmp_path):
    """What is committed, packed by comfy-cli, unpacked, and validated as its security check sees it."""
    clone, unpacked = tmp_path / "clone", tmp_path / "ipgo"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    assert "Created zip file" in comfy_cli(clone, "pack")
    with zipfile.ZipFile(clone / "node.zip") as file:
        assert sorted(file.namelist()) == sorted(published(clone))
        file.extractall(unpacked)
    assert "All validation checks passed" in comfy_cli(unpacked, "validate")


def comfy_cli(folder: Path, command: str) -> str:
    """What `comfy node` says of a folder."""
    done = subprocess.run(
        [str(CLI), "--skip-prompt", "node", command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
