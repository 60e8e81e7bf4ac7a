"""The denoiser: SD1.5's layout, small, trained on cached latents of drawn pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clip import WIDTH, load_clip
from .data import SIZE, Drawer, Pictures, favourites
from .states import log, resume, save
from .tokenizer import LENGTH
from .vae import build as build_vae

RATE, BATCH, DROPOUT = 1e-3, 32, 0.1
STRANGERS = 12  # at most, a side: tokens without meaning, put around every other batch's texts
STRANGER_NORM = 5.0  # at most; a text's own tokens have about 14, the square root of WIDTH
FAVOURED = 0.75  # of a batch, drawn among the favourite concepts
NORM_GROUPS = 8  # SD1.5 has 10 channels a group; 32 groups of 2 would be nearly instance normalization
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build() -> UNet2DConditionModel:
    """Widths 64, 128, 256 at 16, 8 and 4 squares, one block a level, cross-attention at 8 and 4 squares.

    Attention among 16 x 16 places took two thirds of the time of a training step on a CPU.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=NORM_GROUPS,
    )


@torch.no_grad()
def cache_latents(pictures: Pictures, out: Path, draws: int, device: str) -> tuple[Tensor, list[str], float]:
    """`draws` drawings of every picture: latents of unit variance, captions, and the factor that scaled them."""
    file = out / "latents.pt"
    if file.exists():
        kept = torch.load(file, map_location="cpu", weights_only=True)
        return kept["latents"], kept["captions"], kept["factor"]
    vae = build_vae().to(device)
    average = torch.load(out / "vae.pt", map_location=device, weights_only=True)["average"]
    vae.load_state_dict({k.removeprefix("module."): v for k, v in average.items() if k.startswith("module.")})
    drawer, latents, captions = Drawer(pictures, seed=30), [], []
    total = draws * len(drawer.rows)
    while len(captions) < total:
        images, texts, _ = drawer.batch(64)
        with torch.autocast(device, torch.bfloat16):
            latents.append(vae.encode(images.to(device) * 2 - 1).latent_dist.mode().float().cpu())
        captions += texts
    joined = torch.cat(latents)
    factor = float(1 / joined.std())
    torch.save({"latents": (joined * factor).half(), "captions": captions, "factor": factor}, file)
    return (joined * factor).half(), captions, factor


class TextStates:
    """The text tower's last hidden states, computed once per caption: padded to 77 as SD1.5 does, or cut at the end."""

    def __init__(self, tokenizer: Any, clip: Any, device: str) -> None:
        self.tokenizer, self.clip, self.device = tokenizer, clip, device
        self.kept: dict[str, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str], padded: bool) -> Tensor:
        """(B, S, WIDTH): S is 77, or the length of the longest caption (its batch mates keep some padding)."""
        new = sorted({caption for caption in captions if caption not in self.kept})
        if new:
            tokens = self.tokenizer(
                new, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
            ).to(self.device)
            states = self.clip.text_model(input_ids=tokens.input_ids).last_hidden_state.half()
            lengths = tokens.attention_mask.sum(dim=1).tolist()
            self.kept |= {c: (state, length) for c, state, length in zip(new, states, lengths, strict=True)}
        longest = LENGTH if padded else max(self.kept[caption][1] for caption in captions)
        return torch.stack([self.kept[caption][0][:longest].float() for caption in captions])


def among_strangers(context: Tensor, random: torch.Generator) -> Tensor:
    """`context` with short random vectors before and after it: (B, 0..STRANGERS + S + 0..STRANGERS, WIDTH).

    A key of zero gets the logit 0. A model that never saw one gave two tokens near zero so much attention that its
    pictures fell apart; large models have learned to rest their attention on the first token.
    """
    sides = []
    for count in torch.randint(STRANGERS + 1, (2,), generator=random).tolist():
        directions = torch.nn.functional.normalize(torch.randn(len(context), count, WIDTH, generator=random), dim=-1)
        lengths = torch.rand(len(context), count, 1, generator=random) * STRANGER_NORM
        sides.append((directions * lengths).to(context))
    return torch.cat((sides[0], context, sides[1]), dim=1)


def train(pictures: Pictures, out: Path, minutes: float, device: str, draws: int = 24) -> None:
    """Train for `minutes`, going on from `out/unet.pt` when it is there."""
    torch.manual_seed(3)
    tokenizer, clip = load_clip(out, device)
    latents, captions, factor = cache_latents(pictures, out, draws, device)
    noises = DDPMScheduler(**SCHEDULE)
    snr = noises.alphas_cumprod / (1 - noises.alphas_cumprod)
    weights = (snr.clamp_max(5) / snr).to(device)
    model = build().to(device)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step = resume(out / "unet.pt", model, average, optimizer, device)
    random = torch.Generator().manual_seed(step + 4)
    states = TextStates(tokenizer, clip, device)
    everything = torch.arange(len(latents))
    favoured = torch.tensor([i for i, c in enumerate(captions) if any(name in c for name in favourites())])
    started, shown, mean = time.time(), time.time(), 0.0
    while (done := (time.time() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 200) * max(0.01, 1 - done)
        pool = favoured if float(torch.rand((), generator=random)) < FAVOURED else everything
        rows = pool[torch.randint(len(pool), (BATCH,), generator=random)].tolist()
        texts = [captions[r] if float(torch.rand((), generator=random)) > DROPOUT else "" for r in rows]
        clean = latents[rows].float().to(device)
        times = torch.randint(0, 1000, (BATCH,), generator=random).to(device)
        noise = torch.randn(clean.shape, generator=random).to(device)
        context = states(texts, padded=step % 4 != 0)
        context = among_strangers(context, random) if step % 2 else context
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, torch.bfloat16):  # a CPU's flash backward is slow
            predicted = model(noises.add_noise(clean, noise, times), times, context).sample
        loss = (weights[times] * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        mean += (float(loss.detach()) - mean) / min(step, 200)
        if time.time() - shown > 60:
            shown = time.time()
            log(out / "unet.csv", step=step, loss=mean)
            save(out / "unet.pt", model, average, optimizer, step, factor=factor)
    log(out / "unet.csv", step=step, loss=mean)
    save(out / "unet.pt", model, average, optimizer, step, factor=factor)
