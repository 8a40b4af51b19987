"""Which size a picture is stored at: pure functions on integers, no pixels.

A picture keeps its aspect and, up to a largest area, its resolution. An autoencoder takes sides that are
multiples of its stride, so the picture is resized to cover such a size and the rest is cropped, half from
either end:

    original (h, w) -> resize (resize_height, resize_width) -> crop (top, left, height, width)

The two axes are scaled alike but for `max_stretch`, which is spent before anything is cropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from data_pipeline.errors import DataError

REASON_ASPECT = "aspect beyond the limit"
REASON_SMALL = "too small"
REASON_CROP = "would lose more than the limit to the crop"


@dataclass(frozen=True, kw_only=True)
class SizeRules:
    """What may become of a picture's size. Areas in pixels of the picture."""

    multiple: int
    """Both stored sides are multiples of this: the autoencoder's stride times the patch size."""
    mode: Literal["native", "buckets"] = "native"
    """native: as above. buckets: straight to the bucket of nearest aspect, stretched and enlarged as that
    takes and never cropped, which is how the released models were trained."""
    min_area: int = 1
    """A smaller picture is enlarged to it, by `max_upscale` at most, or refused."""
    max_area: int = 1024 * 1024
    """A larger picture is reduced to it."""
    max_aspect: float = 4.0
    """Long side over short side of the original; beyond it a picture is refused."""
    max_upscale: float = 1.0
    """Largest factor by which either side may grow; 1: nothing is ever enlarged."""
    max_stretch: float = 0.02
    """Scale of one axis over that of the other, less 1. Spent to crop less."""
    max_crop: float = 0.15
    """Share of the resized picture that the crop may take; beyond it the picture is refused."""
    buckets: tuple[tuple[int, int], ...] = ()
    """mode buckets: the sizes (height, width); empty: `bucket_table` of the largest area."""

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise DataError(f"multiple: expected at least 1, received {self.multiple}")
        if self.max_area < self.multiple**2:
            raise DataError(
                f"--max-area: {self.max_area} holds no picture whose sides are multiples of {self.multiple}"
            )
        if not 1 <= self.min_area <= self.max_area:
            raise DataError(f"--min-area: expected 1 to --max-area {self.max_area}, received {self.min_area}")
        if self.max_aspect < 1.0 or self.max_upscale < 1.0:
            raise DataError(
                f"--max-aspect and --max-upscale: expected at least 1, received {self.max_aspect} and "
                f"{self.max_upscale}"
            )
        if self.max_stretch < 0.0 or not 0.0 <= self.max_crop < 1.0:
            raise DataError(
                f"--max-stretch: expected at least 0, received {self.max_stretch}; --max-crop: expected 0 up "
                f"to but not 1, received {self.max_crop}"
            )
        for height, width in self.buckets:
            if min(height, width) < self.multiple:
                raise DataError(f"--buckets: {height}x{width} is smaller than the multiple {self.multiple}")


@dataclass(frozen=True)
class Fit:
    """How a picture comes to its stored size: resize, then crop from `top`, `left`. All in pixels."""

    height: int
    width: int
    resize_height: int
    resize_width: int

    @property
    def top(self) -> int:
        return (self.resize_height - self.height) // 2

    @property
    def left(self) -> int:
        return (self.resize_width - self.width) // 2

    @property
    def crop_share(self) -> float:
        """Share of the resized picture that the crop takes."""
        return 1.0 - self.height * self.width / (self.resize_height * self.resize_width)

    def scales(self, height: int, width: int) -> tuple[float, float]:
        """Factors by which the sides of an original of `height` x `width` change before the crop."""
        return self.resize_height / height, self.resize_width / width

    def stretch(self, height: int, width: int) -> float:
        """Larger scale over smaller scale, less 1, of an original of `height` x `width`."""
        y, x = self.scales(height, width)
        return max(y / x, x / y) - 1.0


@dataclass(frozen=True)
class Unfit:
    """A picture that the rules refuse."""

    reason: str
    detail: str


def fit(height: int, width: int, rules: SizeRules) -> Fit | Unfit:
    """The stored size of an original of `height` x `width`, or why it has none."""
    aspect = max(height, width) / min(height, width)
    if aspect > rules.max_aspect:
        return Unfit(REASON_ASPECT, f"{height}x{width} has aspect {aspect:.2f}, allowed {rules.max_aspect:g}")
    if rules.mode == "buckets":
        return _fit_bucket(height, width, rules)
    return _fit_native(height, width, rules)


