"""Names stay inside ComfyUI's folders, and extra places are honoured."""

from __future__ import annotations

import folder_paths
import host
import pytest

paths = host.pack("nodes.host.paths")
errors = host.pack("ipgo_engine.errors")


def test_tokens_are_saved_and_found_under_models(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder_paths.folder_names_and_paths.pop(paths.TOKENS, None)
    folder_paths.add_model_folder_path(paths.TOKENS, str(elsewhere))  # as extra_model_paths.yaml does
    paths.register()
    file = paths.new_token_file("styles/vivid")
    assert file == elsewhere / "styles" / "vivid.safetensors"
    file.write_bytes(b"x")
    assert [name.replace("\\", "/") for name in paths.token_files()] == ["styles/vivid.safetensors"]
    assert paths.token_file(paths.token_files()[0]) == file
    with pytest.raises(errors.InputError, match="missing"):
        paths.token_file("missing.safetensors")
    folder_paths.folder_names_and_paths.pop(paths.TOKENS)
    paths.register()
    assert len(folder_paths.get_folder_paths(paths.TOKENS)) == 1


@pytest.mark.parametrize(
    "name", ["", "  ", "../up", "a/../../up", "/etc/passwd", "\\\\server\\x", "a:b", "a?", "dot.", "a\x00"]
)
def test_names_are_contained(name, tmp_path):
    with pytest.raises(errors.InputError, match="name is"):
        paths.contained(tmp_path, name, ".safetensors")


def test_runs_are_kept_in_the_output_folder():
    file = paths.run_file("cat", ".state")
    assert file.parent.name == "ipgo"
    assert file.name == "cat.state"


def test_a_link_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    try:
        (tmp_path / "inside" / "link").symlink_to(tmp_path)
    except OSError:
        pytest.skip("links need rights here")
    with pytest.raises(errors.InputError, match="leads outside"):
        paths.contained(tmp_path / "inside", "link/mine", ".safetensors")
