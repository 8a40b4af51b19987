"""What happened to a run: when it began, was continued, stopped, failed, could not save.

`RUN/events.jsonl` is appended to by every process that trains in the folder and never cut: `metrics.jsonl`,
in contrast, is that of one run without interruptions.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tim_ds.errors import CheckpointError
from tim_ds.trainer.line_file import LineFile

EVENTS_FILE = "events.jsonl"

BEGAN = "began"
CONTINUED = "continued"
STOPPED = "stopped"
FAILED = "failed"
FINISHED = "finished"
SAVE_FAILED = "save failed"
SAVE_LEFT_OUT = "save left out"
SAVED_AGAIN = "saved again"
SNAPSHOT_FAILED = "snapshot failed"

STARTS = (BEGAN, CONTINUED)
ENDS = (STOPPED, FAILED, FINISHED)


class Events:
    """Writes events. Only rank 0 holds one.

    Raises:
        CheckpointError: from the constructor, if the disk refuses; later, events wait for it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = LineFile(folder / EVENTS_FILE)
        except OSError as error:
            raise CheckpointError(
                f"{folder / EVENTS_FILE}: cannot be written: {error.strerror or error}; free space, or give "
                "permission, and run the same command again"
            ) from error

    def add(self, event: str, step: int, **facts: Any) -> None:
        """Facts are plain values, told to whoever reads the report."""
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._file.add({"time": time, "event": event, "step": step, **facts})

    def flush(self) -> None:
        self._file.take_up()
        self._file.write(flush=True)

    def close(self) -> None:
        self._file.close()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; lines that cannot be read are left out."""
    try:
        text = (folder / EVENTS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int) and "event" in event:
            events.append(event)
    return events
