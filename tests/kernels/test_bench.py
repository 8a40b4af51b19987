"""The benchmark's own promises: parity before time, no time without a GPU, bytes that are really moved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.kernels.launches import recorded, without_running
from tim_kernels import bench, use_path
from tim_kernels.bench import report, tune
from tim_kernels.bench.__main__ import main
from tim_kernels.bench.case import MIXES, NotHere, lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import Failed, ParityError, Quantiles, Row, ceilings, check, rows
from tim_kernels.gated_residual import kernel as gated
from tim_kernels.schedule import CANDIDATES, RUN, SCHEDULES, WIDE_TILE, schedule_of

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


TORCH_ALONE = [(case, name) for case in SMALL for name in case.libraries if name.startswith("torch ")]


@pytest.mark.parametrize(("case", "name"), TORCH_ALONE, ids=lambda x: x if isinstance(x, str) else x.name)
def test_what_torch_offers_for_an_op_computes_the_same(case, name, device):
    """Beside every op there is a row to beat, on machines without other libraries too."""
    assert check(case, case.libraries[name], LENGTHS, device) < 2**-7


def test_every_op_that_a_library_knows_is_measured_beside_one():
    with_rival = {case.op for case in SMALL if case.libraries or case.yardsticks}
    assert with_rival == {case.op for case in SMALL if not case.op.endswith("_jvp")}
    assert {case.op for case, _ in TORCH_ALONE} == {"gated_residual", "qk_norm_rope", "swiglu"}


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

    with without_running(monkeypatch), use_path("triton"):
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


KERNEL = "modulated_layer_norm backward"
TODAY = SCHEDULES[KERNEL]
ONE_STAGE = TODAY._replace(stages=1)


def _times(**ms_of_columns):
    """Rows of today's schedule, first and last, and of one stage between: milliseconds a column."""
    return [
        tune.Timed(KERNEL, column, "mixed", 8, tuple(schedule), ms)
        for column, times in ms_of_columns.items()
        for schedule, ms in zip((TODAY, ONE_STAGE, TODAY), times, strict=True)
    ]


