from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from data_pipeline.config import AutoencoderConfig
from tests.config.recipes import CLASSES, TEXT, class_recipe, recipe
from tim_ds.config.load import load_recipe, parse_recipe
from tim_ds.config.recipe import (
    from_dict,
    last_time,
    latent_channels,
    latent_stride,
    parse_size,
    recipe_hash,
    to_dict,
)
from tim_ds.errors import ConfigError, TimeDomainError
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig, TransportConfig, WeightConfig

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))


def refusal(*overrides: str, of=recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        of(*overrides)
    return str(caught.value)


PATCHES = ("data.image_encoder={kind: patches, width: 16}",)
ALIGNED = ("objective.repa_weight=0.5", "model.z_dim=64", "model.encoder_depth=1")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_right_and_named_like_its_file(path: Path):
    assert load_recipe(path).name == path.stem


def test_shipped_recipes_were_found():
    assert {"t2i_xl", "handwriting_tim", "handwriting_flow"} <= {path.stem for path in RECIPES}


def test_the_two_handwriting_recipes_train_the_same_network_on_the_same_data_and_budget():
    folder = RECIPES[0].parent
    tim, flow = (load_recipe(folder / f"handwriting_{kind}.yaml") for kind in ("tim", "flow"))
    assert flow.model == tim.model
    assert flow.data == tim.data
    assert (flow.train.steps, flow.train.seed) == (tim.train.steps, tim.train.seed)
    assert flow.objective.diffusion_share == 1.0


def test_the_default_objective_is_the_exact_derivative_with_its_weights():
    """Chosen together (LOG.md, 2026-11-22). The authors' recipes write theirs out, see below."""
    objective = ObjectiveConfig()
    assert objective.derivative == "paired"
    assert (objective.diffusion_share, objective.consistency_share) == (0.75, 0.05)
    assert objective.diffusion_time == "first"
    assert (objective.weight.adaptive, objective.weight.adaptive_over) == (True, "kind")
    recipe_of_the_study = load_recipe(RECIPES[0].parent / "handwriting_tim.yaml")
    assert recipe_of_the_study.objective == replace(objective, directional=False)


def test_no_recipe_pairs_an_exact_derivative_with_the_authors_weights():
    objectives = {path.stem: load_recipe(path).objective for path in RECIPES}
    exact = {
        name: objective
        for name, objective in objectives.items()
        if objective.derivative == "paired" and objective.diffusion_share < 1.0
    }
    assert {"handwriting_tim", "t2i_xl_native", "t2i_xl_finetune", "t2i_xl_lora"} <= set(exact)
    for name, objective in exact.items():
        shares = (objective.diffusion_share, objective.consistency_share)
        assert shares == (0.75, 0.05), name
        assert not objective.weight.adaptive or objective.weight.adaptive_over == "kind", name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=a/b"], "name: expected letters, digits"),
        (["name=''"], "name: expected letters, digits"),
        (["name=..\\n"], "name: expected letters, digits"),
        (["data.text_encoder=null"], "data.text_encoder: required when model.condition is 'text'"),
        (
            ["data.text_encoder.width=17"],
            "model.text_dim: expected 17, the width of data.text_encoder, received 16",
        ),
        (["model.num_classes=10"], "model.num_classes: belongs to condition 'class'"),
        (["data.text_encoder.path=x"], "data.text_encoder.path: kind 'words' has no weights"),
        (
            ["data.text_encoder={kind: gemma, path: x, width: 16}"],
            "data.text_encoder.width: belongs to kind 'words', not to gemma",
        ),
        (["data.text_encoder.padding=constant"], "data.text_encoder.padding: only gemma"),
        (["model.in_channels=3"], "model.in_channels: expected 4, the channels of data.autoencoder (pixels)"),
        (["data.autoencoder.factor=4"], "model.in_channels: expected 16"),
        (["data.autoencoder={kind: dc_ae, path: x}"], "model.in_channels: expected 32"),
        (["data.autoencoder.path=x"], "data.autoencoder.path: kind 'pixels' has no weights"),
        (
            ["data.autoencoder={kind: sd_vae, path: x, factor: 4}"],
            "data.autoencoder.factor: belongs to kind 'pixels', not to sd_vae",
        ),
        (
            ["data.autoencoder={kind: sd_vae, path: x, channels: 1}"],
            "data.autoencoder.channels: belongs to kind 'pixels', not to sd_vae",
        ),
        (["data.autoencoder={kind: dc_ae}"], "data.autoencoder.path: required for kind dc_ae"),
        (["data.tokens_per_pack=0"], "data.tokens_per_pack: expected at least 1, received 0"),
        (["data.packs_per_step=0"], "data.packs_per_step: expected at least 1, received 0"),
        (["data.workers=-1"], "data.workers: expected at least 0, received -1"),
        (["data.shards=''"], "data.shards: expected a folder or a URL"),
        (["data.text_encoder.max_tokens=0"], "data.text_encoder.max_tokens: expected at least 1, received 0"),
        (
            ["train.optimizer.final_lr_share=0.1"],
            "train.optimizer.final_lr_share: belongs to schedule 'cosine'",
        ),
        (
            ["objective.diffusion_share=1", "objective.consistency_share=0.3", "sampler.mode=diffusion"],
            "objective.consistency_share: diffusion_share 1 leaves no image for it",
        ),
        (
            ["objective.weight={time_type: constant, warp: odds}"],
            "objective.weight.time_type: 'constant' reads neither warp nor of_interval",
        ),
        (
            ["objective.derivative=dde", "objective.derivative_step=0.2"],
            "objective.derivative_step: expected at most 0.1",
        ),
        (
            ["objective.guided_target={end: 1.5}"],
            "objective.guided_target.end: expected a time of ot_fm",
        ),
        (["objective.transport.kind=edm"], "objective.weight.warp: tangent is valid on"),
        (["objective.transport.kind=ve"], "objective.weight.warp: tangent is valid on"),
        (
            ["objective.transport.kind=trigflow", "objective.weight.warp=odds"],
            "objective.weight.warp: odds is valid on",
        ),
        (
            ["objective.derivative=jvp", "objective.derivative_step=1e-3"],
            "objective.derivative_step: belongs to derivative 'dde'; 'jvp' has no step",
        ),
        (
            ["objective.derivative=paired", "objective.derivative_step=1e-3"],
            "objective.derivative_step: belongs to derivative 'dde'; 'paired' has no step",
        ),
        (["objective.repa_weight=0.5"], "model.z_dim: required when objective.repa_weight is above 0"),
        (
            ["objective.repa_weight=0.5", "model.z_dim=8", "model.encoder_depth=1"],
            "data.image_encoder: required when objective.repa_weight is above 0",
        ),
        (
            ["data.image_encoder={kind: patches, width: 8}"],
            "data.image_encoder: objective.repa_weight is 0, so nothing reads its features",
        ),
        (
            ["objective.repa_weight=0.5", "model.z_dim=8", "model.encoder_depth=1", *PATCHES],
            "model.z_dim: expected 16, the width of data.image_encoder, received 8",
        ),
        (
            ["data.image_encoder={kind: dino, path: x, width: 8}", *ALIGNED],
            "data.image_encoder.width: belongs to kind 'patches', not to dino",
        ),
        (
            ["data.image_encoder={kind: patches, dtype: float32}", *ALIGNED],
            "data.image_encoder.dtype: kind 'patches' has no weights",
        ),
        (
            ["objective.guided_target={start: 2, end: 3}"],
            "objective.guided_target.start: expected a time of ot_fm, 0 to 1, received 2",
        ),
        (
            ["objective.guided_target={}", "data.caption_dropout=0"],
            "data.caption_dropout: expected above 0, because objective.guided_target",
        ),
        (["sampler.cfg_scale=2", "data.caption_dropout=0"], "sampler.cfg_scale: guidance needs the network"),
        (
            ["sampler.stochasticity=0.2", "objective.transport.kind=vp"],
            "sampler.stochasticity: defined for ot_fm and tim, not for vp",
        ),
        (
            ["objective.diffusion_share=1"],
            "sampler.mode: objective.diffusion_share 1 never shows the network",
        ),
        (
            ["train.preview.prompts=[a]", "train.preview.sizes=[8x]"],
            "train.preview.sizes[0]: expected HEIGHTxWIDTH in pixels",
        ),
        (
            ["train.preview.prompts=[a, b]", "train.preview.sizes=[8x8, 8x9]"],
            "train.preview.sizes[1]: expected multiples of 2 pixels (autoencoder 2 x patch 1), received 8x9",
        ),
        (
            ["train.preview.prompts=[a]", "train.preview.sizes=[8x10]", "model.patch_size=2"],
            "train.preview.sizes[0]: expected multiples of 4 pixels (autoencoder 2 x patch 2), received 8x10",
        ),
        (["train.preview.prompts=[a]"], "train.preview.sizes: expected one size a prompt (1), received 0"),
        (["train.preview.every_steps=5"], "train.preview.prompts: required when train.preview.every_steps"),
        (["train.preview.num_steps=[1, 0]"], "train.preview.num_steps[1]: expected at least 1, received 0"),
        (["sampler.num_steps=0"], "sampler.num_steps: expected at least 1, received 0"),
        (
            ["sampler.cfg_interval=[1.5, 2]"],
            "sampler.cfg_interval: expected shares of T_max that meet 0 to 1",
        ),
        (["sampler.stochasticity=-1"], "sampler.stochasticity: expected 0 or more, received -1.0"),
        (["model.text_dim=-5"], "model.text_dim: expected null or at least 1, received -5"),
        (["model.z_dim=0"], "model.z_dim: expected null or at least 1, received 0"),
        (["model.adaln_hidden=0"], "model.adaln_hidden: expected null or at least 1, received 0"),
        (["model.mlp_ratio=-1"], "model.mlp_ratio: expected a hidden width"),
        (["train.seed=-1"], "train.seed: expected 0 or more, received -1"),
        (["train.preview.every_steps=-1"], "train.preview.every_steps: expected 0 or more, received -1"),
        (["train.preview.seed=-1"], "train.preview.seed: expected 0 or more, received -1"),
        (
            ["train.preview={every_steps: 5, prompts: [a], sizes: [8x8], num_steps: []}"],
            "train.preview.num_steps: required when train.preview.every_steps is above 0",
        ),
        (
            ["train.optimizer.warmup_steps=11"],
            "train.optimizer.warmup_steps: expected at most train.steps 10, received 11",
        ),
        (
            ["train.checkpoint.milestones=[5, 11]"],
            "train.checkpoint.milestones[1]: expected 1 to train.steps 10, received 11",
        ),
    ],
)
def test_contradiction_is_refused_by_its_dotted_key(overrides: list[str], message: str):
    assert refusal(*overrides).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.text_encoder={kind: words}"], "data.text_encoder: model.condition 'class' reads labels"),
        (["model.text_dim=16"], "model.text_dim: belongs to condition 'text'"),
        (
            ["model.class_dropout=false"],
            "model.class_dropout: expected true, because data.caption_dropout 0.1 replaces labels",
        ),
        (
            ["train.preview.prompts=['3', '10']", "train.preview.sizes=[8x8, 8x8]"],
            "train.preview.prompts[1]: expected a class label, 0 to 9, received '10'",
        ),
        (
            ["train.preview.prompts=[cat]", "train.preview.sizes=[8x8]"],
            "train.preview.prompts[0]: expected a class label, 0 to 9, received 'cat'",
        ),
    ],
)
def test_contradiction_of_a_class_recipe_is_refused(overrides: list[str], message: str):
    given = {word.partition("=")[0] for word in overrides}
    kept = [word for word in CLASSES if word.partition("=")[0] not in given]
    assert refusal(*kept, *overrides).startswith(message)


