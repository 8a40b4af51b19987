"""What `tim_ds.trainer.pieces` measured, as the scaling model reads it: collectives, computation, steps.

Bytes are those that a rank sends in a ring: (N - 1) / N of the whole tensor, twice that where everyone gets a
sum. Over the time they are the bus bandwidth, which does not depend on N where the network is the limit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tim_ds.config.recipe import Recipe, to_dict
from tim_ds.errors import RequestError
from tim_ds.model.weights import write_aside

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce"]
Scope = Literal["node", "everywhere"]

FORMAT = 1


def ring_steps(kind: Kind, ranks: int) -> int:
    """Messages of a ring that follow each other."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1)


def sent_bytes(kind: Kind, whole_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends."""
    return ring_steps(kind, ranks) * whole_bytes / ranks


@dataclass(frozen=True, slots=True)
class Sent:
    """What a rank sends in a step, in the collectives of one kind."""

    kind: Kind
    scope: Scope
    ranks: int
    """Of each of these collectives."""
    sent_bytes: float
    calls: float

    @property
    def messages(self) -> float:
        """That follow each other."""
        return self.calls * ring_steps(self.kind, self.ranks)


@dataclass(frozen=True, slots=True)
class Link:
    """What collectives reach."""

    bytes_per_s: float
    """Bus bandwidth."""
    message_s: float = 0.0
    """Latency of one message of a ring."""

    def seconds(self, sent: Sent) -> float:
        return sent.sent_bytes / self.bytes_per_s + sent.messages * self.message_s


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of repetitions, the slowest rank of each."""

    p20: float
    p50: float
    p80: float
    repetitions: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Seconds:
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(times), cuts[7], len(times))


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective, by itself."""

    kind: Kind
    scope: Scope
    ranks: int
    whole_bytes: int
    """Of the tensor that is gathered, reduced or split."""
    seconds: Seconds

    @property
    def bus_bytes_per_s(self) -> float:
        return sent_bytes(self.kind, self.whole_bytes, self.ranks) / self.seconds.p50


@dataclass(frozen=True, slots=True)
class Step:
    """A step with so many packs a rank."""

    packs: int
    whole: Seconds
    alone: Seconds
    """The same step where every collective is answered at once with what the rank has itself."""
    wire: Seconds
    """The step's collectives, one after the other, and nothing else."""
    sent: tuple[Sent, ...]

    @property
    def wire_s(self) -> float:
        """Of the step's collectives in the step, where some pass beside each other: at most the whole."""
        return min(self.wire.p50, self.whole.p50)

    @property
    def exposed_s(self) -> float:
        return self.whole.p50 - self.alone.p50


@dataclass(frozen=True)
class Pieces:
    """What one command measured on one set of machines."""

    about: dict[str, Any]
    """Hardware, versions, commit, date, hosts, backend, command."""
    work: dict[str, Any]
    """What of the recipe decides the computation."""
    engine: dict[str, Any]
    ranks: int
    per_node: int
    stage: int
    image_tokens: int
    trained: int
    """Parameters."""
    steps: tuple[Step, ...]
    """By packs, fewest first."""
    collectives: tuple[Collective, ...]

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node

    @property
    def where(self) -> str:
        """One line for those who read figures that come of it."""
        about = self.about
        return f"{about['device']}, {self.ranks} ranks on {', '.join(about['hosts'])}, {about['date']}"

    @property
    def pack_s(self) -> float:
        """Computation of one more pack."""
        few, many = self.steps[0], self.steps[-1]
        return (many.alone.p50 - few.alone.p50) / (many.packs - few.packs)

    @property
    def update_s(self) -> float:
        """Computation of a step whatever its packs: optimiser, averages, what is done once with gradients."""
        return max(0.0, self.steps[0].alone.p50 - self.steps[0].packs * self.pack_s)

    @property
    def overlap(self) -> float | None:
        """Share of what can pass behind computation, the shorter of communication and computation, that did,
        over all steps; None for one rank. Beyond 0 and 1 there is only noise."""
        possible = sum(min(step.wire_s, step.alone.p50) for step in self.steps)
        if self.ranks == 1 or possible <= 0:
            return None
        hidden = sum(step.wire_s - step.exposed_s for step in self.steps)
        return min(1.0, max(0.0, hidden / possible))

    @property
    def in_step(self) -> float:
        """How many times longer the collectives of a step take than the same by themselves, with latency and
        bandwidth of each kind: sizes between and what a kind leaves behind for the next are in it."""
        alone = {
            (kind, scope): link for scope in get_args(Scope) for kind, link in self._alone(scope).items()
        }
        expected = sum(
            alone[sent.kind, sent.scope].seconds(sent)
            for step in self.steps
            for sent in step.sent
            if (sent.kind, sent.scope) in alone
        )
        return sum(step.wire_s for step in self.steps) / expected if expected else 1.0

    def links(self, scope: Scope) -> dict[Kind, Link]:
        """Of each kind that was measured there, as fast as it is in a step."""
        factor = self.in_step
        return {
            kind: Link(link.bytes_per_s / factor, link.message_s * factor)
            for kind, link in self._alone(scope).items()
        }

    def _alone(self, scope: Scope) -> dict[Kind, Link]:
        """Latency from the smallest tensor, bandwidth from the rest of the time that the largest takes."""
        found: dict[Kind, Link] = {}
        for kind in get_args(Kind):
            same = [c for c in self.collectives if c.kind == kind and c.scope == scope]
            if not same:
                continue
            small, large = (end(same, key=lambda c: c.whole_bytes) for end in (min, max))
            start_s, whole_s = small.seconds.p50, large.seconds.p50
            sending_s = whole_s - start_s if whole_s > 2 * start_s else whole_s
            found[kind] = Link(
                sent_bytes(kind, large.whole_bytes, large.ranks) / sending_s,
                start_s / ring_steps(kind, small.ranks),
            )
        return found

    def store(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"
        write_aside(path, len(text), lambda aside: aside.write_text(text, encoding="utf-8"))


def load_pieces(path: Path) -> Pieces:
    """
    Raises:
        RequestError: if the file is not of `tim_ds.trainer.pieces`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        steps = tuple(
            Step(
                step["packs"],
                Seconds(**step["whole"]),
                Seconds(**step["alone"]),
                Seconds(**step["wire"]),
                tuple(Sent(**sent) for sent in step["sent"]),
            )
            for step in values.pop("steps")
        )
        collectives = tuple(
            Collective(**{**one, "seconds": Seconds(**one["seconds"])}) for one in values.pop("collectives")
        )
        return Pieces(steps=steps, collectives=collectives, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not a file of tim_ds.trainer.pieces ({error!r})") from error


def work_of(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide how long a pack takes."""
    values = to_dict(recipe)
    train = ("precision", "activation_checkpointing", "adapter")
    return {
        "model": values["model"],
        "objective": values["objective"],
        "train": {key: values["train"][key] for key in train},
        "tokens_per_pack": values["data"]["tokens_per_pack"],
    }


def differences(pieces: Pieces, recipe: Recipe) -> list[str]:
    """Settings in which a recipe differs from the one that was measured, with both values."""
    # As JSON, which knows no tuples and has one kind of number.
    here = json.loads(json.dumps(work_of(recipe)))
    return [
        f"{key}: {here.get(key)!r}, measured with {there!r}"
        for (key, there), here in ((item, _flat(here)) for item in _flat(pieces.work).items())
        if here.get(key) != there
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        found.update(inner)
    return found
