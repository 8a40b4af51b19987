"""Attention within segments against a loop in float64, and which backend is trusted with it."""

from __future__ import annotations

import importlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.kernels.compare import normal
from tim_kernels import path_taken, use_path
from tim_kernels.varlen_attention import (
    AttentionPlan,
    backends,
    op,
    proof,
    prove_attention_backends,
    use_attention_backend,
    varlen_attention,
    varlen_attention_with_lse,
)
from tim_kernels.varlen_attention.backends import BACKENDS, Backend, Situation
from tim_kernels.varlen_attention.dense import dense_attention

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_chosen_or_judged(monkeypatch):
    monkeypatch.delenv(op.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(op, "_judged", {})
    monkeypatch.setattr(op, "_loaded", {})


def _by_loop(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, one segment after another, in the plainest terms."""
    outputs, sums = [], []
    pieces = q.split(plan.lengths_q), k.split(plan.lengths_k), v.split(plan.lengths_k)
    for q_i, k_i, v_i in zip(*pieces, strict=True):
        logits = scale * torch.einsum("qnh,knh->nqk", q_i, k_i)
        # softmax over no keys gives no weights: a sum of nothing.
        outputs.append(torch.einsum("nqk,knh->qnh", logits.softmax(-1), v_i))
        sums.append(logits.logsumexp(-1).t())
    return torch.cat(outputs), torch.cat(sums)


Inputs = tuple[Tensor, Tensor, Tensor]


def _inputs(plan: AttentionPlan, head_dim: int = 8, dtype: torch.dtype = torch.float64) -> Inputs:
    """q, k and v."""
    q = normal(plan.num_queries, 2, head_dim, seed=0, dtype=dtype)
    k, v = (normal(plan.num_keys, 2, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    return q, k, v


def _outputs_and_gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out.device, out.dtype))]


LENGTHS = {
    "one-shape": ((4, 4, 4), (4, 4, 4)),
    "mixed": ((4, 1, 6, 4, 1), (3, 2, 5, 1, 1)),
    "out-of-order": ((2, 5, 2, 5), (7, 1, 7, 2)),
    "without-keys": ((3, 2, 1), (0, 4, 0)),
    "without-queries": ((0, 2, 0, 3), (5, 1, 2, 2)),
    "without-either": ((0, 2, 4, 0), (5, 1, 0, 0)),
    "single-token": ((1,), (1,)),
}


@pytest.mark.parametrize("backend", ["dense", "segments"])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS.values(), ids=LENGTHS.keys())
def test_values_and_gradients_equal_the_loop_over_segments(lengths_q, lengths_k, backend):
    plan = AttentionPlan.from_lengths(lengths_q, lengths_k)
    inputs = _inputs(plan)
    with use_attention_backend(backend):
        ours = _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), inputs)
    assert path_taken("varlen_attention") == backend
    truth = _outputs_and_gradients(lambda q, k, v: _by_loop(q, k, v, plan, 1 / math.sqrt(8))[0], inputs)
    # Two orders of float64 sums.
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_head_widths_and_precisions_on_the_cpu(head_dim, dtype):
    plan = AttentionPlan.from_lengths((3, 7, 5), (2, 7, 4))
    inputs = _inputs(plan, head_dim, dtype)
    ours = _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), inputs)
    assert path_taken("varlen_attention") == "dense"
    truth = _outputs_and_gradients(
        lambda q, k, v: _by_loop(q, k, v, plan, 1 / math.sqrt(head_dim))[0], [x.double() for x in inputs]
    )
    # In 16 bits a few roundings of the largest value, the cotangent's included; in float32 those of the sums.
    tolerance = 1e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("lengths", [((0, 0), (0, 0)), ((), ()), ((2, 1), (0, 0)), ((0, 0), (3, 1))])
def test_packs_in_which_no_query_has_a_key_give_zeros(lengths):
    plan = AttentionPlan.from_lengths(*lengths)
    out, *gradients = _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), _inputs(plan))
    assert out.shape == (plan.num_queries, 2, 8) and not out.any()
    assert not any(g.any() for g in gradients)


def test_the_scale_can_be_given():
    plan = AttentionPlan.from_lengths((3, 2), (4, 1))
    q, k, v = _inputs(plan)
    torch.testing.assert_close(
        varlen_attention(q, k, v, plan, scale=0.7), _by_loop(q, k, v, plan, 0.7)[0], rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", ["one-shape", "mixed", "out-of-order", "single-token"])
def test_the_definition_hands_out_logsumexp(name):
    plan = AttentionPlan.from_lengths(*LENGTHS[name])
    q, k, v = _inputs(plan)
    out, lse = varlen_attention_with_lse(q, k, v, plan)
    expected, expected_lse = _by_loop(q, k, v, plan, 1 / math.sqrt(8))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-13)


def test_logsumexp_of_a_query_without_keys_is_minus_infinity():
    plan = AttentionPlan.from_lengths((2, 3), (0, 4))
    q, k, v = (x.to(BF16).requires_grad_() for x in _inputs(plan))
    _, lse = varlen_attention_with_lse(q, k, v, plan)
    assert lse is not None and lse.dtype == torch.float32 and not lse.requires_grad
    assert (lse[:2] == float("-inf")).all() and lse[2:].isfinite().all()


def test_a_backend_without_logsumexp_says_so():
    plan = AttentionPlan.from_lengths((2,), (3,))
    with use_attention_backend("segments"):
        out, lse = varlen_attention_with_lse(*_inputs(plan), plan)
    assert lse is None and out.shape == (2, 2, 8)


def test_forward_mode_derivative_of_the_definition():
    plan = AttentionPlan.from_lengths((3, 4, 1), (2, 5, 0))
    primals = _inputs(plan)
    tangents = tuple(normal(*p.shape, seed=5 + i, dtype=p.dtype) for i, p in enumerate(primals))
    q, k, v = primals
    with sdpa_kernel(SDPBackend.MATH):
        ours = jvp(lambda q, k, v: varlen_attention(q, k, v, plan), primals, tangents)[1]
    assert path_taken("varlen_attention") == "dense"
    truth = jvp(lambda q, k, v: _by_loop(q, k, v, plan, 1 / math.sqrt(8))[0], primals, tangents)[1]
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    with use_attention_backend("segments"), pytest.raises(ValueError, match="a forward-mode derivative"):
        jvp(lambda x: varlen_attention(x, k, v, plan), (q,), tangents[:1])


@pytest.mark.parametrize("backend", ["dense", "segments"])
def test_no_segment_sees_another(backend):
    """NaN in one segment leaves values and gradients of the others bit-equal, padded keys or not."""
    plan = AttentionPlan.from_lengths((3, 3, 2, 3), (5, 2, 2, 4))
    clean = _inputs(plan, dtype=torch.float32)
    dirty = [x.clone() for x in clean]
    dirty[0][3:6] = dirty[1][5:7] = dirty[2][5:7] = float("nan")
    with use_attention_backend(backend):
        a, b = (
            _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), x) for x in (clean, dirty)
        )
    queries, keys = [0, 1, 2, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    for x, y, rows in zip(a, b, (queries, queries, keys, keys), strict=True):
        assert torch.equal(x[rows], y[rows])
        assert y.isnan().any()


def test_inputs_that_are_not_contiguous():
    plan = AttentionPlan.from_lengths((3, 2), (3, 2))
    packed = normal(5, 3, 2, 8, seed=0, dtype=torch.float64)
    q, k, v = packed.unbind(1)
    assert not q.is_contiguous()
    expected = varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), plan)
    assert torch.equal(varlen_attention(q, k, v, plan), expected)


def test_gradients_are_bitwise_repeatable():
    plan = AttentionPlan.from_lengths((5, 1, 7), (3, 2, 6))
    inputs = _inputs(plan, 72, torch.float32)
    first, second = (
        _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["mixed", "without-either"])
@pytest.mark.parametrize("backend", ["dense", "segments"])
def test_a_compiled_model_holds_the_op_in_one_graph(name, backend):
    plan = AttentionPlan.from_lengths(*LENGTHS[name])
    inputs = _inputs(plan, dtype=BF16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: varlen_attention(q, k, v, plan), backend="eager", fullgraph=True)
    with use_attention_backend(backend):
        ours = _outputs_and_gradients(compiled, inputs)
        eager = _outputs_and_gradients(lambda q, k, v: varlen_attention(q, k, v, plan), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_a_plan_is_cut_to_segments_that_have_both_sides():
    plan = AttentionPlan.from_lengths((0, 2, 4, 1), (5, 1, 0, 3))
    assert plan.filled is not None
    assert plan.filled.plan.lengths_q == (2, 1) and plan.filled.plan.lengths_k == (1, 3)
    assert plan.filled.index_q is not None and plan.filled.index_q.tolist() == [0, 1, 6]
    assert plan.filled.index_k is not None and plan.filled.index_k.tolist() == [5, 6, 7, 8]
    assert plan.filled.plan.cu_seqlens_k.tolist() == [0, 1, 4]


def test_a_plan_for_full_segments_moves_no_token():
    plan = AttentionPlan.from_lengths((3, 3), (2, 2))
    assert plan.filled is None and plan.is_uniform
    assert plan.padded_groups.index_q is plan.padded_groups.index_k is plan.padded_groups.inverse_q is None
    assert [g.mask for g in plan.padded_groups.groups] == [None]
    assert (plan.max_q, plan.max_k, plan.cu_seqlens_q.tolist()) == (3, 2, [0, 3, 6])


def test_short_segments_of_all_lengths_are_one_batch_and_see_their_own_keys_alone():
    plan = AttentionPlan.from_lengths((4, 1, 3), (2, 5, 1))
    assert [(g.num, g.length_q, g.max_k) for g in plan.merged_groups.groups] == [(3, 4, 5)]
    q, k, v = (normal(8, 2, 8, seed=seed).double() for seed in range(3))
    k[2:7] = v[2:7] = math.nan
    merged, exact = (dense_attention(q, k, v, g, 0.3) for g in (plan.merged_groups, plan.exact_groups))
    # float64 sums in another order; the second segment is NaN in both, and no other.
    torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert merged.isnan().any((1, 2)).tolist() == [n == 4 for n in range(8)]


def test_long_segments_stay_batches_of_one_length():
    plan = AttentionPlan.from_lengths((400, 1, 400), (400, 5, 300))
    assert plan.merged_groups is plan.padded_groups


def test_given_cumulative_lengths_are_kept():
    cu = torch.tensor([0, 1, 3], dtype=torch.int32)
    plan = AttentionPlan.from_lengths((1, 2), (1, 2), cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert plan.cu_seqlens_q is cu and plan.cu_seqlens_k is cu


WRONG_PLANS = {
    "segments": ((1, 2, 3), (1, 2), {}, "3 query segments but 2 key segments"),
    "negative": ((1, -2), (1, 2), {}, "lengths below 0"),
    "cu_seqlens dtype": (
        (1, 2),
        (1, 2),
        {"cu_seqlens_q": torch.zeros(3, dtype=torch.int64)},
        r"cu_seqlens_q: expected int32 \[3\] on cpu, received torch.int64 \[3\]",
    ),
    "cu_seqlens device": (
        (1, 2),
        (1, 2),
        {
            "cu_seqlens_q": torch.zeros(3, dtype=torch.int32),
            "cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta"),
        },
        "cu_seqlens_k: expected .* on cpu, received .* on meta",
    ),
}


@pytest.mark.parametrize(("q", "k", "options", "message"), WRONG_PLANS.values(), ids=WRONG_PLANS.keys())
def test_plans_that_cannot_be_are_refused(q, k, options, message):
    with pytest.raises(ValueError, match="attention plan: .*" + message):
        AttentionPlan.from_lengths(q, k, **options)


PLAN = AttentionPlan.from_lengths((2, 1), (3, 1))
Q, K = torch.zeros(3, 2, 8), torch.zeros(4, 2, 8)
WRONG = {
    "queries": ((K, K, K), r"q: expected \[3, heads, head_dim\].* received \[4, 2, 8\]"),
    "keys": ((Q, Q, Q), r"k: expected \[4, heads, head_dim\].* received \[3, 2, 8\]"),
    "heads": ((Q, K[:, :1], K), r"k: expected .* received \[4, 1, 8\]"),
    "values": ((Q, K, K[..., :4]), r"v: expected shape \[4, 2, 8\]"),
    "dtype": ((Q, K.double(), K), "k: expected torch.float32 as q, received torch.float64"),
    "integers": ((Q.int(), K, K), "q: expected a floating-point tensor"),
    "device": ((Q, K, K.to("meta")), "v: expected on cpu as q is"),
}


@pytest.mark.parametrize(("inputs", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_named(inputs, message):
    q, k, v = inputs
    with pytest.raises(ValueError, match="varlen_attention: " + message):
        varlen_attention(q, k, v, PLAN)


class _WrongGradient(torch.autograd.Function):
    """Leaves the value and makes the gradient wrong in the last columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (d_x,) = gradients
        return torch.cat([d_x[..., :-8], torch.zeros_like(d_x[..., -8:])], dim=-1)


def _attend(fault: str | None = None) -> backends.Attend:
    """The definition, with one fault."""
    definition = BACKENDS["dense"].load()

    def attend(q, k, v, plan, scale, with_lse):
        if fault == "raises":
            raise RuntimeError("no kernel image\nfor this device")
        q, k, v = (
            _WrongGradient.apply(x) if fault == f"d{n}" else x for n, x in (("q", q), ("k", k), ("v", v))
        )
        out, lse = definition(q, k, v, plan, scale, with_lse)
        if fault == "out":
            out = out * torch.linspace(1, 1.2, out.shape[-1], dtype=out.dtype)
        if fault == "leak":
            out = out + 0 * v.sum()
        if fault == "dtype":
            out = out.float()
        if fault == "lse" and lse is not None:
            lse = lse + 0.1
        return out, lse

    return attend


def _fake(name: str, fault: str | None = None, **rest: Any) -> Backend:
    return Backend(name, lambda: _attend(fault), lambda _: None, **rest)


@pytest.fixture
def ship(monkeypatch):
    """Replaces the backends by these, tried in this order."""

    def replace(*fakes: Backend) -> None:
        monkeypatch.setattr(op, "BACKENDS", {b.name: b for b in fakes})
        monkeypatch.setattr(op, "order", lambda capability, *, is_short: [b.name for b in fakes])

    return replace


def _run(head_dim: int = 72, dtype: torch.dtype = BF16, lengths: tuple[int, ...] = (3, 2)) -> str | None:
    plan = AttentionPlan.from_lengths(lengths, lengths)
    varlen_attention(*_inputs(plan, head_dim, dtype), plan)
    return path_taken("varlen_attention")


FAULTS = {
    "dq": r"dq is off by 0\.\d+ of its size",
    "dk": r"dk is off by 0\.\d+ of its size",
    "dv": r"dv is off by 0\.\d+ of its size",
    "out": r"out is off by 0\.\d+ of its size",
    "leak": "with NaN in segment 1, out is off by nan",
    "dtype": r"out is torch\.float32",
    "lse": r"logsumexp is off by 0\.1",
    "raises": "it raised RuntimeError: no kernel image$",
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.items(), ids=FAULTS.keys())
def test_a_faulty_backend_is_refused_by_name_and_the_next_is_taken(fault, reason, ship, caplog):
    ship(_fake("faulty", fault), _fake("sound"))
    with caplog.at_level(logging.WARNING, logger="tim_kernels"):
        assert _run() == "sound"
        assert _run() == "sound"
    # Said once, not at each call.
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "varlen_attention: faulty is not used at head_dim 72, bfloat16, cpu: it failed its trial: "
    )
    found = prove_attention_backends(CPU, BF16, 72)
    assert found["sound"] is None and found["faulty"] is not None
    assert re.search(reason, found["faulty"])


def test_a_backend_is_tried_once_for_each_head_width_and_precision(ship, monkeypatch):
    tried = []
    real = proof.refusal
    monkeypatch.setattr(
        proof, "refusal", lambda b, a, s: tried.append((s.head_dim, s.dtype)) or real(b, a, s)
    )
    ship(_fake("sound"))
    for head_dim, dtype in ((72, BF16), (72, BF16), (64, BF16), (72, torch.float16), (64, BF16)):
        _run(head_dim, dtype)
    assert tried == [(72, BF16), (64, BF16), (72, torch.float16)]


def test_backends_of_uniform_packs_see_no_others(ship):
    ship(_fake("uniform", uniform_only=True), _fake("general"))
    assert _run(lengths=(3, 3)) == "uniform"
    assert _run(lengths=(3, 2)) == "general"
    with use_attention_backend("uniform"), pytest.raises(ValueError, match="the segments of the pack differ"):
        _run(lengths=(3, 2))


def test_when_none_can_be_trusted_all_reasons_are_given(ship):
    ship(_fake("first", "dq"), _fake("second", "raises"))
    with pytest.raises(
        RuntimeError, match=r"no backend can be trusted at head_dim 72.*first: .*dq.*; second: "
    ):
        _run()


def test_a_faulty_backend_that_is_asked_for_is_an_error_and_not_a_detour(ship):
    ship(_fake("faulty", "dq"), _fake("sound"))
    with (
        use_attention_backend("faulty"),
        pytest.raises(ValueError, match=r"the backend faulty was asked for, .* dq"),
    ):
        _run()


def test_a_package_that_is_not_installed_is_passed_over(ship, caplog):
    def load() -> backends.Attend:
        return importlib.import_module("a_package_that_does_not_exist").attend

    ship(Backend("absent", load, lambda _: None), _fake("sound"))
    with caplog.at_level(logging.INFO, logger="tim_kernels"):
        assert _run() == "sound"
    (record,) = (r for r in caplog.records if "absent" in r.getMessage())
    assert record.levelno == logging.INFO and "it is not installed" in record.getMessage()


def test_what_does_not_fit_is_not_even_loaded(ship):
    def load() -> backends.Attend:
        raise AssertionError("loaded")

    ship(Backend("unfit", load, lambda s: f"it dislikes head_dim {s.head_dim}"), _fake("sound"))
    assert _run() == "sound"
    assert prove_attention_backends(CPU, BF16, 72)["unfit"] == "it dislikes head_dim 72"


def test_a_trial_leaves_no_trace_in_the_callers_work(ship):
    """Under checkpointing, without gradients, in autocast, compiled: the trial runs, the call is right."""
    plan = AttentionPlan.from_lengths((3, 4), (2, 5))
    q, k, v = (x.requires_grad_() for x in _inputs(plan, dtype=BF16))

    def call(q, k, v):
        return varlen_attention(q, k, v, plan)

    def judged_anew(run: Callable[[], Any]) -> Any:
        op._judged.clear()
        state = torch.get_rng_state()
        result = run()
        assert list(op._judged.values()) == [None]
        assert torch.equal(state, torch.get_rng_state())
        return result

    ship(_fake("sound"))
    expected = call(q, k, v)
    expected.sum().backward()
    gradient, q.grad = q.grad, None
    out = judged_anew(lambda: checkpoint(call, q, k, v, use_reentrant=False))
    out.sum().backward()
    assert gradient is not None and q.grad is not None and torch.equal(q.grad, gradient)
    with torch.no_grad(), torch.autocast("cpu"):
        assert torch.equal(judged_anew(lambda: call(q, k, v)), expected)
    with torch.inference_mode():
        assert torch.equal(judged_anew(lambda: call(q, k, v)), expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(judged_anew(lambda: compiled(q, k, v)), expected)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(op.ENVIRONMENT_VARIABLE, "segments")
    assert _run() == "segments"
    with use_attention_backend("dense"):
        assert _run() == "dense"
        with use_attention_backend("segments"):
            assert _run() == "segments"
        assert _run() == "dense"
    monkeypatch.setenv(op.ENVIRONMENT_VARIABLE, "flash2")
    with pytest.raises(ValueError, match="the backend flash2 was asked for, but the tensors are on cpu"):
        _run()


def test_the_plain_path_of_all_ops_is_the_definition(ship):
    ship(_fake("sound"), BACKENDS["dense"])
    with use_path("torch"):
        assert _run() == "dense"
    # There is no Triton kernel of it: that choice leaves attention as it is.
    with use_path("triton"):
        assert _run() == "sound"


def test_a_misspelt_backend_is_refused(monkeypatch):
    message = r": expected one of .* received 'flash'"
    with pytest.raises(ValueError, match="use_attention_backend" + message), use_attention_backend("flash"):
        pass
    monkeypatch.setenv(op.ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(ValueError, match=op.ENVIRONMENT_VARIABLE + message):
        _run()


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr("tim_kernels.dispatch._logged", set())
    with caplog.at_level(logging.INFO, logger="tim_kernels"):
        _run()
        _run()
        with use_attention_backend("dense"):
            _run()
    assert [r.getMessage() for r in caplog.records] == [
        "varlen_attention: dense (first to be trusted at head_dim 72, torch.bfloat16, cpu)",
        "varlen_attention: dense (asked for)",
    ]


def _on(capability: tuple[int, int], head_dim: int = 72, dtype: torch.dtype = BF16) -> Situation:
    return Situation(torch.device("cuda"), capability, dtype, head_dim)


def _fit(situation: Situation, *, is_short: bool = False) -> list[str]:
    names = backends.order(situation.capability, is_short=is_short)
    return [name for name in names if BACKENDS[name].obstacle(situation) is None]


def test_the_order_on_each_generation():
    assert _fit(_on((9, 0))) == ["flash3", "cudnn", "torch_varlen", "flash2", "segments", "dense"]
    assert _fit(_on((8, 0))) == ["flash2", "torch_varlen", "segments", "dense"]
    assert _fit(_on((8, 0)), is_short=True) == ["torch_varlen", "flash2", "segments", "dense"]
    assert _fit(_on((10, 0))) == ["flash4", "flash4_padded", "torch_varlen", "flash2", "segments", "dense"]
    assert _fit(_on((10, 0), head_dim=64)) == ["flash4", "torch_varlen", "flash2", "segments", "dense"]
    assert _fit(_on((7, 5))) == ["segments", "dense"]
    assert _fit(Situation(CPU, None, BF16, 72)) == ["dense"]


@pytest.mark.parametrize("situation", [_on((9, 0), dtype=torch.float32), _on((9, 0), 12), _on((9, 0), 264)])
def test_only_torchs_own_kernels_take_other_precisions_and_widths(situation):
    assert _fit(situation) == ["segments", "dense"]


def test_flash4_is_refused_at_head_width_72_on_hopper_unless_padded():
    flash4, padded = BACKENDS["flash4"].obstacle, BACKENDS["flash4_padded"].obstacle
    assert flash4(_on((9, 0))) == "its gradient of q is wrong at head_dim 72 on sm_90"
    assert padded(_on((9, 0))) is None
    assert flash4(_on((9, 0), 64)) is None and flash4(_on((10, 0))) is None
    assert "not one to pad" in (padded(_on((9, 0), 64)) or "")
    assert flash4(_on((8, 0))) == padded(_on((8, 0))) == "it needs sm_90 or newer"


def test_flash3_is_for_hopper_alone():
    assert BACKENDS["flash3"].obstacle(_on((10, 0))) == BACKENDS["flash3"].obstacle(_on((8, 0)))


def _as_package(calls: list[dict[str, Any]], *, lse_of: str, result: str) -> Callable[..., Any]:
    """A stand-in with the arguments of the packages' flash_attn_varlen_func, computed by the definition."""

    def compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, **rest):
        calls.append({"width": q.shape[-1], "max_q": max_q, "max_k": max_k, **rest})
        lengths = [tuple((cu[1:] - cu[:-1]).tolist()) for cu in (cu_q, cu_k)]
        assert max_q == max(lengths[0]) and max_k == max(lengths[1])
        plan = AttentionPlan.from_lengths(*lengths)
        out, lse = BACKENDS["dense"].load()(q, k, v, plan, scale, True)
        assert lse is not None
        lse = lse.t().contiguous() if lse_of == "heads" else lse
        return out if result == "tensor" else (out, lse)

    return compute


def _flash2(calls):
    compute = _as_package(calls, lse_of="heads", result="tuple")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        result = compute(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            deterministic=deterministic, causal=causal, dropout_p=dropout_p,
        )  # fmt: skip
        return (*result, None) if return_attn_probs else result[0]

    return flash_attn_varlen_func


def _flash3_of_old(calls):
    """Without a choice: the tuple always comes."""
    compute = _as_package(calls, lse_of="heads", result="tuple")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        return compute(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    return flash_attn_varlen_func


def _flash4(calls):
    compute = _as_package(calls, lse_of="tokens", result="tuple")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, deterministic=False, return_lse=False,
    ):  # fmt: skip
        return compute(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    return flash_attn_varlen_func


PACKAGES = {
    "flash2": ("flash_attn", _flash2, 72),
    "flash3": ("flash_attn_interface", _flash3_of_old, 72),
    "flash4": ("flash_attn.cute", _flash4, 72),
    "flash4_padded": ("flash_attn.cute", _flash4, 96),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_called_as_it_wants_to_be(name, monkeypatch):
    module, make, width = PACKAGES[name]
    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=make(calls)))
    backend = BACKENDS[name]
    # The whole trial, logsumexp included, through the stand-in.
    assert proof.refusal(backend, backend.load(), Situation(CPU, None, BF16, 72)) is None
    assert len(calls) == 4 and {c["width"] for c in calls} == {width}
    assert not any(c.get("causal") or c.get("dropout_p") for c in calls)


def test_torchs_varlen_kernel_is_called_as_it_wants_to_be(monkeypatch):
    calls: list[dict[str, Any]] = []
    compute = _as_package(calls, lse_of="heads", result="tuple")

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
        result = compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)
        return result if return_aux is not None and return_aux.lse else result[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    backend = BACKENDS["torch_varlen"]
    attend = backend.load()
    assert proof.refusal(backend, attend, Situation(CPU, None, BF16, 72)) is None
    plan = AttentionPlan.from_lengths((2, 1), (3, 1))
    q, k, v = _inputs(plan)
    assert attend(q, k, v, plan, 0.3, False)[1] is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_program_gets_deterministic_gradients(deterministic, monkeypatch):
    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=_flash2(calls)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    plan = AttentionPlan.from_lengths((2, 1), (3, 1))
    q, k, v = _inputs(plan)
    BACKENDS["flash2"].load()(q, k, v, plan, 0.3, False)
    assert [c["deterministic"] for c in calls] == [deterministic]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_what_this_gpu_would_take_is_proven(head_dim):
    device = torch.device("cuda")
    found = prove_attention_backends(device, BF16, head_dim, everything=True)
    trusted = {name for name, refused in found.items() if refused is None}
    assert {"segments", "dense"} <= trusted
    failed = {name: why for name, why in found.items() if why is not None and why.startswith(op.UNPROVEN)}
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_parity_at_full_size(name):
    """Every backend that can run here, on a pack of native resolutions with captions of all lengths."""
    device, lengths_q, lengths_k = torch.device("cuda"), (1024, 1, 777, 4096), (256, 77, 1, 200)
    refused = prove_attention_backends(device, BF16, 72, everything=True)[name]
    if refused is not None:
        assert not refused.startswith(op.UNPROVEN)
        return
    if BACKENDS[name].uniform_only:
        lengths_q, lengths_k = (1024, 1024), (256, 256)
    for keys in (lengths_q, lengths_k):
        plan = AttentionPlan.from_lengths(lengths_q, keys, device=device)
        inputs = [x.to(device) for x in _inputs(plan, 72, BF16)]
        with use_attention_backend(name):
            ours = _outputs_and_gradients(lambda q, k, v, p=plan: varlen_attention(q, k, v, p), inputs)
        truth = _outputs_and_gradients(
            lambda q, k, v, p=plan: _by_loop(q, k, v, p, 1 / math.sqrt(72))[0], [x.double() for x in inputs]
        )
        for a, b, lengths in zip(ours, truth, (lengths_q, lengths_q, keys, keys), strict=True):
            assert proof._relative_error(a, b, lengths, None) < proof.TOLERANCE_IN_EPS * torch.finfo(BF16).eps
