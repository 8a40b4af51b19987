"""Figures of memory and disk in the READMEs are what `tim_ds.trainer.memory` computes, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.footprint import autoencoder_footprint, text_footprint
from data_pipeline.online import LATENT_PIXELS
from tests.data_pipeline.tiny_models import save_released_configs
from tim_ds.config.load import load_recipe
from tim_ds.trainer.engine import read_engine_file
from tim_ds.trainer.memory import GIB, RUNTIME_BYTES, MemoryEstimate, Ranks, estimate

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "ds_configs"
README = (ENGINES / "README.md").read_text()
XL = ROOT / "launch" / "recipes" / "t2i_xl.yaml"
FINETUNE = XL.with_name("t2i_xl_finetune.yaml")
STATE = (
    "weights",
    "float32 masters",
    "AdamW averages",
    "averaged weights",
    "gradients",
    "gradients for the step",
)


def engine(name: str) -> dict[str, object]:
    return read_engine_file(ENGINES / f"{name}.json")


def table(header: str) -> list[list[str]]:
    """Cells of the rows beneath a header that begins so."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def with_spread(found: MemoryEstimate) -> str:
    return f"{found.device_bytes / GIB:.1f} +- {found.device_spread / GIB:.1f}"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of encoders of the sizes that the README names."""
    folder = tmp_path_factory.mktemp("released")
    save_released_configs(folder)
    return folder


def test_the_table_of_engine_files() -> None:
    recipe = load_recipe(XL)
    rows = table("| file | state")
    assert sorted(row[0].strip("`") for row in rows) == sorted(
        path.stem for path in ENGINES.glob("zero*.json")
    )
    for name, state, *totals, host in rows:
        config = engine(name.strip("`"))
        found = {}
        for ranks, stated in zip((Ranks(1, 1), Ranks(8, 8), Ranks(32, 8)), totals, strict=True):
            if stated:
                found[ranks.size] = estimate(recipe, config, ranks)
                assert stated == with_spread(found[ranks.size]), (name, ranks)
        held = sum(part.device for part in found[8].parts if part.name in STATE)
        assert (state, host) == (f"{held / GIB:.1f}", f"{found[8].host_bytes_per_node / GIB:.0f}"), name
    found = estimate(recipe, engine("zero2"), Ranks(8, 8))
    steps = (
        "block inputs",
        "one block, recomputed",
        "around the blocks",
        "backward of one block",
        "batch and loss",
    )
    activations = sum(part.device for part in found.parts if part.name in steps)
    assert f"activations and the batch ({activations / GIB:.1f} GiB)" in README
    assert f"{RUNTIME_BYTES / GIB:g} GiB assumed for CUDA and NCCL" in README


def test_one_gpu_with_the_optimiser_on_the_host() -> None:
    found = estimate(load_recipe(XL, ["data.tokens_per_pack=8192"]), engine("zero2_offload"), Ranks(1, 1))
    copy = found.part("copy of a checkpoint").host
    told = " ".join(README.split())
    assert f"packs of 8,192 tokens take {with_spread(found)} GiB of the card" in told
    assert f"{found.host_bytes / GIB:.0f} GiB of the host, {copy / GIB:.0f} of them for the copy" in told


def test_the_table_of_frozen_encoders(released: Path) -> None:
    recipe = load_recipe(XL, [f"data.autoencoder.path={released / 'dc_ae'}"])
    text_encoder = TextEncoderConfig(kind="gemma", path=str(released / "gemma"), max_tokens=256)
    config = recipe.data.autoencoder
    batch = autoencoder_footprint(config, LATENT_PIXELS // 1024**2, 1024, 1024)
    large = [autoencoder_footprint(config, 1, side, side).peak for side in (2048, 4096)]
    captions = text_footprint(text_encoder, 32)
    assert [row[1:] for row in table("| | weights |")] == [
        [f"{batch.weights / GIB:.2f}", f"{batch.peak / GIB:.1f}"],
        [f"{batch.weights / GIB:.2f}", " / ".join(f"{peak / GIB:.0f}" for peak in large)],
        [f"{captions.weights / GIB:.2f}", f"{captions.peak / GIB:.1f}"],
    ]


def test_fine_tuning_with_encoders(released: Path) -> None:
    paths = [f"data.autoencoder.path={released / 'dc_ae'}", f"data.text_encoder.path={released / 'gemma'}"]
    found = estimate(load_recipe(FINETUNE, paths), engine("zero2_offload"), Ranks(1, 1))
    told = " ".join(README.split())
    assert (
        f"then takes {with_spread(found)} GiB of a card and {found.host_bytes / GIB:.0f} GiB of the host"
        in told
    )


def test_the_table_of_previews(released: Path) -> None:
    from transformers import T5Config

    t5 = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    t5.architectures = ["T5EncoderModel"]
    t5.save_pretrained(released / "t5")
    encoders = (
        [f"data.text_encoder.path={released / 'gemma'}"],
        [f"data.text_encoder={{kind: t5, path: {released / 't5'}, max_tokens: 256}}", "model.text_dim=4096"],
    )
    rows = table("| text encoder |")
    for settings, row in zip(encoders, rows, strict=True):
        recipe = load_recipe(XL, [f"data.autoencoder.path={released / 'dc_ae'}", *settings])
        found = estimate(recipe, engine("zero2"), Ranks(8, 8))
        sizes = (found.host_bytes, found.host_bytes_of_others, found.host_bytes_per_node, found.device_bytes)
        assert row[1:] == [f"{size / GIB:.1f}" for size in sizes], row[0]


def test_checkpoint_sizes() -> None:
    told = " ".join((ROOT / "tim_ds" / "trainer" / "README.md").read_text().split())
    found = estimate(load_recipe(XL), engine("zero2"), Ranks(8, 8))
    size = found.checkpoint_bytes
    assert size == 16 * found.parameters and "16 bytes a parameter with one average" in told
    assert f"the whole state of the 865M model ({size / 1e9:.2f} GB" in told
    assert f"**the whole, 8 ranks of {size / 8e9:.2f} GB**" in told
    assert f"half, 8 ranks of {size / 16e9:.2f} GB" in told
    assert f"the {size / 2e9:.2f} GB of one rank" in told
