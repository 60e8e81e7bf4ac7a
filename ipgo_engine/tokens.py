"""IPGO tokens: a few continuous tokens before and after the prompt's embedding (IPGO paper, section 4.1)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TokenConfig
from .errors import InputError
from .formats.tokens import read_tokens, write_tokens
from .generators.base import Conditioning


def rotate_even_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """R1 of eq. 4: rotate the coordinate pairs (0, 1), (2, 3), ... of the last axis by `angle` radians.

    `x` is (..., d) with d even; `angle` is a scalar or broadcasts against (..., d / 2).
    """
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def rotate_odd_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """R2 of eq. 5: rotate the coordinate pairs (1, 2), (3, 4), ..., (d - 1, 0) of the last axis by `angle` radians."""
    return rotate_even_pairs(x.roll(-1, dims=-1), angle).roll(1, dims=-1)


def wrap_angles(angles: Tensor) -> Tensor:
    """The same angles in (-pi, pi]."""
    return math.pi - torch.remainder(math.pi - angles, 2 * math.pi)


def nearest_orthonormal(basis: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to `basis` (d, N), N <= d: its polar factor."""
    u, _, vh = torch.linalg.svd(basis, full_matrices=False)
    return u @ vh


def insert_tokens(embeddings: Tensor, prefix: Tensor, suffix: Tensor) -> Tensor:
    """T = concat(V_pre, f(C), V_suf) on the sequence axis (eq. 2).

    `embeddings` is (B, S, d); `prefix` and `suffix` are (M, d), or (B, M, d) for other tokens in every row.
    """
    rows = embeddings.shape[0]

    def expand(tokens: Tensor) -> Tensor:
        tokens = tokens.to(embeddings)
        return tokens if tokens.ndim == 3 else tokens.expand(rows, -1, -1)

    return torch.cat((expand(prefix), embeddings, expand(suffix)), dim=1)


def extend_mask(mask: Tensor | None, before: int, after: int) -> Tensor | None:
    """A (B, S) attention mask for a sequence that grew by tokens everybody may attend to."""
    return None if mask is None else nn.functional.pad(mask, (before, after), value=True)


