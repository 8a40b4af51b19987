"""A block keeps for its backward what `tim_ds/model/README.md` lists, and no more."""

from __future__ import annotations

import pytest

from tests.kernels.activation_memory import bytes_per_unit

IN_16_BITS, IN_32_BITS = 2, 4
MLP = 3072 / 1152
TEXT = 1 / 4


def test_bytes_kept_by_a_block_of_the_865m_network(device):
    found = bytes_per_unit()
    expected = {
        # The residual stream before each of three, and two branches; mean and deviation of a row.
        "residual_modulated_norm": 3 * IN_32_BITS + 2 * IN_16_BITS + 3 * 8 / 1152,
        "qkv_norm_rope": 3 * IN_16_BITS,
        # q, k, v and the result among image tokens; q and the result, and k of the caption, across. Two
        # logarithms of sums a head.
        "attention": 6 * IN_16_BITS + TEXT * IN_16_BITS + 2 * 16 * 4 / 1152,
        "q_norm_rope": IN_16_BITS,
        "cross_attn.kv": TEXT * IN_16_BITS,
        "kv_norm": TEXT * 2 * IN_16_BITS,
        # The one norm whose result has two readers.
        "mlp.fc1_g": IN_16_BITS,
        "swiglu": 2 * MLP * IN_16_BITS,
        "gated_residual": IN_16_BITS,
    }
    assert found == pytest.approx(expected)
    assert sum(found.values()) < 55
