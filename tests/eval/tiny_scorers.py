"""Tiny random models that score pictures, in the formats of the released ones, and a feature network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from tim_ds.eval.detector import COCO_CLASSES

_WORDS = "a photo of the and is there yes no red orange yellow green blue object dog cat car answer with only"


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP of width 16 for pictures of 16 x 16, with a byte-level vocabulary."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = _write_clip_tokenizer(folder)
    config = CLIPConfig(
        text_config={
            **common,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 24,
            "bos_token_id": vocabulary["<|startoftext|>"],
            "eos_token_id": vocabulary["<|endoftext|>"],
        },
        vision_config={**common, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def _write_clip_tokenizer(folder: Path) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 24})
    )
    return vocabulary


def save_detector(folder: Path, *, classes: tuple[str, ...] = COCO_CLASSES) -> Path:
    """A Mask2Former of width 16 on a Swin of width 8."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone: dict[str, Any] = {
        "image_size": 32,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 2,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**backbone),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={n: name for n, name in enumerate(classes)},
        label2id={name: n for n, name in enumerate(classes)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # Sure of itself, so that detections pass the thresholds.
        model.class_predictor.weight.mul_(300)
    model.save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A BLIP question answerer of width 16."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(0)
    tokenizer = _word_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.cls_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def save_vilt(folder: Path) -> Path:
    """A ViLT of width 16 that answers yes, no or maybe."""
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor

    torch.manual_seed(0)
    tokenizer = _word_tokenizer()
    config = ViltConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        image_size=32,
        patch_size=16,
        id2label={0: "yes", 1: "no", 2: "maybe"},
        label2id={"yes": 0, "no": 1, "maybe": 2},
    )
    ViltForQuestionAnswering(config).save_pretrained(folder)
    processor = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16)
    ViltProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def save_chat(folder: Path) -> Path:
    """A LLaVA of width 16 with a chat template."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer = _word_tokenizer(extra=["<image>"])
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
            bos_token_id=tokenizer.cls_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def _word_tokenizer(extra: list[str] | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", ".", *_WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # a Rust setter
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
    )
    if extra:
        fast.add_special_tokens({"additional_special_tokens": extra})
    return fast


class TinyFeatures:
    """The interface of `inception.Inception` with random filters and few features."""

    pool_width = 4
    spatial_width = 3

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.filters = torch.randn(7, 3, 2, 2, generator=generator)
        self.classes = torch.randn(5, 4, generator=generator)
        self.identity = {"network": "tiny", "weights_sha256": f"{seed}".ljust(64, "0")}
        self.seen: list[int] = []
        self.resized: list[int] = []

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        assert pictures.dtype == torch.uint8
        self.seen.append(len(pictures))
        return self._features(pictures.float())

    def of_resized(self, pictures: Tensor) -> dict[str, Tensor]:
        assert pictures.shape[1:] == (3, 299, 299) and pictures.dtype == torch.float32
        self.resized.append(len(pictures))
        return self._features(pictures)

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        answers = nnf.conv2d(x / 128 - 1, self.filters).relu().mean(dim=(2, 3))
        pool = answers[:, :4]
        return {"pool": pool, "spatial": answers[:, 4:], "logits": pool @ self.classes.T}


def write_random_picture(path: Path, seed: int, *, side: int = 8, grey: bool = False) -> None:
    """A picture of smoothly random colours, PNG or JPEG by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (2, 2) if grey else (2, 2, 3), dtype=np.uint8)
    Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC).save(path)
