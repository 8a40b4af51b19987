"""Training, sampling and kernels on a CUDA device that computes nothing: devices, dtypes, waits and launches.

What the values are is for other tests; here the largest packs cost no memory (`tests/fake_cuda.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes
from tqdm import tqdm

from data_pipeline.batch import Latents, PackedBatch
from data_pipeline.encoders.autoencoder import load_dc_ae
from tests.data_pipeline.tiny_models import save_autoencoders
from tests.fake_cuda import DEVICE, HostWaits, Seen, fake_cuda
from tests.kernels.launches import Launch
from tests.networks import TEXT_WIDTH, export_of
from tim_ds.config.load import load_recipe
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import meta_network
from tim_ds.model.tim import TiM
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig, TransportConfig, WeightConfig
from tim_ds.pipeline import Request, TiMPipeline
from tim_ds.sampler import transition
from tim_ds.trainer.inputs import Prepare, StepInputs
from tim_ds.trainer.metrics import Sums
from tim_ds.trainer.step import TransitionStep
from tim_kernels import use_path
from tim_kernels.offsets import PROGRAMS
from tim_kernels.shipped import variants
from tim_kernels.varlen_attention import op
from tim_kernels.varlen_attention.backends import Situation

BF16 = torch.bfloat16
TEXT_DIM, Z_DIM, WORDS = 64, 24, 5
# The XL network's widths: kernels are launched in their shipped forms.
MODEL = ModelConfig(
    condition="text", in_channels=32, hidden_size=1152, depth=2, num_heads=16, encoder_depth=1,
    text_dim=TEXT_DIM, z_dim=Z_DIM,
)  # fmt: skip
GRIDS = ((32, 32), (16, 24), (64, 40), (8, 8)) * 4
"""16,128 tokens: enough that copies of a row a token do not fit in what CUDA stages."""
PAIRED = ObjectiveConfig()
OBJECTIVES = {
    "paired": PAIRED,
    "paired, guided, aligned": ObjectiveConfig(
        guided_target=GuidedTargetConfig(start=0.0, end=1.0), repa_weight=0.5
    ),
    "dde, by image, vp": ObjectiveConfig(
        derivative="dde",
        transport=TransportConfig(kind="vp"),
        weight=WeightConfig(adaptive_over="image", time_type="soft_min_snr"),
    ),
}


@contextmanager
def device(monkeypatch: pytest.MonkeyPatch, *, may_wait: bool = False) -> Iterator[Seen]:
    """A fake H200 on which torch's varlen kernel is trusted."""

    def situation(device: torch.device, dtype: torch.dtype, head_dim: int) -> Situation:
        return Situation(device, (9, 0), dtype, head_dim)

    monkeypatch.setattr(Situation, "of", staticmethod(situation))
    monkeypatch.setattr(op, "_refusal", lambda name, _: None if name == "torch_varlen" else "not here")
    with fake_cuda(monkeypatch, may_wait=may_wait) as seen:
        yield seen


def network_on_device(
    config: ModelConfig = MODEL, dtype: torch.dtype = torch.float32, *, checkpoint_blocks: bool = False
) -> TiM:
    with _disable_current_modes():
        network = meta_network(config).to(dtype)
    network = network.to_empty(device=DEVICE)
    network.checkpoint_blocks = checkpoint_blocks
    return network


def inputs_on_device(
    objective: ObjectiveConfig, grids: Sequence[tuple[int, int]] = GRIDS, model: ModelConfig = MODEL
) -> StepInputs:
    """As the loader leaves them, pinned, and as a step moves them."""
    tokens, images = sum(h * w for h, w in grids), len(grids)
    is_text = model.condition == "text"
    stored = torch.zeros(tokens * model.token_channels, dtype=torch.float16)
    batch = PackedBatch(
        latents=Latents(stored, tuple(grids), model.patch_size, model.in_channels),
        text_LE=torch.zeros(images * WORDS, TEXT_DIM) if is_text else None,
        text_lengths=(WORDS,) * images if is_text else None,
        labels_S=None if is_text else torch.zeros(images, dtype=torch.int64),
        sample_ids=tuple(range(images)),
        keys=tuple(map(str, range(images))),
        epoch=0,
        step=0,
        images_in_step=images,
        dropped_S=(False,) * images,
        features_TZ=torch.zeros(tokens, Z_DIM, dtype=BF16) if objective.repa_weight else None,
    )
    null = {"null_states_LE": torch.zeros(1, TEXT_DIM)} if is_text else {"null_label": 3}
    return Prepare(objective, 0, **null)(batch).pin_memory().to(DEVICE)  # type: ignore[arg-type]


def step_on_device(objective: ObjectiveConfig, network: TiM) -> TransitionStep:
    teacher = None if objective.guided_target is None else network_on_device(network.config)
    return TransitionStep(
        network, objective, latent_channels=network.config.in_channels, world_size=1, teacher=teacher
    )


