"""What only a GPU can show: 16-bit arithmetic, real sizes, no waiting for the device. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tim_kernels import path_taken, use_path
from tim_kernels.bench.case import lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import TOLERANCE, check, cotangents_of, outputs_and_gradients
from tim_kernels.schedule import use_stages

pytestmark = pytest.mark.gpu

# Attention runs on kernels of others, which have tests of their own.
CASES = [case for case in cases() if case.op != "varlen_attention"]
NAMES = [case.name for case in CASES]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 1000, 65536])
@pytest.mark.parametrize("mix", ["small", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_outputs_and_gradients_at_real_widths(case, mix, tokens):
    with use_path("triton"):
        check(case, case.ours, lengths_of(mix, tokens), DEVICE)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_auto_takes_the_kernel(case):
    lengths = lengths_of("mixed", 1000)
    case.ours(case.inputs(lengths, DEVICE), case.plan(lengths, DEVICE))
    assert path_taken(case.op) == "triton"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_results_are_bitwise_repeatable(case):
    lengths = lengths_of("mixed", 20000)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    cotangents = [torch.ones_like(y) for y in case.ours(inputs, plan)]
    runs = [outputs_and_gradients(case, case.ours, inputs, cotangents, plan) for _ in range(3)]
    for name, (_, value) in runs[0].items():
        assert all(torch.equal(value, other[name][1]) for other in runs[1:]), name


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_stages_of_a_pipeline_change_no_bit(case):
    """Segments shorter than a pipeline is deep, chunks that end within one, and long ones."""
    lengths = (1, 2, 3, *lengths_of("mixed", 5000), 1, 33)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    cotangents = cotangents_of(case.ours, inputs, plan)
    with use_stages(1):
        expected = outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    for name, (_, value) in outputs_and_gradients(case, case.ours, inputs, cotangents, plan).items():
        truth = expected[name][1]
        off = float((value.double() - truth.double()).abs().max() / truth.double().abs().max())
        # The heads' backward is the one kernel whose arithmetic the compiler lays out otherwise with stages
        # than without: sums may be taken in another order, and results round to a neighbour. A row that is
        # not what it should be is off by its own size.
        allowed = 0.0
        if case.op == "qk_norm_rope" and name.startswith("gradient"):
            allowed = TOLERANCE.get(value.dtype, 1e-5)
        assert off <= allowed, f"{name}: off by {off:.1e} of its magnitude"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_forward_and_backward_never_wait_for_the_device(case):
    lengths = lengths_of("mixed", 5000)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def run() -> None:
        outputs = case.ours(inputs, plan)
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_captured_graph_replays_the_same_bits(case):
    """On a stream of its own, as a capture is, with memory that the capture sets apart."""
    lengths = lengths_of("mixed", 5000)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    cotangents = cotangents_of(case.ours, inputs, plan)
    eager = outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    # Until then nothing of it has run, and its memory holds what it held.
    graph.replay()
    for name, (_, value) in captured.items():
        assert torch.equal(value, eager[name][1]), name


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_compiled_model_takes_the_kernel_and_gives_the_same_bits(case):
    lengths = lengths_of("mixed", 5000)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    cotangents = [torch.ones_like(y) for y in case.ours(inputs, plan)]
    compiled = torch.compile(case.ours)
    eager = outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    for name, (_, value) in outputs_and_gradients(case, compiled, inputs, cotangents, plan).items():
        assert torch.equal(value, eager[name][1]), name
    assert path_taken(case.op) == "triton"
