"""Tiny random models, saved in the formats of the released ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "three", "above", "seven", "gap"]


def save_autoencoders(folder: Path) -> dict[str, Any]:
    """A DC-AE of stride 2 and an SD-VAE of stride 4, saved as `dc_ae` and `sd_vae`; returns both."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    # Typed as one-element tuples in diffusers; any number is meant.
    dc_blocks: Any = ("ResBlock", "EfficientViTBlock")
    kl_channels: Any = (8, 8, 8)
    kl_down: Any = ("DownEncoderBlock2D",) * 3
    kl_up: Any = ("UpDecoderBlock2D",) * 3
    dc_ae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=dc_blocks,
        decoder_block_types=dc_blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    sd_vae = AutoencoderKL(
        block_out_channels=kl_channels,
        down_block_types=kl_down,
        up_block_types=kl_up,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=0.25,
    )
    models: dict[str, Any] = {"dc_ae": dc_ae.eval(), "sd_vae": sd_vae.eval()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return models


def save_released_configs(folder: Path) -> None:
    """`dc_ae` and `gemma` of the sizes of the encoders of `t2i_xl`, without weights."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from transformers import Gemma3TextConfig

    blocks: Any = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths: Any = (128, 256, 512, 512, 1024, 1024)
    scales: Any = ((), (), (), (5,), (5,), (5,))
    with torch.device("meta"):
        autoencoder = AutoencoderDC(
            latent_channels=32,
            attention_head_dim=32,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
            decoder_layers_per_block=(3,) * 6,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
    autoencoder.save_config(folder / "dc_ae")
    Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32_768,
        architectures=["Gemma3ForCausalLM"],
    ).save_pretrained(folder / "gemma")


def save_tokenizer(folder: Any, template: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # a setter of the Rust class
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]  # likewise
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_gemma(folder: Path) -> None:
    """A Gemma of width 16."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
    )
    # Saved as a causal model, as the released one is: the adapter must find the decoder inside.
    Gemma3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, "<bos> $A")


def save_t5(folder: Path) -> None:
    """A T5 of width 16."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder, "$A <eos>")


def save_vision(folder: Path) -> None:
    """Vision transformers of width 16 and patches of 4 pixels: `dinov2`, `dinov3` and `radio`."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        DINOv3ViTConfig,
        DINOv3ViTModel,
        RadioConfig,
        RadioModel,
    )

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 32,
    }
    Dinov2Model(Dinov2Config(**common, mlp_ratio=2)).save_pretrained(folder / "dinov2")
    DINOv3ViTModel(DINOv3ViTConfig(**common, intermediate_size=32)).save_pretrained(folder / "dinov3")
    RadioModel(RadioConfig(**common, mlp_ratio=2.0, max_img_size=64)).save_pretrained(folder / "radio")
