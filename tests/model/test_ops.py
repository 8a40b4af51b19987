"""The seam's operations against independent definitions written out here, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_ds.errors import ConfigError, ShapeError
from tim_ds.model import ops
from tim_ds.model.rope import token_positions
from tim_ds.packed import Segments
from tim_kernels.saved import saved_bytes


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attention_by_loop(q, k, v, segments_q, segments_k):
    out = []
    for q_i, k_i, v_i in zip(segments_q.split(q), segments_k.split(k), segments_k.split(v), strict=True):
        logits = torch.einsum("qnh,knh->nqk", q_i, k_i) / math.sqrt(q.shape[-1])
        out.append(torch.einsum("nqk,knh->qnh", logits.softmax(-1), v_i))
    return torch.cat(out)


LENGTHS = {
    "one-shape": ((4, 4, 4), (4, 4, 4)),
    "mixed": ((4, 1, 6, 4, 1), (3, 2, 5, 1, 1)),
    "out-of-order": ((2, 5, 2, 5), (7, 1, 7, 2)),
    "no-text": ((3, 2), (0, 4)),
    "single-token": ((1,), (1,)),
}


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS.values(), ids=LENGTHS.keys())
def test_attention_and_its_gradients_equal_the_loop_over_segments(lengths_q, lengths_k):
    segments_q, segments_k = Segments.from_lengths(lengths_q), Segments.from_lengths(lengths_k)
    shapes = (sum(lengths_q), 2, 8), (sum(lengths_k), 2, 8), (sum(lengths_k), 2, 8)
    q, k, v = ours = [_normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    a = ops.attention(q, k, v, ops.plan_attention(segments_q, segments_k))
    q, k, v = theirs = [x.detach().clone().requires_grad_() for x in ours]
    b = _attention_by_loop(q, k, v, segments_q, segments_k)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    weight = _normal(*a.shape, seed=9)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12)


def test_attention_has_a_forward_mode_derivative():
    segments_q, segments_k = Segments.from_lengths((3, 4)), Segments.from_lengths((2, 5))
    plan = ops.plan_attention(segments_q, segments_k)
    primals = _normal(7, 2, 4), _normal(7, 2, 4, seed=1), _normal(7, 2, 4, seed=2)
    tangents = tuple(_normal(*p.shape, seed=5 + i) for i, p in enumerate(primals))
    with sdpa_kernel(SDPBackend.MATH):
        ours = jvp(lambda q, k, v: ops.attention(q, k, v, plan), primals, tangents)[1]
    truth = jvp(lambda q, k, v: _attention_by_loop(q, k, v, segments_q, segments_k), primals, tangents)[1]
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_attention_that_cannot_run_is_refused_at_start_up(monkeypatch):
    device = torch.device("cpu")
    ops.prove_attention(device, torch.bfloat16, 72)
    monkeypatch.setenv("TIM_ATTENTION_BACKEND", "torch_varlen")
    with pytest.raises(ConfigError, match="torch_varlen was asked for, but the tensors are on cpu"):
        ops.prove_attention(device, torch.bfloat16, 72)


def test_residual_modulated_norm_is_its_formula():
    segments = Segments.from_lengths((3, 1, 2))
    x, branch = _normal(6, 10), _normal(6, 10, seed=1)
    gate, shift, scale = (_normal(3, 10, seed=s) for s in (2, 3, 4))
    x_new, h = ops.residual_modulated_norm(x, branch, gate, shift, scale, ops.plan_chunks(segments))
    for token, s in enumerate([0, 0, 0, 1, 2, 2]):
        row = x[token] + gate[s] * branch[token]
        normal = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-6)
        torch.testing.assert_close(x_new[token], row, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(h[token], normal * (1 + scale[s]) + shift[s], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_that_computes_its_input_again_has_the_same_gradients_and_does_not_keep_it(has_bias):
    gate, up, weight, bias = (_normal(*s, seed=i) for i, s in enumerate([(5, 6), (5, 6), (3, 6), (3,)]))
    leaves = [x.requires_grad_() for x in (gate, up, weight, *([bias] if has_bias else []))]
    found, kept = [], []
    for again in (None, ops.Again(ops.swiglu, (gate, up))):
        product = ops.swiglu(gate, up)
        outputs = []

        def run(product=product, again=again, outputs=outputs):
            outputs.append(ops.linear(product, weight, bias if has_bias else None, again))

        kept.append(saved_bytes(run, apart_from=leaves))
        found.append([outputs[0], *torch.autograd.grad((outputs[0] ** 3).sum(), leaves)])
    assert kept == [5 * 6 * 8, 0]
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


def test_qk_norm_uses_the_wider_epsilon_and_the_affine_parameters():
    x = 1e-3 * _normal(2, 1, 8)  # small, so that the epsilon matters
    weight, bias = _normal(8, seed=1), _normal(8, seed=2)
    row = x[1, 0]
    expected = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5) * weight + bias
    torch.testing.assert_close(
        ops.kv_norm(x.repeat(1, 1, 2).flatten(1), 1, (weight, bias))[0][1, 0],
        expected,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("layout", ["row_major", "reference"])
def test_rotation_is_complex_multiplication_by_the_grid_position(layout):
    segments = Segments.from_grids([(2, 3), (3, 2)])
    head_dim = 12
    x = _normal(12, 2, head_dim)
    out = ops.q_norm_rope(x, None, ops.rotary_table(segments, head_dim, layout, torch.float64))
    token = 0
    for height, width in segments.grids or ():
        for n in range(height * width):
            a, b = divmod(n, width) if layout == "row_major" else (n % height, n // height)
            for k in range(head_dim // 4):
                frequency = 10000.0 ** (-2 * k / (head_dim // 2))
                for start, position in ((0, a), (head_dim // 2, b)):
                    pair = x[token, 1, start + 2 * k : start + 2 * k + 2]
                    turned = complex(*pair.tolist()) * complex(
                        math.cos(position * frequency), math.sin(position * frequency)
                    )
                    got = out[token, 1, start + 2 * k : start + 2 * k + 2]
                    assert abs(complex(*got.tolist()) - turned) < 1e-12
            token += 1


def test_q_k_and_v_of_self_attention_are_shifted_by_image_before_the_norm():
    segments = Segments.from_grids([(1, 2), (2, 2)])
    table = ops.rotary_table(segments, 8, "row_major", torch.float64)
    qkv, shift = _normal(6, 48), _normal(2, 48, seed=1)
    norms = (_normal(8, seed=2), _normal(8, seed=3)), (_normal(8, seed=4), _normal(8, seed=5))
    received = ops.qkv_norm_rope(qkv, 2, *norms, table, shift, ops.plan_chunks(segments))
    raw = (qkv + shift[[0, 0, 1, 1, 1, 1]]).reshape(6, 3, 2, 8).unbind(1)
    expected = [ops.q_norm_rope(x, norm, table) for x, norm in zip(raw, norms, strict=False)] + [raw[2]]
    torch.testing.assert_close(list(received), expected, rtol=1e-12, atol=1e-12)


def test_row_major_self_attention_logits_depend_on_relative_position_only():
    segments = Segments.from_grids([(4, 4)])
    table = ops.rotary_table(segments, 8, "row_major", torch.float64)
    q, k = _normal(1, 1, 8).expand(16, 1, 8), _normal(1, 1, 8, seed=1).expand(16, 1, 8)
    logits = torch.einsum("qnh,knh->qk", *(ops.q_norm_rope(x, None, table) for x in (q, k)))
    logits = logits.reshape(4, 4, 4, 4)
    torch.testing.assert_close(logits[0, 0, 1, 2], logits[2, 1, 3, 3], rtol=1e-12, atol=1e-12)
    assert (logits[0, 0, 1, 2] - logits[0, 0, 2, 1]).abs() > 1e-6


def test_reference_layout_scrambles_grids_that_are_not_square():
    a, b = token_positions(Segments.from_grids([(2, 3)]), "reference")
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    with pytest.raises(ShapeError, match="grid"):
        token_positions(Segments.from_lengths([3]), "row_major")
