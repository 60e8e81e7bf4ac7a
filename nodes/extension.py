"""What ComfyUI loads: every node of the pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import black_box_rewards, downloads, joint, models, noise, rewards, scores, tokens, tokens_files
from .host.files import register_folders

MODULES = (models, tokens, tokens_files, noise, joint, rewards, black_box_rewards, downloads, scores)


class IPGOExtension(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        """Called by newer releases before the nodes are listed."""
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        register_folders()
        return [node for module in MODULES for node in module.NODES]
