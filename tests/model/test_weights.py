"""Weight files: strict, atomic, and one clear error for whatever is wrong with a file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.small_files import small_files
from tim_ds.errors import CheckpointError
from tim_ds.model.weights import load_weights_into, read_weights, write_weights


def _state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "proj.weight": torch.randn(5, 3, generator=g),
        "proj.bias": torch.randn(5, generator=g).bfloat16(),
        "table": torch.arange(4),
    }


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_written_weights_read_back_bit_equal_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tim.safetensors"
    write_weights(path, _state(), {"step": "7"})
    assert _same(read_weights(path), _state())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "7"}
    assert _names(path.parent) == ["tim.safetensors"]


def test_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write_weights(tmp_path / "tim.safetensors", _state())
    (tmp_path / "plain").touch()
    assert (tmp_path / "tim.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_views_of_one_buffer_and_transposed_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat[:6].view(2, 3), "b": flat[6:].view(2, 3).T}
    write_weights(tmp_path / "w.safetensors", state)
    assert _same(read_weights(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("nesting", [None, "state_dict", "model"])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_pytorch_files_read_flat_or_nested(tmp_path: Path, nesting: str | None, zip_format: bool) -> None:
    content = _state() if nesting is None else {nesting: _state(), "step": 3}
    path = tmp_path / "model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    assert _same(read_weights(path), _state())


def test_format_is_told_from_the_content_not_the_suffix(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.bin", _state())
    assert _same(read_weights(tmp_path / "model.bin"), _state())


class _RunsCode:
    """Unpickled without protection, creates the file it names."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self.witness), "w"))


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    plain, saved = tmp_path / "plain.pt", tmp_path / "saved.bin"
    plain.write_bytes(pickle.dumps({"proj.weight": _RunsCode(witness)}, protocol=2))
    torch.save({"proj.weight": _RunsCode(witness)}, saved)
    for path in (plain, saved):
        with pytest.raises(CheckpointError, match="code"):
            read_weights(path)
    assert not witness.exists()
    # The file is not harmless: what read_weights refuses does run elsewhere.
    pickle.loads(plain.read_bytes())["proj.weight"].close()
    assert witness.exists()


def _truncated(source: Path, target: Path, keep: int) -> Path:
    target.write_bytes(source.read_bytes()[:keep])
    return target


def test_truncated_safetensors_name_the_expected_and_the_received_size(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    write_weights(whole, _state())
    size = whole.stat().st_size
    with pytest.raises(CheckpointError, match=rf"truncated, expected {size} bytes, received {size - 5}"):
        read_weights(_truncated(whole, tmp_path / "tail.safetensors", size - 5))
    with pytest.raises(CheckpointError, match="truncated inside its header"):
        read_weights(_truncated(whole, tmp_path / "head.safetensors", 40))


def test_truncated_pytorch_file_is_one_clear_error_at_every_length(tmp_path: Path) -> None:
    whole = tmp_path / "whole.bin"
    for zip_format in (True, False):
        torch.save(_state(), whole, _use_new_zipfile_serialization=zip_format)
        # Shorter, the first bytes do not tell the format.
        for keep in range(4, whole.stat().st_size):
            with pytest.raises(CheckpointError, match="damaged"):
                read_weights(_truncated(whole, tmp_path / "cut.bin", keep))


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.mkdir(), "received a folder"),
        (lambda path: path.touch(), "the file is empty"),
        (_write(b"<!DOCTYPE html><title>Not found</title>"), "neither a safetensors nor a PyTorch"),
        (_write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "git lfs pull"),
        (_write((20).to_bytes(8, "little") + b"{" + b"x" * 40), "header is damaged"),
        (lambda path: torch.save([torch.ones(2)], path), "received list"),
        (lambda path: torch.save({}, path), "holds no tensors"),
        (lambda path: torch.save({"weight": torch.ones(2), "lr": 0.1}, path), r"not tensors \(1\):\n    lr"),
    ],
    ids=[
        "absent",
        "folder",
        "empty",
        "web-page",
        "lfs-pointer",
        "header",
        "list",
        "no-tensors",
        "not-tensors",
    ],
)
def test_wrong_file_is_one_error_that_names_it(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "given.bin"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_loading_sets_every_parameter_and_keeps_the_networks_dtype() -> None:
    donor, network = _network(), _network().double()
    with torch.no_grad():
        for p in donor.parameters():
            p.normal_()
    load_weights_into(network, donor.state_dict(), source="donor")
    for name, p in network.named_parameters():
        assert p.dtype == torch.float64
        assert torch.equal(p, donor.get_parameter(name).double())


def test_loading_lists_missing_extra_and_misshapen_keys_at_once_and_changes_nothing() -> None:
    network = _network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["0.bias"]
    state["2.weight"] = torch.ones(1)
    state["1.weight"] = torch.ones(2, 5)
    with pytest.raises(CheckpointError) as caught:
        load_weights_into(network, state, source="given.bin")
    message = str(caught.value)
    assert message.startswith("given.bin: ")
    assert "missing (1):\n    0.bias" in message
    assert "extra (1):\n    2.weight" in message
    assert "misshapen (1):\n    1.weight (expected [2, 4], received [2, 5])" in message
    assert _same(dict(network.state_dict()), before)


@pytest.mark.parametrize("shape", [(1,), (4, 1), (1, 3)])
def test_a_shape_that_would_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    network = _network()
    state = {**network.state_dict(), "0.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"misshapen \(1\):\n    0\.weight \(expected \[4, 3\]"):
        load_weights_into(network, state, source="given.bin")


def test_long_lists_of_keys_are_capped_with_their_count() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights_into(_network(), {f"layer{i}": torch.ones(1) for i in range(300)}, source="other.bin")
    message = str(caught.value)
    assert "extra (300)" in message and "... and 292 more" in message
    assert len(message.splitlines()) < 25


def test_a_write_that_the_system_stops_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tim.safetensors"
    write_weights(path, _state())
    large = {"weight": torch.zeros(200_000)}
    with small_files(65_536), pytest.raises(CheckpointError, match="800,000 bytes needed") as caught:
        write_weights(path, large)
    assert str(path) in str(caught.value)
    assert _names(tmp_path) == ["tim.safetensors"]
    assert _same(read_weights(path), _state())


def test_too_little_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tim_ds.model.weights.shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"bytes needed: the disk has 10 bytes left"):
        write_weights(tmp_path / "tim.safetensors", _state())
    assert _names(tmp_path) == []
