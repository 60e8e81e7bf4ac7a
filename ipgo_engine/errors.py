"""One exception family: every error the engine raises on purpose is an `IPGOError`.

A message names the input, what was found (shape, type, value) and what to do about it.
"""

from __future__ import annotations


class IPGOError(Exception):
    """Base of every error the engine raises on purpose; its text is fit to show to a user."""


class InputError(IPGOError, ValueError):
    """An argument, a setting or a file cannot be used as it is."""


class EncoderMismatchError(InputError):
    """Tokens were learned for another text encoder than the one they are applied to."""


class NonFiniteError(IPGOError):
    """A reward, an image or a gradient holds NaN or infinity."""


class Cancelled(IPGOError):
    """Raised by a generator, a reward or an observer to stop a run; the loop returns the best so far."""


class BudgetSpentError(IPGOError):
    """A reward may not be asked any more: the run ends with its best so far."""
