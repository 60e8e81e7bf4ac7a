"""Tokens in files, in ComfyUI's own folders."""

from __future__ import annotations

import json
import math
from typing import Any

from comfy_api.latest import io

from ..ipgo_engine.formats.tokens import read_metadata
from ..ipgo_engine.tokens import IPGOTokens
from .host import files, paths
from .schema import CATEGORY, Tokens, newer


class IPGOSaveTokens(io.ComfyNode):
    """Tokens to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """An output node."""
        return io.Schema(
            node_id="IPGOSaveTokens",
            display_name="Save IPGO Tokens",
            category=CATEGORY,
            description="Writes tokens into models/ipgo_tokens (or where extra_model_paths.yaml says), numbered, "
            "never over an older file. Training saves by itself; this is for a name of your own.",
            inputs=[
                Tokens.Input("tokens", tooltip="Learned tokens."),
                io.String.Input(
                    "filename_prefix", default="my_tokens",
                    tooltip="Name of the file; a number is added. Sub-folders are allowed, leaving the folder is not.",
                ),
                io.String.Input(
                    "note", default="", multiline=True, tooltip="Kept in the file and shown by Load IPGO Tokens."
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="Where the tokens are now.")],
            is_output_node=True,
            **newer(search_aliases=["export tokens", "store tokens"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, tokens: Any, filename_prefix: str, note: str) -> io.NodeOutput:
        """Write the file, whole or not at all."""
        metadata = {"note": note} if note.strip() else {}
        path = tokens.save(files.next_token_file(filename_prefix), **metadata)
        return io.NodeOutput(files.shown(path), ui={"text": (f"Saved: {files.shown(path)}",)})


class IPGOLoadTokens(io.ComfyNode):
    """Tokens from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The list holds every file there is now; press R in ComfyUI to look again."""
        names = paths.token_files()
        return io.Schema(
            node_id="IPGOLoadTokens",
            display_name="Load IPGO Tokens",
            category=CATEGORY,
            description="Reads tokens from models/ipgo_tokens. Press R to refresh the list after training.",
            inputs=[
                io.Combo.Input(
                    "file", options=names or [files.NOTHING],
                    tooltip="A tokens file. Training puts its own here under the name of its save_as.",
                )
            ],
            outputs=[
                Tokens.Output("tokens", display_name="tokens", tooltip="The tokens, for Apply IPGO Conditioning."),
                io.String.Output(
                    "information", display_name="information",
                    tooltip="What the file says: prompts, reward, text encoder, settings, note.",
                ),
            ],
            **newer(search_aliases=["import tokens", "open tokens"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read and check the file; damaged or foreign ones are refused by name."""
        path = paths.token_file(file)
        information = json.dumps(read_metadata(path), indent=2, ensure_ascii=False)
        return io.NodeOutput(IPGOTokens.load(path), information)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> Any:
        """Read again when the file was replaced; every time when it comes through a link (None here)."""
        if file is None:
            return math.nan
        path = paths.token_file(file)
        return f"{path}:{path.stat().st_mtime_ns}"

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Files written since the page was loaded are fine too; so is a link (None here). Core says what is missing."""
        try:
            if file is not None:
                paths.token_file(file)
        except ValueError as error:
            return str(error)
        return True


NODES = [IPGOSaveTokens, IPGOLoadTokens]