def test_valid_neighbours_of_the_contradictions_are_accepted():
    class_recipe("train.preview.prompts=['0', '9']", "train.preview.sizes=[8x8, 8x24]")
    class_recipe("model.class_dropout=false", "data.caption_dropout=0")
    recipe("objective.transport.kind=edm", "objective.weight.warp=identity")
    recipe("objective.transport.kind=edm", "objective.weight.time_type=constant")
    recipe("objective.transport.kind=vp", "objective.weight.warp=odds")
    recipe("objective.transport.kind=trigflow")
    recipe("objective.guided_target={w_gt: 0.25, w_cond: 0.75}", "data.caption_dropout=0")
    recipe("sampler.stochasticity=0.2", "objective.transport.kind=tim")
    recipe("data.text_encoder={kind: gemma, path: x, padding: constant}", "model.text_dim=1152")
    recipe("data.autoencoder={kind: sd_vae, path: x}")
    recipe("train.optimizer.warmup_steps=10", "train.checkpoint.milestones=[10]")


def test_every_contradiction_is_reported_with_where_it_was_written():
    lines = refusal("model.in_channels=3", "train.preview.num_steps=[0]").splitlines()
    assert lines == [
        "model.in_channels: expected 4, the channels of data.autoencoder (pixels), received 3 "
        "(override model.in_channels=3)",
        "train.preview.num_steps[0]: expected at least 1, received 0 (override train.preview.num_steps=[0])",
    ]


