"""Every kernel variant that is compiled ahead of time and whose resources are on record (`aot.py`).

What the recipes of `launch/recipes` launch in training, at the widths of the authors' networks: 1152 (XL) and
768 (B). A new kernel adds its variants here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tim_kernels import segment_sum
from tim_kernels.gated_residual import jvp_kernel as gated_jvp
from tim_kernels.gated_residual import kernel as gated
from tim_kernels.modulated_layer_norm import jvp_kernel as norm_jvp
from tim_kernels.modulated_layer_norm import kernel as norm
from tim_kernels.qk_norm_rope import jvp_kernel as heads_jvp
from tim_kernels.qk_norm_rope import kernel as heads
from tim_kernels.schedule import CANDIDATES, SCHEDULES, use_schedule
from tim_kernels.swiglu import jvp_kernel as swiglu_jvp
from tim_kernels.swiglu import kernel as swiglu
from tim_kernels.transition_loss import kernel as loss
from tim_kernels.varlen_attention import jvp_kernel as attention_jvp

_INT32_POINTERS = ("chunks_ptr", "first_chunk_ptr", "tiles_ptr")
_COEFFICIENTS = ("alpha_hat", "sigma_hat", "b_over_db", "d_alpha_hat", "d_sigma_hat")
_TERMS = ("count", "denoising", "directional")

LOSS_FORMS = (
    (32, 32, False, True),
    (32, 32, True, True),
    (32, 32, False, False),
    (16, 4, False, True),
    (16, 4, True, True),
    (64, 4, False, True),
)
"""(channels of a token, of a cell, whether the target is guided, whether there is a directional term)."""


@dataclass(frozen=True)
class Variant:
    """One kernel, for one set of argument types and compile-time values, as the op launches it.

    `types` names the Triton type of each run-time argument ("*bf16", "i32", "fp32"). An argument that is None
    at launch stands in `constants`, as the compile-time arguments do.
    """

    op: str
    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    wide_loads: int
    """Fewest 128-bit loads that the machine code must hold."""
    matrix: bool = False
    """Whether it is meant to run on the tensor cores."""
    max_registers: int | None = None
    """Of a thread, where the op sets a limit."""
    is_seldom: bool = False
    """Whether few recipes launch it, or packs that seldom come, beside one much like it."""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.label}"

    @property
    def kernel_name(self) -> str:
        """Of the kernel in `schedule.SCHEDULES`, if it has an entry there."""
        direction = self.label.partition(":")[0]
        return f"{self.op} {direction}" if direction in ("forward", "backward") else self.op


def variants() -> list[Variant]:
    return [
        *_segment_sum(),
        *_modulated_layer_norm(),
        *_gated_residual(),
        *_qk_norm_rope(),
        *_swiglu(),
        *_transition_loss(),
        *_modulated_layer_norm_jvp(),
        *_gated_residual_jvp(),
        *_qk_norm_rope_jvp(),
        *_swiglu_jvp(),
        *_varlen_attention_jvp(),
    ]


def candidates() -> list[Variant]:
    """Every variant under every other schedule that is timed (`schedule.CANDIDATES`)."""
    found = []
    for kernel, schedules in CANDIDATES.items():
        for schedule in schedules:
            if schedule == SCHEDULES[kernel]:
                continue
            with use_schedule(kernel, schedule):
                # How its loads are cut is what differs.
                found += [
                    replace(v, label=f"{v.label}, {schedule}", wide_loads=0)
                    for v in variants()
                    if v.kernel_name == kernel
                ]
    return found


def _variant(
    op: str, label: str, kernel: Any, pointers: dict[str, str | None], options: dict[str, Any], **rest: Any
) -> Variant:
    """Pointers by argument name without `_ptr`, None where the op passes None; strides go by their names."""
    options = dict(options)
    num_warps = options.pop("num_warps")
    rest.setdefault("max_registers", options.pop("maxnreg", None))
    constants, types = dict(options), dict(rest.pop("types", {}))
    for name in kernel.arg_names:
        if name in _INT32_POINTERS and name.removesuffix("_ptr") not in pointers:
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            pointee = pointers[name.removesuffix("_ptr")]
            if pointee is None:
                constants[name] = None
            else:
                types[name] = f"*{pointee}"
        elif name.endswith("_stride"):
            types[name] = "i32"
    return Variant(op, label, kernel, types, constants, num_warps, **rest)


def _segment_sum() -> list[Variant]:
    return [
        _variant(
            "segment_sum",
            "any width",
            segment_sum.segment_sum_kernel,
            {"partial": "fp32", "out": "fp32"},
            segment_sum.OPTIONS,
            types={"row_size": "i32"},
            wide_loads=1,
        )
    ]


def _modulated_layer_norm() -> list[Variant]:
    found = []
    for width, stream, stored, residual in (
        (1152, "fp32", "bf16", True),
        (1152, "bf16", "bf16", True),
        (1152, "fp32", "bf16", False),
        (1152, "fp32", "fp32", False),
        (768, "fp32", "bf16", True),
        (768, "fp32", "bf16", False),
        (768, "fp32", "fp32", False),
    ):
        label = f"width {width}, stream {stream}, h {stored}, {'with' if residual else 'no'} residual"
        optional = stored if residual else None
        is_seldom = width == 768 and not residual
        modulation = {"shift": "fp32", "scale": "fp32", "gate": "fp32" if residual else None}
        pointers: dict[str, str | None] = {
            **modulation,
            "x": stream,
            "branch": optional,
            "x_new": stream if residual else None,
            "h": stored,
            "statistics": "fp32",
        }
        found.append(
            _variant(
                "modulated_layer_norm",
                f"forward: {label}",
                norm.forward_kernel,
                pointers,
                norm.forward_options(width),
                types={"eps": "fp32"},
                # x, shift, scale and, with a residual, branch and gate: each at least one a thread.
                wide_loads=5 if residual else 3,
                is_seldom=is_seldom,
            )
        )
        pointers |= {
            "d_h": stored,
            # The final layer's x' goes nowhere but into its norm.
            "d_x_new": stream if stored == "bf16" else None,
            "x_new": stream,
            "d_x": stream,
            "d_branch": optional,
            "partial": "fp32",
        }
        found.append(
            _variant(
                "modulated_layer_norm",
                f"backward: {label}",
                norm.backward_kernel,
                pointers,
                norm.backward_options(width),
                wide_loads=5 if residual else 3,
                is_seldom=is_seldom,
            )
        )
    return found


def _gated_residual() -> list[Variant]:
    names = ("gate", "x", "out", "d_out", "partial")
    pointers: dict[str, str | None] = {**dict.fromkeys(names, "fp32"), "branch": "bf16", "d_branch": "bf16"}
    found = []
    for width in (1152, 768):
        for form, kernel, options in (
            ("forward", gated.forward_kernel, gated.forward_options(width)),
            ("backward", gated.backward_kernel, gated.backward_options(width)),
        ):
            label = f"{form}: width {width}, stream fp32, branch bf16"
            found.append(
                _variant(
                    "gated_residual", label, kernel, pointers, options, wide_loads=5, is_seldom=width == 768
                )
            )
    return found


def _qk_norm_rope() -> list[Variant]:
    """Self-attention with and without the interval's shift, the queries and the keys of cross-attention."""
    found = []
    for num_heads, head_dim, form in (
        (16, 72, "q, k, v with shift"),
        (16, 72, "q, k, v"),
        (16, 72, "q"),
        (16, 72, "k, v"),
        (12, 64, "q, k, v with shift"),
    ):
        has_second, has_plain = form.startswith("q, k"), "v" in form
        shift = "fp32" if "shift" in form else None
        angle = None if form == "k, v" else "fp32"
        second, plain = "bf16" if has_second else None, "bf16" if has_plain else None
        second_affine = "fp32" if has_second else None
        position = None if angle is None else "i32"
        pointers: dict[str, str | None] = {
            "x": "bf16",
            "d_x": "bf16",
            "shift": shift,
            "shift_partial": shift,
            "chunks": None if shift is None else "i32",
            "first": "bf16",
            "second": second,
            # Without a shift the forward hands out v as it is; the backward puts its gradient in place.
            "plain": None if shift is None else plain,
            "d_first": "bf16",
            "d_second": second,
            "d_plain": plain,
            "first_weight": "fp32",
            "first_bias": "fp32",
            "second_weight": second_affine,
            "second_bias": second_affine,
            "cos": angle,
            "sin": angle,
            "position_a": position,
            "position_b": position,
            "affine_partial": "fp32",
        }
        types = {"num_rows": "i32", "rows_per_program": "i32", "eps": "fp32"}
        label = f"{form}, {num_heads} heads of {head_dim}, bf16"
        num_parts = 1 + has_second + (shift is not None)
        forward = heads.forward_options(num_heads, head_dim)
        backward = heads.backward_options(num_heads, head_dim, has_shift=shift is not None)
        found += [
            _variant(
                "qk_norm_rope",
                f"forward: {label}",
                heads.forward_kernel,
                pointers,
                forward,
                types=types,
                # 16 heads of 64 columns are four vectors of bfloat16 a thread.
                wide_loads=4 * num_parts,
            ),
            _variant(
                "qk_norm_rope",
                f"backward: {label}",
                heads.backward_kernel,
                pointers,
                backward,
                types=types,
                # 8 heads of 64 columns: two vectors of the gradient and of x.
                wide_loads=4 * (1 + has_second) + 2 * has_plain,
            ),
        ]
    return found


