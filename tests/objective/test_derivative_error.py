"""The tables of derivative error and cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.index import build_index
from data_pipeline.schema import Sample
from data_pipeline.shards import write_shard
from tests.model.networks import class_config, random_network, text_config
from tim_ds.config.load import load_recipe
from tim_ds.model.export_folder import Export, SourceConfig, write_export
from tim_ds.objective import derivative_error
from tim_ds.objective.config import TransportConfig
from tim_ds.objective.derivative_error import build_case, describe, measure_cost, measure_errors, random_pack
from tim_ds.objective.transport import build_transport

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def test_errors_rank_as_rounding_says() -> None:
    config = text_config()
    network = random_network(config, dtype=torch.float32)
    case = build_case(
        network, build_transport(TransportConfig()), random_pack(config, (3, 3), 3, 4, seed=1), seed=0
    )
    before = {name: p.clone() for name, p in network.named_parameters()}
    rows = measure_errors(case, (0.02, 0.005))
    found = {(row.estimator, row.precision, row.step): row.error for row in rows}
    assert len(found) == 9
    # float32: rounding for the carried derivative, e^2 (a factor of 16) for the difference
    assert found["paired", "float32", None] < 1e-5
    ratio = found["dde", "float32", 0.02] / found["dde", "float32", 0.005]
    assert ratio == pytest.approx(16, rel=0.3)
    # bfloat16 products: independent roundings of the two sides, divided by 2e
    assert found["paired", "bf16 products", None] < 0.03
    for precision in ("bf16 products", "bf16 everywhere"):
        difference = found["dde", precision, 0.005]
        assert difference > 5 * found["paired", precision, None]
        assert difference > 2 * found["dde", precision, 0.02]
    assert found["dde", "bf16 everywhere", 0.005] > found["dde", "bf16 products", 0.005]
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert not any(module._forward_hooks for module in network.modules()), "a rounding hook was left behind"


def test_flops_of_a_step() -> None:
    config = class_config(hidden_size=64, depth=4, patch_size=1, z_dim=None)
    network = random_network(config, dtype=torch.float32)
    case = build_case(
        network, build_transport(TransportConfig()), random_pack(config, (6, 6), 4, 0, seed=1), seed=0
    )
    rows = {row.estimator: row for row in measure_cost(case, repeats=1)}
    assert rows["flow matching"].flops == rows["flow matching"].seconds == 1.0
    # Two forwards on half the images, of three forwards' worth in all.
    assert rows["dde"].flops == pytest.approx(1 + 1 / 3, abs=0.02)
    # One forward of the linear layers on half the images, and five products for the attention's two.
    assert 1 + 1 / 6 - 0.02 < rows["paired"].flops < 1 + 1 / 6 + 0.06
    assert all(row.seconds > 0 and row.memory is None for row in rows.values())


def test_the_command_reads_a_run_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = text_config(z_dim=None)
    export = Export(
        model=config,
        transport=TransportConfig(kind="trigflow"),
        step=0,
        source=SourceConfig(kind="run", name="test"),
    )
    write_export(tmp_path / "export", export, random_network(config, dtype=torch.float32).state_dict())
    shards = tmp_path / "shards"
    shards.mkdir()
    samples = [
        Sample(key=f"{i}", latent=torch.randn(4, 2 + i % 2, 3), states=torch.randn(1 + i % 3, 12))
        for i in range(6)
    ]
    write_shard(shards / "shard-000000.tar", samples)
    build_index(shards, progress=False).save()
    # The folder of a run; what else is taken: tests/test_sources.py.
    command = [str(tmp_path), "--data", str(shards), "--steps", "0.005", "--repeats", "1"]
    assert derivative_error.main([*command, "--images", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| dde |") == 4 and printed.count("| paired |") == 4
    assert "| dde | bf16 everywhere | 0.005 |" in printed
    assert derivative_error.main([*command, "--images", "7"]) == 2
    assert "expected at least 7" in capsys.readouterr().err


@pytest.mark.slow  # 11.4 GB of memory: the weights in float32 and in float64
def test_on_the_865m_network_the_carried_derivative_is_within_two_percent_in_bfloat16() -> None:
    recipe = load_recipe(RECIPES / "t2i_xl.yaml")
    network = derivative_error.random_network(recipe.model, seed=0)
    pack = random_pack(recipe.model, (4, 4), 2, 8, seed=0)
    case = build_case(network, build_transport(recipe.objective.transport), pack, seed=0)
    assert describe(case).startswith("865.0M parameters (1152 wide, 28 blocks, 16 heads, AdaLN 384)")
    found = {row.precision: row.error for row in measure_errors(case, ())}
    assert found["float32"] < 1e-5
    assert 1e-3 < found["bf16 products"] < found["bf16 everywhere"] < 0.02


def test_the_command_takes_network_and_transport_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (RECIPES / "t2i_xl.yaml").read_text()
    small = {"hidden_size: 1152": "hidden_size: 24", "depth: 28": "depth: 2", "num_heads: 16": "num_heads: 2"}
    small |= {"adaln_hidden: 384": "adaln_hidden: 10", "kind: ot_fm": "kind: trigflow"}
    for old, new in small.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(text)
    command = ["--recipe", str(recipe), "--images", "2", "--grid", "2x3", "--steps", "0.005"]
    assert derivative_error.main([*command, "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "(24 wide, 2 blocks, 2 heads, AdaLN 10); 2 images, 12 tokens; trigflow" in printed
    assert derivative_error.main(["--recipe", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: the recipe cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        derivative_error.main(["export", *command])


def test_a_malformed_grid_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert derivative_error.main(["--grid", "8"]) == 2
    assert "--grid: expected HEIGHTxWIDTH" in capsys.readouterr().err
