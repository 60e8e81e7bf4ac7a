"""Nodes for tests only: rewards that go wrong on purpose, and exact comparisons of images."""

from __future__ import annotations

import hashlib
import time

import torch


class FaultyReward:
    """Brightness, until call `after`; then what `fault` says, for `times` calls (0: for ever)."""

    differentiable = True

    def __init__(self, fault, after, times):
        self.name, self.fault, self.after, self.times, self.calls = f"faulty ({fault})", fault, after, times, 0

    def score(self, images, prompts):
        self.calls += 1
        value = images.mean(dim=(1, 2, 3))
        if self.calls <= self.after or (self.times and self.calls > self.after + self.times):
            return value
        if self.fault == "nan":
            return value * float("nan")
        if self.fault == "out of memory":
            raise torch.cuda.OutOfMemoryError("simulated: CUDA out of memory")
        if self.fault == "slow":
            time.sleep(0.3)
            return value
        raise RuntimeError("simulated failure of a reward")


class Faults:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IPGO_REWARD",), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        number = ("INT", {"default": 0, "min": 0, "max": 10**6})
        return {"required": {"fault": (["nan", "out of memory", "slow", "error"],), "after": number, "times": number}}

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802  a new one for every prompt: it counts its calls
        return float("nan")

    def make(self, fault, after, times):
        return (FaultyReward(fault, after, times),)


class SameImages:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "compare", "testing", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"a": ("IMAGE",), "b": ("IMAGE",)}}

    def compare(self, a, b):
        same = a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        text = "equal" if same else f"different: {tuple(a.shape)} {tuple(b.shape)}"
        if not same and a.shape == b.shape:
            text += f", largest difference {float((a.cpu() - b.cpu()).abs().max())}"
        return {"ui": {"text": (text,)}}


class Again:
    """Hands a latent on, and is never cached: what comes after it is computed anew."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "hand_on", "testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return float("nan")

    def hand_on(self, latent):
        return (latent,)


class Digest:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "digest", "testing", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"images": ("IMAGE",)}}

    def digest(self, images):
        pixels = images.float().cpu().contiguous().numpy().tobytes()
        return {"ui": {"text": (hashlib.sha256(pixels).hexdigest(),)}}


NODE_CLASS_MAPPINGS = {
    "IPGOTestFaultyReward": Faults,
    "IPGOTestSameImages": SameImages,
    "IPGOTestAgain": Again,
    "IPGOTestDigest": Digest,
}