def _swiglu() -> list[Variant]:
    """The MLP (3072; of B 2048), captions (4608), AdaLN of blocks (864), of the end (384, 576; of B 256)."""
    found = []
    for width, stored in (
        (3072, "bf16"),
        (2048, "bf16"),
        (4608, "bf16"),
        (256, "fp32"),
        (384, "fp32"),
        (576, "fp32"),
        (864, "fp32"),
    ):
        label = f"width {width}, {stored}"
        pointers: dict[str, str | None] = dict.fromkeys(
            ("gate", "up", "out", "d_out", "d_gate", "d_up"), stored
        )
        # Two vectors of bfloat16, or four of float32, for each input.
        vectors = 2 if stored == "bf16" else 4
        for form, kernel, inputs in (
            ("forward", swiglu.forward_kernel, 2),
            ("backward", swiglu.backward_kernel, 3),
        ):
            found.append(
                _variant(
                    "swiglu",
                    f"{form}: {label}",
                    kernel,
                    pointers,
                    swiglu.tile_options(width),
                    types={"num_rows": "i32"},
                    wide_loads=inputs * vectors,
                    is_seldom=width in (2048, 256),
                )
            )
    return found


def _transition_loss() -> list[Variant]:
    """F and all others in float32, for the latents of the recipes: channels of a token, of a cell.

    dF/dt is absent from a pack in which no segment has r < t.
    """
    name = "transition_loss"
    found = []
    for width, cell, guided, directional in LOSS_FORMS:
        label = f"{width} channels" if cell == width else f"{width} channels, {cell} a cell"
        options = loss.cell_options(width, cell)
        if directional and not guided:
            pointers: dict[str, str | None] = dict.fromkeys(("partial", *_TERMS), "fp32")
            finish = {"C": options["C"], "L": options["L"], **loss.FINISH_OPTIONS}
            found.append(
                _variant(
                    name,
                    f"finish: {label}",
                    loss.finish_kernel,
                    pointers,
                    finish,
                    wide_loads=0,
                    is_seldom=width != 32,
                )
            )
        label += ", guided" if guided else ""
        label += "" if directional else ", no directional term"
        for slope in ("fp32", None):
            names = ("F", "x", "z", "partial", "d_F", "d_denoising", *_TERMS, *_COEFFICIENTS)
            pointers = {
                **dict.fromkeys(names, "fp32"),
                "dF_dt": slope,
                "diffusion_target": "fp32" if guided else None,
                "d_directional": "fp32" if directional else None,
            }
            # Two vectors for each of F, x, z and, where they are there, of dF/dt and the guided target.
            vectors = 2 * (3 + (slope is not None) + guided)
            for form, kernel in (("forward", loss.forward_kernel), ("backward", loss.backward_kernel)):
                found.append(
                    _variant(
                        name,
                        f"{form}: {label}" + ("" if slope else ", no dF/dt"),
                        kernel,
                        pointers,
                        {**options, "DIRECTIONAL": directional},
                        wide_loads=vectors,
                        is_seldom=width != 32 or slope is None or not directional,
                    )
                )
    return found