def test_contradiction_of_a_default_points_at_the_nearest_written_section():
    with pytest.raises(ConfigError, match=r"^data\.text_encoder: required .* \(f\.yaml:10\)$"):
        parse_recipe(TEXT.replace("  text_encoder: {kind: words, width: 16}\n", ""), source="f.yaml")


def test_recipe_built_in_python_obeys_the_same_rules():
    right = recipe()
    with pytest.raises(ConfigError, match=r"^model\.in_channels: expected 4"):
        replace(right, model=replace(right.model, in_channels=5))


@pytest.mark.parametrize(
    ("config", "channels", "stride"),
    [
        (AutoencoderConfig(kind="pixels", factor=4, channels=3), 48, 4),
        (AutoencoderConfig(kind="dc_ae", path="x"), 32, 32),
        (AutoencoderConfig(kind="sd_vae", path="x"), 4, 8),
    ],
    ids=lambda value: value.kind if isinstance(value, AutoencoderConfig) else str(value),
)
def test_latent_of_each_autoencoder(config: AutoencoderConfig, channels: int, stride: int):
    assert latent_channels(config) == channels
    assert latent_stride(config) == stride


def test_size_is_height_by_width():
    assert parse_size("1024x2560") == (1024, 2560)
    for wrong in ("1024", "1024X2560", "0x8", "8x0", "8x8x8", "-8x8", "8 x 8", "08x8", "", "٣x٣"):
        with pytest.raises(ValueError, match="expected HEIGHTxWIDTH"):
            parse_size(wrong)


