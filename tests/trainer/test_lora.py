"""Adapters: frozen weights, the same run at every ZeRO stage, an adapter that peft loads, merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.trainer.cases import ADAPTED, ALIGNED, PAIRED, write_base
from tests.trainer.conftest import Groups
from tests.trainer.plain import train_plainly
from tests.trainer.ranks import recipe
from tests.trainer.test_arrangements import LOSS_TOLERANCE, WEIGHT_TOLERANCE, check_same
from tim_ds.config.recipe import Recipe
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.export_folder import load_network, read_export
from tim_ds.model.tim import TiM
from tim_ds.packed import Direction, Segments, TextCondition
from tim_ds.trainer.assembly import build_root
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.config import AdapterConfig
from tim_ds.trainer.export import export_checkpoint
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.lora import add_adapters, merged, write_adapter
from tim_ds.trainer.metrics import read_metrics

LORA = AdapterConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "export", shards)


def fine_tuning(shards: Path, base: Path, *overrides: str) -> Recipe:
    return recipe(shards, f"train.init_from={base}", *overrides)


def adapted(base: Path, *, moved: bool) -> TiM:
    """The base network with adapters, in float64; `moved`: as after training, no matrix of them zero."""
    network, _ = load_network(base, dtype=torch.float64)
    add_adapters(network, LORA)
    generator = torch.Generator().manual_seed(3)
    if moved:
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.2, generator=generator)
    return network.eval()


def evaluate(network: nn.Module) -> tuple[Tensor, Tensor]:
    """F and its carried derivative on two pictures."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    segments = Segments.from_grids([(2, 3), (3, 2)])
    condition = TextCondition(drawn(4, 8), Segments.from_lengths([3, 1]))
    times = torch.tensor([0.7, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)
    direction = Direction((0,), drawn(6, 4), torch.ones(1, dtype=torch.float64))
    with torch.no_grad():
        output = network(drawn(12, 4), *times, segments, condition, direction=direction)
    assert output.dF_TC is not None
    return output.F_TC, output.dF_TC


def adapter_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(base: Path) -> None:
    plain, _ = load_network(base, dtype=torch.float64)
    network = adapted(base, moved=False)
    for here, there in zip(evaluate(network), evaluate(plain), strict=True):
        assert torch.equal(here, there)
    trained = adapter_of(network)
    # Two matrices on each of eight targets of two blocks.
    assert len(trained) == 2 * 8 * 2
    assert all(name.startswith("blocks.") and ".lora_" in name for name in trained)


def test_merged_weights_compute_what_the_adapter_computes_derivative_included(base: Path) -> None:
    network = adapted(base, moved=True)
    plain, _ = load_network(base, dtype=torch.float64)
    before = evaluate(plain)
    weights = plain.state_dict()
    whole = merged(lambda name, _: weights[name], adapter_of(network), LORA)
    plain.load_state_dict({name: whole(name, like) for name, like in weights.items()})
    for here, there, old in zip(evaluate(network), evaluate(plain), before, strict=True):
        # Merged weights are kept in float32.
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
        assert float((here - old).abs().max()) > 0.1


def test_peft_loads_the_written_adapter(base: Path, tmp_path: Path) -> None:
    import peft

    network = adapted(base, moved=True)
    state = {name: value.float() for name, value in adapter_of(network).items()}
    write_adapter(tmp_path / "adapter", state, LORA, str(base))
    plain, _ = load_network(base, dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    whole = loaded.merge_and_unload()
    for here, there in zip(evaluate(network), evaluate(whole), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (content["peft_type"], content["r"], content["base_model_name_or_path"]) == ("LORA", 2, str(base))


@pytest.mark.parametrize(
    "variant", [*(f"adapted_{stage}" for stage in range(3)), "adapted_paired_3", "continued"]
)
def test_adapters_train_like_a_plain_loop_at_every_stage(groups: Groups, shards: Path, variant: str) -> None:
    found = groups.results(2, "start_from_weights")[0]
    start = Path(found["base"])
    paired = (PAIRED,) if "paired" in variant else ()
    reference = train_plainly(fine_tuning(shards, start, *ADAPTED, *paired))
    run = groups.folder_of(2, "start_from_weights") / variant
    lines = read_metrics(run)
    assert [line["denoising"] for line in lines] == pytest.approx(reference.denoising, rel=LOSS_TOLERANCE)
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(reference.ema) == 32
    for name, value in reference.ema.items():
        written = stored["base_model.model." + name.replace(".default.", ".")]
        assert written.numpy() == pytest.approx(value.numpy(), abs=WEIGHT_TOLERANCE), name
    moved = max(float(value.abs().max()) for name, value in stored.items() if "lora_B" in name)
    assert moved > 100 * WEIGHT_TOLERANCE
    export, state = read_export(run / "export")
    assert export.step == 4
    weights = read_export(start)[1]
    whole = merged(lambda name, _: weights[name], reference.ema, LORA)
    for name, like in weights.items():
        expected = whole(name, like).numpy()
        assert state[name].numpy() == pytest.approx(expected, abs=WEIGHT_TOLERANCE), name


def test_checkpoints_of_adapters_hold_adapters_alone(groups: Groups) -> None:
    groups.results(2, "start_from_weights")
    (newest, *_) = find_checkpoints(groups.folder_of(2, "start_from_weights") / "continued" / "checkpoints")
    names = set()
    for path in newest.path.glob("rank_*.safetensors"):
        names |= {key.split("@")[0] for key in load_file(path) if not key.startswith("own/")}
    assert names and all(".lora_" in name for name in names)
    assert newest.manifest["initial_weights"].startswith("blake2b:")


def test_a_checkpoint_of_an_adapter_is_exported_merged_or_alone(groups: Groups, tmp_path: Path) -> None:
    """As the run wrote them at its end; from any other step, and with the trained weights, likewise."""
    base = groups.results(2, "start_from_weights")[0]["base"]
    run = groups.folder_of(2, "start_from_weights") / "continued"
    last, first = find_checkpoints(run / "checkpoints")
    _, at_end = read_export(run / "export")
    export_checkpoint(last, tmp_path / "last")
    for name, value in read_export(tmp_path / "last")[1].items():
        assert torch.equal(value, at_end[name]), name
    export_checkpoint(last, tmp_path / "alone", layout="adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (run / "adapter" / name).read_bytes()

    export_checkpoint(first, tmp_path / "first", weights="raw", layout="diffusers")
    stored = load_file(tmp_path / "first" / "transformer" / "diffusion_pytorch_model.safetensors")
    start = read_export(base)[1]
    assert stored.keys() == start.keys()
    target = "blocks.0.attn.qkv.weight"
    moved, kept = stored[target] - start[target], stored["final_layer.linear.weight"]
    # A product of rank 2, and not that of the end.
    assert torch.linalg.matrix_rank(moved, atol=1e-5) == 2
    assert not torch.equal(stored[target], at_end[target])
    assert torch.equal(kept, start["final_layer.linear.weight"])


def test_an_adapter_is_not_merged_into_other_weights(groups: Groups, tmp_path: Path) -> None:
    groups.results(2, "start_from_weights")
    folder = groups.folder_of(2, "start_from_weights")
    (checkpoint, *_) = find_checkpoints(folder / "continued" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"its adapter belongs to weights blake2b:.*/other"):
        export_checkpoint(checkpoint, tmp_path / "out", base=str(folder / "other"))
    assert not (tmp_path / "out").exists()
    (whole, *_) = find_checkpoints(folder / "whole_2" / "checkpoints")
    with pytest.raises(CheckpointError, match="the run trained all weights"):
        export_checkpoint(whole, tmp_path / "out", layout="adapter")


def test_an_adapter_is_not_continued_on_other_weights(groups: Groups) -> None:
    refusal = groups.results(2, "start_from_weights")[0]["refusal"]
    assert "its adapter belongs to weights blake2b:" in refusal and "/other" in refusal


def test_a_whole_network_starts_from_the_weights(groups: Groups, shards: Path) -> None:
    found = groups.results(2, "start_from_weights")[0]
    reference = train_plainly(fine_tuning(shards, Path(found["base"])))
    run = groups.folder_of(2, "start_from_weights") / "whole_2"
    # Blocks that are no identity magnify rounding: 2e-5 seen in a gradient norm.
    lines = read_metrics(run)
    assert [line["denoising"] for line in lines] == pytest.approx(reference.denoising, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(reference.grad_norms, rel=1e-4)
    state = load_file(run / "export" / "tim.safetensors")
    for name, value in reference.ema.items():
        assert state[name].numpy() == pytest.approx(value.numpy(), abs=1e-4), name
    fresh = train_plainly(recipe(shards))
    assert reference.denoising[0] != pytest.approx(fresh.denoising[0], rel=1e-2)


def test_aligned_training_is_that_of_a_plain_loop(groups: Groups, shards: Path) -> None:
    reference = train_plainly(recipe(shards, *ALIGNED))
    run = groups.folder_of(2, "start_from_weights") / "aligned_3"
    groups.results(2, "start_from_weights")
    check_same(run, reference)
    alignment = [line["alignment"] for line in read_metrics(run)]
    assert all(value > 0 for value in alignment) and alignment[-1] < alignment[0]


def test_alignment_reaches_the_projector_and_the_blocks_up_to_the_tapped_one(
    base: Path, shards: Path
) -> None:
    # The base network, so that no gate is zero; the loss is the alignment alone.
    from tests.trainer.plain import steps_of

    settings = recipe(shards, *ALIGNED)
    root = build_root(settings, 1, read_initial(str(base)))
    batch = steps_of(settings, num_steps=1)[0][0]
    terms = root(batch).terms
    assert bool((terms.alignment_S > 0).all())
    output = root.network(
        batch.x_TC,
        batch.times.t_S.float(),
        batch.times.r_S.float(),
        batch.segments,
        batch.condition,
        with_features=True,
    )
    output.features_TZ.square().sum().backward()
    reached = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, p in root.network.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    assert {"projector.0", "projector.4", "blocks.0", "x_embedder.proj"} <= reached
    assert "blocks.1" not in reached and not any(name.startswith("final_layer") for name in reached)


def test_a_target_that_the_network_lacks_is_refused(base: Path) -> None:
    network, _ = load_network(base)
    del network.blocks[0].mlp
    with pytest.raises(ConfigError, match=r"train\.adapter\.targets: 'mlp\.fc1_g' is not in the blocks"):
        add_adapters(network, LORA)
