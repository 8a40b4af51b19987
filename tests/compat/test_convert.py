"""Import and export of weight files: strict, lossless, and nothing is overwritten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tests.model.networks import class_config, random_network, text_config
from tim_ds.compat.__main__ import main
from tim_ds.compat.authors import RELEASED, ReleasedModel
from tim_ds.compat.convert import differences_from_authors, export_weights, import_weights
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import (
    EXPORT_FILE,
    WEIGHTS_FILE,
    Export,
    SourceConfig,
    read_export,
    write_export,
)
from tim_ds.model.weights import read_weights, write_weights
from tim_ds.objective.config import TransportConfig

TINY = {
    "tiny_text": ReleasedModel(
        model=text_config(rope_layout="reference"),
        autoencoder=AutoencoderConfig(kind="pixels"),
        text_encoder=TextEncoderConfig(kind="words", width=12, padding="constant"),
        sampler=RELEASED["t2i_xl"].sampler,
    ),
    "tiny_class": ReleasedModel(
        model=class_config(rope_layout="reference"),
        autoencoder=AutoencoderConfig(kind="pixels"),
        sampler=RELEASED["c2i_b_p4"].sampler,
    ),
}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two released models of a few thousand parameters take the place of the real ones."""
    monkeypatch.setattr("tim_ds.compat.authors.RELEASED", TINY)
    monkeypatch.setattr("tim_ds.compat.convert.RELEASED", TINY)


def _state(name: str, *, projector: bool = True) -> dict[str, Tensor]:
    state = random_network(TINY[name].model, dtype=torch.float32).state_dict()
    return {k: v.clone() for k, v in state.items() if projector or not k.startswith("projector.")}


