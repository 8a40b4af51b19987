"""torch-fidelity's Inception, the real class with random weights: features, resizing, loading."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.eval.tiny_scorers import TinyFeatures, write_random_picture
from tim_ds.errors import CheckpointError, RequestError
from tim_ds.eval import inception
from tim_ds.eval.inception import Inception, clean_resizer, extract, need, picture_batches


@pytest.fixture(scope="module")
def weights(fidelity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of the network."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS_NAME
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return Inception.load(weights)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(
        0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_features_are_the_librarys_and_those_of_adm(network: Inception, pictures: Tensor) -> None:
    branch: list[Tensor] = []
    inner = network.network
    handle = inner.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
        lambda module, given, output: branch.append(output.clone())
    )
    found = network(pictures)
    handle.remove()
    with torch.no_grad():
        pool, logits = inner(pictures)
    torch.testing.assert_close(found["pool"], pool, rtol=0, atol=0)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=0)
    # mixed_6/conv is the output of the 1x1 branch; 7 of its channels, channels last.
    expected = branch[0][:, :7].permute(0, 2, 3, 1).reshape(1, -1)
    torch.testing.assert_close(found["spatial"], expected, rtol=0, atol=0)
    assert found["pool"].shape == (1, 2048) and found["spatial"].shape == (1, 2023)
    assert found["pool"].std() > 0 and found["spatial"].std() > 0
    bias_free = found["pool"] @ inner.get_submodule("fc").weight.T  # type: ignore[operator]
    # Sums of 2048 products in float32.
    torch.testing.assert_close(found["logits"], bias_free, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [256, 640])
def test_pictures_are_resized_by_the_rule_of_tensorflow_1(fidelity: ModuleType, side: int) -> None:
    """Written out in float64: the value at i x side / 299, no filter and no half pixel."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    picture = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)).double()
    at = torch.arange(299, dtype=torch.float64) * side / 299
    low = at.floor().long()
    high, share = (low + 1).clamp_max(side - 1), at - low
    rows = picture[..., low, :] * (1 - share)[:, None] + picture[..., high, :] * share[:, None]
    expected = rows[..., low] * (1 - share) + rows[..., high] * share
    found = interpolate_bilinear_2d_like_tensorflow1x(picture.float(), size=(299, 299), align_corners=False)
    # Places up to 640 in float32 are off by up to 6e-5 along both sides, beside steps of up to 255 levels.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.04)


def test_resized_by_somebody_else_gives_the_same_for_pictures_that_need_no_resizing(
    network: Inception, pictures: Tensor
) -> None:
    whole, resized = network(pictures), network.of_resized(pictures.float())
    for name in ("pool", "spatial", "logits"):
        # The library resizes 299 to 299, whose weights may be off by one rounding of float32.
        torch.testing.assert_close(resized[name], whole[name], rtol=1e-4, atol=1e-5)


def test_weights_are_identified_and_bad_files_are_refused(
    network: Inception, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(network.identity["weights_sha256"]) == 64
    with pytest.raises(RequestError, match=r"none.pth: no such file; fetch weights-inception-2015-12-05"):
        Inception.load(tmp_path / "none.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RequestError, match=r"checkpoints/weights-inception.*no such file"):
        Inception.load(None)
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2)}, other)
    with pytest.raises(RequestError, match=r"other.pth: not the weights of this network"):
        Inception.load(other)
    code = tmp_path / "code.pth"
    code.write_bytes(pickle.dumps({"w": _Call()}, protocol=2))
    with pytest.raises(CheckpointError):
        Inception.load(code)


class _Call:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(RequestError, match=r"no-such: cannot be imported .*pip install 'tim-ds\[eval\]'"):
        need("no_such_library", "no-such")


def test_pictures_go_in_order_in_batches_of_one_size(tmp_path: Path) -> None:
    sides = (8, 8, 8, 12, 12, 8)
    for n, side in enumerate(sides):
        write_random_picture(tmp_path / f"{n}.png", n, side=side, grey=n == 1)
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    batches = list(picture_batches(paths, 2))
    assert [batch.shape[:2] for batch in batches] == [(2, 8), (1, 8), (2, 12), (1, 8)]
    network = TinyFeatures()
    found = extract(network, batches, progress=False)
    for n, path in enumerate(paths):
        [single] = picture_batches([path], 1)
        alone = extract(TinyFeatures(), [single], progress=False)
        # Another batch changes the order of float32 sums.
        np.testing.assert_allclose(found["pool"][n], alone["pool"][0], rtol=1e-5, atol=1e-6)
    with pytest.raises(RequestError, match="expected pictures, received none"):
        extract(network, [], progress=False)


def test_clean_pictures_are_resized_by_clean_fid(tmp_path: Path) -> None:
    """Against Pillow, channel by channel in float32: filtered, not rounded, cut to 0 to 255."""
    from PIL import Image

    write_random_picture(tmp_path / "a.png", 0, side=700)
    [batch] = picture_batches([tmp_path / "a.png"], 1)
    resized = clean_resizer()(batch[0])
    for channel in range(3):
        one = Image.fromarray(batch[0, ..., channel].astype(np.float32))
        expected = np.asarray(one.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_array_equal(resized[..., channel], expected)
    network = TinyFeatures()
    extract(network, [batch], clean=True, progress=False)
    assert network.resized == [1] and network.seen == []
