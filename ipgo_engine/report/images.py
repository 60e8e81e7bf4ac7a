"""Between tensors, Pillow images and PNG files."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.files import write_whole
from ..rewards.preprocess import to_uint8

if TYPE_CHECKING:
    from PIL import Image


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) or (1, 3, H, W) in [0, 1] as a Pillow image."""
    from PIL import Image

    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[:2] != (1, 3):
        raise InputError(f"image is {tuple(image.shape)}: give one image, (3, H, W) or (1, 3, H, W).")
    return Image.fromarray(to_uint8(batch)[0].numpy())


def from_pil(image: Image.Image) -> Tensor:
    """A Pillow image as (1, 3, H, W) float32 in [0, 1]; transparent pixels lie on white, 16 bits of grey stay 16.

    Raises `InputError` for floating-point pixels, of which nobody can say what white is.
    """
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise InputError("the picture holds floating-point pixels, whose white is unknown: save it with 8 or 16 bits.")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts at 255 instead of scaling
        grey = torch.from_numpy(np.array(image, dtype=np.float32) / 65535).clamp(0, 1)
        return grey.expand(1, 3, *grey.shape).contiguous()
    if image.mode in ("RGBA", "LA", "P") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8))
    return pixels.permute(2, 0, 1)[None].float() / 255


def open_image(path: str | Path) -> Tensor:
    """The picture in a file as (1, 3, H, W). Raises `InputError` when it is missing or no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return from_pil(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}).") from error


def save_image(path: str | Path, image: Tensor | Image.Image) -> Path:
    """Write a PNG file, whole or not at all."""
    picture = to_pil(image) if isinstance(image, Tensor) else image
    return write_whole(path, lambda part: picture.save(part, format="PNG"))


def slug(text: str, longest: int = 40) -> str:
    """A piece of a file name that every file system takes: "Red heart, 3D!" -> "red-heart-3d"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:longest].strip("-") or "prompt"
