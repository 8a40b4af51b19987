"""Pictures for an evaluation: one file a picture, made once, refused when half finished or mixed.

A folder of pictures holds `pictures.json`, which says what decided them. Sampling goes on where it stopped:
a picture that is there is not made again, and a folder made with other weights or settings is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tim_ds.config.recipe import parse_size
from tim_ds.errors import RequestError
from tim_ds.model.weights import sha256, write_aside
from tim_ds.pipeline import PNG_KEY, OutputType, PipelineOutput, PromptLike, TiMPipeline, write_png

MANIFEST_NAME = "pictures.json"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_LISTED = 3
_OF_SAMPLER = ("num_steps", "cfg_scale", "cfg_interval", "stochasticity", "mode")
_COMPARED = ("weights_sha256", "size", "num_steps", "mode", "cfg_scale", "stochasticity")
"""What every picture says of itself and `pictures.json` of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the pictures of an evaluation are sampled. None takes what the export says."""

    size: str = "1024x1024"
    """HEIGHTxWIDTH in pixels."""
    num_steps: int | None = None
    cfg_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    stochasticity: float | None = None
    mode: Literal["transition", "diffusion"] | None = None
    seed: int = 0
    """Of the first picture; the next takes the next number."""
    batch: int = 16
    """Pictures a call; it does not change them."""
    part: tuple[int, int] = (0, 1)
    """(k, n): every n-th picture from the k-th, so that n processes share the work."""

    def __post_init__(self) -> None:
        try:
            parse_size(self.size)
        except ValueError as error:
            raise RequestError(f"--size: {error}") from error
        if self.batch < 1:
            raise RequestError(f"--batch: expected at least 1, received {self.batch}")
        if not 0 <= self.part[0] < self.part[1]:
            raise RequestError(
                f"--part: expected K/N with 0 <= K < N, received {self.part[0]}/{self.part[1]}"
            )


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture of an evaluation."""

    name: str
    """Path in the folder of pictures, with `/` between its parts."""
    prompt: PromptLike
    seed: int


@dataclass(frozen=True, eq=False)
class PictureSet:
    """A complete folder of pictures, in the order they were asked for."""

    folder: Path
    names: tuple[str, ...]
    sha256: str
    """Of all names and contents."""
    made_by: dict[str, Any] | None
    """The settings of `pictures.json`; None for pictures that another program made."""

    def path(self, i: int) -> Path:
        return self.folder / self.names[i]

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]


def generate(
    pipeline: TiMPipeline,
    wanted: Sequence[Wanted],
    folder: Path,
    sampling: Sampling,
    *,
    evaluation: str,
    progress: bool = True,
) -> None:
    """Make the pictures of `wanted` that `folder` does not hold yet, each written whole or not at all.

    Args:
        evaluation: its name, kept in `pictures.json`.
    Raises:
        RequestError: if the folder holds pictures of other weights, prompts or settings, or of unknown ones.
        CheckpointError: if the disk refuses.
    """
    # All is checked before the folder is claimed: a mistake must not leave its mark there.
    pipeline.request(
        [one.prompt for one in wanted],
        sampling.size,
        seeds=[one.seed for one in wanted],
        **{name: getattr(sampling, name) for name in _OF_SAMPLER},
    )
    claim(folder, identity_of(pipeline, wanted, sampling, evaluation=evaluation), wanted)
    k, n = sampling.part
    mine = list(wanted[k::n])
    missing = [one for one in mine if not (folder / one.name).exists()]
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), unit="picture", desc="sample", disable=not progress
    ) as bar:
        for part in chunks(missing, sampling.batch):
            write(draw(pipeline, part, sampling), part, folder)
            bar.update(len(part))


