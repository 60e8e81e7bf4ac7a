"""From an image batch to the tensor a model expects, in torch alone, so that gradients reach the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_inputs(images: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Raise `InputError` unless `images` is a floating (B, 3, H, W) tensor with one prompt per image."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images is {found}: give a tensor (B, 3, H, W); a single image needs a leading axis of 1.")
    if not images.is_floating_point():
        raise InputError(f"images has dtype {images.dtype}: convert to float and divide by 255, values in [0, 1].")
    if 0 in images.shape:
        raise InputError(f"images is {tuple(images.shape)}: every axis needs at least one entry.")
    if prompts is None:
        return
    if isinstance(prompts, str) or len(prompts) != images.shape[0]:
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise InputError(f"{count} prompt(s) for {images.shape[0]} image(s): give a list with one prompt per image.")


def into_range(images: Tensor) -> Tensor:
    """Float32 images limited to [0, 1], shape unchanged, with the gradient passed straight through.

    A value outside [0, 1] is scored as the nearest displayable one, which is what a saved file would show. Its
    gradient is that of the limited pixel: a plain clamp would give 0 and a saturated pixel could never come back.
    """
    images = images.float()
    return images + (images.detach().clamp(0, 1) - images.detach())


@dataclass(frozen=True)
class Preprocessing:
    """The steps of one model's own evaluation code: resize, cut or fill to a square, normalize.

    Measured against open_clip's transform (Pillow) and transformers' CLIP processor on the same pictures, from 20 x 30
    to 1024 x 1024: at most 1.1 steps of 8 bits apart, 0.3 on average. Those round to 8 bits after each of their two
    passes, which would cut the gradient; this does not round.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: Literal["shorter", "longer", "squash"] = "shorter"
    """Which side becomes `size`: the shorter (the centre is cropped), the longer (the rest is black), or both."""
    crop: Literal["round", "floor"] = "round"
    """Offset of the centre crop when the margin is odd: torchvision rounds half to even, transformers rounds down."""
    clamp: bool = True
    """Cut what the bicubic kernel overshoots, as Pillow does; off for models evaluated by resizing float tensors."""

    def __post_init__(self) -> None:
        for values in (self.mean, self.std):
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                raise InputError(f"preprocessing got {values!r} for the three colours: give three numbers.")
        if min(self.std) <= 0:
            raise InputError(f"preprocessing got the spread {self.std!r}: it must be above 0.")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalized (B, 3, size, size), float32, for images (B, 3, H, W) of any size and shape."""
        images = into_range(images)
        if self.fit == "shorter":
            square = center_crop(resize(images, shorter_side(images, self.size), self.clamp), self.size, self.crop)
        elif self.fit == "longer":
            square = pad_to_square(resize(images, longer_side(images, self.size), self.clamp), self.size)
        else:
            square = resize(images, (self.size, self.size), self.clamp)
        mean = square.new_tensor(self.mean).view(1, 3, 1, 1)
        std = square.new_tensor(self.std).view(1, 3, 1, 1)
        return (square - mean) / std


def shorter_side(images: Tensor, size: int) -> tuple[int, int]:
    """(height, width) whose shorter side is `size`; the longer one is rounded down, as torchvision does."""
    height, width = images.shape[-2:]
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def longer_side(images: Tensor, size: int) -> tuple[int, int]:
    """(height, width) whose longer side is `size`; the shorter one is rounded to nearest, as HPS v2 does."""
    height, width = images.shape[-2:]
    scale = size / float(max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(images: Tensor, target: tuple[int, int], clamp: bool) -> Tensor:
    """Bicubic with antialiasing: the kernel of Pillow (a = -0.5), computed without rounding to 8 bits.

    With `clamp`, first along the rows and then along the columns, limited to [0, 1] after each, as Pillow does.
    """
    if tuple(images.shape[-2:]) == target:
        return images
    if not clamp:
        return _bicubic(images, target)
    rows = _bicubic(images, (images.shape[-2], target[1])).clamp(0, 1)
    return _bicubic(rows, target).clamp(0, 1)


def _bicubic(images: Tensor, target: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == target:
        return images
    return F.interpolate(images, size=target, mode="bicubic", align_corners=False, antialias=True)


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """The images in the middle of a black (size, size) square; an odd pixel goes right and below."""
    height, width = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, [width // 2, width - width // 2, height // 2, height - height // 2])


def center_crop(images: Tensor, size: int, rounding: Literal["round", "floor"]) -> Tensor:
    """The central (size, size) window of images whose two sides are at least `size`."""
    height, width = images.shape[-2:]
    if rounding == "round":
        top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    else:
        top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def to_uint8(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 on the CPU, rounded to nearest: what a PNG file of these images holds. No gradient."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu()
