"""The order of training as a pure function of (sizes, seed, step). Integers only: no tensors, no files.

How it works. The samples, sorted by token count, are cut into as many *strata* as a window has slots; every
window takes the same number of samples from each stratum. All windows therefore look alike, and one of them
is packed **once**, for the largest length of each stratum: the *template*, a fixed number of steps, each of
`packs_per_step` packs, each pack a list of slots. A keyed permutation says which sample of a stratum sits in
which window, and another one in which order the steps are visited; both are computed element by element
(`permutation.py`), so a step touches its own images and nothing else. Hence

- a global step number alone says which packs come next, at any world size: resume is a number, and costs
  the same at ten thousand samples and at a hundred million;
- no pack exceeds its budget and, within an epoch, no sample appears twice;
- every epoch has the same number of steps;
- every rank computes the same plan without communication.

What the windows leave, between one window and two, is packed as a template of its own, the *tail*. Every pack
of a step must hold an image: when fewer images remain than one more step has packs, and the steps before have
no room for them, they sit the epoch out, at most `packs_per_step` - 1 of them. It happens when packs hold one
or two images; a budget of many images has room.

Balance: the ranks of a step wait for the slowest pack, so packs are filled by cost (largest image first, into
the cheapest pack that has room), and packs of like cost share a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.draws import generator
from data_pipeline.errors import DataError
from data_pipeline.permutation import derive_key, mix, permute

ATTENTION_COST = 4 / (28 * 1152)
"""Cost of a pair of tokens relative to a token: a block costs 28 d^2 + 4 L d a token; d = 1152 (XL)."""

FILLS = (1.0, 0.99, 0.9875, 0.985, 0.9825, 0.98)
"""Shares of the token budget that a window tries, in turn. The rest is the room in which costs are balanced:
on a web mix 0.995 doubles the imbalance of 0.99. 1.0 is for data of one size, or of a few that fit."""

BLOCK_IMAGES = 16_384
"""Images whose places are looked up together, in whole steps: a few milliseconds."""

BALANCE = 1.02
"""Slowest pack over mean, as an average over steps, that ends the trying."""

WINDOW_PACKS = 1024
WINDOW_STEPS = 8
"""A window holds at least so many packs and steps: among more packs there are more of like cost."""

ROUND_SHARE = 16
"""A round hands images to the cheapest 1/16 of the packs: as even as one image at a time (1.013 of
the mean on a web mix at 64 packs a step), four times faster than with a heap."""

SEARCHES = 6
"""Halvings of the interval of window sizes, where none of `FILLS` fits."""


@dataclass(frozen=True, eq=False)
class LengthGroups:
    """Samples grouped by size, shortest first; groups may share a length.

    Shapes:
        lengths, counts, starts: int64 [G].   members: integer [N], may be memory-mapped.
    """

    lengths: np.ndarray
    """Tokens of a sample of each group, ascending."""
    counts: np.ndarray
    starts: np.ndarray
    """Where each group begins in `members`."""
    members: np.ndarray
    """Sample ids, group by group."""

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> LengthGroups:
        """Groups of the samples 0 to N - 1 whose lengths are given."""
        array = np.asarray(lengths, dtype=np.int64)
        members = np.argsort(array, kind="stable")
        values, starts = np.unique(array[members], return_index=True)
        return cls(values, np.diff(np.append(starts, len(array))), starts, members)

    @property
    def ends(self) -> np.ndarray:
        """Rank after the last sample of each group; a rank is a place in the order by length."""
        return np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class StepPlan:
    """The packs of one optimiser step, over all ranks: sample ids of each pack."""

    step: int
    epoch: int
    packs: tuple[tuple[int, ...], ...]

    @property
    def num_images(self) -> int:
        return sum(len(pack) for pack in self.packs)

    def of_rank(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        """The packs that `rank` trains on, in order."""
        return self.packs[rank::world_size]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """One pack of one rank.

    Shapes:
        sample_ids: int64 [S].
    """

    step: int
    epoch: int
    sample_ids: np.ndarray
    images_in_step: int
    """Images of the step over all packs and ranks."""


@dataclass(frozen=True, eq=False)
class _Template:
    """Packed slots of a window, or of several parts end to end.

    Slot i of pack p: `pack_starts[p] <= i < pack_starts[p + 1]`.

    Shapes:
        pack_starts: int64 [P + 1].   classes, places: int64 [slots].   costs: float64 [P].
    """

    pack_starts: np.ndarray
    classes: np.ndarray
    """Which class of samples may sit in a slot."""
    places: np.ndarray
    """Number of the slot among those of its class in this window."""
    costs: np.ndarray
    tokens_left_out: int

    @property
    def num_packs(self) -> int:
        return len(self.costs)

    def followed_by(self, other: _Template) -> _Template:
        """Both, the packs of `other` numbered on from these."""
        return _Template(
            pack_starts=np.concatenate([self.pack_starts, self.pack_starts[-1] + other.pack_starts[1:]]),
            classes=np.concatenate([self.classes, other.classes]),
            places=np.concatenate([self.places, other.places]),
            costs=np.concatenate([self.costs, other.costs]),
            tokens_left_out=self.tokens_left_out + other.tokens_left_out,
        )


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring steps of one epoch, all packs of each or a rank's; pack p holds
    `samples[starts[p]:starts[p + 1]]`."""

    epoch: int
    first: int
    num_images: np.ndarray
    """Images of each step, over all of its packs."""
    samples: np.ndarray
    starts: np.ndarray

    def has(self, epoch: int, position: int) -> bool:
        return self.epoch == epoch and 0 <= position - self.first < len(self.num_images)


