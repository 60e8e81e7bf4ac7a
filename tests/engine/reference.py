"""Independent float64 NumPy version of the two papers' equations, written for reading, not for speed.

Written from the papers and from DESIGN sections 3 and 4 alone; it shares no code with the engine. Matrices follow the
papers: embeddings are columns, so V is d x M and T is d x (number of tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# --- IPGO: rotations, tokens, penalty, constraints (eqs. 2 to 11) -------------------------------------------------


def elementary_rotation(angle: float) -> Array:
    """Eq. 3."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def rotation_r1(d: int, angle: float) -> Array:
    """Eq. 4: I_{d/2} (x) R_e; pairs (0,1), (2,3), ..."""
    return np.kron(np.eye(d // 2), elementary_rotation(angle))


def rotation_r2(d: int, angle: float) -> Array:
    """Eq. 5, row by row; pairs (1,2), (3,4), ..., (d-1,0): coordinate d of the paper's 1-based list wraps to 1."""
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.zeros((d, d))
    for first in range(1, d, 2):
        second = (first + 1) % d
        matrix[first, first], matrix[first, second] = cos, -sin  # row 1 of R_e
        matrix[second, first], matrix[second, second] = sin, cos  # row 2 of R_e
    return matrix


def tokens(basis: Array, coefficients: Array, angles: Sequence[float]) -> Array:
    """Eqs. 6 and 7: V = R2(angles[1]) R1(angles[0]) E Z, d x M."""
    d = basis.shape[0]
    return rotation_r2(d, angles[1]) @ rotation_r1(d, angles[0]) @ basis @ coefficients


def insert(prefix: Array, prompt: Array, suffix: Array) -> Array:
    """Eq. 2: T = concat(V_pre, f(C), V_suf) along the sequence."""
    return np.concatenate([prefix, prompt, suffix], axis=1)


def conformity(inserted: Array, prompt: Array) -> float:
    """Eq. 11: || mean_j T_j - mean_k f(C)_k ||_2^2."""
    difference = sum(inserted.T) / inserted.shape[1] - sum(prompt.T) / prompt.shape[1]
    return float(sum(value**2 for value in difference))


def conformity_l1_mean(inserted: Array, prompt: Array) -> float:
    """The released notebook's penalty: mean over coordinates of |mean_j T_j - mean_k f(C)_k|."""
    return float(np.abs(inserted.mean(1) - prompt.mean(1)).sum() / prompt.shape[0])


def project_coefficients(coefficients: Array, bound: float = 1.0) -> Array:
    """The value constraint of eq. 10."""
    return np.minimum(np.maximum(coefficients, -bound), bound)


def wrap_angle(angle: float) -> float:
    """The same rotation with an angle in (-pi, pi]."""
    while angle > math.pi:
        angle -= 2 * math.pi
    while angle <= -math.pi:
        angle += 2 * math.pi
    return angle


def nearest_orthonormal(basis: Array) -> Array:
    """The closest matrix (Frobenius norm) with E^T E = I, eq. 8 corrected: the polar factor U V^T of E = U S V^T."""
    left, _, right = np.linalg.svd(basis, full_matrices=False)
    return left @ right


# --- Noise: concentration bounds and the regularizer (eqs. 6 to 9) ------------------------------------------------


def blocks(z: Array, k: int) -> Array:
    """m = n // k rows of k consecutive values; values left over at the end are not used."""
    flat = np.asarray(z, dtype=np.float64).reshape(-1)
    m = flat.size // k
    return flat[: m * k].reshape(m, k)


def mean_norm(z: Array, k: int) -> float:
    """M1 = || (1/m) sum z_i ||_2."""
    return float(np.sqrt((blocks(z, k).mean(0) ** 2).sum()))


def covariance_norm(z: Array, k: int) -> float:
    """M2 = || (1/m) sum z_i z_i^T - I_k ||_2, the largest singular value."""
    rows = blocks(z, k)
    covariance = np.einsum("ia,ib->ab", rows, rows) / len(rows)
    return float(np.linalg.svd(covariance - np.eye(k), compute_uv=False)[0])


def log_p1(z: Array, k: int) -> float:
    """Eq. 6 with min{.., 1}: log p1 = min(log 2 - m M1^2 / (2k), 0)."""
    m = z.size // k
    return min(math.log(2) - m * mean_norm(z, k) ** 2 / (2 * k), 0.0)


def log_p2(z: Array, k: int) -> float:
    """Eq. 7 with min{.., 1}: log p2 = min(log 2 - (m/2) max(sqrt(1 + M2) - 1 - sqrt(k/m), 0)^2, 0)."""
    m = z.size // k
    excess = max(math.sqrt(1 + covariance_norm(z, k)) - 1 - math.sqrt(k / m), 0.0)
    return min(math.log(2) - m / 2 * excess**2, 0.0)


def probability(z: Array, k: int, permutations: Sequence[NDArray[np.int64]]) -> float:
    """Eq. 8: the minimum of p1 and p2 over the given permutations of scalars."""
    flat = np.asarray(z, dtype=np.float64).reshape(-1)
    worst = 0.0
    for permutation in permutations:
        worst = min(worst, log_p1(flat[permutation], k), log_p2(flat[permutation], k))
    return math.exp(worst)


def regularizer(
    z: Array, k: int, permutations: Sequence[NDArray[np.int64]], weights: Sequence[float] | None = None
) -> float:
    """Eq. 9 without mu: the expectation of log p1 + log p2 over permutations (equal weights unless given)."""
    flat = np.asarray(z, dtype=np.float64).reshape(-1)
    chosen = [1 / len(permutations)] * len(permutations) if weights is None else list(weights)
    total = 0.0
    for weight, permutation in zip(chosen, permutations, strict=True):
        total += weight * (log_p1(flat[permutation], k) + log_p2(flat[permutation], k))
    return total


# --- Reward gradients without a differentiable reward (noise paper, section 4) ------------------------------------


def hybrid_direction(rewards: Sequence[float], images: Sequence[Array], reward: float, image: Array) -> Array:
    """h = mean_i (r(y_i) - r(y)) (y_i - y)."""
    terms = [(r - reward) * (y - image) for r, y in zip(rewards, images, strict=True)]
    return sum(terms[1:], terms[0]) / len(terms)
