"""The benchmark's own promises: parity before time, no time without a GPU, bytes that are really moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.launches import recorded
from tim_kernels import bench, use_path
from tim_kernels.bench import report, tiles
from tim_kernels.bench.__main__ import main
from tim_kernels.bench.case import MIXES, NotHere, lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import Failed, ParityError, Quantiles, Row, ceilings, check, rows
from tim_kernels.varlen_attention import jvp_kernel
from tim_kernels.varlen_attention.jvp_kernel import CANDIDATES

SMALL = cases(width=16, hidden=16, channels=8, head_dim=8)
LENGTHS = (5, 1, 3)
NAMES = [case.name for case in SMALL]
ONE_OF_EACH = list({case.op: case for case in SMALL}.values())


def _no_timer(run):
    """Stands for a clock: each run takes 2 ms, whatever it is."""
    run()
    return Quantiles(1.0, 2.0, 3.0)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tokens", [1, 64, 1000, 8192])
def test_segment_mixes_add_up(mix, tokens):
    lengths = lengths_of(mix, tokens)
    assert sum(lengths) == tokens and min(lengths) > 0


@pytest.mark.parametrize("case", SMALL, ids=NAMES)
def test_kernels_and_twins_pass_their_parity_check(case, device):
    with use_path("triton"):
        assert 0 < check(case, case.ours, LENGTHS, device) < 2**-7
    assert check(case, case.twin, LENGTHS, device) < 2**-7


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.op)
@pytest.mark.parametrize("fault", ["forward", "gradient", "nan"])
def test_a_wrong_implementation_gets_no_row(case, fault, device):
    def wrong(inputs, plan):
        outputs = list(case.twin(inputs, plan))
        y = outputs[-1]
        if fault == "forward":
            outputs[-1] = y * 1.05
        elif fault == "gradient":
            outputs[-1] = y * 1.05 - (y * 0.05).detach()
        else:
            outputs[-1] = y * torch.where(torch.arange(y.shape[0]) == y.shape[0] - 1, float("nan"), 1.0).to(
                y
            ).reshape(-1, *[1] * (y.ndim - 1))
        return tuple(outputs)

    if fault == "gradient" and case.backward_bytes_per_token is None:
        # A tangent has no gradient, and the value of this fault is right.
        assert check(case, wrong, LENGTHS, device) < 2**-7
        return
    with pytest.raises(ParityError, match="error"):
        check(case, wrong, LENGTHS, device)
    found = list(
        rows(
            replace(case, ours=case.twin, libraries={"wrong": wrong}, yardsticks={}),
            "mixed",
            LENGTHS,
            device,
            _no_timer,
            compiled=False,
        )
    )
    assert [type(r) for r in found[-1:]] == [ParityError]
    assert {r.candidate for r in found if isinstance(r, Row)} == {"ours", "twin"}


@pytest.mark.parametrize("case", SMALL, ids=NAMES)
def test_the_byte_model_is_what_the_kernels_touch(case, device, monkeypatch):
    """Every tensor with a row a token that a launch receives, once."""
    if case.op == "varlen_attention":
        # Kernels of others: the model is the size of what goes in and out.
        assert case.backward_bytes_per_token == 2 * case.forward_bytes_per_token
        return
    plan, inputs = case.plan(LENGTHS, device), case.inputs(LENGTHS, device)
    tokens = sum(LENGTHS)

    def touched(launches):
        # The statistics of a row, 8 bytes, are no tensor of the model's width.
        return sum(
            x.numel() * x.element_size()
            for launch in launches
            for name, x in launch.tensors.items()
            if x.ndim >= 2 and x.shape[0] == tokens and name != "statistics_ptr"
        )

    with use_path("triton"):
        with recorded(monkeypatch) as launches:
            outputs = case.ours(inputs, plan)
        assert touched(launches) == case.forward_bytes_per_token * tokens
        leaves = [x for x in inputs.values() if x.requires_grad]
        assert bool(leaves) == (case.backward_bytes_per_token is not None)
        if not leaves:
            return
        with recorded(monkeypatch) as launches:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        assert touched(launches) == case.backward_bytes_per_token * tokens


def test_rows_say_what_was_measured(device):
    case = SMALL[0]
    found = [r for r in rows(case, "mixed", LENGTHS, device, _no_timer, compiled=False) if isinstance(r, Row)]
    modes = ["forward", "backward", "full"]
    assert [(r.candidate, r.mode) for r in found] == [
        (name, mode) for name in ("ours", "twin", "torch layer_norm alone") for mode in modes
    ]
    forward = found[0]
    assert (forward.p20, forward.p50, forward.p80) == (1.0, 2.0, 3.0)
    assert forward.model_bytes == 12 * 16 * 9
    # Bytes in 2 ms, and a copy that takes as long.
    assert forward.gb_per_s == pytest.approx(forward.model_bytes / 2e-3 / 1e9)
    assert forward.share_of_copy == 1.0
    yardstick = found[-1]
    assert not yardstick.same_function and yardstick.share_of_copy is None


def test_rows_of_a_tangent_and_of_attention_say_what_bounds_them(device):
    by_op = {case.op: case for case in SMALL}
    tangent, attention = by_op["varlen_attention_jvp"], by_op["varlen_attention"]
    (ours, twin) = rows(tangent, "mixed", LENGTHS, device, _no_timer, compiled=False)
    assert isinstance(ours, Row) and isinstance(twin, Row)
    assert (ours.candidate, ours.mode, twin.candidate) == ("ours", "forward", "twin")
    assert ours.share_of_copy is None and ours.gb_per_s is None
    # The last case is cross-attention: three products with 128 keys of 16 columns for 9 queries, in 2 ms.
    assert ours.tflop_per_s == pytest.approx(2 * 3 * 9 * 128 * 16 / 2e-3 / 1e12)
    found = list(rows(attention, "mixed", LENGTHS, device, _no_timer, compiled=False))
    seen = {(r.candidate, r.mode): r for r in found if isinstance(r, Row)}
    assert {candidate for candidate, _ in seen} == {"ours", "twin", "segments"}
    # Two products forward, five backward.
    ratio = (seen["ours", "backward"].tflop_per_s or 0) / (seen["ours", "forward"].tflop_per_s or 1)
    assert ratio == pytest.approx(2.5)
    left_out = [str(r) for r in found if isinstance(r, NotHere)]
    assert len(left_out) == 6 and all("was asked for, but" in text for text in left_out)


def test_a_later_run_goes_on_from_an_earlier_one(device, tmp_path):
    path, where = tmp_path / "results.json", {"gpu": "none", "commit": "test", "date": "2020-01-01"}
    first, second = (
        [r for r in rows(SMALL[0], "mixed", (n,), device, _no_timer, compiled=False) if isinstance(r, Row)]
        for n in (4, 9)
    )
    report.store(path, where, first)
    kept = report.earlier(path, {**where, "date": "2020-01-02"})
    assert kept == first
    again = [replace(r, p50=7.0) for r in first]
    assert report.merged(report.merged(kept, second), again) == [*again, *second]
    with pytest.raises(
        ValueError, match="measured elsewhere: commit test, here other; store to another file"
    ):
        report.earlier(path, {**where, "commit": "other"})


def test_goals_are_judged_by_the_worst_row(device):
    (row, *_) = (r for r in rows(SMALL[0], "mixed", (4,), device, _no_timer, compiled=False))
    assert isinstance(row, Row)
    large = [
        replace(row, tokens=report.LARGE, label=name, share_of_copy=s)
        for name, s in (("a", 0.95), ("b", 0.89))
    ]
    small = replace(row, share_of_copy=0.1)
    compiled = [replace(r, candidate="twin, compiled", p50=1.5) for r in large]
    text = report.goals([*large, small, *compiled])
    assert "| modulated_layer_norm forward: 90% of copy | 89% (b, mixed, 65536 tokens) | no |" in text
    assert (
        "not slower than torch.compile | 0.75 times as fast (forward, a, mixed, 65536 tokens) | no |" in text
    )
    assert "| 95% (a, mixed, 65536 tokens) | yes |" in report.goals(large[:1])


def test_results_are_stored_read_and_drawn(device, tmp_path):
    found = [
        r
        for tokens in (4, 9)
        for r in rows(SMALL[0], "mixed", (tokens,), device, _no_timer, compiled=False)
        if isinstance(r, Row)
    ]
    where = {"gpu": "none", "torch": torch.__version__, "commit": "test"}
    report.store(tmp_path / "results.json", where, found)
    assert report.load(tmp_path / "results.json") == (where, found)
    assert main(["--render", str(tmp_path / "results.json")]) == 0
    assert [p.name for p in tmp_path.glob("*.png")] == ["results-0-modulated_layer_norm.png"]
    lines = [report.line(r) for r in found]
    assert len(lines) == 18 and all(
        text.count("|") == report.header().splitlines()[0].count("|") for text in lines
    )


def test_without_a_gpu_it_says_so_and_gives_no_time(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No CUDA device here: nothing is timed.")
    assert " ms" not in printed and "GB/s" not in printed
    for case in cases():
        assert f"| {case.name} | {case.forward_bytes_per_token:,} |" in printed
    out = tmp_path / "results.json"
    assert main(["--out", str(out)]) == 2 and not out.exists()
    assert "nothing was measured" in capsys.readouterr().err


def test_the_command_describes_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (bench.__doc__ or "").splitlines()[0] in capsys.readouterr().out


def test_the_table_of_tiles_marks_the_fastest_of_each_form_and_names_the_fastest_over_all():
    forms = (("self", "mixed", 8), ("cross", "mixed", 8))
    speeds = {(128, 32, 3, 8): (100.0, 400.0), (64, 32, 2, 4): (300.0, 200.0)}
    found = [
        tiles.Timed(*form, tile, 1.0, pair[n])
        for n, form in enumerate(forms)
        for tile, pair in speeds.items()
    ]
    text = tiles.table(found)
    assert "| 128, 32, 3, 8 | 100 | **400** | 200 |" in text
    assert "| 64, 32, 2, 4 | **300** | 200 | 245 |" in text
    assert text.endswith("Fastest over all: 64, 32, 2, 4.")


def test_a_tile_that_is_wrong_or_raises_is_named_and_not_timed(device, monkeypatch):
    launch = jvp_kernel.launch_jvp

    def faulty(*args):
        if args[-1] == CANDIDATES[1]:
            raise RuntimeError("out of resource: shared memory\nand more")
        return launch(*args) * (1.1 if args[-1] == CANDIDATES[2] else 1.0)

    monkeypatch.setattr(jvp_kernel, "launch_jvp", faulty)
    found = list(tiles.timed(device, _no_timer, width=8, head_dim=8, sizes=(("mixed", 2),)))
    problems = {x.tile: x.problem for x in found if x.problem}
    assert problems.keys() == set(CANDIDATES[1:3]) and len(found) == 3 * len(CANDIDATES)
    assert {x.p50 for x in found if not x.problem} == {2.0}
    assert "shared memory" in (problems[CANDIDATES[1]] or "") and "off by" in (problems[CANDIDATES[2]] or "")
    assert "out of resource" in tiles.table(found)


def test_ceilings_follow_from_bytes_and_operations(device):
    # In 2 ms each: 20 MB, and 2 * 1024^3 operations.
    assert ceilings(device, _no_timer, copied_bytes=20 * 10**6, side=1024) == (
        "a copy moves 10 GB/s, a product of 1024 x 1024 makes 1 TFLOP/s"
    )


def test_a_candidate_that_raises_is_named_and_the_others_are_measured(device):
    def broken(inputs, plan):
        raise NotImplementedError("no kernel image\nwith a long tale")

    case = replace(SMALL[0], libraries={"broken": broken}, yardsticks={})
    found = list(rows(case, "mixed", LENGTHS, device, _no_timer, compiled=False))
    assert [str(r) for r in found if isinstance(r, Failed)] == [
        f"{case.name}: broken: NotImplementedError: no kernel image"
    ]
    assert {r.candidate for r in found if isinstance(r, Row)} == {"ours", "twin"}