def draw(
    pipeline: TiMPipeline, part: Sequence[Wanted], sampling: Sampling, *, output_type: OutputType = "pil"
) -> PipelineOutput:
    """The pictures of one call.

    Args:
        output_type: `latent` leaves them undecoded.
    Raises:
        RequestError: if the network cannot draw them.
        NonFiniteError: if a picture stops being finite on the way.
    """
    return pipeline(
        [one.prompt for one in part],
        sampling.size,
        seeds=[one.seed for one in part],
        output_type=output_type,
        **{name: getattr(sampling, name) for name in _OF_SAMPLER},
    )


def write(output: PipelineOutput, part: Sequence[Wanted], folder: Path) -> None:
    """Each picture to its file.

    Raises:
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    for i, one in enumerate(part):
        write_png(folder / one.name, output.pixels[i], output.picture_settings(i))


def identity_of(
    pipeline: TiMPipeline, wanted: Sequence[Wanted], sampling: Sampling, *, evaluation: str
) -> dict[str, Any]:
    """Everything that decides the pictures, and where the weights come from."""
    export = pipeline.export
    sampler = export.sampler

    def chosen(name: str) -> Any:
        given = getattr(sampling, name)
        return getattr(sampler, name) if given is None else given

    return {
        "evaluation": evaluation,
        "model": export.source.name,
        "step": export.step,
        "recipe_sha256": export.source.recipe_sha256,
        "weights_sha256": pipeline.weights_sha256,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "size": sampling.size,
        "num_steps": chosen("num_steps"),
        "mode": chosen("mode"),
        "cfg_scale": chosen("cfg_scale"),
        "cfg_interval": list(chosen("cfg_interval")),
        "cfg_upper": sampler.cfg_upper,
        "stochasticity": chosen("stochasticity"),
        "schedule_dtype": sampler.schedule_dtype,
        "seed": sampling.seed,
        "count": len(wanted),
        "prompts_sha256": digest([[one.name, one.prompt, one.seed] for one in wanted]),
    }


def open_pictures(folder: Path, wanted: Sequence[Wanted], *, progress: bool = True) -> PictureSet:
    """The pictures of a folder, checked: all of `wanted`, nothing else, all whole, all of one making.

    Pictures without `pictures.json` come from another program; nothing is then known of their making.

    Raises:
        RequestError: naming what is missing, unexpected, damaged or of another making.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of pictures; generate them first (--export)")
    names = [one.name for one in wanted]
    expected = set(names)
    found = _pictures_in(folder)
    missing = [name for name in names if name not in found]
    if missing:
        raise RequestError(
            f"{folder}: half finished: {len(missing)} of {len(names)} pictures are missing "
            f"({_listing(missing)}); run the generating half again, it goes on where it stopped"
        )
    extra = sorted(found - expected)
    if extra:
        raise RequestError(
            f"{folder}: holds {len(extra)} pictures that this evaluation does not ask for "
            f"({_listing(extra)}); expected {len(names)}; choose another folder"
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        prompts = digest([[one.name, one.prompt, one.seed] for one in wanted])
        if manifest.get("prompts_sha256") != prompts:
            raise RequestError(
                f"{folder}: its pictures are of other prompts or seeds than this evaluation asks for "
                f"(--seed, or another file of prompts)"
            )
    whole = hashlib.sha256()
    for one in tqdm(wanted, unit="picture", desc="check", leave=False, disable=not progress):
        path = folder / one.name
        settings = _check_picture(path)
        if manifest is not None:
            _check_making(path, settings, one, manifest)
        whole.update(f"{one.name}\0{sha256(path)}\n".encode())
    made_by = None
    if manifest is not None:
        made_by = {**manifest, "nfe": _check_picture(folder / names[0]).get("nfe")}
    return PictureSet(folder, tuple(names), whole.hexdigest(), made_by)


def picture_set(folder: Path, names: Sequence[str], *, progress: bool = True) -> PictureSet:
    """Pictures of a data set, whose folder may hold others too; each is checked to be whole.

    Raises:
        RequestError: naming what is missing or damaged.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RequestError(
            f"{folder}: {len(missing)} of {len(names)} pictures are missing ({_listing(missing)})"
        )
    whole = hashlib.sha256()
    for name in tqdm(names, unit="picture", desc="check", leave=False, disable=not progress):
        _check_picture(folder / name)
        whole.update(f"{name}\0{sha256(folder / name)}\n".encode())
    return PictureSet(folder, tuple(names), whole.hexdigest(), None)


def load_picture(path: Path) -> Image.Image:
    """An RGB picture, turned as its metadata say.

    Raises:
        RequestError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{path}: not a picture that can be read ({error})") from error


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def choose_dtype(name: str) -> torch.dtype:
    """The type of the network's parameters for `--dtype`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def chunks(items: Sequence[Wanted], size: int) -> Iterator[Sequence[Wanted]]:
    """Up to `size` at a time, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def claim(folder: Path, identity: dict[str, Any], wanted: Sequence[Wanted]) -> None:
    """Write `pictures.json`, or see that the one that is there says the same.

    Raises:
        RequestError: if the folder holds pictures of another making, or of an unknown one.
        CheckpointError: if the disk refuses.
    """
    # Looked at before the manifest: a process beside this one writes the manifest first.
    present = sorted(_pictures_in(folder)) if folder.is_dir() else []
    stored = read_manifest(folder) if folder.is_dir() else None
    if stored is None or (not present and stored != identity):
        # Without pictures, a manifest is of a run that was given up before its first.
        if present:
            raise RequestError(
                f"{folder}: holds {len(present)} pictures ({_listing(present)}) but no {MANIFEST_NAME} that "
                f"says how they were made; choose another folder for --pictures"
            )
        text = json.dumps(identity, indent=2) + "\n"
        write_aside(folder / MANIFEST_NAME, len(text.encode()), lambda aside: aside.write_text(text))
        return
    different = [name for name in identity if stored.get(name) != identity[name]]
    if different:
        raise RequestError(
            f"{folder}: holds pictures made otherwise: "
            + "; ".join(
                f"{name} was {stored.get(name)!r}, now {identity[name]!r}" for name in different[:_LISTED]
            )
            + f"{_more(different)}; choose another folder for --pictures"
        )
    extra = sorted(_pictures_in(folder) - {one.name for one in wanted})
    if extra:
        raise RequestError(f"{folder}: holds {len(extra)} foreign pictures ({_listing(extra)}); remove them")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `pictures.json` says; None if there is none.

    Raises:
        RequestError: if it cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise ValueError(f"expected a mapping, received {type(stored).__name__}")
        if missing := [name for name in (*_COMPARED, "seed", "model") if name not in stored]:
            raise ValueError(f"no {', '.join(missing)}")
        return stored
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); choose another folder") from error


def _pictures_in(folder: Path) -> set[str]:
    """Names of all pictures below `folder`; hidden files are pictures being written."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
    }


def _check_picture(path: Path) -> dict[str, Any]:
    """The settings a picture carries, if any.

    Raises:
        RequestError: if it is cut short or is no picture.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
            if image.format == "PNG":
                # Reads every chunk with its checksum, without decoding.
                image.verify()
            else:
                # Others are verified by nothing but decoding; a JPEG is read whole at an eighth of its size.
                image.draft("RGB", (image.width // 8, image.height // 8))
                image.load()
        return {} if text is None else json.loads(str(text))
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{path}: damaged ({error}); delete it and generate it again") from error


def _check_making(path: Path, settings: dict[str, Any], one: Wanted, manifest: dict[str, Any]) -> None:
    expected = {
        "prompt": one.prompt,
        "seed": one.seed,
        **{name: manifest[name] for name in _COMPARED},
    }
    for name, value in expected.items():
        if settings.get(name) != value:
            raise RequestError(
                f"{path}: mixed in: its {name} is {settings.get(name)!r}, {MANIFEST_NAME} says {value!r}; "
                f"delete it and generate it again"
            )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + _more(names)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
