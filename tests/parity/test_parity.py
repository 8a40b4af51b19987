"""The stored results of the authors' code are reproduced, tensor by tensor, and a small mistake does not
pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import compare_file, golden_files, main
from tests.parity.compare import Report, relative_error
from tests.parity.golden import GoldenFile
from tests.parity.network_case import compare_network

pytestmark = pytest.mark.parity

GOLDENS = Path(__file__).parents[1] / "golden"
SMALLEST = GOLDENS / "golden_dev_c2i_rect_p2.json"

_BUG = "edm_sd0p5_refbug"
NOT_COMPARABLE_NETWORK = {
    f"tr/{_BUG}/target",
    f"tr/{_BUG}/x_r",
    f"samp/{_BUG}_4step",
    *(
        f"loss/{_BUG}/{variant}/{key}"
        for variant in ("dir", "nodir")
        for key in ("per_sample_denoising", "time_weight", "weighted", "proj")
    ),
}
NOT_COMPARABLE_FORMULAS = {
    "edm_sd0p5/ref/target",
    "edm_sd0p5/ref/target_mg",
    "edm_sd0p5/ref/x_r",
    "samplers (index lists of the description)",
}
COMPARED = {
    "golden_dev_c2i_p2.json": 204,
    "golden_dev_c2i_rect_p2.json": 201,
    "golden_dev_formulas.json": 175,
    "golden_dev_t2i_rect.json": 207,
    "golden_dev_t2i_square.json": 208,
}
"""Comparisons of each file, so that none drops out unseen."""


@pytest.mark.parametrize("path", golden_files(GOLDENS), ids=lambda path: path.stem)
def test_every_stored_tensor_is_reproduced_or_named_as_not_comparable(path: Path) -> None:
    report = compare_file(path)
    assert not report.failures, "\n".join(report.lines())
    assert len(report.comparisons) == COMPARED[path.name]
    formulas = "formulas" in path.name
    assert set(report.skipped) == (NOT_COMPARABLE_FORMULAS if formulas else NOT_COMPARABLE_NETWORK)


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.1.adaLN_modulation.fc2.weight",
        "final_layer.linear.bias",
    ],
)
def test_a_change_of_one_weight_by_a_hundredth_does_not_pass(name: str) -> None:
    golden = GoldenFile.read(SMALLEST)
    # Of the label table, a row that the batch uses.
    row = int(golden.tensors["in/y"][0]) if "embedding_table" in name else 0
    golden.weights[name][row].view(-1)[0] += 1e-2
    failed = {c.tensor for c in compare_network(golden).failures}
    assert {"fwd/F", "tr/ot_fm/F"} <= failed


def test_a_projector_weight_changes_the_features_and_the_alignment_alone() -> None:
    golden = GoldenFile.read(SMALLEST)
    golden.weights["projector.4.bias"][0] += 1e-2
    failed = {c.tensor for c in compare_network(golden).failures}
    assert "fwd/h_proj" in failed and "loss/ot_fm/dir/proj" in failed
    assert "fwd/F" not in failed


def _copy(folder: Path) -> Path:
    for part in GOLDENS.glob(f"{SMALLEST.stem}*"):
        shutil.copy(part, folder)
    return folder / SMALLEST.name


def test_tool_exits_0_and_prints_the_worst_error_of_each_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _copy(tmp_path)
    assert main(["--goldens", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for family in ("fwd/F", "act", "rope", "tr/dde", "grad/norms", "mg", "tw", "samp", "trace/rows"):
        assert any(line.startswith(f"  {family} ") and " worst " in line for line in printed.splitlines())
    assert "1 files, 201 comparisons, 0 beyond tolerance" in printed


def test_tool_exits_2_without_goldens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "no golden_*.json here" in capsys.readouterr().err


def test_tool_exits_2_when_a_case_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = _copy(tmp_path).with_suffix(".safetensors")
    values.write_bytes(values.read_bytes()[:-100])
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "truncated" in capsys.readouterr().err
    values.unlink()
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_tool_exits_2_when_a_case_lacks_what_the_comparison_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _copy(tmp_path).with_suffix(".safetensors")
    tensors = load_file(values)
    save_file({f"other/{name}": value for name, value in tensors.items()}, values)
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "the case has no 'in/x'" in capsys.readouterr().err
    save_file(tensors, values)
    (tmp_path / SMALLEST.name).write_text("{}")
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "the case has no 'transports'" in capsys.readouterr().err
    save_file({"other": torch.ones(2)}, values)
    assert main(["--goldens", str(tmp_path)]) == 2
    assert "holds nothing that the comparison knows" in capsys.readouterr().err


def test_tool_exits_1_on_a_value_that_is_a_hundredth_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _copy(tmp_path).with_suffix(".safetensors")
    tensors = load_file(values)
    tensors["samp/ot_4step"] = tensors["samp/ot_4step"] * 1.01
    save_file(tensors, values)
    assert main(["--goldens", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED samp/ot_4step" in printed and "1 beyond tolerance" in printed


def test_differences_of_shape_and_nan_never_pass() -> None:
    golden = torch.ones(2, 3)
    report = Report("golden_x.json", {"a": golden, "b": golden, "c": torch.zeros(3)})
    report.compare("a", torch.ones(3, 2), 1e9)
    report.compare("b", torch.full((2, 3), torch.nan), 1e9)
    report.compare("c", torch.full((3,), 1e-3), 1e-4)
    assert [c.tensor for c in report.failures] == ["a", "b", "c"]
    assert relative_error(torch.tensor([2.0, -4.5]), torch.tensor([2.0, -4.0])) == 0.125
