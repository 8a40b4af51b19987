"""Which path runs, and how it is chosen."""

from __future__ import annotations

import logging

import pytest
import torch

from tim_kernels import ChunkPlan, dispatch, modulated_layer_norm, path_taken, use_path

OP = "modulated_layer_norm"


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())


def _run(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    x, m = torch.ones(3, 8, dtype=dtype, device=device), torch.ones(1, 8, dtype=dtype, device=device)
    modulated_layer_norm(x, x, m, m, m, ChunkPlan.from_lengths((3,), device=device))
    return path_taken(OP)


def test_auto_takes_the_twin_on_the_cpu():
    assert _run() == "torch"


def test_auto_takes_the_twin_where_there_is_no_kernel_for_the_dtype(device):
    assert _run(device, torch.float64) == "torch"


def test_triton_runs_when_it_is_asked_for(device):
    with use_path("triton"):
        assert _run(device) == "triton"


def test_triton_that_cannot_run_is_an_error_and_not_a_detour(device):
    with (
        use_path("triton"),
        pytest.raises(ValueError, match=r"no kernel for torch\.float64; use auto or torch"),
    ):
        _run(device, torch.float64)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: False)
    with use_path("triton"), pytest.raises(ValueError, match="a tensor is on cpu"):
        _run()


def test_without_triton_auto_takes_the_twin(monkeypatch, device):
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: False)
    assert _run(device) == "torch"


def test_inner_choices_win_and_end_with_their_block(device):
    with use_path("torch"):
        with use_path("triton", OP):
            assert _run(device) == "triton"
            with use_path("torch"):
                assert _run(device) == "torch"
            assert _run(device) == "triton"
        assert _run(device) == "torch"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("triton", "triton"),
        ("torch", "torch"),
        (f"{OP}=triton", "triton"),
        (f"torch,{OP}=triton", "triton"),
        (f"triton, {OP}=torch", "torch"),
    ],
)
def test_the_environment_chooses_for_all_ops_or_for_one(monkeypatch, device, value, expected):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    assert _run(device) == expected
    with use_path("torch"):
        assert _run(device) == "torch"


@pytest.mark.parametrize(
    ("value", "message"), [("fast", "received 'fast'"), ("modulated_norm=torch", "received 'modulated_norm'")]
)
def test_a_misspelt_environment_is_refused(monkeypatch, value, message):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(ValueError, match=message):
        _run()


def test_a_misspelt_path_or_op_is_refused():
    with pytest.raises(ValueError, match="received 'cuda'"), use_path("cuda"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="received 'norm'"), use_path("torch", "norm"):
        pass


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="tim_kernels"):
        _run()
        _run()
        with use_path("torch"):
            _run()
    assert [r.getMessage() for r in caplog.records] == [
        f"{OP}: torch (a tensor is on cpu)",
        f"{OP}: torch (asked for)",
    ]


def test_a_compiled_model_goes_through_without_a_break():
    plan, x, m = ChunkPlan.from_lengths((3,)), torch.randn(3, 8), torch.randn(1, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return modulated_layer_norm(x, x, m, m, m, plan)[1]

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
