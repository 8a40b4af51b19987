"""The kernels that attention may run on, when they may, and in which order they are tried.

T query tokens, L key tokens, N heads, H head width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_kernels.varlen_attention.dense import dense_attention, dense_logsumexp
from tim_kernels.varlen_attention.plan import AttentionPlan

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float, bool], tuple[Tensor, Tensor | None]]
"""(q, k, v, plan, scale, whether logsumexp is wanted) -> (out [T, N, H], logsumexp [T, N] or None)."""

HALF = (torch.bfloat16, torch.float16)
SHORT_PACK = 1024
"""Up to this length, on sm_80, torch's varlen kernel goes before the flash-attn package.

vllm-omni issue 4418, A100: 1.8 to 2 times faster at 256 to 320 tokens, 10 % slower at 4096; between, a guess.
"""
FLASH4_PADDED_TO = (64, 96, 128)
"""Head widths that FlashAttention-4 computes as they are on Hopper."""


@dataclass(frozen=True)
class Situation:
    """What decides whether a backend is fit: where it runs, in what precision, at which head width."""

    device: torch.device
    capability: tuple[int, int] | None
    """Compute capability of a CUDA device."""
    dtype: torch.dtype
    head_dim: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> Situation:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device, capability, dtype, head_dim)

    def __str__(self) -> str:
        where = str(self.device)
        if self.capability is not None:
            where = f"sm_{self.capability[0]}{self.capability[1]}"
        return f"head_dim {self.head_dim}, {str(self.dtype).removeprefix('torch.')}, {where}"


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    load: imports what it needs and returns the function; ImportError or AttributeError mean it is not there.
    obstacle: why it must not be tried in a situation, or None.
    uniform_only: it takes packs of equal segments alone.
    """

    name: str
    load: Callable[[], Attend]
    obstacle: Callable[[Situation], str | None]
    uniform_only: bool = False


def order(capability: tuple[int, int] | None, *, is_short: bool) -> tuple[str, ...]:
    """Names in the order in which they are tried; the first that is fit and proven is taken.

    Reported speeds behind it: FlashAttention-3 and cuDNN lead on Hopper, FlashAttention-4 on Blackwell; on
    Ampere torch's kernel wins on short packs and the flash-attn package on long ones.
    """
    if capability is None:
        return ("dense",)
    if capability < (8, 0):
        return "segments", "dense"
    if capability[0] == 9:
        return "flash3", "cudnn", "torch_varlen", "flash2", "segments", "dense"
    if capability[0] == 10:
        return "flash4", "flash4_padded", "torch_varlen", "flash2", "segments", "dense"
    if is_short:
        return "torch_varlen", "flash2", "segments", "dense"
    return "flash2", "torch_varlen", "segments", "dense"


def _gpu_half(situation: Situation, least: tuple[int, int] = (8, 0)) -> str | None:
    if situation.capability is None:
        return f"the tensors are on {situation.device}"
    if situation.capability < least:
        return f"it needs sm_{least[0]}{least[1]} or newer"
    if situation.dtype not in HALF:
        return f"it has no kernel for {situation.dtype}"
    if situation.head_dim % 8 or situation.head_dim > 256:
        return f"head_dim {situation.head_dim} is not a multiple of 8 up to 256"
    return None


def _lse_by_token(lse: Tensor, q_TNH: Tensor) -> Tensor:
    """Varlen kernels hand out [N, T], some versions [T, N]: [T, N]."""
    by_head = (q_TNH.shape[1], q_TNH.shape[0])
    return lse.t() if lse.shape == by_head else lse


def _first_and_lse(result: Any, q_TNH: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Packages return the output alone, or a tuple (output, logsumexp, ...), depending on their version."""
    if isinstance(result, Tensor):
        return result, None
    out, lse = result[:2]
    return out, _lse_by_token(lse.detach(), q_TNH) if with_lse and isinstance(lse, Tensor) else None


def _flash(module: str, with_lse_name: str) -> Attend:
    """`flash_attn_varlen_func` of one of the flash-attention packages, whose options differ by version."""
    function = importlib.import_module(module).flash_attn_varlen_func
    options = inspect.signature(function).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        optional = {
            with_lse_name: with_lse,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        result = function(
            q,
            k,
            v,
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_k=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_q,
            max_seqlen_k=plan.max_k,
            softmax_scale=scale,
            causal=False,
            **{name: value for name, value in optional.items() if name in options},
        )
        return _first_and_lse(result, q, with_lse)

    return attend


def _load_flash2() -> Attend:
    return _flash("flash_attn", "return_attn_probs")


def _load_flash3() -> Attend:
    return _flash("flash_attn_interface", "return_attn_probs")


def _load_flash4() -> Attend:
    return _flash("flash_attn.cute", "return_lse")


def _load_flash4_padded() -> Attend:
    inner = _load_flash4()

    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        head_dim = q.shape[-1]
        width = next(n for n in FLASH4_PADDED_TO if n >= head_dim)
        q, k, v = (nnf.pad(x, (0, width - head_dim)) for x in (q, k, v))
        out, lse = inner(q, k, v, plan, scale, with_lse)
        return out[..., :head_dim], lse

    return attend


def _load_torch_varlen() -> Attend:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = varlen_attn(
            q,
            k,
            v,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_q,
            plan.max_k,
            scale=scale,
            return_aux=AuxRequest(lse=True) if with_lse else None,
        )
        return _first_and_lse(result, q, with_lse)

    return attend


def _load_cudnn() -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return dense_attention(q, k, v, plan.exact_groups, scale), None

    return attend


def _load_segments() -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return dense_attention(q, k, v, plan.exact_groups, scale), None

    return attend


def _load_dense() -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        lse = dense_logsumexp(q, k, plan.padded_groups, scale) if with_lse else None
        return dense_attention(q, k, v, plan.padded_groups, scale), lse

    return attend


def _flash3_obstacle(situation: Situation) -> str | None:
    if situation.capability is not None and situation.capability[0] != 9:
        return "it is for sm_90"
    return _gpu_half(situation)


def _flash4_obstacle(situation: Situation) -> str | None:
    on_hopper = situation.capability is not None and situation.capability[0] == 9
    if on_hopper and situation.head_dim not in FLASH4_PADDED_TO:
        # flash-attention pull request 2896, open in September 2026.
        return f"its gradient of q is wrong at head_dim {situation.head_dim} on sm_90"
    return _gpu_half(situation, least=(9, 0))


def _flash4_padded_obstacle(situation: Situation) -> str | None:
    if situation.head_dim in FLASH4_PADDED_TO or situation.head_dim > FLASH4_PADDED_TO[-1]:
        return f"head_dim {situation.head_dim} is not one to pad to {FLASH4_PADDED_TO}"
    return _gpu_half(situation, least=(9, 0))


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("flash3", _load_flash3, _flash3_obstacle),
        Backend("flash2", _load_flash2, _gpu_half),
        Backend("flash4", _load_flash4, _flash4_obstacle),
        Backend("flash4_padded", _load_flash4_padded, _flash4_padded_obstacle),
        Backend("torch_varlen", _load_torch_varlen, _gpu_half),
        Backend("cudnn", _load_cudnn, _gpu_half, uniform_only=True),
        Backend("segments", _load_segments, lambda _: None),
        Backend("dense", _load_dense, lambda _: None),
    )
}