def _modulated_layer_norm_jvp() -> list[Variant]:
    found = []
    for width, stream, stored, residual in (
        (1152, "fp32", "bf16", True),
        (1152, "bf16", "bf16", True),
        (1152, "fp32", "bf16", False),
        (1152, "fp32", "fp32", False),
        (768, "fp32", "bf16", True),
    ):
        optional, modulation = (stored, "fp32") if residual else (None, None)
        pointers: dict[str, str | None] = {
            **dict.fromkeys(("x", "d_x"), stream),
            **dict.fromkeys(("branch", "d_branch"), optional),
            **dict.fromkeys(("gate", "d_gate"), modulation),
            **dict.fromkeys(("scale", "d_shift", "d_scale"), "fp32"),
            "d_x_new": stream if residual else None,
            "d_h": stored,
        }
        found.append(
            _variant(
                "modulated_layer_norm_jvp",
                f"width {width}, stream {stream}, h {stored}, {'with' if residual else 'no'} residual",
                norm_jvp.jvp_kernel,
                pointers,
                norm_jvp.jvp_options(width),
                types={"eps": "fp32"},
                # Two a thread for every float32 row, of tokens or segments, and one for every bfloat16 row.
                wide_loads=14 if residual else 10,
            )
        )
    return found


def _gated_residual_jvp() -> list[Variant]:
    pointers: dict[str, str | None] = dict.fromkeys(("d_x", "d_out", "gate", "d_gate"), "fp32")
    pointers |= {"branch": "bf16", "d_branch": "bf16"}
    label = "width 1152, stream fp32, branch bf16"
    options = gated_jvp.jvp_options(1152)
    return [
        _variant("gated_residual_jvp", label, gated_jvp.jvp_kernel, pointers, options, wide_loads=8),
    ]