def test_a_schedule_that_is_faster_beyond_doubt_is_to_be_put_in_todays_place():
    found = tune.verdict(KERNEL, _times(a=(1.0, 0.8, 1.0), b=(2.0, 1.8, 2.0)))
    assert (found.fastest, found.is_change) == (ONE_STAGE, True)
    assert found.gain == pytest.approx(1 - (0.8 * 0.9) ** 0.5)
    assert str(found) == (
        'change SCHEDULES["modulated_layer_norm backward"] from Rows(stages=3, columns_per_warp=640) '
        "to Rows(stages=1, columns_per_warp=640): 15.1% less time, spread 0.0%"
    )


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ({"a": (1.0, 0.99, 1.0)}, "a gain of one in a hundred"),
        ({"a": (1.0, 0.98, 1.1)}, "today's differs from itself by more"),
        ({"a": (1.0, 0.5, 1.0), "b": (1.0, None, 1.0)}, "it was refused at another size"),
        ({"a": (1.0, 1.2, 1.0)}, "slower"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_todays_schedule_is_kept_for_less(times, why):
    found = tune.verdict(KERNEL, _times(**times))
    assert not found.is_change, why
    assert str(found).startswith(f'keep SCHEDULES["{KERNEL}"] at Rows(stages=3, ')


def test_the_table_of_schedules_marks_the_fastest_of_each_column():
    text = tune.table(_times(a=(1.0, 0.5, 1.1), b=(2.0, None, 2.0)))
    assert "| stages, columns_per_warp | 1 | 2 |" in text
    assert "| 1, 640 | **500.0 us** | 0.0 us |" in text and "| 3, 640 | 1000.0 us | **2000.0 us** |" in text


def test_every_kernel_that_goes_along_rows_or_keys_is_timed_as_today_and_otherwise():
    assert {*SCHEDULES} - {*CANDIDATES} == {WIDE_TILE}
    for kernel, schedules in CANDIDATES.items():
        assert SCHEDULES[kernel] in schedules and len(set(schedules)) == len(schedules) > 1
        assert {type(x) for x in schedules} == {type(SCHEDULES[kernel])}
        forms = {case.name for case, *_ in tune.columns(kernel, cases())}
        assert forms if kernel != RUN else len(forms) > 5, kernel


@pytest.mark.parametrize("kernel", CANDIDATES)
def test_another_schedule_computes_the_same(kernel, device, monkeypatch):
    """The last of each: other warps, heads or rows a program. On a GPU this precedes every time, for all."""
    monkeypatch.setitem(CANDIDATES, kernel, CANDIDATES[kernel][-1:])
    case, mode, mix, _ = next(tune.columns(kernel, SMALL))
    first, other, last = tune.timed(kernel, case, mode, mix, (2, 1), device, _no_timer)
    assert (first.problem, other.problem, other.remark) == (None, None, None)
    assert first.schedule == last.schedule == tuple(SCHEDULES[kernel]) != other.schedule


def test_a_schedule_that_is_wrong_or_raises_is_named_and_not_timed(device, monkeypatch):
    case = next(x for x in SMALL if x.op == "gated_residual")
    options = gated.forward_options

    def faulty(width):
        if schedule_of("gated_residual forward").stages == 2:
            raise RuntimeError("out of resource: shared memory\nand more")
        return options(width)

    def wrong(inputs, plan):
        factor = 1.1 if schedule_of("gated_residual forward").stages == 3 else 1.0
        return tuple(factor * y for y in case.ours(inputs, plan))

    monkeypatch.setattr(gated, "forward_options", faulty)
    own = replace(case, ours=wrong)
    found = list(tune.timed("gated_residual forward", own, "forward", "mixed", LENGTHS, device, _no_timer))
    problems = {x.schedule[0]: x.problem for x in found if x.problem}
    assert problems.keys() == {2, 3} and {x.p50 for x in found if not x.problem} == {2.0}
    assert problems[2] == "RuntimeError: out of resource: shared memory" and "off by" in (problems[3] or "")
    assert "out of resource" in tune.table(found)


def test_bits_that_stages_change_are_remarked(device):
    case = next(x for x in SMALL if x.op == "gated_residual")

    def other_bits(inputs, plan):
        (y,) = case.ours(inputs, plan)
        return (y * (1 + 2**-22) if schedule_of("gated_residual forward").stages == 2 else y,)

    own = replace(case, ours=other_bits)
    found = tune.timed("gated_residual forward", own, "forward", "mixed", LENGTHS, device, _no_timer)
    remarks = {x.schedule[0]: x.remark for x in found if x.remark}
    assert remarks.keys() == {2} and remarks[2].startswith("other bits than today's: output 0")


def test_tuning_runs_to_its_verdicts_and_stores_them(device, monkeypatch, tmp_path, capsys):
    """Everything but the device: its clock, its name and the compilations for it."""
    kept = {"gated_residual forward": CANDIDATES["gated_residual forward"], KERNEL: CANDIDATES[KERNEL]}
    compiled = []
    monkeypatch.setattr(tune, "CANDIDATES", kept)
    monkeypatch.setattr(tune, "SIZES", (("mixed", 3),))
    monkeypatch.setattr(tune, "cases", lambda: SMALL)
    monkeypatch.setattr(tune, "compile_ahead", compiled.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    clock = iter([0.0, 0.0, 1.0, 99.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))

    def one_stage_is_fast(run):
        run()
        ms = 1.0 if schedule_of("gated_residual forward").stages == 3 else 2.0
        return Quantiles(ms, ms, ms)

    out = tmp_path / "new" / "tiles.json"
    assert tune.main(device, one_stage_is_fast, out, {"gpu": "none"}, deadline=9.0) == 0
    assert compiled == [90]
    printed = capsys.readouterr().out
    change = (
        'change SCHEDULES["gated_residual forward"] from Rows(stages=1, columns_per_warp=512) to Rows(stag'
    )
    assert printed.count(change) == 2 and "50.0% less time" in printed
    assert f"no time was left for {KERNEL}: float32 stream, with residual" in printed
    stored = json.loads(out.read_text())
    assert [v["kernel"] for v in stored["verdicts"]] == ["gated_residual forward"]
    assert len(stored["timed"]) == len(kept["gated_residual forward"]) + 1


def test_the_results_of_tuning_say_what_to_change():
    found = _times(a=(1.0, 0.8, 1.0))
    text = json.dumps(tune.stored({"gpu": "none"}, found, [tune.verdict(KERNEL, found)]))
    (entry,) = json.loads(text)["verdicts"]
    assert entry["change"] and entry["fastest"] == {"stages": 1, "columns_per_warp": 640}
    assert entry["text"].startswith("change SCHEDULES[") and len(json.loads(text)["timed"]) == 3


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
