"""What a call asks for: prompts, sizes, seeds and settings in every form users write them, checked."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np

from tim_ds.config.recipe import parse_size
from tim_ds.errors import RequestError
from tim_ds.model.config import ModelConfig
from tim_ds.sampler.config import SamplerConfig

Size = tuple[int, int]
"""(height, width) in pixels."""
PromptLike = str | int
"""A caption, or a class label."""

_MODES = ("transition", "diffusion")


@dataclass(frozen=True)
class Request:
    """A call whose every part was checked: `TiMPipeline.request` makes one, `TiMPipeline.run` draws it."""

    prompts: tuple[PromptLike, ...]
    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    config: SamplerConfig
    negative_prompts: tuple[str | None, ...]
    """What guidance leads away from; None: the empty caption, or the null label."""

    def part(self, numbers: Sequence[int]) -> Request:
        """The pictures of these numbers alone."""
        return Request(
            tuple(self.prompts[i] for i in numbers),
            tuple(self.sizes[i] for i in numbers),
            tuple(self.seeds[i] for i in numbers),
            self.config,
            tuple(self.negative_prompts[i] for i in numbers),
        )

    def own_settings(self, i: int) -> dict[str, Any]:
        """What picture `i` alone is asked for."""
        return own_settings(self.prompts[i], self.sizes[i], self.seeds[i], self.negative_prompts[i])


def own_settings(
    prompt: PromptLike, size: Size, seed: int, negative_prompt: str | None = None
) -> dict[str, Any]:
    """What a picture says of itself alone; a negative prompt only where it has one."""
    found = {"prompt": prompt, "size": f"{size[0]}x{size[1]}", "seed": seed}
    return found if negative_prompt is None else found | {"negative_prompt": negative_prompt}


@dataclass(frozen=True)
class RequestRules:
    """What a network can be asked for.

    Args:
        defaults: of the settings that a call leaves out.
        stride: of the autoencoder.
    """

    model: ModelConfig
    defaults: SamplerConfig
    stride: int

    def request(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sizes: str | Size | Sequence[str | Size],
        seeds: int | Sequence[int],
        negative_prompts: str | Sequence[str | None] | None,
        sampler: dict[str, Any],
    ) -> Request:
        """The call, checked.

        Raises:
            RequestError, ConfigError: as `TiMPipeline.__call__`, memory aside.
        """
        found = self.prompts(prompts)
        count = len(found)
        checked_sizes = self.sizes(sizes, count)
        checked_seeds = check_seeds(seeds, count)
        config = self.sampler({name: value for name, value in sampler.items() if value is not None})
        negatives = self.negative_prompts(negative_prompts, count, config)
        return Request(tuple(found), tuple(checked_sizes), tuple(checked_seeds), config, negatives)

    def prompts(self, given: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
        found = listed("prompts", given, str | int)
        if not found:
            raise RequestError("prompts: expected at least one, received an empty list")
        check = self._caption if self.model.condition == "text" else self._label
        return [check(i, prompt) for i, prompt in enumerate(found)]

    def _caption(self, i: int, prompt: PromptLike) -> str:
        if not isinstance(prompt, str):
            raise RequestError(f"prompts[{i}]: expected a caption, received {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompts[{i}]: not text that can be written: {error}") from error
        return prompt

    def _label(self, i: int, label: PromptLike) -> int:
        count = self.model.num_classes or 0
        number = int(label) if isinstance(label, str) and label.isascii() and label.isdigit() else label
        if isinstance(number, str | bool) or not isinstance(number, Integral) or not 0 <= number < count:
            raise RequestError(f"prompts[{i}]: expected a class label, 0 to {count - 1}, received {label!r}")
        return int(number)

    def sizes(self, given: str | Size | Sequence[str | Size], count: int) -> list[Size]:
        found: list[Any] = [given] * count if is_one_size(given) else listed("sizes", given, str)
        if len(found) != count:
            raise RequestError(f"sizes: expected {_one_or(count)}, one a prompt, received {len(found)}")
        return [self._size(i, size) for i, size in enumerate(found)]

    def _size(self, i: int, size: Any) -> Size:
        if isinstance(size, str):
            try:
                height, width = parse_size(size)
            except ValueError as error:
                raise RequestError(f"sizes[{i}]: {error}") from error
        else:
            try:
                height, width = (operator.index(side) for side in size)
            except (TypeError, ValueError) as error:
                raise RequestError(f"sizes[{i}]: expected (height, width), received {size!r}") from error
        unit, stride, patch = self.stride * self.model.patch_size, self.stride, self.model.patch_size
        if height < 1 or width < 1 or height % unit or width % unit:
            raise RequestError(
                f"sizes[{i}]: {height}x{width}: both sides must be multiples of {unit} pixels "
                f"(autoencoder stride {stride} x patch size {patch}); "
                f"nearest that fit: {_nearest(height, width, unit)}"
            )
        return height, width

    def sampler(self, given: dict[str, Any]) -> SamplerConfig:
        """The defaults with the fields that were given."""
        given = {name: _plain(name, value) for name, value in given.items()}
        mode = given.get("mode", self.defaults.mode)
        if mode not in _MODES:
            raise RequestError(f"mode: expected one of {', '.join(_MODES)}, received {mode!r}")
        num_steps = given.get("num_steps", self.defaults.num_steps)
        if num_steps < 1:
            raise RequestError(f"num_steps: expected at least 1, received {num_steps}")
        config = replace(self.defaults, **given)
        has_null_label = self.model.condition != "class" or self.model.class_dropout
        if config.cfg_scale != 1.0 and not has_null_label:
            raise RequestError(
                f"cfg_scale: {config.cfg_scale:g} needs a null label, which this network was built without "
                f"(model.class_dropout: false); set it to 1"
            )
        return config

    def negative_prompts(
        self, given: str | Sequence[str | None] | None, count: int, config: SamplerConfig
    ) -> tuple[str | None, ...]:
        for_all = given is None or isinstance(given, str)
        found: list[Any] = [given] * count if for_all else listed("negative_prompt", given, str)
        if len(found) != count:
            raise RequestError(
                f"negative_prompt: expected {_one_or(count)}, one a prompt, received {len(found)}"
            )
        for one in found:
            if one is None:
                continue
            if self.model.condition != "text":
                raise RequestError("negative_prompt: this network draws from class labels; leave it away")
            if not isinstance(one, str):
                raise RequestError(f"negative_prompt: expected a caption, received {one!r}")
            if config.cfg_scale == 1.0:
                raise RequestError(
                    "negative_prompt: has no effect without guidance; set cfg_scale (guidance_scale) beyond 1"
                )
        return tuple(found)


def check_seeds(seeds: int | Sequence[int], count: int) -> list[int]:
    """One each, or the first of consecutive ones."""
    try:
        if isinstance(seeds, int | np.integer):
            found = [int(seeds) + i for i in range(count)]
        else:
            found = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise RequestError(f"seeds: expected whole numbers, received {seeds!r}") from error
    if len(found) != count:
        raise RequestError(f"seeds: expected {_one_or(count)}, one a prompt, received {len(found)}")
    for i, seed in enumerate(found):
        if not 0 <= seed < 2**63:
            raise RequestError(f"seeds[{i}]: expected 0 to 2^63 - 1, received {seed}")
    return found


def is_one_size(sizes: Any) -> bool:
    """Whether one size for all was given, and not a list of one each."""
    if isinstance(sizes, str):
        return True
    try:
        return len(sizes) == 2 and all(isinstance(side, Integral) for side in sizes)
    except TypeError:
        return False


def listed(name: str, given: Any, single: Any) -> list[Any]:
    """A list of what was given alone, or one each.

    Raises:
        RequestError: if it is neither.
    """
    if isinstance(given, single):
        return [given]
    try:
        return list(given)
    except TypeError as error:
        raise RequestError(f"{name}: expected one, or a list of one each, received {given!r}") from error


def _plain(name: str, value: Any) -> Any:
    """A setting of the sampler in the type that its field and a picture's metadata have.

    Raises:
        RequestError: if it is of another kind.
    """
    try:
        if name == "num_steps":
            return operator.index(value)
        if name in ("cfg_scale", "stochasticity"):
            return _number(value)
        if name == "cfg_interval":
            low, high = value
            return _number(low), _number(high)
    except (TypeError, ValueError) as error:
        kinds = {"num_steps": "a whole number", "cfg_interval": "two numbers, (low, high)"}
        raise RequestError(f"{name}: expected {kinds.get(name, 'a number')}, received {value!r}") from error
    return value


def _number(value: Any) -> float:
    if isinstance(value, str | bool) or value is None:
        raise TypeError("not a number")
    return float(value)


def _one_or(count: int) -> str:
    return "1" if count == 1 else f"1 or {count}"


def _nearest(height: int, width: int, unit: int) -> str:
    """Up to two sizes that fit, the nearest first."""

    def around(side: int) -> set[int]:
        below = side // unit * unit
        return {max(unit, below), max(unit, below + (unit if side % unit else 0))}

    fitting = [(h, w) for h in around(height) for w in around(width)]
    fitting.sort(key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    return " or ".join(f"{h}x{w}" for h, w in fitting[:2])
