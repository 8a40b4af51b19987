"""How every command line ends: its exit status, and what it says."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

USER_ERROR = 2
"""Exit status where the user can put it right; the message says how. argparse ends with the same."""
READER_LEFT = 141
"""Exit status where whoever read the output is gone (`... | head`): that of programs which SIGPIPE ends."""

Main = Callable[[Sequence[str] | None], int]


def command(*errors: type[Exception]) -> Callable[[Main], Callable[..., int]]:
    """Let a main function end as all do.

    Its exit status is what it returns (0; 1 for work that failed), but `USER_ERROR`, after the message alone,
    where it raises one of `errors`, and `READER_LEFT`, without a word, where its output cannot be written.
    Ctrl-C ends it by that signal (130 in a shell) after one word: where it was is nothing to the user.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            try:
                try:
                    return main(arguments)
                finally:
                    # What is left would be written when nothing can catch its error any more.
                    sys.stdout.flush()
            except BrokenPipeError:
                if not _reader_left():
                    raise
                return READER_LEFT
            except errors as error:
                print(f"error: {error}", file=sys.stderr)
                return USER_ERROR
            except KeyboardInterrupt:
                sys.excepthook = _without_trace
                raise

        return run

    return decorate


def _without_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _reader_left() -> bool:
    """Whether nobody reads the output any more; then what else is written goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        # Not a file: something in memory, which has no reader to lose.
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True