def test_dict_form_survives_json():
    original = recipe(
        "objective.guided_target={}", "train.checkpoint.milestones=[3]", "train.optimizer.eps=1e-12"
    )
    assert from_dict(json.loads(json.dumps(to_dict(original)))) == original


def test_dict_with_a_wrong_key_names_its_source():
    values = to_dict(recipe())
    values["train"]["step"] = 3
    with pytest.raises(
        ConfigError, match=r"^train\.step: unknown key; did you mean 'steps'\? \(run/recipe\.json\)$"
    ):
        from_dict(values, source="run/recipe.json")


def test_hash_is_of_the_meaning_not_of_the_spelling():
    spelt_out = parse_recipe(
        "# a comment\n" + TEXT.replace("steps: 10", "optimizer: {lr: 1e-4}\n  steps: 10")
    )
    assert recipe_hash(spelt_out) == recipe_hash(recipe())
    assert recipe_hash(recipe("train.steps=11")) != recipe_hash(recipe())
    assert len(recipe_hash(recipe())) == 64


def test_hash_does_not_tell_a_whole_float_from_an_integer():
    one = recipe("train.optimizer.grad_clip=1")
    in_python = replace(one, train=replace(one.train, optimizer=replace(one.train.optimizer, grad_clip=1)))
    assert recipe_hash(in_python) == recipe_hash(one)


TRANSPORTS = [
    *(TransportConfig(kind=kind) for kind in ("ot_fm", "trigflow", "edm", "vp", "ve", "tim")),
    TransportConfig(kind="ve", sigma_max=1.5),
    TransportConfig(kind="ve", sigma_max=0.9),
]


@pytest.mark.parametrize("config", TRANSPORTS, ids=lambda config: f"{config.kind}-{config.sigma_max:g}")
def test_rules_agree_with_the_transport_itself(config: TransportConfig):
    from tim_ds.objective.transport import build_transport
    from tim_ds.objective.weighting import check_warp_domain

    transport = build_transport(config)
    assert last_time(config) == transport.T_max

    right = recipe()

    def accepts(build: Callable[[], object]) -> bool:
        try:
            build()
        except (ConfigError, TimeDomainError):
            return False
        return True

    for time_type, warp in product(("constant", "sqrt"), ("identity", "tangent", "odds")):
        weight = WeightConfig(time_type=time_type, warp=warp)
        by_transport = accepts(partial(check_warp_domain, weight, transport))
        by_recipe = accepts(partial(replace, right.objective, transport=config, weight=weight))
        # With other constants than its own a row may reach less far; the recipe judges it by its kind.
        assert by_recipe == by_transport or (config.sigma_max != 100.0 and by_transport), (time_type, warp)

    objective = replace(right.objective, transport=config, weight=WeightConfig(warp="identity"))
    noisy = replace(right.sampler, stochasticity=0.2)
    allowed = accepts(partial(replace, right, objective=objective, sampler=noisy))
    assert allowed == (transport.stochastic_rate is not None)