REFUSED = {
    "a number": (lambda x: x.sum().item(), DataDependentOutputException),
    "a branch": (lambda x: bool(x.sum() > 0), DataDependentOutputException),
    "a size": (lambda x: x.nonzero(), DynamicOutputShapeException),
    "to the host": (lambda x: x.cpu(), HostWaits),
    "from the host": (lambda _: torch.ones(8).to(DEVICE), HostWaits),
    "pageable memory": (lambda _: torch.ones(2**15).to(DEVICE, non_blocking=True), HostWaits),
    "an index of the host": (lambda x: x[torch.tensor([0, 2])], HostWaits),
    "two devices": (lambda x: x + torch.ones(8), RuntimeError),
}


@pytest.mark.parametrize(("ask", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_the_device_refuses_what_a_real_one_waits_for_or_cannot_do(monkeypatch, ask, error):
    with device(monkeypatch):
        x = torch.zeros(4, 8, device=DEVICE)
        assert x.is_cuda and (x @ x.t()).device == DEVICE
        assert torch.ones(2**15).pin_memory().to(DEVICE, non_blocking=True).is_cuda
        with pytest.raises(error):
            ask(x)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_training_step_stays_on_the_device_and_never_waits(monkeypatch, objective):
    with device(monkeypatch) as seen, _autocast():
        _train(network_on_device(), objective)
    tokens = sum(h * w for h, w in GRIDS)
    # Of what has a row a token, only times and coefficients made of them are in float64: one value a row.
    assert seen.float64_elements == tokens
    products = [p for p in seen.products if p.longest >= tokens]
    # Of such products those with the channels of a token alone are in float32: the final layer's, and here,
    # where autocast does not reach the device, the patch embedding's.
    assert {p.dtype for p in products if p.shortest > MODEL.token_channels} == {BF16}
    assert torch.float32 in {p.dtype for p in products}
    assert len(seen.launches) > 20
    assert not _not_compiled_ahead(seen.launches)


def _not_compiled_ahead(launches: Sequence[Launch]) -> set[str]:
    """Kernels that ran and are not among those that were compiled ahead of time, and looked at."""
    shipped = variants()
    unknown = (x for x in launches if not any(x.is_of(v) for v in shipped))
    return {f"{x.kernel.fn.__module__}.{x.kernel.fn.__name__} {x.constants} {x.types}" for x in unknown}


RECIPES = {p.stem: p for p in sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml"))}
EXAMPLES = {name for name in RECIPES if name.startswith("handwriting")}
"""A network of width 128 for a laptop, compiled as it runs."""
PACKS: dict[str, dict[str, Any]] = {
    "some": {},
    "no": {"diffusion_share": 1.0, "consistency_share": 0.0},
    "all": {"diffusion_share": 0.0, "diffusion_time": PAIRED.diffusion_time},
}
"""Which images of a pack have r < t."""


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in EXAMPLES])
def test_what_a_recipe_launches_was_compiled_ahead(monkeypatch, name):
    recipe = load_recipe(RECIPES[name])
    model = replace(
        recipe.model,
        depth=2,
        encoder_depth=1,
        text_dim=TEXT_DIM if recipe.model.condition == "text" else None,
        num_classes=3 if recipe.model.condition == "class" else None,
        z_dim=Z_DIM if recipe.model.z_dim else None,
    )
    with device(monkeypatch) as seen, _autocast():
        network = network_on_device(model)
        for shares in PACKS.values():
            objective = replace(recipe.objective, **shares)
            inputs = inputs_on_device(objective, GRIDS[:8], model)
            step_on_device(objective, network)(inputs).loss.backward()
    assert len(seen.launches) > 60
    assert not _not_compiled_ahead(seen.launches)


def test_the_definitions_do_so_too_in_a_bfloat16_network(monkeypatch):
    model = replace(MODEL, condition="class", text_dim=None, num_classes=3, z_dim=None, depth=1)
    guided = GuidedTargetConfig(start=0.0, end=1.0)
    objective = ObjectiveConfig(derivative="dde", diffusion_share=0.5, guided_target=guided)
    with device(monkeypatch) as seen, use_path("torch"):
        network = network_on_device(model, BF16)
        _train(network, objective, GRIDS[:4])
    assert not seen.launches
    assert sum(p.dtype == BF16 for p in seen.products if p.longest >= 4032) > 10


def _train(network: TiM, objective: ObjectiveConfig, grids: Sequence[tuple[int, int]] = GRIDS) -> None:
    """A micro-step, its sums, and the update of masters and average; the loss is float32 on the device."""
    inputs = inputs_on_device(objective, grids, network.config)
    assert 0 < len(inputs.times.transition_indices) < len(grids)
    step = step_on_device(objective, network)
    output = step(inputs)
    output.loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    sums = Sums(step.transport, DEVICE)
    sums.add(inputs, output.terms)
    sums.end_step(applied=True, grad_norm=torch.nn.utils.get_total_norm(gradients))
    _update([p.detach().float() for p in network.parameters()])
    assert output.loss.device == DEVICE and output.loss.dtype == torch.float32
    for name, parameter in network.named_parameters():
        is_unused = name.startswith("projector") and not objective.repa_weight
        dtype = None if parameter.grad is None else parameter.grad.dtype
        assert dtype == (None if is_unused else parameter.dtype), name


def _update(masters: list[Tensor]) -> None:
    """AdamW's fused step and the average, as `Engine` and `Ema` make them of float32 masters."""
    averages = [x.clone() for x in masters]
    for master in masters:
        master.requires_grad_().grad = torch.zeros_like(master)
    torch.optim.AdamW(masters, fused=True).step()
    with torch.no_grad():
        torch._foreach_lerp_(averages, masters, 0.1)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def _autocast() -> Iterator[None]:
    """torch.autocast for a device that torch does not find."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BF16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


LARGEST = {"256 px": ((8, 8),) * 4096, "4096 px": ((128, 128),) * 16}
"""262,144 tokens each; for an autoencoder with a stride of 32."""


@pytest.mark.parametrize("grids", LARGEST.values(), ids=LARGEST.keys())
def test_launches_of_the_largest_packs_are_within_the_limits_of_a_device(monkeypatch, grids):
    with device(monkeypatch) as seen:
        network = network_on_device(replace(MODEL, depth=1), BF16, checkpoint_blocks=True)
        step_on_device(PAIRED, network)(inputs_on_device(PAIRED, grids)).loss.backward()
        kernels = {launch.kernel for launch in seen.launches}
        assert len(kernels) > 12
        for launch in seen.launches:
            x, y, z = (*launch.grid, 1, 1)[:3]
            assert 1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16, launch
            # On which it rests that some offsets are taken in 32 bits.
            assert all(n <= PROGRAMS[axis] for n, axis in zip((x, y, z), "xyz", strict=True)), launch
            for name, value in launch.tensors.items():
                assert value.device == DEVICE, f"{launch.kernel}: {name}"
                # Within a row all is adjacent; the rows lie as the kernel is told, or one behind the other.
                stride = launch.numbers.get(name.replace("_ptr", "_stride"), value[0].numel())
                assert value.stride()[1:] == value[0].contiguous().stride(), f"{launch.kernel}: {name}"
                assert value.shape[0] == 1 or value.stride(0) == stride, f"{launch.kernel}: {name}"
                # What Triton would compile anew for an address that no vector of 16 bytes divides.
                assert value.storage_offset() * value.element_size() % 16 == 0, f"{launch.kernel}: {name}"


def test_a_run_draws_with_pretrained_encoders_on_the_device_of_its_network(monkeypatch, tmp_path):
    """They wait on the host: the device's memory is the training's."""
    save_autoencoders(tmp_path)
    autoencoder = load_dc_ae(str(tmp_path / "dc_ae"))
    model = autoencoder.model.to("meta")

    def to(place: str | torch.device) -> None:
        # torch does not move parameters that are not real.
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(value.shape, device=place)))

    monkeypatch.setattr(model, "to", to)
    export = replace(export_of(), model=replace(MODEL, in_channels=4, text_dim=TEXT_WIDTH))
    with device(monkeypatch, may_wait=True):
        model.to("cpu")
        pipe = TiMPipeline(network_on_device(export.model), export, autoencoder=autoencoder)
        latent = torch.zeros(1, 4, 3, 5, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"cuda:0.*cpu"):
            pipe.autoencoder.decode(latent)
        with pipe.encoders_beside_network():
            assert pipe.autoencoder.decode(latent).device == DEVICE
        assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling_waits_for_its_noise_and_its_check_alone(monkeypatch, scale):
    monkeypatch.setattr(transition, "_check_finite", lambda *_: None)
    export = replace(export_of(), model=replace(MODEL, in_channels=16, z_dim=None, text_dim=TEXT_WIDTH))
    with device(monkeypatch, may_wait=True) as seen:
        pipe = TiMPipeline(network_on_device(export.model, BF16).eval(), export)
        seen.waits.clear()
        config = replace(export.sampler, num_steps=4, cfg_scale=scale, stochasticity=0.5)
        grids = ((32, 32), (16, 24))
        sizes = tuple((4 * h, 4 * w) for h, w in grids)
        request = Request(("a three", "a one"), sizes, (3, 4), config, (None, None))
        latents, nfe = pipe._sample(request, grids, tqdm(disable=True), None)
        pictures = [pipe.autoencoder.decode(x[None])[0] for x in latents]
    assert [p.shape[1:] for p in pictures] == [(128, 128), (64, 96)] and nfe == 4 * scale
    assert {p.device for p in pictures} == {DEVICE} and len(seen.launches) > 20
    # States are kept in float64; the network never sees them so.
    assert {p.dtype for p in seen.products} == {BF16, torch.float32}