@dataclass(frozen=True, eq=False)
class _Classes:
    """Neighbouring strata of one length, whose samples change places freely; else one stratum each.

    Shapes: all int64 [number of classes].
    """

    starts: np.ndarray
    """First rank of the class in the order by length."""
    sizes: np.ndarray
    lengths: np.ndarray
    """Tokens of the largest sample of the class."""
    per_window: np.ndarray
    """Slots of the class in every window but the tail."""


class Plan:
    """Which samples form which pack of which step.

    Args:
        lengths: tokens of each sample, int [N], or the samples grouped by length (as `Index.groups` gives).
        tokens_per_pack: budget of a pack.
        packs_per_step: packs of a step over all ranks.
        seed: of the run.
        attention_cost: see `ATTENTION_COST`.

    Raises:
        DataError: if an image exceeds the budget, or there are fewer images than packs in a step.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | LengthGroups,
        *,
        tokens_per_pack: int,
        packs_per_step: int,
        seed: int,
        attention_cost: float = ATTENTION_COST,
    ) -> None:
        self.groups = lengths if isinstance(lengths, LengthGroups) else LengthGroups.of(lengths)
        self.tokens_per_pack = tokens_per_pack
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.attention_cost = attention_cost
        self._ends = self.groups.ends
        self._check()
        self._window, self._num_windows, slots = self._size_of_windows()
        self._classes = self._classes_of(slots)
        self._template = self._pack_template()
        # Where the tail begins among the packs of the template.
        self._tail = self._window if self._num_windows else 0
        packs = self._num_windows * self._window + self._template.num_packs - self._tail
        self.steps_per_epoch = packs // packs_per_step
        self.left_out_per_epoch = self._count_left_out()
        images = max(1, len(self.groups) // self.steps_per_epoch)
        self.steps_in_block = max(1, BLOCK_IMAGES // images)
        self._block: Block | None = None

    def _check(self) -> None:
        lengths, total = self.groups.lengths, len(self.groups)
        if total == 0 or lengths[0] < 1:
            raise DataError("lengths: expected at least one sample, each of at least one token")
        if lengths[-1] > self.tokens_per_pack:
            sample = int(self.groups.members[self.groups.starts[-1]])
            raise DataError(
                f"data.tokens_per_pack: sample {sample}, the largest, has {lengths[-1]} "
                f"tokens, the budget is {self.tokens_per_pack}; raise it to {lengths[-1]}, for good balance "
                f"to {2 * lengths[-1]} or more"
            )
        if total < self.packs_per_step:
            raise DataError(
                f"data.packs_per_step: {self.packs_per_step} packs need at least as many images, "
                f"the data hold {total}"
            )

    # Order of an epoch.

    def step(self, step: int) -> StepPlan:
        """The packs of global step `step` (0 is the first step of the first epoch)."""
        if step < 0:
            raise ValueError(f"step: expected 0 or more, received {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        block = self._block
        if block is None or not block.has(epoch, position):
            # The block of a step does not depend on the steps asked before.
            first = position - position % self.steps_in_block
            block = self._block = self.look_up(epoch, first, self.steps_in_block, slice(None))
        first = (position - block.first) * self.packs_per_step
        starts = block.starts[first : first + self.packs_per_step + 1].tolist()
        samples = block.samples[starts[0] : starts[-1]].tolist()
        packs = tuple(tuple(samples[a - starts[0] : b - starts[0]]) for a, b in pairwise(starts))
        return StepPlan(step, epoch, packs)

    def of_rank(self, rank: int, world_size: int) -> RankPlan:
        """The packs that `rank` trains on: `step(n).of_rank(rank, world_size)`, one at a time."""
        return RankPlan(self, rank, world_size)

    def look_up(self, epoch: int, first: int, num_steps: int, chosen: slice) -> Block:
        """The samples of up to `num_steps` steps from `first` on, of the `chosen` packs of each."""
        template = self._template
        positions = np.arange(first, min(first + num_steps, self.steps_per_epoch))
        places = permute(positions, self.steps_per_epoch, derive_key(self.seed, "plan.steps", epoch))
        # Packs of the epoch, counted through all windows, then within their window and template.
        packs = places[:, None] * self.packs_per_step + self._turned(epoch, positions)
        windows = np.minimum(packs // self._window, self._num_windows)
        packs -= windows * self._window
        packs[windows == self._num_windows] += self._tail
        sizes = np.diff(template.pack_starts)
        num_images = sizes[packs].sum(axis=1)
        packs, windows = packs[:, chosen].ravel(), windows[:, chosen].ravel()
        counts = sizes[packs]
        starts = np.concatenate([[0], np.cumsum(counts)])
        slots = np.repeat(template.pack_starts[packs] - starts[:-1], counts) + np.arange(starts[-1])
        samples = self._samples(slots, np.repeat(windows, counts), epoch)
        return Block(epoch, first, num_images, samples, starts)

    def _turned(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Places 0 to packs_per_step - 1 of each step, moved on: no rank keeps a slot of the template.

        Shapes: [steps] -> [steps, packs_per_step].
        """
        words = mix(positions.astype(np.uint64) ^ derive_key(self.seed, "plan.ranks", epoch))
        turns = (words % np.uint64(self.packs_per_step)).astype(np.int64)
        return (turns[:, None] + np.arange(self.packs_per_step)) % self.packs_per_step

    def _samples(self, slots: np.ndarray, windows: np.ndarray, epoch: int) -> np.ndarray:
        """Sample ids in the slots of these windows."""
        chosen, classes, groups = self._template.classes[slots], self._classes, self.groups
        positions = windows * classes.per_window[chosen] + self._template.places[slots]
        keys = mix(derive_key(self.seed, "plan.samples", epoch) ^ mix(chosen.astype(np.uint64)))
        ranks = classes.starts[chosen] + permute(positions, classes.sizes[chosen], keys)
        group = np.searchsorted(self._ends, ranks, side="right")
        return groups.members[groups.starts[group] + ranks - (self._ends[group] - groups.counts[group])]

    # Quality.

    def fill(self) -> float:
        """Share of the token budget that an epoch uses."""
        tokens = int((self.groups.lengths * self.groups.counts).sum()) - self._template.tokens_left_out
        return tokens / (self.steps_per_epoch * self.packs_per_step * self.tokens_per_pack)

    def balance(self) -> float:
        """Mean over the steps of (cost of the dearest pack / mean cost of the step's packs); 1 is perfect.

        An image counts as the largest of its stratum, as the template does.
        """
        return float(self.balances().mean())

    def balances(self) -> np.ndarray:
        """`balance` of every step of an epoch, in no particular order."""
        steps = self._step_balances(self._template.costs)
        tail = self._tail // self.packs_per_step
        return np.concatenate([np.tile(steps[:tail], self._num_windows), steps[tail:]])

    def _step_balances(self, costs: np.ndarray) -> np.ndarray:
        steps = costs.reshape(-1, self.packs_per_step)
        return steps.max(axis=1) / steps.mean(axis=1)

    def _cost(self, lengths: np.ndarray) -> np.ndarray:
        return lengths + self.attention_cost * lengths.astype(np.float64) ** 2

    # The templates.

    def _size_of_windows(self) -> tuple[int, int, int]:
        """Packs of a window, number of windows before the tail, slots of a window."""
        steps = max(WINDOW_STEPS, -(-WINDOW_PACKS // self.packs_per_step))
        packs, total = steps * self.packs_per_step, len(self.groups)
        mean = float((self.groups.lengths * self.groups.counts).sum()) / total
        # A window needs an image a pack, and any image fits into a pack of its own.
        room = packs * self.tokens_per_pack / mean
        if total < 2 * max(packs, int(FILLS[-1] * room)):
            return packs, 0, 0
        too_many, best = 0, (packs, np.inf)
        for fill in FILLS:
            slots = max(packs, int(fill * room))
            placed, costs = self._fill(self._strata(slots), packs)
            if bool((placed < 0).any()):
                too_many = slots
                continue
            balance = float(self._step_balances(np.sort(costs)).mean())
            if balance <= BALANCE:
                best = (slots, balance)
                break
            if balance < best[1]:
                best = (slots, balance)
        slots = best[0]
        if best[1] == np.inf:
            # Sizes that fit badly: the most that do fit, to within a few in a thousand.
            for _ in range(SEARCHES):
                middle = (slots + too_many) // 2
                placed, _ = self._fill(self._strata(middle), packs)
                if bool((placed < 0).any()):
                    left = int((placed < 0).sum())
                    too_many = middle
                    if slots < middle - left and not bool(
                        (self._fill(self._strata(middle - left), packs)[0] < 0).any()
                    ):
                        slots = middle - left
                else:
                    slots = middle
        return packs, max(0, total // slots - 1), slots

    def _strata(self, slots: int) -> np.ndarray:
        """Largest length of each of `slots` strata, ascending."""
        return self._length_at(self._stratum_starts(slots)[1:] - 1)

    def _stratum_starts(self, slots: int) -> np.ndarray:
        return np.arange(slots + 1, dtype=np.int64) * len(self.groups) // slots

    def _length_at(self, ranks: np.ndarray) -> np.ndarray:
        return self.groups.lengths[np.searchsorted(self._ends, ranks, side="right")]

    def _classes_of(self, slots: int) -> _Classes:
        """Classes of samples; without windows, the samples of each length."""
        if self._num_windows == 0:
            lengths, first = np.unique(self.groups.lengths, return_index=True)
            starts = (self._ends - self.groups.counts)[first]
            sizes = np.diff(np.append(starts, len(self.groups)))
            return _Classes(starts, sizes, lengths, np.zeros_like(sizes))
        bounds = self._stratum_starts(slots)
        lowest, highest = self._length_at(bounds[:-1]), self._length_at(bounds[1:] - 1)
        same = (lowest[:-1] == highest[:-1]) & (highest[:-1] == highest[1:]) & (lowest[1:] == highest[1:])
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        starts = bounds[first]
        return _Classes(
            starts=starts,
            sizes=np.diff(np.append(starts, len(self.groups))),
            lengths=highest[first],
            per_window=np.diff(np.append(first, slots)),
        )

    def _pack_template(self) -> _Template:
        """The packs of a window and, after them, those of the tail."""
        classes = self._classes
        numbers = np.arange(len(classes.sizes))
        tail = np.repeat(numbers, classes.sizes - self._num_windows * classes.per_window)
        placed, packs = self._fill_whole(classes.lengths[tail])
        template = self._template_of(tail, placed, packs, "tail")
        if self._num_windows:
            slots = np.repeat(numbers, classes.per_window)
            placed, _ = self._fill(classes.lengths[slots], self._window)
            template = self._template_of(slots, placed, self._window, "window").followed_by(template)
        return template

    def _count_left_out(self) -> int:
        window = int(self._classes.per_window.sum())
        return len(self.groups) - (self._num_windows - 1) * window - len(self._template.classes)

    def _fill_whole(self, lengths: np.ndarray) -> tuple[np.ndarray, int]:
        """As few whole steps as hold all `lengths`; without a step that would have an empty pack."""
        per_step, budget = self.packs_per_step, self.packs_per_step * self.tokens_per_pack
        steps = -(-int(lengths.sum()) // budget)
        while True:
            if len(lengths) < steps * per_step:
                # No image for some pack of the last step, which is given up with all after it. One step
                # always has its images, so what is left out is less than a step's packs.
                steps = len(lengths) // per_step
                return self._fill(lengths, steps * per_step)[0], steps * per_step
            placed, _ = self._fill(lengths, steps * per_step)
            left = lengths[placed < 0]
            if len(left) == 0:
                return placed, steps * per_step
            steps += max(1, int(left.sum()) // budget)

    def _fill(self, lengths: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
        """Largest image first, each into the cheapest pack with room.

        Returns:
            The pack of each image, -1 where none has room, and the cost of each pack.
        """
        # Stable sorts throughout: the order of equals must not depend on the processor.
        order = np.argsort(-lengths, kind="stable")
        ordered = lengths[order]
        weights = self._cost(ordered)
        placed = np.full(len(lengths), -1, dtype=np.int64)
        costs = np.zeros(num_packs)
        room = np.full(num_packs, self.tokens_per_pack, dtype=np.int64)
        at_once = max(1, num_packs // ROUND_SHARE)
        position = 0
        while position < len(ordered):
            cheapest = np.argsort(costs, kind="stable")
            cheapest = cheapest[room[cheapest] >= ordered[position]][:at_once]
            count = min(len(cheapest), len(ordered) - position)
            if count == 0:
                # A smaller image may fit where the larger one did not.
                position = int(np.searchsorted(-ordered, -ordered[position], side="right"))
                continue
            chosen, taken = cheapest[:count], slice(position, position + count)
            placed[order[taken]] = chosen
            room[chosen] -= ordered[taken]
            costs[chosen] += weights[taken]
            position += count
        return placed, costs

    def _template_of(self, slots: np.ndarray, placed: np.ndarray, num_packs: int, name: str) -> _Template:
        """Steps of packs with like cost; within a step the places are drawn.

        Args:
            slots: class of each slot, ascending.
            placed: pack of each slot, -1 for one that is left out.
        """
        lengths = self._classes.lengths[slots]
        inside = np.flatnonzero(placed >= 0)
        costs = np.bincount(placed[inside], weights=self._cost(lengths[inside]), minlength=num_packs)
        by_cost = np.argsort(costs, kind="stable")
        rng = generator(self.seed, f"plan.{name}", 0, 0)
        steps = by_cost.reshape(-1, self.packs_per_step)
        packs = np.concatenate([step[rng.permutation(len(step))] for step in steps])
        rank = np.empty(num_packs, dtype=np.int64)
        rank[packs] = np.arange(num_packs)
        by_pack = inside[np.argsort(rank[placed[inside]], kind="stable")]
        # Slots of a class are numbered over the window; the last numbers of the tail may be left out.
        seated = np.zeros(len(slots), dtype=np.int64)
        seated[inside] = np.arange(len(inside)) - np.searchsorted(slots[inside], slots[inside], side="left")
        counts = np.bincount(rank[placed[inside]], minlength=num_packs)
        return _Template(
            pack_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            classes=slots[by_pack],
            places=seated[by_pack],
            costs=costs[packs],
            tokens_left_out=int(lengths[placed < 0].sum()),
        )


class RankPlan:
    """The packs of one rank, `rank::world_size` of every step. Only its own images are looked up, so that
    planning costs a rank the same among one rank and among a thousand."""

    def __init__(self, plan: Plan, rank: int, world_size: int) -> None:
        self._plan = plan
        self._packs = slice(rank, None, world_size)
        self.packs_per_step = len(range(rank, plan.packs_per_step, world_size))
        self._steps_in_block = plan.steps_in_block * world_size
        self._block: Block | None = None

    def pack(self, step: int, number: int) -> PackPlan:
        """Pack `number` of this rank in global step `step`."""
        epoch, position = divmod(step, self._plan.steps_per_epoch)
        block = self._block
        if block is None or not block.has(epoch, position):
            first = position - position % self._steps_in_block
            block = self._block = self._plan.look_up(epoch, first, self._steps_in_block, self._packs)
        place = position - block.first
        pack = place * self.packs_per_step + number
        start, end = block.starts[pack : pack + 2].tolist()
        sample_ids = block.samples[start:end].astype(np.int64)
        return PackPlan(step, epoch, sample_ids, int(block.num_images[place]))
