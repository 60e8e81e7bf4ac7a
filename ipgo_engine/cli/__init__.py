"""The command line: parse, call the engine, write a results folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import Cancelled, InputError, IPGOError
from .arguments import parse
from .interrupt import LeaveNow

INTERRUPTED = 130  # what a shell reports for Ctrl-C, so that `ipgo train && next` does not go on

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 the run broke down, 2 bad input, 130 interrupted."""
    try:
        arguments = parse(argv)
    except SystemExit as stop:  # argparse has already said why
        return int(stop.code or 0)
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        return _say(error, 2)
    except Cancelled:
        return _say("interrupted before anything was learned; nothing was written", INTERRUPTED)
    except (KeyboardInterrupt, LeaveNow):
        return _say("interrupted", INTERRUPTED)
    except IPGOError as error:
        return _say(error, 1)
    except OSError as error:
        if error.filename is None:
            raise
        return _say(f"{error.filename!r} cannot be used ({error.strerror or error}): give another path.", 2)


def _say(message: object, code: int) -> int:
    print(f"ipgo: {' '.join(str(message).split())}", file=sys.stderr)
    return code
