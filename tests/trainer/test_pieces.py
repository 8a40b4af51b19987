"""Pieces of a step: their arithmetic, their file, and a measurement on two ranks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import Groups
from tim_ds.config.load import load_recipe
from tim_ds.errors import RequestError
from tim_ds.trainer import pieces as command
from tim_ds.trainer import scaling
from tim_ds.trainer.engine import read_engine_file
from tim_ds.trainer.measured import (
    Collective,
    Kind,
    Link,
    Pieces,
    Scope,
    Seconds,
    Sent,
    Step,
    differences,
    load_pieces,
    ring_steps,
    sent_bytes,
    work_of,
)
from tim_ds.trainer.memory import Ranks
from tim_ds.trainer.scaling import Given, even_pack, expected_flops, hardware_of, scale

ROOT = Path(__file__).parents[2]
RECIPE_FILE = str(ROOT / "launch/recipes/t2i_xl.yaml")
RECIPE = load_recipe(RECIPE_FILE, [])
ENGINE = read_engine_file(ROOT / "ds_configs/zero2.json")
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce")
WITHIN: dict[Kind, Link] = {
    kind: Link(rate, 2e-6) for kind, rate in zip(KINDS, (4e11, 3e11, 2e11), strict=True)
}
BETWEEN: dict[Kind, Link] = {
    kind: Link(rate, 9e-6) for kind, rate in zip(KINDS, (1e11, 5e10, 8e10), strict=True)
}
PACK_S, UPDATE_S, OVERLAP = 0.4, 0.01, 0.75


def exactly(seconds: float) -> Seconds:
    return Seconds(seconds, seconds, seconds, 5)


def collectives(scope: Scope, ranks: int, links: dict[Kind, Link]) -> list[Collective]:
    """What machines with such links would take."""
    return [
        Collective(
            kind,
            scope,
            ranks,
            size,
            exactly(
                sent_bytes(kind, size, ranks) / link.bytes_per_s + ring_steps(kind, ranks) * link.message_s
            ),
        )
        for kind, link in links.items()
        for size in (1024 * ranks, 200_000_000)
    ]


def pieces_of(nodes: int, per_node: int = 8, **changes: Any) -> Pieces:
    """Pieces of machines that are as the model has them."""
    ranks = nodes * per_node
    found = collectives("everywhere", ranks, WITHIN if nodes == 1 else BETWEEN) if ranks > 1 else []
    if nodes > 1 and per_node > 1:
        found += collectives("node", per_node, WITHIN)
    steps = []
    for packs in (1, 2):
        alone, wire = packs * PACK_S + UPDATE_S, packs * 0.04
        exposed = (1 - OVERLAP) * wire if ranks > 1 else 0.0
        steps.append(Step(packs, exactly(alone + exposed), exactly(alone), exactly(wire), ()))
    values: dict[str, Any] = {
        "about": {"device": "a GPU", "hosts": [f"node{i}" for i in range(nodes)], "date": "2026-11-22"},
        "work": work_of(RECIPE),
        "engine": ENGINE,
        "ranks": ranks,
        "per_node": per_node,
        "stage": 2,
        "image_tokens": 1024,
        "trained": 1,
        "steps": tuple(steps),
        "collectives": tuple(found),
    }
    return Pieces(**{**values, **changes})


def test_bus_bandwidth_is_what_a_rank_sends_in_a_ring() -> None:
    found = [Collective(kind, "everywhere", 4, 8_000_000, exactly(0.5)) for kind in KINDS]
    # Three quarters of the tensor, and of a sum once more for its way to all.
    assert [one.bus_bytes_per_s for one in found] == [12e6, 12e6, 24e6]


def test_pieces_of_machines_as_the_model_has_them_give_the_model_back() -> None:
    pieces = pieces_of(2)
    assert pieces.pack_s == pytest.approx(PACK_S) and pieces.update_s == pytest.approx(UPDATE_S)
    assert pieces.overlap == pytest.approx(OVERLAP)
    hardware, _ = hardware_of(RECIPE, Given(), pieces)
    assert hardware.update_s == pytest.approx(16 * UPDATE_S)
    for found, expected in ((hardware.within, WITHIN), (hardware.between, BETWEEN)):
        assert found.keys() == expected.keys()
        for kind, link in expected.items():
            # The smallest tensor is a kilobyte, not nothing.
            assert found[kind].bytes_per_s == pytest.approx(link.bytes_per_s, rel=1e-3)
            assert found[kind].message_s == pytest.approx(link.message_s, rel=2e-2)
    row = scale(RECIPE, ENGINE, hardware, Ranks(16, 8), packs_per_gpu=3, pack=even_pack(RECIPE))
    assert row.compute_s == pytest.approx(3 * PACK_S + UPDATE_S)
    assert row.exposed_s == pytest.approx((1 - OVERLAP) * row.communication_s)


def test_what_collectives_take_in_a_step_corrects_what_they_take_by_themselves() -> None:
    pieces = pieces_of(2)
    sent = (
        Sent("all_reduce", "everywhere", 16, 8e9, 10),
        Sent("all_gather", "everywhere", 16, 1e9, 1),
        Sent("all_gather", "node", 8, 2e9, 4),
    )
    by_itself_s = 8e9 / 8e10 + 300 * 9e-6 + 1e9 / 1e11 + 15 * 9e-6 + 2e9 / 4e11 + 28 * 2e-6
    steps = tuple(replace(step, wire=exactly(1.25 * by_itself_s), sent=sent) for step in pieces.steps)
    pieces = replace(pieces, steps=steps)
    # Latency is that of a kilobyte, not of nothing.
    assert pieces.in_step == pytest.approx(1.25, rel=1e-3)
    found = pieces.links("node")["all_gather"]
    assert found.bytes_per_s == pytest.approx(4e11 / 1.25, rel=2e-3)
    assert found.message_s == pytest.approx(2e-6 * 1.25, rel=2e-2)


def test_an_update_is_shared_from_stage_1_on() -> None:
    pack = even_pack(RECIPE)
    for name, stage, share in (("zero0", 0, 1), ("zero1", 1, 64)):
        pieces = pieces_of(1, stage=stage)
        hardware, _ = hardware_of(RECIPE, Given(inter_gbs=100), pieces)
        engine = read_engine_file(ROOT / f"ds_configs/{name}.json")
        row = scale(RECIPE, engine, hardware, Ranks(64, 8), packs_per_gpu=1, pack=pack)
        whole = UPDATE_S * (8 if stage else 1)
        assert row.compute_s == pytest.approx(PACK_S + whole / share)
        assert row.alone_s == pytest.approx(PACK_S + whole)


def test_what_is_given_goes_before_what_is_measured_and_keeps_proportions() -> None:
    pieces = pieces_of(2)
    given = Given(peak_tflops=100, mfu=0.5, inter_gbs=50, message_us=3, overlap=0.1)
    hardware, told = hardware_of(RECIPE, given, pieces)
    assert (hardware.flops_per_s, hardware.update_s, hardware.overlap) == (5e13, 0.0, 0.1)
    assert hardware.between["all_gather"].bytes_per_s == pytest.approx(50e9)
    # Half as fast as a gather before and after.
    assert hardware.between["reduce_scatter"].bytes_per_s == pytest.approx(25e9, rel=1e-3)
    assert {link.message_s for links in (hardware.within, hardware.between) for link in links.values()} == {
        3e-6
    }
    assert [line.split()[0] for line in told] == ["computation", "in", "over", "overlap"]
    assert ["given" in line for line in told] == [True, True, True, True]
    assert "measured: all_gather 400 GB/s" in told[1] and "latency given" in told[1]


def test_overlap_is_between_nothing_and_everything() -> None:
    pieces = pieces_of(1)
    for exposed, expected in ((-0.01, 1.0), (0.0, 1.0), (0.01, 0.75), (0.1, 0.0)):
        steps = tuple(
            replace(step, whole=exactly(step.alone.p50 + step.packs * exposed)) for step in pieces.steps
        )
        assert replace(pieces, steps=steps).overlap == pytest.approx(expected)
    # On a slow wire no more can be hidden than is computed, of which a quarter is here.
    steps = tuple(
        replace(step, wire=exactly(9.0), whole=exactly(9.0 + 0.75 * step.alone.p50)) for step in pieces.steps
    )
    assert replace(pieces, steps=steps).overlap == pytest.approx(0.25)
    assert pieces_of(1, 1).overlap is None


def test_the_file_holds_everything(tmp_path: Path) -> None:
    pieces = pieces_of(2)
    pieces.store(tmp_path / "pieces.json")
    assert load_pieces(tmp_path / "pieces.json") == replace(pieces, work=json.loads(json.dumps(pieces.work)))
    assert differences(load_pieces(tmp_path / "pieces.json"), RECIPE) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "steps": []}'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(RequestError, match=r"other.json: not a file of tim_ds.trainer.pieces"):
        load_pieces(tmp_path / "other.json")


COMMON = [RECIPE_FILE, "--ds", str(ROOT / "ds_configs/zero2.json"), "--packs-per-gpu", "2"]


def test_the_model_says_for_every_rate_whether_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces_of(2).store(tmp_path / "pieces.json")
    measured = ["--measured", str(tmp_path / "pieces.json")]
    assert scaling.main([*COMMON, *measured, "--gpus", "1,512", "--overlap", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "measured means a GPU, 16 ranks on node0, node1, 2026-11-22" in printed
    assert "computation   measured at stage 2: 0.4 s a pack" in printed
    assert "overlap       given: 50%" in printed and "nothing is measured" not in printed
    assert [line.split()[:2] for line in printed.splitlines()[-2:]] == [["1", "1"], ["512", "64"]]


@pytest.mark.parametrize(
    ("pieces", "arguments", "message"),
    [
        (
            pieces_of(1),
            ["--gpus", "16"],
            r"nothing says how fast all_reduce is between nodes; give --inter-gbs",
        ),
        (pieces_of(2, 1), ["--gpus", "8", "--per-node", "8"], r"in a node; give --intra-gbs"),
        (pieces_of(1, 1), ["--gpus", "1"], r"of one rank, which talks to nobody; give --overlap"),
        (
            pieces_of(1),
            ["--gpus", "8", "model.depth=3"],
            r"of another recipe.*\nmodel.depth: 3, measured with",
        ),
        (pieces_of(1), ["--gpus", "8", "--mfu", "0.4"], r"--peak-tflops and --mfu go together"),
        (pieces_of(1), ["--gpus", "8", "--intra-gbs", "0"], r"--intra-gbs: expected a number above 0"),
        (None, ["--gpus", "8", "--overlap", "0"], r"give --peak-tflops, --mfu, --intra-gbs, --inter-gbs, or"),
    ],
)
def test_what_the_model_cannot_know_is_refused_by_name(
    pieces: Pieces | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = []
    if pieces is not None:
        pieces.store(tmp_path / "pieces.json")
        measured = ["--measured", str(tmp_path / "pieces.json")]
    assert scaling.main([*COMMON, *measured, *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search(message, told.err, re.DOTALL), told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--packs", "2"], "--packs: expected at least two rising numbers"),
        (["--packs", "2,1"], "--packs: expected at least two rising numbers"),
        (["--repetitions", "1"], "--repetitions: expected at least 3, received 1"),
        (["--image-tokens", "99999999"], "--image-tokens: expected 1 to data.tokens_per_pack"),
    ],
)
def test_numbers_that_measure_nothing_are_refused_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pieces.json"
    common = [RECIPE_FILE, "--ds", str(ROOT / "ds_configs/zero2.json"), "--out", str(out)]
    assert command.main([*common, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_two_ranks_measure_their_step_and_a_cut_step_needs_nobody(groups: Groups) -> None:
    for found in groups.results(2, "measure_pieces"):
        # The masters, to the bit, after steps with the wire cut: the learning rate is zero.
        assert found["kept"]
        for path, modelled in found["stored"]:
            pieces = load_pieces(path)
            assert (pieces.ranks, pieces.per_node, pieces.about["backend"]) == (2, 2, "gloo")
            assert [step.packs for step in pieces.steps] == [1, 2]
            counted = [sum(sent.sent_bytes for sent in step.sent) for step in pieces.steps]
            assert counted == pytest.approx(modelled, rel=1e-3)
            assert set(pieces.links("everywhere")) == set(KINDS)
            assert all(
                link.bytes_per_s > 0 and link.message_s > 0 for link in pieces.links("everywhere").values()
            )
            parts = [part for step in pieces.steps for part in (step.whole, step.alone, step.wire)]
            assert all(0 < part.p20 <= part.p50 <= part.p80 for part in parts)
            assert pieces.overlap is not None and 0 <= pieces.overlap <= 1


def test_computation_is_carried_to_other_packs_by_counted_operations() -> None:
    pieces = pieces_of(1)
    hardware, _ = hardware_of(RECIPE, Given(), pieces)
    large = even_pack(RECIPE, 4096)
    row = scale(RECIPE, ENGINE, hardware, Ranks(8, 8), packs_per_gpu=1, pack=large)
    share = expected_flops(RECIPE, large).model / expected_flops(RECIPE, even_pack(RECIPE, 1024)).model
    assert share > 1.05
    assert row.compute_s - UPDATE_S == pytest.approx(share * PACK_S)
