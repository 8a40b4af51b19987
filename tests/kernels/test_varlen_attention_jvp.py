"""Attention's tangent: kernel against its float64 twin, twin against forward mode, after any backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import tim_kernels.tangent
from tests.kernels.compare import far_apart, normal
from tim_kernels import (
    AttentionPlan,
    AttentionTangentPlan,
    path_taken,
    use_attention_backend,
    use_path,
    varlen_attention,
    varlen_attention_jvp,
    varlen_attention_with_lse,
)
from tim_kernels.varlen_attention.jvp_kernel import head_blocks
from tim_kernels.varlen_attention.tangent_plan import ROWS_PER_TILE

# float32 sums of at most 140 keys and 128 columns, and exp2 of logits near 5: 8e-7 seen.
FLOAT32 = 2e-6
# P, P dS and the result are rounded once each; the interpreter's bfloat16 truncates, which doubles it.
STORAGE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}

Inputs = dict[str, Tensor | None]

# Query lengths, key lengths, moving segments, the keys that they read.
PACKS: dict[str, tuple[Any, ...]] = {
    "self": ((3, 1, 0, 5, 2), (3, 1, 0, 5, 2), (3, 0, 2), None),
    "all": ((3, 1, 2), (3, 1, 2), None, None),
    "one token": ((1, 2), (1, 2), (0,), None),
    "captions": ((3, 1, 4, 2), (37, 0, 2, 1), (2, 1, 0), None),
    "one caption for several": ((2, 3, 1), (5, 4), (2, 0), (1, 0)),
    "several tiles and key steps": ((4, ROWS_PER_TILE + 3), (40, 33), (1, 0), None),
    "none": ((2, 1), (2, 1), (), None),
}


def _plan(pack: tuple[Any, ...], device: torch.device | str = "cpu") -> AttentionTangentPlan:
    return AttentionTangentPlan.from_lengths(*pack, device=device)


def _forward_plan(pack: tuple[Any, ...], device: torch.device | str = "cpu") -> AttentionPlan:
    """As the value was computed: every query segment with the keys that it reads."""
    lengths_q, lengths_k, moving, keys = pack
    if keys is None:
        return AttentionPlan.from_lengths(lengths_q, lengths_k, device=device)
    reads = dict(zip(moving, keys, strict=True))
    # The neighbours of "one caption for several" that do not move share the first caption.
    together = [
        sum(n for i, n in enumerate(lengths_q) if reads.get(i, 0) == j) for j in range(len(lengths_k))
    ]
    return AttentionPlan.from_lengths(together, lengths_k, device=device)


def _inputs(
    pack: tuple[Any, ...],
    *,
    keys_move: bool,
    head_dim: int = 8,
    num_heads: int = 2,
    dtype: Any = torch.float32,
) -> Inputs:
    """With the output and logsumexp of the forward, in float64 and rounded."""
    plan = _plan(pack)
    q, k, v, d_q, d_k, d_v = (
        normal(n, num_heads, head_dim, seed=seed, dtype=torch.float64)
        for seed, n in enumerate(
            (
                plan.num_queries, plan.num_keys, plan.num_keys,
                plan.moving.num_queries, plan.moving.num_keys, plan.moving.num_keys,
            )
        )
    )  # fmt: skip
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    out, lse = varlen_attention_with_lse(q, k, v, _forward_plan(pack))
    assert lse is not None
    found: Inputs = {name: x.to(dtype) for name, x in zip("qkv", (q, k, v), strict=True)}
    found["d_q"] = d_q.to(dtype)
    found["d_k"], found["d_v"] = (d_k.to(dtype), d_v.to(dtype)) if keys_move else (None, None)
    return {**found, "out": out.to(dtype), "lse": lse.float()}


def _tangent(inputs: Inputs, plan: AttentionTangentPlan, scale: float | None = None) -> Tensor:
    names = ("q", "k", "v", "d_q", "d_k", "d_v", "out", "lse")
    return varlen_attention_jvp(*(inputs[name] for name in names), plan, scale=scale)  # type: ignore[arg-type]


def _wide(inputs: Inputs) -> Inputs:
    return {name: None if x is None else x.double() for name, x in inputs.items()}


def check(
    inputs: Inputs, pack: tuple[Any, ...], device: torch.device, tolerance: float, scale: float | None = None
) -> Tensor:
    """The kernel on the inputs as they are against the twin on their float64 copies."""
    with use_path("torch"):
        truth = _tangent(_wide(inputs), _plan(pack), scale)
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    with use_path("triton"):
        ours = _tangent(moved, _plan(pack, device), scale)
    assert path_taken("varlen_attention_jvp") == "triton"
    assert ours.shape == truth.shape and inputs["q"] is not None and ours.dtype == inputs["q"].dtype
    if truth.numel():
        # Terms of size 1 cancel where one key stands still; of TF32 products their rounding is left.
        error = (ours.cpu().double() - truth).abs().max() / truth.abs().max().clamp_min(1.0)
        assert error <= tolerance
    return ours


@pytest.mark.parametrize("with_lse", [True, False], ids=["logsumexp", "no logsumexp"])
@pytest.mark.parametrize("keys_move", [True, False], ids=["keys move", "keys stand"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_the_kernel_equals_its_twin(pack, keys_move, with_lse, device):
    inputs = _inputs(pack, keys_move=keys_move)
    if not with_lse:
        inputs["lse"] = None
    check(inputs, pack, device, FLOAT32)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 72, 120, 128])
def test_head_widths(head_dim, device):
    pack = ((2, 3), (2, 3), (1,), None)
    check(_inputs(pack, keys_move=True, head_dim=head_dim, num_heads=1), pack, device, FLOAT32)


def test_columns_of_a_head():
    """At most two blocks that start in the head; only the last reaches beyond it. 72 is not held as 128."""
    assert head_blocks(72) == ((0, 64), (64, 16))
    assert head_blocks(64) == ((0, 64),) and head_blocks(8) == ((0, 16),) and head_blocks(120) == ((0, 128),)
    for head_dim in range(8, 129, 8):
        blocks = head_blocks(head_dim)
        assert sum(size for _, size in blocks) >= head_dim > blocks[-1][0]
        assert all(size >= 16 and size & (size - 1) == 0 for _, size in blocks)
        assert [start for start, _ in blocks] == [0, blocks[0][1]][: len(blocks)]


@pytest.mark.parametrize("keys_move", [True, False])
@pytest.mark.parametrize("logits_at_once", [2**24, 1], ids=["whole", "query by query"])
def test_the_twin_is_forward_mode_of_the_op(monkeypatch, logits_at_once, keys_move):
    monkeypatch.setattr(tim_kernels.tangent, "LOGITS_AT_ONCE", logits_at_once)
    pack = ((3, 1, 4, 2), (5, 0, 2, 1), (2, 1, 0), None)
    inputs, plan, moving = _wide(_inputs(pack, keys_move=keys_move)), _plan(pack), (2, 1, 0)
    values = tuple(x for x in (inputs["q"], inputs["k"], inputs["v"]) if x is not None)
    spread = [torch.zeros_like(x) for x in values]
    for name, x, lengths in zip(("d_q", "d_k", "d_v"), spread, (pack[0], pack[1], pack[1]), strict=True):
        d = inputs[name]
        if d is not None:
            pieces = dict(zip(moving, d.split([lengths[i] for i in moving]), strict=True))
            for i, own in enumerate(x.split(list(lengths))):
                own.copy_(pieces.get(i, torch.zeros_like(own)))
    with use_path("torch"), sdpa_kernel(SDPBackend.MATH):
        truth = jvp(
            lambda q, k, v: varlen_attention(q, k, v, _forward_plan(pack), scale=0.3), values, tuple(spread)
        )[1]
        ours = _tangent(inputs, plan, 0.3)
    # float64 sums of at most 8 terms
    torch.testing.assert_close(ours, plan.queries_of(truth), rtol=1e-11, atol=1e-12)
    assert not ours[4].any() and ours.abs().sum() > 0


@pytest.mark.parametrize("backend", ["dense", "segments"])
def test_any_forward_will_do(backend, device):
    """The output of a backend, with the logsumexp that it hands out or without one."""
    pack = PACKS["self"]
    inputs = _inputs(pack, keys_move=True)
    q, k, v = (inputs[n] for n in "qkv")
    assert q is not None and k is not None and v is not None
    with use_attention_backend(backend):
        out, lse = varlen_attention_with_lse(q, k, v, _forward_plan(pack))
    assert (lse is None) == (backend == "segments")
    check({**inputs, "out": out, "lse": lse}, pack, device, FLOAT32)


def test_the_scale_can_be_given(device):
    pack = PACKS["self"]
    # The logsumexp of another scale would be wrong.
    check({**_inputs(pack, keys_move=True), "lse": None}, pack, device, FLOAT32, scale=0.0)
    inputs = _inputs(pack, keys_move=True)
    q, k, v = (inputs[n] for n in "qkv")
    assert q is not None and k is not None and v is not None
    out, lse = varlen_attention_with_lse(q, k, v, _forward_plan(pack), scale=0.7)
    check({**inputs, "out": out, "lse": lse}, pack, device, FLOAT32, scale=0.7)


@pytest.mark.parametrize("with_lse", [True, False])
def test_large_logits_do_not_overflow(with_lse, device):
    pack = ((3,), (40,), None, None)
    inputs = _inputs(pack, keys_move=True)
    q, k, v = (inputs[n] for n in "qkv")
    assert q is not None and k is not None and v is not None
    q = q * 300
    out, lse = varlen_attention_with_lse(q.double(), k.double(), v.double(), _forward_plan(pack))
    assert lse is not None and lse.max() > 500
    inputs |= {"q": q, "out": out.float(), "lse": lse.float() if with_lse else None}
    # Logits of 700 carry roundings of 700 * 2^-24 = 4e-5, and so does P.
    check(inputs, pack, device, 2e-4)


@pytest.mark.parametrize("stored", STORAGE, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("keys_move", [True, False])
def test_stored_precisions(stored, keys_move, device):
    pack = ((3, 5), (37, 5), (1, 0), None)
    inputs = _inputs(pack, keys_move=keys_move, head_dim=72, dtype=stored)
    check(inputs, pack, device, STORAGE[stored])


def test_views_of_packed_projections(device):
    pack = PACKS["self"]
    inputs = _inputs(pack, keys_move=True)
    for names in (("q", "k", "v"), ("d_q", "d_k", "d_v")):
        present = [x for x in (inputs[n] for n in names) if x is not None]
        inputs |= dict(zip(names, torch.stack(present, 1).unbind(1), strict=True))
    heads_first = inputs["out"]
    assert heads_first is not None
    inputs["out"] = heads_first.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for n, x in inputs.items() if x is not None and n != "lse")
    check(inputs, pack, device, FLOAT32)


def test_no_segment_sees_another(device):
    """NaN in a segment that stands still, and in one that moves, changes no bit elsewhere."""
    pack = ((3, 4, 2), (3, 4, 2), (2, 0), None)
    inputs = _inputs(pack, keys_move=True)
    spoiled = {name: None if x is None else x.clone() for name, x in inputs.items()}
    for name, x in spoiled.items():
        assert x is not None
        if name.startswith("d_"):
            # Tangents of the third segment come first.
            x[:2] = float("nan")
        else:
            x[3:] = float("nan")
    with use_path("triton"):
        clean, dirty = (
            _tangent({n: None if x is None else x.to(device) for n, x in y.items()}, _plan(pack, device))
            for y in (inputs, spoiled)
        )
    assert torch.equal(clean[2:], dirty[2:]) and dirty[:2].isnan().all()


def test_tokens_beyond_two_to_the_31_elements(device, tmp_path: Path):
    """Values, output and tangents whose last token starts beyond 2^31 elements."""
    dense = normal(3, 16, seed=0, dtype=torch.bfloat16).to(device)
    plan = AttentionTangentPlan.from_lengths((1, 2), (1, 2), (1,), device=device)
    every = AttentionTangentPlan.from_lengths((1, 2), (1, 2), device=device)
    results = []
    for x in (far_apart(dense, tmp_path), dense):
        x = x.unflatten(1, (1, 16))
        with use_path("triton"):
            results.append(
                [
                    varlen_attention_jvp(x, x, x, x[1:], x[1:], x[1:], x, None, plan),
                    varlen_attention_jvp(x, x, x, x, x, x, x, None, every),
                ]
            )
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_nothing_has_a_gradient_and_nothing_is_kept(device):
    pack = PACKS["self"]
    inputs = {
        n: None if x is None else x.to(device).requires_grad_()
        for n, x in _inputs(pack, keys_move=True).items()
    }
    kept: list[Tensor] = []
    for path in ("triton", "torch"):
        with use_path(path), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
            assert not _tangent(inputs, _plan(pack, device)).requires_grad
    assert not kept


def test_a_head_that_is_too_wide_goes_through_the_twin(device):
    pack = ((2,), (2,), None, None)
    inputs = _inputs(pack, keys_move=True, head_dim=136, num_heads=1)
    moved = {n: None if x is None else x.to(device) for n, x in inputs.items()}
    _tangent(moved, _plan(pack, device))
    assert path_taken("varlen_attention_jvp") == "torch"
    with use_path("triton"), pytest.raises(ValueError, match="head_dim 136 is not a multiple of 8 up to 128"):
        _tangent(moved, _plan(pack, device))


def test_a_plan_is_cut_into_tiles():
    plan = AttentionTangentPlan.from_lengths((2, 130, 1), (5, 7), (1, 0), (1, 1))
    assert plan.tiles.tolist() == [
        [0, 128, 2, 0, 5, 7],
        [128, 2, 130, 0, 5, 7],
        [130, 2, 0, 7, 5, 7],
    ]
    assert (plan.num_queries, plan.num_keys, plan.moving.num_keys) == (133, 12, 14)
    assert plan.keys_of(torch.arange(12)).tolist() == [*range(5, 12), *range(5, 12)]


WRONG_PLANS = {
    "queries": (((2,), (2,), (1,)), "moving: expected segments among 1"),
    "keys": (((2,), (2,), (0,), (1,)), "keys: expected segments among 1"),
    "numbers": (((2, 1), (2,), (0, 1), (0,)), "2 query segments but 1 key segments"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_PLANS.values(), ids=WRONG_PLANS.keys())
def test_plans_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionTangentPlan.from_lengths(*arguments)


WRONG = {
    "d_k alone": ({"d_v": None}, "d_k and d_v: expected both or neither"),
    "queries": ({"q": torch.zeros(4, 2, 8)}, r"q: expected \[5, heads, head_dim\]"),
    "keys": ({"k": torch.zeros(4, 2, 8)}, r"k: expected shape \[5, 2, 8\], received \[4, 2, 8\]"),
    "tangents of the whole pack": ({"d_q": torch.zeros(5, 2, 8)}, r"d_q: expected shape \[2, 2, 8\]"),
    "output": ({"out": torch.zeros(2, 2, 8)}, r"out: expected shape \[5, 2, 8\]"),
    "logsumexp by head": ({"lse": torch.zeros(2, 5)}, r"lse: expected shape \[5, 2\]"),
    "rounded logsumexp": ({"lse": torch.zeros(5, 2).half()}, "lse: expected float32"),
    "dtype": ({"d_q": torch.zeros(2, 2, 8).double()}, "d_q: expected torch.float32 as q"),
    "device": ({"v": torch.zeros(5, 2, 8, device="meta")}, "v: expected on cpu as q is"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_named(change, message):
    pack = ((3, 2), (3, 2), (1,), None)
    with pytest.raises(ValueError, match="varlen_attention_jvp: " + message):
        _tangent({**_inputs(pack, keys_move=True), **change}, _plan(pack))


@pytest.mark.gpu
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_parity_at_full_size(head_dim, dtype, with_lse):
    """Native resolutions and captions, half of them moving; from the output of the backend of this GPU."""
    device = torch.device("cuda")
    for lengths_k, keys_move in (((1024, 1, 777, 4096), True), ((256, 77, 1, 200), False)):
        pack = ((1024, 1, 777, 4096), lengths_k, (2, 0), None)
        plan, forward = _plan(pack, device), _forward_plan(pack, device)
        inputs = {
            name: normal(n, 16, head_dim, seed=seed, dtype=dtype).to(device)
            for seed, (name, n) in enumerate(
                {
                    "q": forward.num_queries, "k": forward.num_keys, "v": forward.num_keys,
                    "d_q": plan.moving.num_queries, "d_k": plan.moving.num_keys, "d_v": plan.moving.num_keys,
                }.items()
            )
        }  # fmt: skip
        out, lse = varlen_attention_with_lse(inputs["q"], inputs["k"], inputs["v"], forward)
        all_inputs: Inputs = {**inputs, "out": out, "lse": lse if with_lse else None}
        if not keys_move:
            all_inputs |= {"d_k": None, "d_v": None}
        with use_path("torch"):
            truth = _tangent(_wide(all_inputs), plan, 1 / math.sqrt(head_dim))
        with use_path("triton"):
            ours = _tangent(all_inputs, plan)
        # Two roundings of the largest value; in float32 sums of 4096 keys, in three products of TF32 each.
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-4
        assert (ours.double() - truth).abs().max() <= tolerance * truth.abs().max()
