"""What only a GPU can show: 16-bit arithmetic, real sizes, no waiting for the device. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tim_kernels import path_taken, use_path
from tim_kernels.bench.case import lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import check, outputs_and_gradients

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
def test_a_compiled_model_takes_the_kernel_and_gives_the_same_bits(case):
    lengths = lengths_of("mixed", 5000)
    plan, inputs = case.plan(lengths, DEVICE), case.inputs(lengths, DEVICE)
    cotangents = [torch.ones_like(y) for y in case.ours(inputs, plan)]
    compiled = torch.compile(case.ours)
    eager = outputs_and_gradients(case, case.ours, inputs, cotangents, plan)
    for name, (_, value) in outputs_and_gradients(case, compiled, inputs, cotangents, plan).items():
        assert torch.equal(value, eager[name][1]), name
    assert path_taken(case.op) == "triton"
