"""Fetching published reward weights, when asked to and not before."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipgo_engine.rewards.fetch import download
from ..ipgo_engine.rewards.weights import WEIGHTS, describe
from .host import files
from .host.watch import Transfer
from .rewards import REWARD_CATEGORY
from .schema import advanced, newer

ACTIONS = ("show size and licence", "download")


class IPGODownloadWeights(io.ComfyNode):
    """The weights of a reward, into models/rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """An output node that first only shows what it would fetch."""
        return io.Schema(
            node_id="IPGODownloadWeights",
            display_name="Download Reward Weights",
            category=REWARD_CATEGORY,
            description="Shows where the weights of a reward come from, how large they are and under which licence, "
            "and fetches them once you choose 'download'. Afterwards everything works offline.",
            inputs=[
                io.Combo.Input(
                    "reward_name", options=sorted(WEIGHTS), default=sorted(WEIGHTS)[0],
                    tooltip="Whose weights. The help page of each reward node says what it measures.",
                ),
                io.Combo.Input(
                    "action", options=list(ACTIONS), default=ACTIONS[0],
                    tooltip="show size and licence: fetches nothing. download: fetches what is missing into "
                    "models/rewards and checks it; after Cancel or a broken line it goes on from where it was.",
                ),
                advanced(io.String.Input(
                    "mirror", default="",
                    tooltip="Another address that serves the same paths, for example inside your own network. Empty: "
                    "the published one.",
                )),
            ],
            outputs=[io.String.Output("report", display_name="report",
                tooltip="Files, sizes, licences, and how each was verified.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["fetch weights", "reward model download", "pickscore", "hps", "imagereward"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, reward_name: str, action: str, mirror: str) -> io.NodeOutput:
        """Show, or fetch; progress, text and Cancel as with every long node."""
        transfer = Transfer(cls.hidden.unique_id)
        if action == ACTIONS[0]:
            transfer.report(describe(reward_name))
            transfer.report(f"Nothing was fetched. Choose '{ACTIONS[1]}' to put them into {files.reward_root()}.")
        else:
            download(
                reward_name, files.reward_root(), report=transfer.report, progress=transfer.progress,
                host=mirror.strip() or None,
            )  # fmt: skip
            transfer.report("Press R, then choose them in the reward's node.")
        return io.NodeOutput(transfer.text, ui={"text": (transfer.text,)})

    @classmethod
    def fingerprint_inputs(cls, reward_name: str, action: str, mirror: str) -> float:
        """Never cached: what is on the disk may have changed."""
        return float("nan")


NODES = [IPGODownloadWeights]
