"""One node per reward model, and one to combine them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..ipgo_engine import rewards as engine
from .host import files
from .host.choices import reward_dtype
from .host.residence import resident
from .running import for_every_image, from_comfy, lines
from .schema import CATEGORY, Reward, advanced, newer

REWARD_CATEGORY = f"{CATEGORY}/rewards"
RESTS = "Its weights rest in main memory and visit the GPU for as long as a run needs them."


def weights_input(guess: str) -> Any:
    """The list of what lies in models/rewards, with the usual name first."""
    places = files.reward_places()
    usual = [name for name in places if guess in name.lower()]
    return io.Combo.Input(
        "weights", options=places or [files.NOTHING], default=(usual or places or [files.NOTHING])[0],
        tooltip="A file or folder in models/rewards (or where extra_model_paths.yaml says under 'rewards'). The "
        "help page of this node says what belongs there.",
    )  # fmt: skip


def precision_input() -> Any:
    """Precision of the reward model."""
    return advanced(io.Combo.Input(
        "precision", options=["auto", "float32", "float16", "bfloat16"], default="auto",
        tooltip="auto: float16 on a GPU, float32 on the CPU. Scores are float32 either way.",
    ))  # fmt: skip


def reward_output(meaning: str) -> Any:
    """The loaded reward."""
    return Reward.Output("reward", display_name="reward", tooltip=meaning)


def check_weights(weights: str | None) -> bool | str:
    """True, or what is missing and where it belongs; a linked value (None here) is looked at when it is there."""
    try:
        if weights is not None:
            files.reward_path(weights)
    except ValueError as error:
        return str(error)
    return True


def load_from_folder(name: str, weights: str, precision: str) -> io.NodeOutput:
    """A reward with weights, in main memory."""
    return io.NodeOutput(engine.load(name, files.reward_path(weights), "cpu", reward_dtype(precision)))


class IPGODemoReward(io.ComfyNode):
    """The rewards that come with the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two networks trained apart from each other."""
        return io.Schema(
            node_id="IPGODemoReward",
            display_name="IPGO Demo Reward",
            category=REWARD_CATEGORY,
            description="How well a small emoji picture matches its prompt, by a tiny CLIP that ships with the "
            "pack. For the demo model only.",
            inputs=[
                io.Combo.Input(
                    "network", options=["demo-clip", "demo-judge"], default="demo-clip",
                    tooltip="demo-clip: the one to optimize. demo-judge: trained apart from it, to watch as "
                    "held-out reward.",
                )
            ],
            outputs=[reward_output("Cosine similarity of picture and prompt, -1 to 1.")],
            **newer(search_aliases=["emoji reward", "demo clip"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, network: str) -> io.NodeOutput:
        """Read the weights from the pack's own folder."""
        return io.NodeOutput(engine.load(network))


