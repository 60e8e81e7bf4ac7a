"""Rewards without weights: arithmetic on pixels, file size, a model behind an address; and wrappers of rewards."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from comfy_api.latest import io

from ..ipgo_engine import rewards as engine
from ..ipgo_engine.errors import InputError
from ..ipgo_engine.rewards.jpeg import JpegSize
from ..ipgo_engine.rewards.judge import TEMPLATE
from .rewards import REWARD_CATEGORY, reward_output
from .schema import Reward, advanced, newer

ALLOWED = "IPGO_JUDGE_HOSTS"  # hosts on the internet that pictures may be sent to, with commas between them


class IPGOBrightnessReward(io.ComfyNode):
    """Mean brightness, or its opposite."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A direction."""
        return io.Schema(
            node_id="IPGOBrightnessReward",
            display_name="Brightness Reward",
            category=REWARD_CATEGORY,
            description="The simplest reward: how bright, or how dark, the image is. Good for a first look at a "
            "method.",
            inputs=[
                io.Combo.Input(
                    "direction", options=["brightness", "darkness"], default="brightness", tooltip="What scores high."
                )
            ],
            outputs=[reward_output("Mean brightness, 0 to 1, or 1 minus it.")],
            **newer(search_aliases=["darkness", "exposure"]),
        )

    @classmethod
    def execute(cls, direction: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(engine.load(direction))


class IPGOContrastReward(io.ComfyNode):
    """Contrast."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Nothing to set."""
        return io.Schema(
            node_id="IPGOContrastReward",
            display_name="Contrast Reward",
            category=REWARD_CATEGORY,
            description="How much the brightness of the image varies.",
            inputs=[],
            outputs=[reward_output("Standard deviation of the brightness.")],
            **newer(search_aliases=["rms contrast"]),
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(engine.load("contrast"))


class IPGOJpegReward(io.ComfyNode):
    """Size of the image as a JPEG file: a reward without a gradient."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Which way, and the quality."""
        return io.Schema(
            node_id="IPGOJpegReward",
            display_name="JPEG Size Reward",
            category=REWARD_CATEGORY,
            description="A black box: the size of the image as a JPEG file. It has no gradient, so one is estimated "
            "from slightly changed images.",
            inputs=[
                io.Combo.Input(
                    "direction", options=["small file", "large file"], default="small file",
                    tooltip="small file: calm pictures. large file: busy pictures.",
                ),
                io.Int.Input("quality", default=95, min=1, max=95, tooltip="JPEG quality; 95 is what other work uses."),
            ],
            outputs=[reward_output("Kilobytes of 1000 bytes; minus them for small files.")],
            **newer(search_aliases=["compressibility", "black box", "file size"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, direction: str, quality: int) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(JpegSize(compressible=direction == "small file", quality=quality))


class IPGOJudgeReward(io.ComfyNode):
    """A vision-language model as judge."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """An address of your own, and what a call may cost."""
        return io.Schema(
            node_id="IPGOJudgeReward",
            display_name="Vision Judge Reward",
            category=REWARD_CATEGORY,
            description="A vision-language model rates the image. It runs behind an address that speaks OpenAI's "
            "chat format, such as a local llama.cpp or vLLM server. Images are sent to that address and nowhere "
            "else.",
            inputs=[
                io.String.Input(
                    "url", default="",
                    tooltip="Base address of the server, for example http://127.0.0.1:8080/v1 for one on this machine: "
                    "that is where the images go. Addresses on the internet must be allowed, see the help page.",
                ),
                io.String.Input("model_name", default="default", tooltip="Name of the model, as the server calls it."),
                io.Int.Input(
                    "max_calls", default=500, min=1, max=1000000,
                    tooltip="Calls of one run at most, retries included; the run then ends with its best so far.",
                ),
                advanced(io.Float.Input(
                    "timeout", default=60.0, min=1.0, max=3600.0,
                    tooltip="Seconds to connect and send, and again for the whole answer.",
                )),
                advanced(io.Int.Input("concurrency", default=2, min=1, max=64, tooltip="Calls under way at once.")),
                advanced(io.Int.Input(
                    "retries", default=2, min=0, max=100,
                    tooltip="Further attempts after a failure that may pass: no answer in time, busy, no score in it.",
                )),
                advanced(io.String.Input(
                    "template", multiline=True, default="",
                    tooltip="What the judge is asked, with {prompt}, {low} and {high} in it; empty is the question "
                    "shown on the help page. The answer must hold 'Score: 7.5', a JSON score, 7/10, or a bare number.",
                )),
                advanced(io.Int.Input(
                    "max_tokens", default=1024, min=1, max=1000000, optional=True,  # workflows saved before lack it
                    tooltip="Tokens of one answer at most. A model that thinks before it answers needs room for that.",
                )),
            ],
            outputs=[reward_output("0 to 10, as the judge says.")],
            **newer(search_aliases=["vlm", "llm judge", "vision model score"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, url: str, model_name: str, template: str = "", **settings: Any) -> io.NodeOutput:
        """Nothing is called before the first image is rated, and nothing outside this network unless it is allowed."""
        check_destination(url)
        config = engine.JudgeConfig(url=url, model=model_name, template=template.strip() or TEMPLATE, **settings)
        return io.NodeOutput(engine.Judge(config))

    @classmethod
    def validate_inputs(cls, url: str | None = None) -> bool | str:
        """An address must have been typed, or linked (None here)."""
        if url is None or str(url).strip():
            return True
        return "url is empty: type the judge's address, such as http://127.0.0.1:8080/v1."


def check_destination(url: str) -> None:
    """Raise `InputError` for an address on the internet that the environment variable does not name.

    A workflow brings its address along: pressing Run on somebody else's must not send pictures to them.
    """
    try:
        host = urlsplit(url.strip()).hostname or ""
    except ValueError:
        return  # no address: the judge says so
    allowed = os.getenv(ALLOWED, "")
    if _is_near(host) or host in allowed.lower().replace(",", " ").split():
        return
    raise InputError(
        f"url leads to {host}, which is not on this machine or its network: pictures would be sent there. If you want "
        f"that, start ComfyUI with {ALLOWED}={host} in its environment."
    )


def _is_near(host: str) -> bool:
    """This machine, or a private network; a name without a dot is one of the latter."""
    address = _number_of(host)
    if address is None:
        return "." not in host or host.endswith((".localhost", ".local"))
    return address.is_loopback or (address.is_private and not address.is_link_local)


def _number_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, None for a name. 134744072 and 0x08080808 are addresses, too."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


class IPGORobustReward(io.ComfyNode):
    """A reward averaged over small changes of the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The reward and how much the image is changed."""
        return io.Schema(
            node_id="IPGORobustReward",
            display_name="Robust Reward",
            category=REWARD_CATEGORY,
            description="Averages a reward over slightly cropped, shrunk and noisy versions of the image: patterns "
            "that fool the reward on one exact grid of pixels no longer pay.",
            inputs=[
                Reward.Input("reward_in", tooltip="The reward to average."),
                io.Int.Input("samples", default=4, min=1, max=64,
                    tooltip="Changed versions per image; each costs one score."),
                io.Float.Input(
                    "noise", default=0.02, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Noise that is added, 0 to 1."
                ),
                advanced(io.Float.Input(
                    "crop", default=0.15, min=0.0, max=0.9, step=0.01, round=0.001,
                    tooltip="Largest part of a side cut off."
                )),
                advanced(io.Float.Input(
                    "resample", default=0.3, min=0.0, max=0.9, step=0.01, round=0.001, tooltip="Largest shrinking."
                )),
            ],
            outputs=[reward_output("The same scale as the reward.")],
            **newer(search_aliases=["augmentation", "reward hacking"]),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, reward_in: engine.Reward, samples: int, noise: float, crop: float, resample: float
    ) -> io.NodeOutput:
        """Wrap."""
        return io.NodeOutput(engine.Robust(reward_in, samples, crop=crop, resample=resample, noise=noise))


class IPGOOffloadReward(io.ComfyNode):
    """A reward whose weights are on the GPU for the length of one score only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The reward."""
        return io.Schema(
            node_id="IPGOOffloadReward",
            display_name="Offload Reward",
            category=REWARD_CATEGORY,
            description="For GPUs with little memory: the reward's weights rest in main memory and visit the GPU for "
            "each score and its gradient, not for the whole run. Scores and gradients stay the same.",
            inputs=[Reward.Input("reward_in", tooltip="A reward with weights of its own.")],
            outputs=[reward_output("The same scores.")],
            **newer(search_aliases=["low vram", "8 GB", "save memory"]),
        )

    @classmethod
    def execute(cls, reward_in: engine.Reward) -> io.NodeOutput:
        """Wrap."""
        return io.NodeOutput(engine.Offloaded(reward_in))


NODES = [
    IPGOBrightnessReward,
    IPGOContrastReward,
    IPGOJpegReward,
    IPGOJudgeReward,
    IPGORobustReward,
    IPGOOffloadReward,
]
