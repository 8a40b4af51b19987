"""The scaling model beside what it predicts: pieces measured on one network, steps on others.

    python -m tests.trainer.scaling_proof --folder DIR [--stages 1 2 3_tight] [--mbit 200 400 100]

Two hosts of one rank and one core each are namespaces of this machine, joined by cards that send no more than
so many million bits a second (as root, with iproute2). The model is given the pieces of the first rate, with
all numbers of packs but the largest, and how many times faster the others are; what it says of every other
step is compared with that step. Nothing else is needed: weights and packs are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tests.trainer.cluster import NODES, Cluster
from tests.trainer.ranks import free_port
from tests.trainer.test_launch import ROOT
from tim_ds.config.load import load_recipe
from tim_ds.trainer.measured import Collective, Pieces, Seconds, Step, load_pieces
from tim_ds.trainer.memory import Ranks
from tim_ds.trainer.scaling import Given, even_pack, hardware_of, scale

RECIPE = str(ROOT / "launch/recipes/handwriting_tim.yaml")
OVERRIDES = ("data.tokens_per_pack=64", "data.text_encoder.max_tokens=8")
IMAGE_TOKENS = 16
PACKS = (1, 2, 3)


TIGHT = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_prefetch_bucket_size": 300_000,
    "stage3_max_live_parameters": 600_000,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 with limits that a small network feels: a quarter of its weights may be gathered at a time."""


def engine_file(stage: str, folder: Path) -> Path:
    if stage != "3_tight":
        return ROOT / "ds_configs" / f"zero{stage}.json"
    path = folder / "zero3_tight.json"
    path.write_text(json.dumps({"zero_optimization": TIGHT}))
    return path


def measure(cluster: Cluster, stage: str, mbit: float, repetitions: int, out: Path) -> None:
    """The command on both hosts."""
    for name in NODES:
        cluster.limit(name, mbit)
    address = cluster.hosts[NODES[0]].run("hostname", "-I").split()[0]
    port = free_port()
    processes = []
    for rank, name in enumerate(NODES):
        ranks = [f"RANK={rank}", "LOCAL_RANK=0", "WORLD_SIZE=2", f"MASTER_ADDR={address}"]
        environment = [*ranks, f"MASTER_PORT={port}", "GLOO_SOCKET_IFNAME=card", "OMP_NUM_THREADS=1"]
        command = [sys.executable, "-m", "tim_ds.trainer.pieces", RECIPE, *OVERRIDES]
        options = ["--ds", engine_file(stage, out.parent), "--out", out, "--image-tokens", IMAGE_TOKENS]
        packs = ["--packs", ",".join(map(str, PACKS)), "--repetitions", repetitions]
        core = ["taskset", "--cpu-list", rank % (os.cpu_count() or 1)]
        with out.with_suffix(f".{name}.said").open("w") as said:
            processes.append(
                cluster.hosts[name].start(
                    [str(word) for word in (*core, "env", *environment, *command, *options, *packs)],
                    stdout=said,
                    stderr=said,
                )
            )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"stage {stage}, {mbit} Mbit/s: exit codes {codes}; see {out.parent}")


def pooled(rounds: Sequence[Pieces]) -> Pieces:
    """Medians over the rounds."""

    def median(parts: Sequence[Seconds]) -> Seconds:
        middle = {
            name: statistics.median(getattr(part, name) for part in parts) for name in ("p20", "p50", "p80")
        }
        return Seconds(**middle, repetitions=sum(part.repetitions for part in parts))

    steps = [
        Step(
            same[0].packs,
            median([step.whole for step in same]),
            median([step.alone for step in same]),
            median([step.wire for step in same]),
            same[0].sent,
        )
        for same in zip(*(one.steps for one in rounds), strict=True)
    ]
    collectives: list[Collective] = [
        replace(same[0], seconds=median([one.seconds for one in same]))
        for same in zip(*(one.collectives for one in rounds), strict=True)
    ]
    return replace(rounds[0], steps=tuple(steps), collectives=tuple(collectives))


def compare(found: dict[tuple[str, float], Pieces], first: float) -> list[str]:
    """The table: every step that was not among the given pieces."""
    recipe = load_recipe(RECIPE, OVERRIDES)
    pack = even_pack(recipe, IMAGE_TOKENS)
    lines = [
        "| stage | packs | Mbit/s | alone s | wire s | wire, model | predicted s | measured s | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for (stage, mbit), pieces in found.items():
        given = found[stage, first]
        # What was given: steps of one and two packs.
        given = replace(given, steps=given.steps[:-1])
        reached = max(link.bytes_per_s for link in given.links("everywhere").values())
        faster = Given() if mbit == first else Given(inter_gbs=1e-9 * reached * mbit / first)
        hardware, _ = hardware_of(recipe, faster, given)
        for step in pieces.steps:
            is_given = mbit == first and step.packs != PACKS[-1]
            row = scale(
                recipe,
                pieces.engine,
                hardware,
                Ranks(2, 1),
                packs_per_gpu=step.packs,
                pack=pack,
            )
            error = row.step_s / step.whole.p50 - 1
            if not is_given:
                errors.append(abs(error))
            lines.append(
                f"| {stage} | {step.packs} | {mbit:g} | {step.alone.p50:.3f} | {step.wire.p50:.3f} | "
                f"{row.communication_s:.3f} | {row.step_s:.3f} | {step.whole.p50:.3f} | {error:+.1%}"
                f"{' (given)' if is_given else ''} |"
            )
    lines.append(
        f"\nerror of {len(errors)} steps: median {statistics.median(errors):.1%}, largest {max(errors):.1%}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The scaling model beside measured steps.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=["1", "2", "3_tight"])
    parser.add_argument("--mbit", nargs="+", type=float, default=[200, 400, 100])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=12)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with Cluster(options.folder / "hosts") as cluster:
        for number in range(options.rounds):
            for stage, mbit in product(options.stages, options.mbit):
                out = options.folder / f"zero{stage}_{mbit:g}_{number}.json"
                if not out.exists():
                    measure(cluster, stage, mbit, options.repetitions, out)
    found = {
        (stage, mbit): pooled(
            [
                load_pieces(options.folder / f"zero{stage}_{mbit:g}_{number}.json")
                for number in range(options.rounds)
            ]
        )
        for stage, mbit in product(options.stages, options.mbit)
    }
    for (stage, mbit), pieces in found.items():
        exposed = ", ".join(f"{step.exposed_s:.3f}" for step in pieces.steps)
        print(f"stage {stage}, {mbit:g} Mbit/s: exposed {exposed}; overlap {pieces.overlap:.0%}")
    print("\n".join(compare(found, options.mbit[0])))


if __name__ == "__main__":
    main()