def mean_token(embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of (B, S, d), masked positions left out: (B, d) in float32."""
    values = embeddings.float()
    if mask is None:
        return values.mean(dim=1)
    weight = mask.to(values)[..., None]
    return (values * weight).sum(dim=1) / weight.sum(dim=1)


class _Side(nn.Module):
    """Prefix or suffix: V = R2(theta2) R1(theta1) E Z (eqs. 6 and 7); tokens are the columns of V."""

    def __init__(self, dim: int, length: int, config: TokenConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.length = config, length

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator) * 2 - 1

        if not config.low_rank:  # the same norm as a fresh low-rank token has: sqrt(N / 3)
            spread = math.sqrt(config.basis_size / 3 / dim)
            self.embedding = nn.Parameter(torch.randn(length, dim, generator=generator) * spread)
            return
        columns = config.basis_size * (length if config.wide_basis else 1)
        if columns > dim:
            raise InputError(
                f"basis_size gives {columns} basis vectors but the embedding is only {dim} wide: make it smaller."
            )
        bound = 1.0 if config.value_bound is None else config.value_bound
        self.basis = nn.Parameter(nearest_orthonormal(torch.randn(dim, columns, generator=generator)))
        self.coefficients = nn.Parameter(uniform(columns, length) * bound)
        # The notebook learns two angles per token and never applies them; they belong to its parameter count.
        if config.rotation or config.wide_basis:
            self.angles = nn.Parameter(uniform(length if config.wide_basis else 1, 2) * math.pi)
        if config.wide_basis:
            self.bias = nn.Parameter(uniform(dim) / math.sqrt(columns))

    def forward(self) -> Tensor:
        """The tokens, (M, d)."""
        config = self.config
        if not config.low_rank:
            return self.embedding * config.scale
        z = self.coefficients
        if config.clamp_in_forward and config.value_bound is not None:
            z = z.clamp(-config.value_bound, config.value_bound)
        v = z.T @ self.basis.T
        if config.wide_basis:
            v = v + self.bias
        if config.rotation:
            v = rotate_odd_pairs(rotate_even_pairs(v, self.angles[:, :1]), self.angles[:, 1:])
        return v * config.scale

    @torch.no_grad()
    def project_(self) -> None:
        """Put the parameters back inside the constraints of eq. 10."""
        config = self.config
        if not config.low_rank:
            return
        if config.value_bound is not None and not config.clamp_in_forward:
            self.coefficients.clamp_(-config.value_bound, config.value_bound)
        if config.orthonormal:
            self.basis.copy_(nearest_orthonormal(self.basis))
        if config.rotation:
            self.angles.copy_(wrap_angles(self.angles))


class IPGOTokens(nn.Module):
    """The learned prefix and suffix for a text encoder whose output is `dim` wide.

    Parameters are float32 whatever the model computes in. A side of length 0 has no parameters. `seed` fixes the
    start: basis uniform among orthonormal ones, coefficients uniform in the bounds, angles uniform in (-pi, pi].
    Raises `InputError` when `dim` is odd (the rotations need pairs) or smaller than the basis.
    """

    def __init__(self, dim: int, config: TokenConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise InputError(f"dim is {dim}: the rotations of eqs. 4 and 5 need an even embedding width.")
        self.dim, self.config = dim, config or TokenConfig()
        self.metadata: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        lengths = {"prefix": self.config.prefix_length, "suffix": self.config.suffix_length}
        self.sides = nn.ModuleDict(
            {name: _Side(dim, length, self.config, generator) for name, length in lengths.items() if length}
        )

    def _tokens(self, side: str) -> Tensor:
        if side in self.sides:
            return self.sides[side]()
        return torch.zeros(0, self.dim, device=next(self.parameters()).device)

    def prefix(self) -> Tensor:
        """V_pre, (M_pre, d), differentiable in the parameters."""
        return self._tokens("prefix")

    def suffix(self) -> Tensor:
        """V_suf, (M_suf, d), differentiable in the parameters."""
        return self._tokens("suffix")

    @property
    def num_parameters(self) -> int:
        """How many numbers are learned: 2 (d N + N M + 2) with the paper's defaults."""
        return sum(p.numel() for p in self.parameters())

    def insert(self, embeddings: Tensor) -> Tensor:
        """T of eq. 2 for embeddings (B, S, d): (B, M_pre + S + M_suf, d), in the dtype of the embeddings."""
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.dim:
            raise InputError(
                f"embeddings have shape {tuple(embeddings.shape)}: these tokens need (batch, sequence, {self.dim})."
            )
        return insert_tokens(embeddings, self.prefix(), self.suffix())

    def condition(self, conditioning: Conditioning) -> Conditioning:
        """`insert` for encoded prompts: embeddings and attention mask grow, everything else stays."""
        mask = extend_mask(conditioning.mask, self.config.prefix_length, self.config.suffix_length)
        return conditioning.with_embeddings(self.insert(conditioning.embeddings), mask)

    def conformity_penalty(self, embeddings: Tensor, mask: Tensor | None = None, norm: str = "l2-squared") -> Tensor:
        """p_conf of eq. 11 for embeddings f(C) (B, S, d): || mean of T - mean of f(C) ||_2^2, averaged over the batch.

        `norm="l1-mean"` is the released notebook's mean absolute difference over the d coordinates.
        """
        grown = extend_mask(mask, self.config.prefix_length, self.config.suffix_length)
        difference = mean_token(self.insert(embeddings), grown) - mean_token(embeddings, mask)
        rows = difference.abs().mean(dim=1) if norm == "l1-mean" else difference.square().sum(dim=1)
        return rows.mean()

    def project_(self) -> None:
        """Enforce the constraints after an update: clamp Z, re-orthonormalize E, wrap the angles (eq. 10)."""
        for side in self.sides.values():
            side.project_()  # type: ignore[operator]

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Mean Euclidean length of the prefix and of the suffix tokens (CLIP-L outputs are near 27)."""
        found = {"prefix": self.prefix(), "suffix": self.suffix()}
        return {name: float(v.norm(dim=1).mean()) for name, v in found.items() if len(v)}

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write parameters, the finished tokens and `metadata` (encoder, prompts, reward, seeds, ...) as safetensors.

        Raises `InputError` when the file cannot be written; an existing file is replaced whole or not at all.
        """
        finished = {"tokens.prefix": self.prefix().detach(), "tokens.suffix": self.suffix().detach()}
        return write_tokens(path, self.dim, self.config, self.state_dict() | finished, self.metadata | metadata)

    @classmethod
    def load(cls, path: str | Path, *, encoder: str | None = None, dim: int | None = None) -> IPGOTokens:
        """Read what `save` wrote.

        With `encoder` or `dim`, raises `EncoderMismatchError` when the tokens were learned for another text encoder or
        width. Raises `InputError` when the file is missing, damaged or not a tokens file.
        """
        dim, config, tensors, metadata = read_tokens(path, encoder=encoder, dim=dim)
        # The finished tokens first: settings of a damaged file may ask for any amount of memory.
        lengths = {"tokens.prefix": config.prefix_length, "tokens.suffix": config.suffix_length}
        if any(name not in tensors or tensors[name].shape != (length, dim) for name, length in lengths.items()):
            raise InputError(f"{path} is damaged: its tensors do not fit its own settings. Train or copy it again.")
        try:
            tokens = cls(dim, config)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from error
        wanted = {name: value.shape for name, value in tokens.state_dict().items()}
        found = {name: value.shape for name, value in tensors.items() if not name.startswith("tokens.")}
        if wanted != found:
            raise InputError(f"{path} is damaged: its tensors do not fit its own settings. Train or copy it again.")
        if not all(value.dtype == torch.float32 and bool(torch.isfinite(value).all()) for value in tensors.values()):
            raise InputError(f"{path} holds numbers that are not finite or not float32: train or copy it again.")
        tokens.load_state_dict({name: tensors[name] for name in wanted})
        tokens.metadata = metadata
        return tokens
