"""What is to be drawn: one job a picture, from the command line, a file of prompts or pictures drawn
before."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tim_ds.errors import RequestError
from tim_ds.pipeline import file_stem, read_settings

SAMPLER_KEYS = {
    "steps": "num_steps",
    "cfg": "cfg_scale",
    "cfg_interval": "cfg_interval",
    "stochasticity": "stochasticity",
    "mode": "mode",
}
"""Settings of a line of prompts, and the fields of `SamplerConfig` that they set."""
_STORED = (*SAMPLER_KEYS.values(), "cfg_upper", "schedule_dtype")
_SHEET = re.compile(r"grid(_\d+)?")
"""Names of the sheets of all pictures (`sample.GRID_NAME`)."""
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str, int),
    "size": (str,),
    "seed": (int,),
    "num": (int,),
    "name": (str,),
    "steps": (int,),
    "cfg": (int, float),
    "cfg_interval": (list,),
    "stochasticity": (int, float),
    "mode": (str,),
    "negative_prompt": (str,),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A prompt with whatever it sets for itself; None is left to the command line."""

    prompt: str | int
    where: str
    """Place for messages."""
    negative_prompt: str | None = None
    size: str | None = None
    seed: int | None = None
    num: int | None = None
    name: str | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplerConfig`."""
    weights_sha256: str | None = None
    """Of the weights that drew it, if it was drawn before."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture."""

    stem: str
    """Name of its file, without the ending."""
    prompt: str | int
    size: str
    seed: int
    sampler: Mapping[str, Any]
    negative_prompt: str | None = None


def read_lines(path: Path) -> list[Line]:
    """Prompts of a file: one a line, or with the ending .jsonl one JSON object a line.

    An object has `prompt` and, if it likes, `size`, `seed`, `num`, `name`, `steps`, `cfg`, `cfg_interval`,
    `stochasticity`, `mode` and `negative_prompt`. Empty lines are skipped.

    Raises:
        RequestError: naming the line, if the file or a line cannot be read.
    """
    try:
        # Not splitlines(): a prompt may hold any character but the end of a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts-file {path}: cannot be read ({error})") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise RequestError(f"--prompts-file {path}: expected at least one prompt, received none")
    if path.suffix != ".jsonl":
        return [Line(prompt=line, where=f"{path}:{n}") for n, line in numbered]
    return [_read_object(line, f"{path}:{n}") for n, line in numbered]


def read_drawn(path: Path) -> Line:
    """What repeats a picture that carries its settings.

    Raises:
        RequestError: if it carries none.
    """
    stored = read_settings(path)
    try:
        return Line(
            prompt=stored["prompt"],
            negative_prompt=stored.get("negative_prompt"),
            where=str(path),
            size=stored["size"],
            seed=int(stored["seed"]),
            num=1,
            name=path.stem,
            sampler={key: _sampler_value(key, stored[key]) for key in _STORED},
            weights_sha256=stored["weights_sha256"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"--from {path}: its settings are not those of one picture ({error!r})") from error


def expand(
    lines: Sequence[Line], sizes: Sequence[str], *, num: int, seed: int, sampler: Mapping[str, Any]
) -> list[Job]:
    """One job a picture.

    Args:
        sizes: of the lines that have none of their own; one, or one for each of those.
        num: pictures of a line that does not say.
        seed: of the first picture; the n-th takes `seed` + n unless its line has a seed, which then counts
        up. sampler: settings that every line takes unless it has its own.
    Raises:
        RequestError: if sizes are missing, too many or of no use, or two pictures would share a name.
    """
    open_lines = [line for line in lines if line.size is None]
    if sizes and not open_lines:
        raise RequestError("--size: no use: every prompt has its own")
    if open_lines and not sizes:
        raise RequestError(f"--size: expected one, because {open_lines[0].where} has none of its own")
    if len(sizes) not in (0, 1, len(open_lines)):
        expected = "1" if len(open_lines) == 1 else f"1 or {len(open_lines)}"
        raise RequestError(f"--size: expected {expected}, one a prompt, received {len(sizes)}")
    given: Iterator[str] = iter([*sizes] * len(open_lines) if len(sizes) == 1 else sizes)
    jobs: list[Job] = []
    for line in lines:
        size = next(given) if line.size is None else line.size
        count = num if line.num is None else line.num
        for k in range(count):
            drawn = seed + len(jobs) if line.seed is None else line.seed + k
            stem = file_stem(len(jobs), line.prompt, drawn)
            if line.name is not None:
                stem = line.name if count == 1 else f"{line.name}_{k}"
                if _SHEET.fullmatch(stem):
                    raise RequestError(f"{line.where}: name: {stem!r} is that of the sheet of all pictures")
            jobs.append(
                Job(
                    stem=stem,
                    prompt=line.prompt,
                    size=size,
                    seed=drawn,
                    sampler={**sampler, **line.sampler},
                    negative_prompt=line.negative_prompt,
                )
            )
    seen: set[str] = set()
    for job in jobs:
        if job.stem in seen:
            raise RequestError(
                f"two pictures would be called {job.stem}.png; give each line a name of its own"
            )
        seen.add(job.stem)
    return jobs


def _read_object(text: str, where: str) -> Line:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise RequestError(f"{where}: expected an object with a prompt, received {text[:80]}")
    for key, value in values.items():
        if key not in _KINDS:
            raise RequestError(f"{where}: unknown key {key!r}; known: {', '.join(_KINDS)}")
        if isinstance(value, bool) or not isinstance(value, _KINDS[key]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[key])
            raise RequestError(f"{where}: {key}: expected {kinds}, received {value!r}")
    name = values.get("name")
    if name is not None and (not name or "/" in name or "\0" in name or name.startswith(".")):
        raise RequestError(f"{where}: name: expected a plain file name, received {name!r}")
    if values.get("num", 1) < 1:
        raise RequestError(f"{where}: num: expected at least 1, received {values['num']}")
    return Line(
        prompt=values["prompt"],
        negative_prompt=values.get("negative_prompt"),
        where=where,
        size=values.get("size"),
        seed=values.get("seed"),
        num=values.get("num"),
        name=name,
        sampler=_sampler_of(values, where),
    )


def _sampler_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return {
            name: _sampler_value(name, values[key]) for key, name in SAMPLER_KEYS.items() if key in values
        }
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{where}: cfg_interval: expected two numbers, received {values['cfg_interval']!r}"
        ) from error


def _sampler_value(name: str, value: Any) -> Any:
    if name != "cfg_interval":
        return value
    low, high = value
    return float(low), float(high)
