"""JPEG file size: the black box of DDPO and of the noise paper, for and against compressible images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from .preprocess import check_inputs, to_uint8


class JpegSize:
    """Size of the image as a JPEG file, in kilobytes of 1000 bytes, written by Pillow at its default subsampling.

    Compressibility is minus the size, incompressibility is the size. Both grow with the number of pixels, so scores
    of images of different sizes do not compare. Quality 95 is the one DDPO uses.
    """

    differentiable = False

    def __init__(self, *, compressible: bool = True, quality: int = 95) -> None:
        """`quality` from 1 to 95, as Pillow recommends; raises `InputError` outside that."""
        if not 1 <= quality <= 95:
            raise InputError(f"quality is {quality!r}: use a JPEG quality from 1 to 95.")
        self.name = "jpeg" if compressible else "jpeg-incompressibility"
        self.quality = quality
        self.score_settings = {"quality": quality}
        self._sign = -1.0 if compressible else 1.0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, for images (B, 3, H, W) in [0, 1]. Ignores the prompt."""
        check_inputs(images, prompts)
        if not torch.isfinite(images).all():
            raise NonFiniteError("images holds NaN or infinity: it cannot be written as JPEG.")
        sizes = [self._kilobytes(pixels) for pixels in to_uint8(images)]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device) * self._sign

    def _kilobytes(self, pixels: Tensor) -> float:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000