class IPGOClipReward(io.ComfyNode):
    """CLIP score."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Any CLIP."""
        return io.Schema(
            node_id="IPGOClipReward",
            display_name="CLIP Score Reward",
            category=REWARD_CATEGORY,
            description=f"How well the image matches the prompt, with any CLIP. {RESTS}",
            inputs=[weights_input("clip"), precision_input()],
            outputs=[reward_output("Cosine similarity; ordinary pairs score 0.15 to 0.35 with ViT-L/14.")],
            **newer(search_aliases=["clip score", "text alignment"]),
        )

    @classmethod
    def execute(cls, weights: str, precision: str) -> io.NodeOutput:
        """Load."""
        return load_from_folder("clip", weights, precision)

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Say what is missing before anything runs."""
        return check_weights(weights)


class IPGOAestheticReward(io.ComfyNode):
    """LAION's aesthetic predictor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Its head; CLIP ViT-L/14 is looked for beside it."""
        return io.Schema(
            node_id="IPGOAestheticReward",
            display_name="Aesthetic Reward",
            category=REWARD_CATEGORY,
            description="How beautiful people would find the image, whatever the prompt (LAION aesthetic "
            f"predictor). Needs its head and CLIP ViT-L/14 in models/rewards. {RESTS}",
            inputs=[weights_input("aesthetic"), precision_input()],
            outputs=[reward_output("About 1 to 10; ordinary images score 4 to 6.5.")],
            **newer(search_aliases=["laion", "beauty score"]),
        )

    @classmethod
    def execute(cls, weights: str, precision: str) -> io.NodeOutput:
        """Load."""
        return load_from_folder("aesthetic", weights, precision)

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Say what is missing before anything runs."""
        return check_weights(weights)


class IPGOHPSReward(io.ComfyNode):
    """Human Preference Score v2."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two checkpoints whose scores do not compare."""
        return io.Schema(
            node_id="IPGOHPSReward",
            display_name="HPS v2 Reward",
            category=REWARD_CATEGORY,
            description=f"What people prefer, given the prompt (Human Preference Score v2). {RESTS}",
            inputs=[
                weights_input("hps"),
                io.Combo.Input(
                    "version", options=["v2.0", "v2.1"], default="v2.1",
                    tooltip="Two different checkpoints: their scores do not compare. Name the one your file holds.",
                ),
                precision_input(),
            ],
            outputs=[reward_output("Ordinary images score 0.15 to 0.35.")],
            **newer(search_aliases=["hpsv2", "human preference"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: str, version: str, precision: str) -> io.NodeOutput:
        """Load."""
        return load_from_folder({"v2.0": "hpsv2", "v2.1": "hpsv2.1"}[version], weights, precision)

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Say what is missing before anything runs."""
        return check_weights(weights)


class IPGOPickScoreReward(io.ComfyNode):
    """PickScore."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A transformers folder."""
        return io.Schema(
            node_id="IPGOPickScoreReward",
            display_name="PickScore Reward",
            category=REWARD_CATEGORY,
            description=f"What users of a picture service picked, given the prompt (PickScore v1). {RESTS}",
            inputs=[weights_input("pickscore"), precision_input()],
            outputs=[reward_output("Ordinary images score 16 to 24.")],
            **newer(search_aliases=["pick-a-pic", "human preference"]),
        )

    @classmethod
    def execute(cls, weights: str, precision: str) -> io.NodeOutput:
        """Load."""
        return load_from_folder("pickscore", weights, precision)

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Say what is missing before anything runs."""
        return check_weights(weights)


class IPGOImageReward(io.ComfyNode):
    """ImageReward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The authors' file and BERT's vocabulary."""
        return io.Schema(
            node_id="IPGOImageReward",
            display_name="ImageReward Reward",
            category=REWARD_CATEGORY,
            description=f"What people prefer, given the prompt (ImageReward 1.0). {RESTS}",
            inputs=[weights_input("imagereward"), precision_input()],
            outputs=[reward_output("About 0 for an ordinary image, roughly -2.3 to 2.")],
            **newer(search_aliases=["image reward", "human preference"]),
        )

    @classmethod
    def execute(cls, weights: str, precision: str) -> io.NodeOutput:
        """Load."""
        return load_from_folder("imagereward", weights, precision)

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Say what is missing before anything runs."""
        return check_weights(weights)


class IPGOCombineRewards(io.ComfyNode):
    """A weighted sum."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Four places; chain nodes for more."""
        pairs: list[Any] = []
        for number in range(1, 5):
            pairs.append(Reward.Input(
                f"reward_{number}", optional=number > 1,
                tooltip="A reward of the sum; places may stay empty, nodes may be chained."
            ))  # fmt: skip
            pairs.append(io.Float.Input(
                f"weight_{number}", default=1.0, min=-1000.0, max=1000.0, step=0.05, round=0.0001,
                tooltip=f"Weight of reward {number}. Negative avoids it; 0 leaves it out.",
            ))  # fmt: skip
        return io.Schema(
            node_id="IPGOCombineRewards",
            display_name="Combine Rewards",
            category=REWARD_CATEGORY,
            description="A weighted sum of rewards, itself a reward. With images to calibrate on, each counts in "
            "units of its own spread, so that none drowns the others.",
            inputs=[
                *pairs,
                io.Image.Input(
                    "calibration_images", optional=True,
                    tooltip="Optional: two or more ordinary images. Each reward is then brought to their mean and "
                    "spread.",
                ),
                io.String.Input(
                    "calibration_prompts", multiline=True, default="", optional=True,
                    tooltip="Prompts of the calibration images: one line for all, or one line per image.",
                ),
            ],
            outputs=[reward_output("The sum of weight x score, or of weight x (score - mean) / spread.")],
            **newer(search_aliases=["weighted reward", "mix rewards", "sum rewards"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, calibration_images: Any = None, calibration_prompts: str = "", **places: Any) -> io.NodeOutput:
        """The sum of what is connected."""
        pairs = [(places.get(f"reward_{i}"), places.get(f"weight_{i}", 1.0)) for i in range(1, 5)]
        combined = engine.Weighted([(reward, weight) for reward, weight in pairs if reward is not None and weight])
        if calibration_images is None:
            return io.NodeOutput(combined)
        images = from_comfy(calibration_images)
        prompts = for_every_image(lines(calibration_prompts, "calibration_prompts"), len(images))
        with torch.inference_mode(False), torch.no_grad(), resident([combined]):
            return io.NodeOutput(combined.calibrated(images, prompts))


NODES = [
    IPGODemoReward,
    IPGOClipReward,
    IPGOAestheticReward,
    IPGOHPSReward,
    IPGOPickScoreReward,
    IPGOImageReward,
    IPGOCombineRewards,
]