def _qk_norm_rope_jvp() -> list[Variant]:
    """Self-attention with and without the interval's shift, and the queries of cross-attention."""
    found = []
    for num_heads, head_dim, form in (
        (16, 72, "q, k, v with shift"),
        (16, 72, "q, k, v"),
        (16, 72, "q"),
        (12, 64, "q, k, v with shift"),
    ):
        shift = "fp32" if "shift" in form else None
        second, second_weight = ("bf16", "fp32") if "k" in form else (None, None)
        pointers: dict[str, str | None] = {
            **dict.fromkeys(("x", "d_x", "d_first"), "bf16"),
            **dict.fromkeys(("shift", "d_shift"), shift),
            **dict.fromkeys(("first_weight", "cos", "sin"), "fp32"),
            **dict.fromkeys(("position_a", "position_b"), "i32"),
            "d_second": second,
            "second_weight": second_weight,
            # Without a shift the tangent of v is handed out as it is.
            "d_plain": None if shift is None else "bf16",
        }
        found.append(
            _variant(
                "qk_norm_rope_jvp",
                f"{form}, {num_heads} heads of {head_dim}, bf16",
                heads_jvp.jvp_kernel,
                pointers,
                heads_jvp.jvp_options(num_heads, head_dim),
                types={"eps": "fp32"},
                # 8 heads of 64 columns: two vectors of x and of its tangent, for q and for k; v's tangent.
                wide_loads=4 * (1 + (second is not None)) + 2 * (shift is not None),
            )
        )
    return found


def _swiglu_jvp() -> list[Variant]:
    found = []
    for width, stored, rows in (
        (3072, "bf16", "neighbours"),
        (3072, "bf16", "anywhere"),
        (384, "fp32", "neighbours"),
        (384, "fp32", "anywhere"),
        (576, "fp32", "neighbours"),
        (576, "fp32", "anywhere"),
        (864, "fp32", "anywhere"),
    ):
        names = ("gate", "up", "d_gate", "d_up", "d_out")
        pointers: dict[str, str | None] = dict.fromkeys(names, stored)
        pointers["rows"] = "i32" if rows == "anywhere" else None
        vectors = 2 if stored == "bf16" else 4
        found.append(
            _variant(
                "swiglu_jvp",
                f"width {width}, {stored}, values {rows}",
                swiglu_jvp.jvp_kernel,
                pointers,
                swiglu.tile_options(width),
                types={"num_rows": "i32"},
                wide_loads=4 * vectors,
                is_seldom=(width, rows) in ((384, "anywhere"), (576, "neighbours")),
            )
        )
    return found


def _varlen_attention_jvp() -> list[Variant]:
    """Self- and cross-attention, from the logsumexp of the forward and without it."""
    found = []
    for num_heads, head_dim, form, lse in (
        (16, 72, "self", "with"),
        (16, 72, "self", "without"),
        (16, 72, "cross", "with"),
        (16, 72, "cross", "without"),
        (12, 64, "self", "with"),
        (12, 64, "cross", "with"),
    ):
        pointers: dict[str, str | None] = dict.fromkeys(("q", "k", "v", "d_q", "out", "d_out"), "bf16")
        pointers |= dict.fromkeys(("d_k", "d_v"), "bf16" if form == "self" else None)
        pointers["lse"] = "fp32" if lse == "with" else None
        found.append(
            _variant(
                "varlen_attention_jvp",
                f"{form}, {num_heads} heads of {head_dim}, bf16, {lse} logsumexp",
                attention_jvp.jvp_kernel,
                pointers,
                attention_jvp.jvp_options(num_heads, head_dim, torch.bfloat16),
                types={"scale": "fp32"},
                # 128 rows of 64 columns on 256 threads: four vectors of q, of dq and of the output, and one
                # of each tensor of the keys.
                wide_loads=14 if form == "cross" else 16,
                matrix=True,
            )
        )
    return found
