"""The Inception network of FID, by torch-fidelity: the features that ADM's evaluator takes of a picture.

Letters used in shapes: N pictures, H and W pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from tim_ds.errors import RequestError
from tim_ds.eval.generate import load_picture
from tim_ds.model.weights import read_weights, sha256

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion of the network of 2015-12-05, in its releases and in torch's cache."""
INPUT_PX = 299
POOL_WIDTH, SPATIAL_WIDTH = 2048, 2023

# ADM's evaluator takes the first 7 channels of `mixed_6/conv`. The TensorFlow graph counts its blocks mixed,
# mixed_1, ..., so mixed_6 is Mixed_6d; its 1x1 branch comes first in the block's output.
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d", 7
_LAYERS = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b "
    "Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
)


class FeatureNetwork(Protocol):
    """What a feature network is to the evaluations."""

    pool_width: int
    spatial_width: int
    identity: dict[str, Any]

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        """`pool`, `spatial` and `logits` of uint8 [N, 3, H, W], resized as the published network does."""
        ...

    def of_resized(self, pictures: Tensor) -> dict[str, Tensor]:
        """The same of values 0 to 255, float32 [N, 3, 299, 299], resized by somebody else."""
        ...


class Inception:
    """torch-fidelity's `FeatureExtractorInceptionV3` with the features of ADM's evaluator.

    Args:
        network: an instance with the features 2048 and logits_unbiased.
        weights_sha256: of its weight file, for results.
    """

    pool_width = POOL_WIDTH
    spatial_width = SPATIAL_WIDTH

    def __init__(self, network: nn.Module, *, weights_sha256: str = "") -> None:
        self.network = network.eval()
        self.identity: dict[str, Any] = {"network": "Inception 2015-12-05", "weights_sha256": weights_sha256}

    @classmethod
    def load(cls, weights: Path | None) -> Inception:
        """The network with `weights`, or with those in torch's cache, where torch-fidelity keeps them.

        Raises:
            RequestError: if torch-fidelity or the weights are missing.
            CheckpointError: if the file is damaged.
        """
        fidelity = need("torch_fidelity", "torch-fidelity")
        path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME if weights is None else weights
        if not path.is_file():
            raise RequestError(
                f"--inception {path}: no such file; fetch {WEIGHTS_NAME} from the release v0.2.0 of "
                f"https://github.com/toshas/torch-fidelity and name it, or put it there"
            )
        # torch-fidelity unpickles whatever the file holds; this refuses one that carries code.
        read_weights(path)
        try:
            network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
            )
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise RequestError(f"--inception {path}: not the weights of this network ({first})") from error
        return cls(network, weights_sha256=sha256(path))

    def to(self, device: torch.device | str) -> Inception:
        self.network.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        spatial: list[Tensor] = []

        def take(module: nn.Module, given: Any, output: Any) -> None:
            spatial.append(output)

        handle = self.network.get_submodule(_SPATIAL_LAYER).register_forward_hook(take)
        try:
            pool, logits = self.network(pictures.to(_device_of(self.network)))
        finally:
            handle.remove()
        return {"pool": pool.float(), "spatial": _flatten(spatial[0]), "logits": logits.float()}

    @torch.inference_mode()
    def of_resized(self, pictures: Tensor) -> dict[str, Tensor]:
        x = (pictures.to(_device_of(self.network), torch.float32) - 128) / 128
        spatial = None
        for name in _LAYERS.split():
            x = self.network.get_submodule(name)(x)
            if name == _SPATIAL_LAYER:
                spatial = _flatten(x)
        assert spatial is not None
        pool = x.flatten(1)
        classifier = self.network.get_submodule("fc").weight
        assert isinstance(classifier, Tensor)
        return {"pool": pool, "spatial": spatial, "logits": pool @ classifier.T}


def extract(
    network: FeatureNetwork,
    batches: Iterable[NDArray[np.uint8]],
    *,
    names: Sequence[str] = ("pool", "spatial", "logits"),
    total: int | None = None,
    clean: bool = False,
    progress: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """Features of all pictures, in order.

    Shapes:
        batches: uint8 [n, H, W, 3] each; sizes may differ between batches.
    Args:
        names: the features wanted.
        clean: resize by clean-fid (Pillow's bicubic with a filter, float32, not rounded), not by the network.
    """
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    resize = clean_resizer() if clean else None
    with tqdm(total=total, unit="picture", desc="features", disable=not progress) as bar:
        for batch in batches:
            if resize is None:
                features = network(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))
            else:
                resized = np.stack([resize(picture) for picture in batch]).transpose(0, 3, 1, 2)
                features = network.of_resized(torch.from_numpy(np.ascontiguousarray(resized)))
            for name in names:
                found[name].append(features[name].float().cpu().numpy())
            bar.update(len(batch))
    if not all(found.values()):
        raise RequestError("features: expected pictures, received none")
    return {name: np.concatenate(parts) for name, parts in found.items()}


def picture_batches(paths: Sequence[Path], size: int) -> Iterator[NDArray[np.uint8]]:
    """Pictures of files in order, up to `size` of one height and width at a time."""
    batch: list[NDArray[np.uint8]] = []
    for path in paths:
        picture = np.asarray(load_picture(path))
        if batch and (len(batch) == size or batch[0].shape != picture.shape):
            yield np.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield np.stack(batch)


def clean_resizer() -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """clean-fid's own resize of a picture [H, W, 3] to float32 [299, 299, 3].

    Raises:
        RequestError: if clean-fid is not installed.
    """
    return need("cleanfid.resize", "clean-fid").build_resizer("clean")


def need(module: str, package: str) -> Any:
    """A library of the extra `eval`.

    Raises:
        RequestError: saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a torchvision of another build than torch.
        raise RequestError(
            f"{package}: cannot be imported ({error}); install the extra: pip install 'tim-ds[eval]'"
        ) from error


def _flatten(block: Tensor) -> Tensor:
    """[N, C, 17, 17] to [N, 2023] in TensorFlow's order, channels last, so that stored statistics fit."""
    return block[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
