"""The 8x autoencoder: trained on crops first (four times as many pictures a second), then on whole pictures."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .data import SIZE, Drawer, Pictures
from .states import log, resume, save

NORM_GROUPS = 4
RATE = 1.5e-3
KL_WEIGHT = 1e-6  # as SD1.5's: the latents are only kept from growing


def build() -> AutoencoderKL:
    """SD1.5's layout at widths 32, 32, 64, 128.

    Normalized in 4 groups, not SD1.5's 32: with one channel a group the last layers could not tell colours apart, since
    a constant channel becomes zero. The weights have the same shapes whatever the number of groups.
    """
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def loss_of(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Absolute and squared error, the error of the picture's edges, and a little of the latent's divergence."""
    posterior = model.encode(images).latent_dist
    decoded = model.decode(posterior.sample()).sample.float()
    error = decoded - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().float().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + KL_WEIGHT * kl


def crop(images: Tensor, size: int, random: torch.Generator) -> Tensor:
    """The same random window of every picture."""
    top, left = torch.randint(0, images.shape[2] - size + 1, (2,), generator=random).tolist()
    return images[:, :, top : top + size, left : left + size]


@torch.no_grad()
def psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Decibels between pictures and their reconstruction from the latent's mean, averaged over pictures."""
    decoded = model.decode(model.encode(images * 2 - 1).latent_dist.mode()).sample.float().clamp(-1, 1)
    mse = ((decoded + 1) / 2 - images).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


def train(pictures: Pictures, out: Path, minutes: float, device: str) -> None:
    """Train for `minutes`, going on from `out/vae.pt` when it is there.

    Once the UNet's latents exist the encoder stays as it is, and only the decoder learns.
    """
    torch.manual_seed(0)
    model = build().to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    step = resume(out / "vae.pt", model, average, optimizer, device)
    if (out / "latents.pt").exists():
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    drawer = Drawer(pictures, seed=step + 2)
    check = Drawer(pictures, seed=1, held_out=True).batch(40)[0].to(device)
    started, shown = time.time(), 0.0
    while (done := (time.time() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * max(0.02, 1 - done)
        whole = done > 0.75
        images = drawer.batch(8 if whole else 16)[0]
        images = images if whole else crop(images, 64, drawer.random)
        images = (images * 2 - 1).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        if time.time() - shown > 60 or step == 1:
            shown = time.time()
            save(out / "vae.pt", model, average, optimizer, step)
            log(out / "vae.csv", step=step, loss=float(loss.detach()), psnr=psnr(average.module, check))
    save(out / "vae.pt", model, average, optimizer, step)
    log(out / "vae.csv", step=step, loss=float(loss.detach()), psnr=psnr(average.module, check))
