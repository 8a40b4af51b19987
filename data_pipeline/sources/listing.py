"""The order of a source and the hash that stands for it: from names alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_NAME
from data_pipeline.sources.item import display

logger = logging.getLogger(__name__)


def walk_files(root: Path, endings: tuple[str, ...]) -> list[str]:
    """Relative names beneath `root` with one of the endings, sorted; hidden files and folders, and shards,
    are skipped."""
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder")
    found: list[str] = []
    links: list[str] = []
    for folder, folders, files in os.walk(root):
        # Shards that were made of this folder may lie in it, with a contact sheet.
        folders[:] = sorted(
            name
            for name in folders
            if not (name.startswith(".") or os.path.isfile(os.path.join(folder, name, INDEX_NAME)))
        )
        prefix = os.path.relpath(folder, root)
        links += [
            os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))
        ]
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in endings:
                found.append(name if prefix == "." else f"{prefix}/{name}")
    if links:
        named = ", ".join(display(os.path.relpath(link, root)) for link in links[:4])
        logger.warning(
            "%s: folders that are links are not entered: %s%s", root, named, ", ..." if len(links) > 4 else ""
        )
    # By bytes: the order must not depend on a locale.
    return sorted(found, key=os.fsencode)


def hash_of_names(names: Sequence[str]) -> str:
    lister = Lister()
    for name in names:
        lister.add(name)
    return lister.hexdigest()


def hash_file(path: Path) -> str:
    """BLAKE2b of a file in 128 bits."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class Lister:
    """Hash of names in order."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)

    def add(self, *parts: object) -> None:
        self._digest.update("\x00".join(map(str, parts)).encode(errors="surrogateescape") + b"\x01")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
