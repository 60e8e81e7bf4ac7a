"""Scoring and ranking images that exist already."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipgo_engine.errors import NonFiniteError
from ..ipgo_engine.report import Tile, contact_sheet, from_pil, plain_table
from .host.residence import score
from .running import for_every_image, from_comfy, lines, to_comfy
from .schema import CATEGORY, newer, reward_input


class IPGOScoreImages(io.ComfyNode):
    """Scores as list and table, images ranked and labelled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Images, a reward, a prompt."""
        return io.Schema(
            node_id="IPGOScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores a batch of images with a reward and ranks them: the fair comparison for everything "
            "in this pack, and Best-of-N with many seeds.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of images."),
                reward_input("What the images are scored with."),
                io.String.Input(
                    "prompt", multiline=True, default="a photo of a cat",
                    tooltip="What the images were asked to show: one line for all, or one line per image.",
                ),
                io.Int.Input("top_k", default=0, min=0, max=4096,
                    tooltip="Give out the best so many images; 0 is all."),
            ],
            outputs=[
                io.Image.Output("ranked", display_name="ranked", tooltip="The images, best first, top_k of them."),
                io.Image.Output("labelled", display_name="labelled",
                    tooltip="One picture of them all with ranks and scores."),
                io.Float.Output(
                    "scores", display_name="scores", is_output_list=True,
                    tooltip="Score of every image, in the order given."
                ),
                io.Float.Output("mean", display_name="mean", tooltip="Mean score of all images."),
                io.Float.Output("best", display_name="best", tooltip="Score of the best image."),
                io.String.Output("table", display_name="table", tooltip="Rank, number and score of every image."),
            ],
            **newer(search_aliases=["rank images", "best of n", "rate images", "pick best"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, images: Any, reward: Any, prompt: str, top_k: int) -> io.NodeOutput:
        """Score one at a time, then sort."""
        pictures = from_comfy(images)
        prompts = for_every_image(lines(prompt), len(pictures))
        with torch.inference_mode(False), torch.no_grad():
            scores = score(reward, pictures, prompts)
            valid = scores[torch.isfinite(scores)]
            if not len(valid):
                raise NonFiniteError(f"reward {reward.name!r} gave none of the {len(scores)} image(s) a number.")
            # An image without a number, such as the black one of an overflowing VAE, comes last.
            order = scores.nan_to_num(-math.inf, neginf=-math.inf).argsort(descending=True, stable=True)
            best = order[: top_k or len(order)]
            sheet = labelled_sheet(pictures[best], scores[best], f"{reward.name}: best {len(best)} of {len(order)}")
        return io.NodeOutput(
            to_comfy(pictures[best]), to_comfy(sheet), scores.tolist(), float(valid.mean()), float(valid.max()),
            score_table(order, scores, prompts),
        )  # fmt: skip


def labelled_sheet(images: Tensor, scores: Tensor, title: str) -> Tensor:
    """One picture (1, 3, H, W) of images (B, 3, H, W), best first."""
    tiles = [
        Tile(image, f"#{rank}  {float(value):.4g}")
        for rank, (image, value) in enumerate(zip(images, scores, strict=True), start=1)
    ]
    return from_pil(contact_sheet(tiles, columns=4, title=title))


def score_table(order: Tensor, scores: Tensor, prompts: list[str]) -> str:
    """One line per image, best first; images are numbered from 1 in the order they came."""
    rows: list[dict[str, Any]] = [
        {"rank": rank, "image": index + 1, "score": float(scores[index]), "prompt": prompts[index]}
        for rank, index in enumerate(order.tolist(), start=1)
    ]
    return plain_table(rows)


NODES = [IPGOScoreImages]
