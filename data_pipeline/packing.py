"""The order of training as a pure function of (lengths, seed, epoch). Integers only: no tensors, no files.

How it works. The samples' token counts are packed **once** into a *template*: a fixed number of steps, each
of `packs_per_step` packs, each pack a list of slots for images of stated lengths. An epoch then fills the
slots with a fresh permutation of the samples of each length, and visits the steps in a fresh order. Hence

- every epoch has the same number of steps, so a global step number alone says which packs come next, at any
  world size: resume is a number;
- no pack exceeds its budget and, within an epoch, no sample appears twice;
- every rank computes the same plan without communication.

The remainder: every pack of a step must hold an image. When fewer images remain than one more step has packs,
and the steps before have no room for them, they sit the epoch out: at most `packs_per_step` - 1 of them.
Their lengths are the same in every epoch, the samples change with the permutation. It happens when packs hold
one or two images; a budget of many images has room.

Balance: the ranks of a step wait for the slowest pack, so packs are filled by cost (largest image first, into
the cheapest pack that has room), and packs of like cost share a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.draws import generator
from data_pipeline.errors import DataError

ATTENTION_COST = 4 / (28 * 1152)
"""Cost of a pair of tokens relative to a token: a block costs 28 d^2 + 4 L d a token; d = 1152 (XL)."""

FILL = 0.985
"""Share of the token budget that a window aims at. The rest is the room in which costs are balanced."""

WINDOW_PACKS = 512
"""Packs that are filled and balanced together, rounded to whole steps (at least one)."""


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


class Plan:
    """Which samples form which pack of which step.

    Args:
        lengths: tokens of each sample, int [N].
        tokens_per_pack: budget of a pack.
        packs_per_step: packs of a step over all ranks.
        seed: of the run.
        attention_cost: see `ATTENTION_COST`.

    Raises:
        DataError: if an image exceeds the budget, or there are fewer images than packs in a step.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        tokens_per_pack: int,
        packs_per_step: int,
        seed: int,
        attention_cost: float = ATTENTION_COST,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens_per_pack = tokens_per_pack
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.attention_cost = attention_cost
        self._check()
        # Samples grouped by length; a slot is a position in this order.
        self._by_length = np.argsort(self.lengths, kind="stable")
        values, self._group_starts = np.unique(self.lengths[self._by_length], return_index=True)
        self._group_ends = np.append(self._group_starts[1:], len(self.lengths))
        packs = self._pack_template()
        self.steps_per_epoch = len(packs) // packs_per_step
        self.left_out_per_epoch = len(self.lengths) - sum(len(pack) for pack in packs)
        self._pack_starts = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
        self._slots = self._assign_slots(np.concatenate([np.asarray(pack) for pack in packs]), values)
        self._epoch_cache: tuple[int, np.ndarray, np.ndarray] | None = None

    def _check(self) -> None:
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise DataError("lengths: expected at least one sample, each of at least one token")
        largest = int(self.lengths.max())
        if largest > self.tokens_per_pack:
            raise DataError(
                f"data.tokens_per_pack: sample {int(self.lengths.argmax())}, the largest, has {largest} "
                f"tokens, the budget is {self.tokens_per_pack}; raise it, to twice that for good balance"
            )
        if len(self.lengths) < self.packs_per_step:
            raise DataError(
                f"data.packs_per_step: {self.packs_per_step} packs need at least as many images, "
                f"the data hold {len(self.lengths)}"
            )

    def step(self, step: int) -> StepPlan:
        """The packs of global step `step` (0 is the first step of the first epoch)."""
        if step < 0:
            raise ValueError(f"step: expected 0 or more, received {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        step_order, samples = self._epoch(epoch)
        first = int(step_order[position]) * self.packs_per_step
        starts = self._pack_starts[first : first + self.packs_per_step + 1].tolist()
        packs = tuple(tuple(samples[a:b].tolist()) for a, b in pairwise(starts))
        return StepPlan(step, epoch, packs)

    def fill(self) -> float:
        """Share of the token budget that the template uses."""
        tokens = int(self.lengths[self._by_length[self._slots]].sum())
        return tokens / (self.steps_per_epoch * self.packs_per_step * self.tokens_per_pack)

    def balance(self) -> float:
        """Mean over the steps of (cost of the dearest pack / mean cost of the step's packs); 1 is perfect."""
        costs = np.add.reduceat(
            self._cost(self.lengths[self._by_length[self._slots]]), self._pack_starts[:-1]
        )
        costs = costs.reshape(self.steps_per_epoch, self.packs_per_step)
        return float((costs.max(axis=1) / costs.mean(axis=1)).mean())

    def _cost(self, lengths: np.ndarray) -> np.ndarray:
        return lengths + self.attention_cost * lengths.astype(np.float64) ** 2

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the steps, and the sample in each slot, of one epoch."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            step_order = generator(self.seed, "plan.steps", epoch, 0).permutation(self.steps_per_epoch)
            shuffled = self._by_length.copy()
            for group, (start, end) in enumerate(zip(self._group_starts, self._group_ends, strict=True)):
                generator(self.seed, "plan.samples", epoch, group).shuffle(shuffled[start:end])
            self._epoch_cache = (epoch, step_order, shuffled[self._slots])
        return self._epoch_cache[1], self._epoch_cache[2]

    def _assign_slots(self, slot_lengths: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Give every slot of the template a position among the samples of its length."""
        slots = np.empty(len(slot_lengths), dtype=np.int64)
        order = np.argsort(slot_lengths, kind="stable")
        group = np.searchsorted(values, slot_lengths[order])
        first_of_group = np.searchsorted(group, group, side="left")
        slots[order] = self._group_starts[group] + np.arange(len(order)) - first_of_group
        return slots

    def _pack_template(self) -> list[list[int]]:
        """Lengths of the images in each pack; consecutive runs of `packs_per_step` packs are steps."""
        order = generator(self.seed, "plan.template", 0, 0).permutation(len(self.lengths))
        shuffled = self.lengths[order]
        num_packs = max(1, WINDOW_PACKS // self.packs_per_step) * self.packs_per_step
        capacity = num_packs * self.tokens_per_pack
        ends = np.concatenate([[0], np.cumsum(shuffled)])
        packs: list[list[int]] = []
        carried: list[int] = []
        position, windows = 0, 0
        # A window places at most its capacity, so at least one capacity remains for the last: enough images
        # for every pack of a step, and room to spread the remainder.
        while int(ends[-1] - ends[position]) + sum(carried) >= 2 * capacity:
            wanted = ends[position] + int(FILL * capacity) - sum(carried)
            take = int(np.searchsorted(ends, wanted, side="right")) - 1
            take = max(take, position, position + num_packs - len(carried))
            filled, carried = self._fill(carried + shuffled[position:take].tolist(), num_packs)
            packs += self._order(filled, windows)
            position, windows = take, windows + 1
        items = carried + shuffled[position:].tolist()
        return packs + self._order(self._fill_last(items), windows)

    def _fill_last(self, items: list[int]) -> list[list[int]]:
        """As few whole steps as hold all `items`; without a step that would have an empty pack."""
        steps = -(-sum(items) // (self.packs_per_step * self.tokens_per_pack))
        while True:
            if len(items) < steps * self.packs_per_step:
                # No image for some pack of the last step, which is given up. One step always has its images:
                # steps - 1 is at least 1 here, and it lacks at most packs_per_step - 1 of them.
                filled, _ = self._fill(items, (steps - 1) * self.packs_per_step)
                return filled
            filled, left = self._fill(items, steps * self.packs_per_step)
            if not left:
                return filled
            steps += 1

    def _fill(self, items: list[int], num_packs: int) -> tuple[list[list[int]], list[int]]:
        """Largest image first, each into the cheapest pack with room. Returns the packs and what is left."""
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        room = [self.tokens_per_pack] * num_packs
        heap = [(0.0, pack) for pack in range(num_packs)]
        no_room: list[tuple[float, int]] = []
        left: list[int] = []
        previous = 0
        for length in sorted(items, reverse=True):
            if length != previous:
                # A smaller image may fit where the larger one did not.
                for entry in no_room:
                    heapq.heappush(heap, entry)
                no_room.clear()
                previous = length
            while heap and room[heap[0][1]] < length:
                no_room.append(heapq.heappop(heap))
            if not heap:
                left.append(length)
                continue
            cost, pack = heap[0]
            packs[pack].append(length)
            room[pack] -= length
            heapq.heapreplace(heap, (cost + length + self.attention_cost * length * length, pack))
        return packs, left

    def _order(self, packs: list[list[int]], window: int) -> list[list[int]]:
        """Steps of packs with like cost; within a step the ranks' places are drawn."""
        packs = sorted(packs, key=lambda pack: sum(n + self.attention_cost * n * n for n in pack))
        rng = generator(self.seed, "plan.ranks", 0, window)
        ordered: list[list[int]] = []
        for first in range(0, len(packs), self.packs_per_step):
            step = packs[first : first + self.packs_per_step]
            ordered += [step[i] for i in rng.permutation(len(step))]
        return ordered