def test_rules_agree_with_the_pixel_autoencoder():
    from data_pipeline.encoders.autoencoder import build_autoencoder

    config = AutoencoderConfig(kind="pixels", factor=4, channels=3)
    autoencoder = build_autoencoder(config)
    assert (autoencoder.channels, autoencoder.stride) == (latent_channels(config), latent_stride(config))


@pytest.mark.parametrize(
    ("name", "network", "images", "lr", "steps", "p_mean", "p_std"),
    [
        ("t2i_xl", (1152, 28, 16, 384), 2048, 4e-4, 500_000, 0.0, 1.6),
        ("t2i_xl_repa", (1152, 28, 16, 384), 2048, 4e-4, 500_000, 0.0, 1.6),
        ("c2i_b_p4", (768, 12, 12, 256), 1024, 4e-4, 100_000, -0.4, 1.0),
        ("c2i_xl_256", (1152, 28, 16, 384), 512, 2e-4, 750_000, -0.4, 1.0),
        ("c2i_xl_256_mg", (1152, 28, 16, 384), 512, 2e-4, 750_000, -0.4, 1.0),
        ("c2i_xl_512", (1152, 28, 16, 384), 512, 2e-4, 750_000, -0.4, 1.0),
        ("c2i_xl_512_mg", (1152, 28, 16, 384), 512, 2e-4, 750_000, -0.4, 1.0),
    ],
)
def test_a_recipe_of_the_authors_has_their_numbers(
    name: str,
    network: tuple[int, int, int, int],
    images: int,
    lr: float,
    steps: int,
    p_mean: float,
    p_std: float,
) -> None:
    """As they stand in the authors' configurations, read apart from the recipes."""
    found = load_recipe(RECIPES[0].parent / f"{name}.yaml")
    model, objective, data, train = found.model, found.objective, found.data, found.train
    assert (model.hidden_size, model.depth, model.num_heads, model.adaln_hidden) == network
    assert (model.time_condition, model.separate_interval_embedder, model.qk_norm) == ("t-r", True, True)
    # 32-fold autoencoders at 1024 or 512 pixels, 8-fold ones at 256 with patches of 2 or 4.
    pixels = 1024 if model.condition == "text" else 512 if "512" in name else 256
    tokens = (pixels // (latent_stride(data.autoencoder) * model.patch_size)) ** 2
    assert data.packs_per_step * data.tokens_per_pack == images * tokens
    assert data.caption_dropout == 0.1
    # A picture is mirrored in half of the epochs, among classes.
    assert data.flip_online is (model.condition == "class")

    transport, weight = objective.transport, objective.weight
    assert (transport.kind, transport.p_mean, transport.p_std) == ("ot_fm", p_mean, p_std)
    assert (objective.diffusion_share, objective.consistency_share) == (0.5, 0.1)
    assert (objective.diffusion_time, objective.derivative) == ("larger", "dde")
    assert (weight.time_type, weight.warp, weight.of_interval) == ("sqrt", "tangent", True)
    assert (weight.adaptive, weight.adaptive_over, objective.directional) == (True, "image", True)
    assert objective.repa_weight == (0.0 if name == "t2i_xl" else 1.0)
    guided = GuidedTargetConfig(w_gt=1.0, w_cond=0.75, start=0.3, end=0.8)
    assert objective.guided_target == (guided if name.endswith("_mg") else None)

    optimizer = train.optimizer
    assert (train.steps, optimizer.lr, optimizer.betas, optimizer.eps) == (steps, lr, (0.9, 0.95), 1e-6)
    assert (optimizer.weight_decay, optimizer.grad_clip, optimizer.warmup_steps) == (0.01, 1.0, 0)
    assert [average.decay for average in train.ema.averages] == [0.9999]