def _file(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        write_weights(path, state)
    else:
        torch.save(state, path)
    return path


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("projector", [True, False], ids=["projector", "no-projector"])
@pytest.mark.parametrize(("suffix", "back"), [(".bin", ".safetensors"), (".safetensors", ".bin")])
def test_import_then_export_gives_the_same_names_and_bits(
    tmp_path: Path, name: str, projector: bool, suffix: str, back: str
) -> None:
    state = _state(name, projector=projector)
    import_weights(_file(tmp_path / f"model{suffix}", state), tmp_path / "export")
    export_weights(tmp_path / "export", tmp_path / f"again{back}")
    assert _same(read_weights(tmp_path / f"again{back}"), state)


def test_import_keeps_the_dtype_of_the_file(tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in _state("tiny_text").items()}
    import_weights(_file(tmp_path / "model.bin", state), tmp_path / "export")
    assert _same(read_export(tmp_path / "export")[1], state)


def test_import_describes_the_model_with_the_authors_switches_and_its_source(tmp_path: Path) -> None:
    file = _file(tmp_path / "model.bin", _state("tiny_text", projector=False))
    import_weights(file, tmp_path / "export")
    export, _ = read_export(tmp_path / "export")
    assert export.model == dataclasses.replace(TINY["tiny_text"].model, z_dim=None)
    assert (export.sampler.cfg_upper, export.sampler.schedule_dtype) == ("exclusive", "bfloat16")
    assert export.text_encoder == TINY["tiny_text"].text_encoder
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert export.source == SourceConfig(kind="authors", name="tiny_text", file="model.bin", sha256=digest)


def test_import_of_a_file_with_wrong_keys_lists_them_and_writes_nothing(tmp_path: Path) -> None:
    state = _state("tiny_text")
    state["blocks.1.attn.qkv.weights"] = state.pop("blocks.1.attn.qkv.weight")
    state["final_layer.linear.bias"] = torch.zeros(3)
    file = _file(tmp_path / "model.bin", state)
    with pytest.raises(CheckpointError) as caught:
        import_weights(file, tmp_path / "export")
    message = str(caught.value)
    assert "missing (1):\n    blocks.1.attn.qkv.weight\n" in message
    assert "extra (1):\n    blocks.1.attn.qkv.weights\n" in message
    assert "final_layer.linear.bias (expected [4], received [3])" in message
    assert str(file) in message
    assert not (tmp_path / "export").exists()


def test_import_of_another_model_is_refused_by_name_of_the_file(tmp_path: Path) -> None:
    file = _file(tmp_path / "other.bin", {"conv.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"other\.bin: none of the released models"):
        import_weights(file, tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"import as tiny_class: .*\n  missing \(\d+\)"):
        import_weights(file, tmp_path / "export", model="tiny_class")


def test_neither_direction_overwrites(tmp_path: Path) -> None:
    file = _file(tmp_path / "model.bin", _state("tiny_class"))
    import_weights(file, tmp_path / "export")
    before = {name: (tmp_path / "export" / name).read_bytes() for name in (EXPORT_FILE, WEIGHTS_FILE)}
    with pytest.raises(CheckpointError, match="already; choose another folder"):
        import_weights(file, tmp_path / "export")
    with pytest.raises(CheckpointError, match="exists already"):
        export_weights(tmp_path / "export", file)
    assert {name: (tmp_path / "export" / name).read_bytes() for name in before} == before


def test_export_to_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.bin or \.pt"):
        export_weights(tmp_path, tmp_path / "model.ckpt")


def test_settings_that_the_authors_code_cannot_follow_are_named() -> None:
    def export(**changes: object) -> Export:
        values = {"transport": TransportConfig(), "model": text_config(rope_layout="reference"), **changes}
        return Export(step=1, source=SourceConfig(kind="run", name="r"), **values)  # type: ignore[arg-type]

    assert differences_from_authors(export()) == []
    (layout,) = differences_from_authors(export(model=text_config()))
    assert "rope_layout is row_major" in layout
    (tim,) = differences_from_authors(export(transport=TransportConfig(kind="tim")))
    assert "transport is tim" in tim
    (edm,) = differences_from_authors(export(transport=TransportConfig(kind="edm")))
    assert "sigma_data" in edm
    assert differences_from_authors(export(transport=TransportConfig(kind="edm", sigma_data=1.0))) == []


def test_command_line_imports_and_exports_with_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state("tiny_text")
    file = _file(tmp_path / "model.bin", state)
    total = sum(v.numel() for v in state.values())
    projector = sum(v.numel() for k, v in state.items() if k.startswith("projector."))
    assert main(["import", str(file), "--out", str(tmp_path / "export")]) == 0
    parts = f"{total - projector:,} and a projector of {projector:,}"
    counts = f"{total:,} parameters in {len(state)} tensors: {parts}"
    printed = capsys.readouterr().out
    assert f"tiny_text, {counts}" in printed
    assert "model.rope_layout: reference" in printed and "text_encoder.padding: constant" in printed
    assert main(["export", str(tmp_path / "export"), "--out", str(tmp_path / "again.safetensors")]) == 0
    printed = capsys.readouterr()
    assert counts in printed.out and printed.err == ""
    assert _same(read_weights(tmp_path / "again.safetensors"), state)


def test_command_line_warns_when_the_authors_code_would_draw_other_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = text_config()
    export = Export(
        model=model, transport=TransportConfig(), step=3, source=SourceConfig(kind="run", name="r")
    )
    write_export(tmp_path / "export", export, random_network(model).state_dict())
    assert main(["export", str(tmp_path / "export"), "--out", str(tmp_path / "ours.bin")]) == 0
    assert "rope_layout is row_major" in capsys.readouterr().err


def test_command_line_reports_one_error_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "absent.bin"), "--out", str(tmp_path / "export")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'absent.bin'}: cannot be read (No such file or directory)\n"
    )


def test_description_is_plain_json(tmp_path: Path) -> None:
    import_weights(_file(tmp_path / "model.bin", _state("tiny_class")), tmp_path / "export")
    content = json.loads((tmp_path / "export" / EXPORT_FILE).read_text())
    assert content["source"]["kind"] == "authors" and content["text_encoder"] is None
