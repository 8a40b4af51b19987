"""Comparing one golden file tensor by tensor: what was compared, how far off it is, what could not be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    tensor: str
    family: str
    error: float
    """max|ours - golden| / max|golden|; infinite where shapes differ or a value is not finite."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class Report:
    """What became of every tensor of one file."""

    file: str
    golden: Mapping[str, Tensor]
    comparisons: list[Comparison] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    """Read by the comparison and not made by it."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Not comparable: tensor to reason."""

    def compare(
        self,
        tensor: str,
        ours: Tensor,
        tolerance: float,
        *,
        family: str | None = None,
        scale: float | None = None,
    ) -> None:
        """Compare with the golden tensor of that name, if the file has it.

        Args:
            family: what the tensor is listed under; by default its name up to the first slash.
            scale: measures the difference instead of max|golden|, for a tensor that is exactly zero on paper.
        """
        if tensor in self.golden and tensor not in self.skipped:
            error = relative_error(ours, self.golden[tensor], scale)
            self.comparisons.append(Comparison(tensor, family or tensor.split("/")[0], error, tolerance))

    def check(self, name: str, ours: float, golden: float) -> None:
        """A number of the description that must agree."""
        error = relative_error(torch.tensor(float(ours)), torch.tensor(float(golden)))
        self.comparisons.append(Comparison(name, "description", error, 1e-6))

    def use(self, *tensors: str) -> None:
        self.inputs.extend(name for name in tensors if name in self.golden)

    def skip(self, tensors: Iterable[str], reason: str) -> None:
        self.skipped.update(dict.fromkeys(tensors, reason))

    def close(self) -> Report:
        """List what nothing claimed."""
        known = {c.tensor for c in self.comparisons} | set(self.inputs) | set(self.skipped)
        self.skip(
            [name for name in self.golden if name not in known], "no tensor of this name is known to the tool"
        )
        return self

    @property
    def failures(self) -> list[Comparison]:
        return [c for c in self.comparisons if not c.passed]

    def lines(self) -> list[str]:
        """The report as text: worst error of every family, then what could not be compared and why."""
        rows = [f"{self.file}: {len(self.comparisons)} compared, {len(self.inputs)} inputs"]
        families: dict[tuple[str, float], list[Comparison]] = {}
        for c in self.comparisons:
            families.setdefault((c.family, c.tolerance), []).append(c)
        for (family, tolerance), members in families.items():
            worst = max(members, key=lambda c: c.error)
            verdict = "ok" if worst.passed else "FAILED"
            rows.append(
                f"  {family:<28}{len(members):>5}  worst {worst.error:8.1e}  tolerance {tolerance:7.1e}  "
                f"{verdict:<6} {worst.tensor}"
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            rows.append(f"  not comparable: {reason}:")
            rows.extend(f"    {name}" for name in names)
        return rows


def relative_error(ours: Tensor, golden: Tensor, scale: float | None = None) -> float:
    """max|ours - golden| / max|golden|, or / `scale`; absolute where that is zero."""
    ours, golden = ours.detach().double(), golden.double()
    if ours.shape != golden.shape:
        return float("inf")
    if golden.numel() == 0:
        return 0.0
    difference = (ours - golden).abs().max().item()
    measure = golden.abs().max().item() if scale is None else scale
    error = difference / measure if measure > 0 else difference
    # A NaN compares as false with everything and would otherwise pass for small.
    return error if error == error else float("inf")