def _fit_native(height: int, width: int, rules: SizeRules) -> Fit | Unfit:
    area = height * width
    scale = min(1.0, math.sqrt(rules.max_area / area))
    if area * scale * scale < rules.min_area:
        scale = math.sqrt(rules.min_area / area)
    small = Unfit(
        REASON_SMALL,
        f"{height}x{width} would have to grow by more than {rules.max_upscale:g} to an area of "
        f"{rules.min_area} in multiples of {rules.multiple}",
    )
    if scale > rules.max_upscale:
        return small
    candidates = [
        candidate
        for target_height in _multiples(height * scale, rules.multiple)
        for target_width in _multiples(width * scale, rules.multiple)
        if rules.min_area <= target_height * target_width <= rules.max_area
        and (candidate := _cover(height, width, target_height, target_width, rules)) is not None
    ]
    if not candidates:
        return small

    def cost(candidate: Fit) -> tuple[float, int, int]:
        # What the crop takes and what the stretch bends, each against its limit; then the larger picture.
        lost = candidate.crop_share + 0.5 * candidate.stretch(height, width)
        # A change of area costs too, a little: otherwise a much smaller size of exact aspect would win.
        change = abs(math.log(candidate.height * candidate.width / (area * scale * scale)))
        return lost + 0.25 * change, -candidate.height * candidate.width, candidate.height

    best = min(candidates, key=cost)
    if best.crop_share > rules.max_crop:
        best = min(candidates, key=lambda candidate: (candidate.crop_share, cost(candidate)))
    if best.crop_share > rules.max_crop:
        return Unfit(
            REASON_CROP,
            f"{height}x{width} to multiples of {rules.multiple} would lose {best.crop_share:.1%}, "
            f"allowed {rules.max_crop:.1%}",
        )
    return best


def _multiples(side: float, multiple: int) -> tuple[int, ...]:
    """The multiples just below and just above `side`, at least one of them."""
    # Sides that a reduction hits exactly must not fall to the next multiple by a rounding of the last bit.
    below = max(1, math.floor(side / multiple + 1e-9)) * multiple
    return (below, below + multiple)


def _cover(height: int, width: int, target_height: int, target_width: int, rules: SizeRules) -> Fit | None:
    """The smallest resize that covers the target within `max_stretch`; None if a side would grow too much."""
    scale_y, scale_x = target_height / height, target_width / width
    limit = 1.0 + rules.max_stretch
    resize_height, resize_width = target_height, target_width
    # Rounded up, so that the stretch stays within its limit; an integer must not move by a last bit.
    if scale_x > limit * scale_y:
        resize_height = max(target_height, math.ceil(height * scale_x / limit - 1e-9))
    elif scale_y > limit * scale_x:
        resize_width = max(target_width, math.ceil(width * scale_y / limit - 1e-9))
    if max(resize_height / height, resize_width / width) > rules.max_upscale:
        return None
    return Fit(target_height, target_width, resize_height, resize_width)


def _fit_bucket(height: int, width: int, rules: SizeRules) -> Fit | Unfit:
    table = rules.buckets or bucket_table(rules.max_area, rules.multiple, rules.max_aspect)
    if height * width < rules.min_area:
        return Unfit(REASON_SMALL, f"{height}x{width} is below the area {rules.min_area}")
    # Nearest in aspect; of equals the nearest in area.
    best = min(
        table,
        key=lambda size: (
            round(abs(math.log(size[0] * width / (size[1] * height))), 9),
            abs(math.log(size[0] * size[1] / (height * width))),
            size,
        ),
    )
    return fit_given(best, rules.multiple)


def fit_given(size: tuple[int, int], multiple: int) -> Fit:
    """The fit of a size that the source prescribes: sides floored to the multiple, resized without a crop."""
    height, width = (max(1, side // multiple) * multiple for side in size)
    return Fit(height, width, height, width)


@lru_cache(maxsize=16)
def bucket_table(area: int, multiple: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) of nearly `area`, one a height: the widest that the area and the aspect allow."""
    sizes: set[tuple[int, int]] = set()
    side = multiple
    while side * side <= area:
        other = area // side // multiple * multiple
        if other / side <= max_aspect:
            sizes |= {(side, other), (other, side)}
        side += multiple
    if not sizes:
        raise DataError(
            f"--max-area: {area} gives no bucket in multiples of {multiple} within aspect {max_aspect:g}"
        )
    return tuple(sorted(sizes))


def parse_buckets(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes written as `HxW,HxW,...`, height first."""
    return tuple(parse_size(part) for part in text.split(",") if part.strip())


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `HxW`; a name before the last dash, as in the authors' bucket names, is ignored.

    Raises:
        DataError: if it is no such size.
    """
    height, cross, width = text.rpartition("-")[2].strip().partition("x")
    # isascii: isdigit alone also accepts superscripts, which int() refuses.
    if not (cross and height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
        raise DataError(f"size {text[:80]!r}: expected HEIGHTxWIDTH in pixels, such as 768x1024")
    if int(height) < 1 or int(width) < 1 or max(len(height), len(width)) > 6:
        raise DataError(f"size {text[:80]!r}: sides run from 1 to 999999 pixels")
    return int(height), int(width)


def describe_fit(height: int, width: int, fitted: Fit, rotated: bool) -> dict[str, object]:
    """What a sample's json records of its size. A crop is [top, left, height, width] after the resize."""
    scale_y, scale_x = fitted.scales(height, width)
    return {
        "original_px": [height, width],
        "resize_px": [fitted.resize_height, fitted.resize_width],
        "crop_px": [fitted.top, fitted.left, fitted.height, fitted.width],
        "height_px": fitted.height,
        "width_px": fitted.width,
        "scale": [round(scale_y, 6), round(scale_x, 6)],
        **({"rotated": True} if rotated else {}),
    }
