"""Mask2Former through transformers, post-processed as GenEval's detector is: boxes, masks, scores, by class.

Letters used in shapes: Q queries, K classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from tim_ds.errors import RequestError
from tim_ds.eval.pretrained import load_pretrained, of_transformers

DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"

_NAMES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|"
    "stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|"
    "umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|"
    "baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|"
    "banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|"
    "bed|dining table|toilet|tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|"
    "microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|"
    "toothbrush"
)

COCO_CLASSES = tuple(_NAMES.split("|"))
"""GenEval's names of the 80 classes of COCO, in COCO's order."""

# What checkpoints call the same classes.
_OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "television": "tv",
    "hair dryer": "hair drier",
    "doughnut": "donut",
}

# The test-time picture of the published detector: shorter side 800, longer at most 1333, then ImageNet's
# means and deviations (of values in 0 to 1), then zeros to multiples of 32.
_SHORTER_PX, _LONGER_PX, _MULTIPLE_PX = 800, 1333, 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_DETECTIONS = 100


@dataclass(frozen=True, eq=False)
class Detection:
    """One object.

    Shapes:
        mask: bool [H, W] of the picture; None where only boxes are known.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; right and bottom lie beyond the last pixel."""
    mask: NDArray[np.bool_] | None = None


class Detector:
    """`transformers.Mask2FormerForUniversalSegmentation` trained on the instances of COCO, in float32.

    Raises:
        RequestError: if its classes are not those of COCO.
    """

    def __init__(
        self, model: Any, *, device: torch.device | str = "cpu", shorter_px: int = _SHORTER_PX
    ) -> None:
        self.names = class_names(model.config.id2label)
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self._shorter_px = shorter_px

    def to(self, device: torch.device | str) -> Detector:
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @classmethod
    def from_pretrained(cls, name: str = DEFAULT_DETECTOR, *, device: torch.device | str = "cpu") -> Detector:
        """The model of a local folder or a hub id.

        Raises:
            RequestError: if it is not there, or is another model.
        """
        kind = of_transformers("Mask2FormerForUniversalSegmentation")
        return cls(load_pretrained("--detector", name, kind.from_pretrained), device=device)

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, *, threshold: float) -> list[Detection]:
        """Objects whose score exceeds `threshold`, the surest first."""
        pixels, (height, width) = prepare(picture, shorter_px=self._shorter_px)
        outputs = self.model(pixel_values=pixels.to(self.device))
        return instances(
            outputs.class_queries_logits[0].float(),
            outputs.masks_queries_logits[0].float(),
            self.names,
            padded=(int(pixels.shape[-2]), int(pixels.shape[-1])),
            resized=(height, width),
            original=(picture.height, picture.width),
            threshold=threshold,
        )


def class_names(id2label: Mapping[Any, str]) -> list[str]:
    """GenEval's name of every class of a checkpoint, in the checkpoint's order.

    Raises:
        RequestError: if they are not the 80 of COCO.
    """
    labels = [id2label[key] for key in sorted(id2label, key=int)]
    names = [_OTHER_NAMES.get(label.strip().lower(), label.strip().lower()) for label in labels]
    if sorted(names) != sorted(COCO_CLASSES):
        unknown = sorted(set(names) - set(COCO_CLASSES))
        raise RequestError(
            f"--detector: expected the {len(COCO_CLASSES)} classes of COCO, received {len(names)}"
            + (f", among them {', '.join(unknown[:5])}" if unknown else "")
            + f"; use a checkpoint trained on COCO instances such as {DEFAULT_DETECTOR}"
        )
    return names


def prepare(picture: Image.Image, *, shorter_px: int = _SHORTER_PX) -> tuple[Tensor, tuple[int, int]]:
    """Pixels [1, 3, H, W] with zeros to multiples of 32 at the right and below, and the size before those."""
    longer_px = shorter_px * _LONGER_PX / _SHORTER_PX
    width, height = picture.size
    factor = min(shorter_px / min(width, height), longer_px / max(width, height))
    size = (max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5)))
    resized = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)
    pixels = ((values - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1)
    right, below = -size[0] % _MULTIPLE_PX, -size[1] % _MULTIPLE_PX
    return nnf.pad(pixels, (0, right, 0, below))[None], (size[1], size[0])


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    names: list[str],
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    threshold: float,
) -> list[Detection]:
    """The 100 best pairs of query and class; score = probability x mean mask probability inside the mask.

    Mask logits are enlarged to the padded picture, cut to the resized one, brought to the original size (both
    bilinear) and cut at 0, as in the published detector; transformers' own post-processing works on a grid of
    384 x 384 instead, which moves boxes. A pair whose probability is not above `threshold` cannot reach
    it, so its mask is never made.

    Shapes:
        class_logits: [Q, K + 1], the last class is none. mask_logits: [Q, h, w].
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best, places = probabilities.flatten().topk(min(_MAX_DETECTIONS, probabilities.numel()))
    found = []
    for probability, place in zip(best.tolist(), places.tolist(), strict=True):
        if probability <= threshold:
            break
        query, label = divmod(place, num_classes)
        mask_HW = _enlarge(mask_logits[query], padded, resized, original)
        inside = mask_HW > 0
        area = int(inside.sum())
        if area == 0:
            continue
        sureness = float(mask_HW.sigmoid()[inside].sum()) / (area + 1e-6)
        score = probability * sureness
        if score <= threshold:
            continue
        mask = inside.cpu().numpy()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        found.append(Detection(names[label], score, box, mask))
    return sorted(found, key=lambda one: -one.score)


def _enlarge(
    logits_hw: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    whole = nnf.interpolate(logits_hw[None, None], size=padded, mode="bilinear", align_corners=False)
    cut = whole[..., : resized[0], : resized[1]]
    return nnf.interpolate(cut, size=original, mode="bilinear", align_corners=False)[0, 0]
