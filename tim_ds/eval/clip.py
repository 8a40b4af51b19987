"""CLIP through transformers: cosines of pictures and captions, colours of cut-out objects.

Letters used in shapes: N pictures, K captions, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tim_ds.eval.pretrained import load_pretrained, of_transformers

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
"""The weights that GenEval and the CLIP score of MJHQ-30K name as ViT-L/14 of OpenAI."""

# Channel means and deviations that the released models were trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model with its tokenizer, in float32.

    Args:
        model: `transformers.CLIPModel`.
        tokenizer: of the same checkpoint.
    """

    def __init__(self, model: Any, tokenizer: Any, *, device: torch.device | str = "cpu") -> None:
        self.model: nn.Module = model.float().eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.picture_px = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def from_pretrained(cls, name: str = DEFAULT_CLIP, *, device: torch.device | str = "cpu") -> Clip:
        """The model of a local folder or a hub id.

        Raises:
            RequestError: if it is not there or is not CLIP.
        """
        of_model, of_tokenizer = of_transformers("CLIPModel", "CLIPTokenizer")
        model = load_pretrained("--clip", name, of_model.from_pretrained)
        tokenizer = load_pretrained("--clip", name, of_tokenizer.from_pretrained)
        return cls(model, tokenizer, device=device)

    def to(self, device: torch.device | str) -> Clip:
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [N, D], float32, on the CPU."""
        pixels = torch.stack([prepare(picture, self.picture_px) for picture in pictures]).to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output  # type: ignore[operator]
        return _unit(self.model.visual_projection(pooled))  # type: ignore[operator]

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [K, D], float32, on the CPU. A caption beyond the model's length is cut."""
        tokens = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(  # type: ignore[operator]
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.model.text_projection(pooled))  # type: ignore[operator]

    def class_vectors(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One unit vector a class [K, D]: the mean over templates (`{}` stands for the class), normalised."""
        vectors = [
            self.encode_captions([template.format(name) for template in templates]).mean(dim=0)
            for name in classes
        ]
        return _unit(torch.stack(vectors))


def prepare(picture: Image.Image, side_px: int) -> Tensor:
    """CLIP's own preparation, [3, side, side]: shorter side to `side_px` (bicubic), centre cut, normalised.

    The resize is Pillow's, which filters when it reduces: what CLIP was trained and published with.
    """
    picture = picture.convert("RGB")
    width, height = picture.size
    shorter = min(width, height)
    size = (int(side_px * width / shorter), int(side_px * height / shorter))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side_px) / 2), round((size[1] - side_px) / 2)
    picture = picture.crop((left, top, left + side_px, top + side_px))
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)
    normalised = (values - torch.tensor(_MEAN)) / torch.tensor(_STD)
    return normalised.permute(2, 0, 1).contiguous()


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors.float(), dim=-1).cpu()
