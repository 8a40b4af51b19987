"""Pictures beneath a folder."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.sources.item import PICTURE_ENDINGS, Item, display, read_file, with_sidecars
from data_pipeline.sources.listing import hash_of_names, walk_files


class FolderSource:
    """Pictures beneath a folder, `<stem>.json` and `<stem>.txt` beside each. Classes: the topmost folders."""

    kind = "folder"

    def __init__(self, root: Path, keep: tuple[str, ...] = ()) -> None:
        self._root = root
        self._keep = keep
        self._names = walk_files(root, PICTURE_ENDINGS)
        self._classes = tuple(sorted({name.partition("/")[0] for name in self._names if "/" in name}))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(display(name) for name in self._classes)

    def fingerprint(self) -> str:
        return hash_of_names(self._names)

    def read(self, number: int) -> Item:
        name = self._names[number]
        path = self._root / name
        source = display(name)
        picture = read_file(path, source)
        sidecars: dict[str, bytes | None] = {}
        for ending in ("txt", "json"):
            # As cameras and older systems write them, too.
            beside = (path.with_suffix(f".{one}") for one in (ending, ending.upper()))
            there = next((file for file in beside if file.is_file()), None)
            sidecars[ending] = None if there is None else read_file(there, source)
        top, slash, _ = name.partition("/")
        class_name = display(top) if slash else None
        return with_sidecars(source, picture, sidecars["txt"], sidecars["json"], self._keep, class_name)
