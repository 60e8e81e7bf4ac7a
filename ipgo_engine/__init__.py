"""Reward-guided optimization of prompts (IPGO tokens) and of noise (probability-regularized), for any diffusion model.

The engine imports torch and never a host: a `Generator` (diffusers, ComfyUI) makes images, a `Reward` scores them.
"""

from . import rewards
from .config import JointConfig, NoiseConfig, OptimizeConfig, TokenConfig
from .errors import BudgetSpentError, Cancelled, EncoderMismatchError, InputError, IPGOError, NonFiniteError
from .events import Observer, StepEvent
from .noise import NoiseRegularizer
from .optimize import Result, RunFailedError, optimize_jointly, optimize_noise, train_tokens
from .tokens import IPGOTokens, rotate_even_pairs, rotate_odd_pairs

__all__ = [
    "BudgetSpentError",
    "Cancelled",
    "EncoderMismatchError",
    "IPGOError",
    "IPGOTokens",
    "InputError",
    "JointConfig",
    "NoiseConfig",
    "NoiseRegularizer",
    "NonFiniteError",
    "Observer",
    "OptimizeConfig",
    "Result",
    "RunFailedError",
    "StepEvent",
    "TokenConfig",
    "optimize_jointly",
    "optimize_noise",
    "rewards",
    "rotate_even_pairs",
    "rotate_odd_pairs",
    "train_tokens",
]
