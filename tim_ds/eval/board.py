"""TensorBoard on a disk that refuses."""

from __future__ import annotations

import threading


def keep_board_thread_quiet() -> None:
    """TensorBoard writes in a thread of its own. When the disk refuses, the thread's error is raised again at
    the next call, where it becomes ours; without this its trace would be printed too."""
    if getattr(threading.excepthook, "knows_board", False):
        return
    former = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        of_board = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(args.exc_value, OSError)):
            former(args)

    hook.knows_board = True  # type: ignore[attr-defined]  # a mark for the next call
    threading.excepthook = hook
