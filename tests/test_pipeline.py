"""The pipeline: prompts, sizes and seeds to pictures, the same whatever is sampled beside them."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from data_pipeline.config import AutoencoderConfig
from data_pipeline.encoders.autoencoder import PixelAutoencoder
from data_pipeline.encoders.text import WordsEncoder
from tests.networks import export_of, network_of, write_tiny_export
from tim_ds.errors import CheckpointError, ConfigError, RequestError
from tim_ds.packed import TextCondition
from tim_ds.pipeline import PNG_KEY, TiMPipeline, read_settings, write_png

PROMPTS = ["a three", "a one above a seven", "a two before a gap", "a three", "an eight"]
SIZES = [(8, 8), (16, 8), (8, 24), (8, 8), (24, 8)]
SEEDS = [3, 1, 4, 15, 9]


class Spy(nn.Module):
    """The network, with a record of the packs it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.grids: list[tuple[tuple[int, int], ...]] = []

    def forward(self, x_TC: Any, t_S: Any, r_S: Any, segments: Any, condition: Any, **options: Any) -> Any:
        self.grids.append(segments.grids)
        return self.network(x_TC, t_S, r_S, segments, condition, **options)


class Forbidden(nn.Module):
    """Fails when it is asked for anything: a request was not refused in time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the network was called before the request was checked")


@pytest.fixture
def pipe() -> TiMPipeline:
    export = export_of()
    return TiMPipeline(network_of(export), export)


@pytest.fixture
def spy() -> Spy:
    return Spy(network_of(export_of()))


def test_a_pipeline_shows_what_it_is(pipe: TiMPipeline) -> None:
    parameters = sum(p.numel() for p in pipe.network.parameters())
    shown = repr(pipe)
    assert f"{parameters:,} parameters on cpu in float32" in shown and "condition text" in shown
    assert len(shown) < 200


def test_a_picture_does_not_depend_on_its_batch(pipe: TiMPipeline) -> None:
    """In float64, where the order of a sum moves a pixel by 1e-15 and never across a rounding edge."""
    pipe.to("cpu", torch.float64)
    together = pipe(PROMPTS, SIZES, num_steps=3, seeds=SEEDS).pixels
    pipe.tokens_per_batch = 1
    alone = [
        pipe(p, s, num_steps=3, seeds=[k]).pixels[0] for p, s, k in zip(PROMPTS, SIZES, SEEDS, strict=True)
    ]
    backwards = pipe(PROMPTS[::-1], SIZES[::-1], num_steps=3, seeds=SEEDS[::-1]).pixels[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


class FilledUp(WordsEncoder):
    """Words with a padding state, as the released weights have one."""

    @property
    def padding_state(self) -> torch.Tensor:  # type: ignore[override]  # WordsEncoder has none
        return torch.full((1, self.width), 9.0)


def test_prompts_and_empty_captions_are_filled_up_to_the_longest_of_their_batch() -> None:
    export = export_of()
    encoder = FilledUp(export.model.text_dim or 0)
    seen: list[TextCondition] = []

    class Listener(Spy):
        def forward(self, *args: Any, **options: Any) -> Any:
            seen.append(args[4])
            return super().forward(*args, **options)

    pipe = TiMPipeline(Listener(network_of(export)), export, text_encoder=encoder)
    pipe(PROMPTS, SIZES, num_steps=2, seeds=SEEDS, cfg_scale=2.0)
    own = [*encoder.encode(PROMPTS), *encoder.encode([""] * len(PROMPTS))]
    longest = max(len(states) for states in own)
    assert len(own[-1]) < longest
    guided = [c for c in seen if c.num_segments == len(own)]
    assert guided and all(c.segments.lengths == (longest,) * c.num_segments for c in seen)
    for states, expected in zip(guided[0].states_LE.split(longest), own, strict=True):
        assert torch.equal(states[: len(expected)], expected)
        assert bool((states[len(expected) :] == 9.0).all())


def test_pictures_have_their_own_sizes_and_are_not_all_alike(pipe: TiMPipeline) -> None:
    images = pipe(PROMPTS, SIZES, num_steps=2, seeds=SEEDS).pixels
    assert [image.shape for image in images] == [(*size, 1) for size in SIZES]
    assert all(image.dtype == np.uint8 for image in images)
    # Prompts 0 and 3 differ in their seed alone.
    assert (images[0] != images[3]).any()
    # Neither black nor saturated: the comparisons above compare something.
    assert all(len(np.unique(image)) > 10 for image in images)


def test_seed_and_prompt_both_matter(pipe: TiMPipeline) -> None:
    first, again, other_prompt, other_seed = (
        pipe(prompt, "8x8", seeds=[seed]).pixels[0]
        for prompt, seed in (("a six", 5), ("a six", 5), ("a nine", 5), ("a six", 6))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other_prompt).any()
    assert (first != other_seed).any()


def test_one_seed_is_the_first_of_consecutive_ones(pipe: TiMPipeline) -> None:
    consecutive = pipe(["a six"] * 3, "8x8", seeds=5)
    listed = pipe(["a six"] * 3, "8x8", seeds=[5, 6, 7])
    assert consecutive.seeds == listed.seeds == (5, 6, 7)
    for a, b in zip(consecutive.pixels, listed.pixels, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "sizes",
    ["16x8", (16, 8), ["16x8", "16x8"], [(16, 8), "16x8"], np.array([[16, 8], [16, 8]]), (np.int64(16), 8)],
)
def test_sizes_are_read_in_every_form(pipe: TiMPipeline, sizes: Any) -> None:
    assert [image.shape for image in pipe(["a", "b"], sizes).pixels] == [(16, 8, 1)] * 2


@pytest.mark.parametrize(("cfg_scale", "factor"), [(1.0, 1), (2.0, 2)])
def test_batches_keep_to_the_token_budget(spy: Spy, cfg_scale: float, factor: int) -> None:
    """Pictures of 4, 8, 12, 4 and 12 tokens under a budget of 16 a call."""
    pipe = TiMPipeline(spy, export_of())
    pipe.tokens_per_batch = 16 * factor
    pipe(PROMPTS, SIZES, num_steps=1, cfg_scale=cfg_scale)
    grids = [(h // 4, w // 4) for h, w in SIZES]
    expected = [grids[0:2], grids[2:4], grids[4:]]
    assert spy.grids == [tuple(part * factor) for part in expected]


def test_a_picture_beyond_the_budget_goes_alone(spy: Spy) -> None:
    pipe = TiMPipeline(spy, export_of())
    pipe.tokens_per_batch = 1
    pipe(["a", "b"], ["8x8", "16x16"], num_steps=1)
    assert spy.grids == [((2, 2),), ((4, 4),)]


def test_nfe_counts_evaluations_a_picture(spy: Spy) -> None:
    pipe = TiMPipeline(spy, export_of())
    assert pipe(["a", "b"], "8x8", num_steps=3).nfe == 3
    assert sum(len(grids) for grids in spy.grids) == 3 * 2
    spy.grids.clear()
    output = pipe(["a", "b"], "8x8", num_steps=3, cfg_scale=2.0, cfg_interval=(0.0, 0.5))
    # Steps start at t = 1, 2/3 and 1/3: one of three is guided.
    assert output.nfe == 4
    assert sum(len(grids) for grids in spy.grids) == 4 * 2


def test_guidance_moves_away_from_the_empty_caption(pipe: TiMPipeline) -> None:
    """Scale 0 is the empty caption's own picture."""
    pipe.to("cpu", torch.float64)
    guided = pipe("a six", "8x8", cfg_scale=0.0, seeds=1).pixels[0]
    empty = pipe("", "8x8", seeds=1).pixels[0]
    plain = pipe("a six", "8x8", seeds=1).pixels[0]
    np.testing.assert_array_equal(guided, empty)
    assert (plain != empty).any()


def test_the_names_of_diffusers_mean_the_same(pipe: TiMPipeline) -> None:
    known = pipe("a six", "16x8", num_steps=3, cfg_scale=2.0, seeds=11)
    generator = torch.Generator().manual_seed(11)
    other = pipe("a six", height=16, width=8, num_inference_steps=3, guidance_scale=2.0, generator=generator)
    np.testing.assert_array_equal(known.pixels[0], other.pixels[0])
    assert known.settings == other.settings and known.seeds == other.seeds == (11,)
    several = [torch.Generator().manual_seed(seed) for seed in (11, 3)]
    assert pipe(["a six"] * 2, (16, 8), generator=several).seeds == (11, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "sizes: expected either sizes, or both height and width"),
        ({"sizes": "8x8", "prompt": "b"}, "prompt: the same as prompts"),
        ({"height": 8}, "sizes: expected either sizes, or both height and width"),
        ({"sizes": "8x8", "width": 8}, "sizes: expected either sizes, or both height and width"),
        (
            {"sizes": "8x8", "num_steps": 2, "num_inference_steps": 2},
            "num_inference_steps: the same as num_s",
        ),
        ({"sizes": "8x8", "cfg_scale": 2, "guidance_scale": 2}, "guidance_scale: the same as cfg_scale"),
        ({"sizes": "8x8", "seeds": 0, "generator": torch.Generator()}, "generator: the same as seeds"),
    ],
)
def test_one_thing_under_two_names_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TiMPipeline(Forbidden(), export_of())("a", **arguments)


class TestAsDiffusersHasIt:
    """What users of diffusers try first: it works, or says what does."""

    def test_images_are_what_output_type_says(self, pipe: TiMPipeline) -> None:
        words: dict[str, Any] = {"prompt": ["a three", "a six"], "height": 8, "width": 16, "generator": None}
        pil = pipe(**words)
        assert all(image.size == (16, 8) and image.mode == "L" for image in pil.images)
        expected = np.stack(pil.pixels).astype(np.float32) / 255
        np.testing.assert_array_equal(pipe(**words, output_type="np").images, expected)
        tensor = pipe(**words, output_type="pt").images
        np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), expected)
        [images] = pipe(**words, return_dict=False)
        assert np.asarray(images[1]).tobytes() == np.asarray(pil[0][1]).tobytes() == pil.pixels[1].tobytes()

    def test_latents_decode_to_the_pictures_and_are_not_saved(
        self, pipe: TiMPipeline, tmp_path: Path
    ) -> None:
        output = pipe(["a three", "a six"], "8x16", output_type="latent")
        assert output.images.shape == (2, 16, 2, 4) and output.pixels == []
        decoded = [pipe._decode(latent) for latent in output.images]
        np.testing.assert_array_equal(decoded, pipe(["a three", "a six"], "8x16").pixels)
        with pytest.raises(RequestError, match='output_type "latent" leaves no pictures'):
            output.save(tmp_path)

    def test_pictures_of_many_sizes_are_a_list(self, pipe: TiMPipeline) -> None:
        for kind, shape in (("np", (8, 24, 1)), ("pt", (1, 8, 24)), ("latent", (16, 2, 6))):
            images = pipe(PROMPTS, SIZES, output_type=kind).images  # type: ignore[arg-type]  # a plain str
            assert isinstance(images, list) and images[2].shape == shape
        with pytest.raises(RequestError, match="output_type: expected one of pil, np, pt, latent, received"):
            pipe("a", "8x8", output_type="png")  # type: ignore[arg-type]  # what is refused

    def test_several_pictures_of_each_prompt(self, pipe: TiMPipeline) -> None:
        output = pipe(["a three", "a six"], ["8x8", "8x16"], num_images_per_prompt=2, seeds=5)
        assert output.prompts == ("a three", "a three", "a six", "a six") and output.seeds == (5, 6, 7, 8)
        assert [image.size for image in output.images] == [(8, 8), (8, 8), (16, 8), (16, 8)]
        generators = [torch.Generator().manual_seed(n) for n in (4, 3)]
        again = pipe("a three", "8x8", num_images_per_prompt=2, generator=generators)
        assert again.seeds == (4, 3)
        with pytest.raises(RequestError, match="num_images_per_prompt: expected at least 1, received 0"):
            pipe("a", "8x8", num_images_per_prompt=0)
        with pytest.raises(RequestError, match="seeds: expected 1 or 4, one a prompt, received 2"):
            pipe(["a", "b"], "8x8", num_images_per_prompt=2, generator=generators)

    def test_a_generator_that_was_seeded_by_chance_is_taken(self, pipe: TiMPipeline) -> None:
        generator = torch.Generator().manual_seed(2**64 - 1)
        assert pipe("a three", "8x8", generator=generator).seeds == (2**63 - 1,)

    def test_a_negative_prompt_takes_the_place_of_the_empty_caption(
        self, pipe: TiMPipeline, tmp_path: Path
    ) -> None:
        words: dict[str, Any] = {"sizes": "8x8", "guidance_scale": 0.0, "seeds": [1, 1]}
        away = pipe(["a three", "a six"], negative_prompt=["a nine", "a two"], **words)
        # At scale 0 nothing but what guidance leads away from is left.
        drawn = pipe(["a nine", "a two"], "8x8", seeds=[1, 1])
        for a, b in zip(away.pixels, drawn.pixels, strict=True):
            np.testing.assert_array_equal(a, b)
        mixed = pipe.run(
            pipe.request(
                ["a three"] * 2, "8x8", seeds=[1, 1], negative_prompts=["a nine", None], cfg_scale=0.0
            )
        )
        np.testing.assert_array_equal(mixed.pixels[0], away.pixels[0])
        np.testing.assert_array_equal(mixed.pixels[1], pipe("", "8x8", seeds=1).pixels[0])
        [path, other] = mixed.save(tmp_path)
        assert read_settings(path)["negative_prompt"] == "a nine"
        assert "negative_prompt" not in read_settings(other)

    @pytest.mark.parametrize(
        ("negative", "options", "message"),
        [
            ("blurred", {}, "has no effect without guidance; set cfg_scale"),
            (["a", "b"], {"cfg_scale": 2.0}, "negative_prompt: expected 1, one a prompt, received 2"),
            ([3], {"cfg_scale": 2.0}, "negative_prompt: expected a caption, received 3"),
        ],
    )
    def test_negative_prompts_that_cannot_be_are_refused(
        self, negative: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            TiMPipeline(Forbidden(), export_of())("a", "8x8", negative_prompt=negative, **options)

    def test_class_labels_have_no_negative_prompt(self) -> None:
        pipe = TiMPipeline(Forbidden(), export_of(condition="class"))
        with pytest.raises(RequestError, match="this network draws from class labels"):
            pipe(1, "8x8", negative_prompt="a", cfg_scale=2.0)

    def test_a_callback_sees_every_step_and_may_stop_but_not_change(self, pipe: TiMPipeline) -> None:
        told: list[tuple[int, float]] = []
        shapes: list[list[tuple[int, ...]]] = []

        def look(where: TiMPipeline, step: int, time: float, given: dict[str, Any]) -> dict[str, Any]:
            assert where is pipe
            told.append((step, time))
            shapes.append([tuple(latent.shape) for latent in given["latents"]])
            return given

        output = pipe(["a", "b"], ["8x8", "8x16"], num_steps=4, callback_on_step_end=look)
        assert told == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
        assert shapes == [[(16, 2, 2), (16, 2, 4)]] * 4
        plain = pipe(["a", "b"], ["8x8", "8x16"], num_steps=4)
        np.testing.assert_array_equal(output.pixels[1], plain.pixels[1])

        class Enough(Exception): ...

        def stop(*_: Any) -> None:
            raise Enough

        with pytest.raises(Enough):
            pipe("a", "8x8", callback_on_step_end=stop)
        with pytest.raises(RequestError, match="returned other latents; a callback may look and stop"):
            pipe("a", "8x8", callback_on_step_end=lambda *_: {"latents": []})

    def test_it_moves_by_device_by_type_and_by_both(self, pipe: TiMPipeline, tmp_path: Path) -> None:
        assert pipe.to(torch.bfloat16).dtype == torch.bfloat16 and pipe.to("cpu").dtype == torch.bfloat16
        assert pipe.to("cpu", torch.float32).dtype == torch.float32
        assert pipe.to(dtype=torch.bfloat16) is pipe
        folder = write_tiny_export(tmp_path / "export")
        loaded = TiMPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        with pytest.raises(RequestError, match="torch_dtype: the same as dtype"):
            TiMPipeline.from_pretrained(folder, torch_dtype=torch.float32, dtype=torch.float32)

    def test_what_it_has_not_says_where_it_is(self, pipe: TiMPipeline) -> None:
        anything: Any = pipe
        for name, hint in (
            ("enable_sequential_cpu_offload", "enable_model_cpu_offload keeps the encoders off it"),
            ("enable_xformers_memory_efficient_attention", "never holds the whole matrix"),
            ("scheduler", "num_steps, mode, stochasticity"),
            ("transformer", "it is .network"),
            ("vae", "it is .autoencoder"),
            ("load_lora_weights", "load its export"),
            ("set_progress_bar_config", "progress=True"),
        ):
            assert not hasattr(pipe, name)
            with pytest.raises(AttributeError, match=f"TiMPipeline has no {name}: .*{hint}"):
                getattr(anything, name)
        with pytest.raises(AttributeError, match=r"TiMPipeline has no colour$"):
            _ = anything.colour

    def test_decoding_one_at_a_time_and_in_tiles_is_what_it_does(self, pipe: TiMPipeline) -> None:
        pipe.enable_vae_slicing()
        pipe.enable_vae_tiling()
        with pytest.raises(RequestError, match="has no weights and is not decoded in tiles"):
            pipe.enable_vae_tiling(64)


class Traveller:
    """An encoder with weights, which works on the device of the network alone; its host is `meta`."""

    def __init__(self, own: Any, trips: list[str]) -> None:
        self.own, self.trips = own, trips
        # 400 MB, without storage.
        self.model = nn.Linear(10_000, 10_000, device="meta")
        self.device = torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        if name in ("encode", "decode"):
            assert self.device.type == "cpu"
            self.trips.append(name)
        return getattr(self.own, name)

    def to(self, device: torch.device | str) -> None:
        # Asked for the host of this machine, which is the device of the test's network, it goes elsewhere.
        self.device = torch.device("meta" if device == "cpu" else device)
        self.trips.append(self.device.type)


def test_offloaded_encoders_come_for_their_work_and_go(pipe: TiMPipeline) -> None:
    expected = pipe(PROMPTS, SIZES, num_steps=2, seeds=SEEDS, cfg_scale=2.0)
    needed = pipe.needed_bytes((8, 8), pipe.export.sampler)
    trips: list[str] = []
    autoencoder, text_encoder = Traveller(pipe.autoencoder, trips), Traveller(pipe.text_encoder, trips)
    pipe.autoencoder, pipe.text_encoder = autoencoder, text_encoder  # type: ignore[assignment]  # stand-ins
    pipe.tokens_per_batch = 10**6
    pipe.enable_model_cpu_offload(device="cpu")
    assert trips == ["meta", "meta"] and pipe.needed_bytes((8, 8), pipe.export.sampler) > needed
    trips.clear()
    found = pipe(PROMPTS, SIZES, num_steps=2, seeds=SEEDS, cfg_scale=2.0)
    assert all((a == b).all() for a, b in zip(found.pixels, expected.pixels, strict=True))
    # Once for all captions, those that guidance leads away from among them; once for all pictures of a batch.
    assert trips == ["cpu", "encode", "encode", "meta", "cpu", *["decode"] * len(PROMPTS), "meta"]
    trips.clear()
    pipe(PROMPTS, SIZES, num_steps=1, seeds=SEEDS, cfg_scale=1.0, output_type="latent")
    assert trips == ["cpu", "encode", "encode", "meta"]


def test_offloading_to_a_device_that_is_not_there_is_refused(pipe: TiMPipeline) -> None:
    with pytest.raises(RequestError, match="device: cuda:99: not usable here"):
        pipe.enable_model_cpu_offload(gpu_id=99)
    with pytest.raises(RequestError, match="device: vulkan: not usable here"):
        pipe.enable_model_cpu_offload(device="vulkan")


def test_defaults_are_the_exports(pipe: TiMPipeline) -> None:
    export = export_of(mode="diffusion", num_steps=5)
    diffusion = TiMPipeline(network_of(export), export)
    output = diffusion("a six", "8x8", seeds=2)
    assert output.settings["mode"] == "diffusion" and output.nfe == 5
    same = pipe("a six", "8x8", seeds=2, num_steps=5, mode="diffusion")
    other = pipe("a six", "8x8", seeds=2, num_steps=5)
    np.testing.assert_array_equal(output.pixels[0], same.pixels[0])
    assert (output.pixels[0] != other.pixels[0]).any()


def test_levels_are_rounded_to_the_nearest(pipe: TiMPipeline) -> None:
    values = torch.tensor([-3.0, -1.0, 1.4 / 127.5 - 1, 1.6 / 127.5 - 1, 0.9999, 1.0, 7.0, 0.0])
    latent = PixelAutoencoder(4, 1).encode(values.repeat(8).reshape(1, 1, 8, 8))[0]
    picture = pipe._decode(latent)
    assert picture.shape == (8, 8, 1)
    # 0.0 is 127.5, half-way; torch rounds halves to even.
    assert picture[0, :, 0].tolist() == [0, 0, 1, 2, 255, 255, 255, 128]


def test_patches_of_several_cells_make_the_multiple(pipe: TiMPipeline) -> None:
    export = export_of(patch_size=2, channels=3)
    colour = TiMPipeline(network_of(export), export)
    assert (pipe.size_multiple, colour.size_multiple) == (4, 8)
    assert colour("a", "16x8").pixels[0].shape == (16, 8, 3)


def test_bfloat16_weights_draw_nearly_the_same(pipe: TiMPipeline) -> None:
    exact = pipe(PROMPTS, SIZES, seeds=SEEDS).pixels
    coarse = pipe.to("cpu", torch.bfloat16)(PROMPTS, SIZES, seeds=SEEDS).pixels
    difference = np.mean(
        [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(exact, coarse, strict=True)]
    )
    # bfloat16 keeps 8 bits of noise and weights: measured 0.3 levels of 255.
    assert 0 < difference < 2


def test_progress_counts_pictures_and_steps(pipe: TiMPipeline) -> None:
    bar = tqdm(total=10, file=io.StringIO())
    pipe.tokens_per_batch = 8
    pipe(PROMPTS, SIZES, num_steps=2, progress=bar)
    assert bar.n == 10


class TestClassLabels:
    @pytest.fixture
    def pipe(self) -> TiMPipeline:
        export = export_of(condition="class")
        return TiMPipeline(network_of(export), export)

    def test_labels_are_numbers_or_their_text(self, pipe: TiMPipeline) -> None:
        as_numbers = pipe([0, 4], "8x8", seeds=1)
        as_text = pipe(["0", "4"], "8x8", seeds=1)
        assert as_numbers.prompts == as_text.prompts == (0, 4)
        for a, b in zip(as_numbers.pixels, as_text.pixels, strict=True):
            np.testing.assert_array_equal(a, b)
        same_seed = pipe([0, 4], "8x8", seeds=[1, 1]).pixels
        assert (same_seed[0] != same_seed[1]).any()

    def test_guidance_uses_the_null_label(self, pipe: TiMPipeline) -> None:
        plain, guided = (pipe(2, "8x8", cfg_scale=s, seeds=1) for s in (1.0, 2.0))
        assert guided.nfe == 2 * plain.nfe
        assert (plain.pixels[0] != guided.pixels[0]).any()

    @pytest.mark.parametrize("label", [5, -1, "five", "5", 1.5, True])
    def test_labels_out_of_range_are_refused(self, pipe: TiMPipeline, label: Any) -> None:
        with pytest.raises(RequestError, match=r"prompts\[1\]: expected a class label, 0 to 4, received"):
            pipe([0, label], "8x8")

    def test_guidance_without_a_null_label_is_refused(self) -> None:
        export = export_of(condition="class", class_dropout=False)
        with pytest.raises(RequestError, match="needs a null label, which this network was built without"):
            TiMPipeline(Forbidden(), export)(0, "8x8", cfg_scale=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, received an empty list"),
        ({"prompts": ["a", 3]}, r"prompts\[1\]: expected a caption, received 3"),
        ({"num_steps": 0}, "num_steps: expected at least 1, received 0"),
        ({"sizes": "8x10"}, r"sizes\[0\]: 8x10: both sides must be multiples of 4 .* fit: 8x8 or 8x12"),
        ({"sizes": ["8x8", (9, 15)]}, r"sizes\[1\]: 9x15: .* nearest that fit: 8x16 or 8x12"),
        ({"sizes": "1x2"}, r"nearest that fit: 4x4"),
        ({"sizes": (0, 8)}, r"sizes\[0\]: 0x8: both sides must be multiples of 4"),
        (
            {"sizes": "8 by 8"},
            r"sizes\[0\]: expected HEIGHTxWIDTH in pixels such as 1024x768, received '8 by 8'",
        ),
        ({"sizes": [8.5, 8]}, r"sizes\[0\]: expected \(height, width\), received 8.5"),
        ({"sizes": [(8, 8), (8, 8.9)]}, r"sizes\[1\]: expected \(height, width\), received \(8, 8.9\)"),
        ({"sizes": [(8, 8), (8, 8, 8)]}, r"sizes\[1\]: expected \(height, width\)"),
        ({"sizes": ["8x8"] * 3}, "sizes: expected 1 or 2, one a prompt, received 3"),
        ({"seeds": [1, 2, 3]}, "seeds: expected 1 or 2, one a prompt, received 3"),
        ({"seeds": [1, -2]}, r"seeds\[1\]: expected 0 to 2\^63 - 1, received -2"),
        ({"mode": "ddiffusion"}, "mode: expected one of transition, diffusion, received 'ddiffusion'"),
        ({"cfg_scale": -1.0}, "cfg_scale: expected 0 or more, received -1"),
        ({"num_steps": 2.5}, "num_steps: expected a whole number, received 2.5"),
        ({"num_steps": "4"}, "num_steps: expected a whole number, received '4'"),
        ({"cfg_scale": "2"}, "cfg_scale: expected a number, received '2'"),
        ({"stochasticity": True}, "stochasticity: expected a number, received True"),
        ({"cfg_interval": 0.5}, "cfg_interval: expected two numbers, .*received 0.5"),
        ({"cfg_interval": ("a", 1)}, "cfg_interval: expected two numbers"),
        ({"seeds": [1.5, 2]}, r"seeds: expected whole numbers, received \[1.5, 2\]"),
        ({"seeds": 1.5}, "seeds: expected whole numbers, received 1.5"),
        ({"seeds": "ab"}, "seeds: expected whole numbers, received 'ab'"),
        ({"generator": 7}, "generator: expected one, or a list of one each, received 7"),
        ({"generator": [7, 8]}, "generator: expected torch.Generator, received 7"),
        ({"prompts": 3.5}, "prompts: expected one, or a list of one each, received 3.5"),
        ({"sizes": 5}, "sizes: expected one, or a list of one each, received 5"),
        ({"negative_prompt": 5}, "negative_prompt: expected one, or a list of one each, received 5"),
        ({"cfg_interval": (0.8, 0.2)}, "cfg_interval: low 0.8 is beyond high 0.2"),
    ],
)
def test_bad_requests_are_refused_before_any_work(arguments: dict[str, Any], message: str) -> None:
    pipe = TiMPipeline(Forbidden(), export_of())
    request: dict[str, Any] = {"prompts": ["a", "b"], "sizes": "8x8"} | arguments
    with pytest.raises((RequestError, ConfigError), match=message):
        pipe(**request)


def test_numbers_of_numpy_and_torch_are_taken_and_stored_as_plain_ones(
    pipe: TiMPipeline, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "num_steps": np.int64(2),
        "cfg_scale": np.float32(1.5),
        "seeds": torch.tensor([3]),
        "stochasticity": 0,
    }
    output = pipe("a", "8x8", **given)
    [path] = output.save(tmp_path)
    stored = read_settings(path)
    assert (stored["num_steps"], stored["cfg_scale"], stored["seed"]) == (2, 1.5, 3)


def test_parts_that_do_not_fit_the_network_are_refused() -> None:
    with pytest.raises(RequestError, match="makes latents of 4 channels, the network expects 16"):
        TiMPipeline(Forbidden(), export_of(), autoencoder=PixelAutoencoder(2, 1))
    with pytest.raises(RequestError, match="makes states of width 8, the network expects 16"):
        TiMPipeline(Forbidden(), export_of(), text_encoder=WordsEncoder(8))


def test_weights_without_encoders_ask_for_them() -> None:
    bare = replace(export_of(), autoencoder=None, text_encoder=None)
    with pytest.raises(RequestError, match="export: names no autoencoder"):
        TiMPipeline(Forbidden(), bare)
    with pytest.raises(RequestError, match="export: names no text encoder"):
        TiMPipeline(Forbidden(), bare, autoencoder=PixelAutoencoder(4, 1))


def test_encoders_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    missing = AutoencoderConfig(kind="dc_ae", path=str(tmp_path / "none"))
    with pytest.raises(
        RequestError, match=r"export: data.autoencoder.path: cannot load AutoencoderDC from .*none"
    ):
        TiMPipeline(Forbidden(), replace(export_of(), autoencoder=missing))


class TestFolders:
    def test_an_export_draws_what_its_network_drew(self, pipe: TiMPipeline, tmp_path: Path) -> None:
        folder = write_tiny_export(tmp_path / "export")
        loaded = TiMPipeline.from_pretrained(folder)
        output = loaded(PROMPTS, SIZES, seeds=SEEDS)
        for a, b in zip(output.pixels, pipe(PROMPTS, SIZES, seeds=SEEDS).pixels, strict=True):
            np.testing.assert_array_equal(a, b)
        weights = (folder / "tim.safetensors").read_bytes()
        assert output.settings["weights_sha256"] == hashlib.sha256(weights).hexdigest()
        assert output.settings["recipe_sha256"] == "f" * 64

    def test_a_folder_that_is_no_export_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="not there; expected an export folder, a run"):
            TiMPipeline.from_pretrained(tmp_path / "nothing")
        folder = write_tiny_export(tmp_path / "export")
        weights = folder / "tim.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="truncated"):
            TiMPipeline.from_pretrained(folder)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_saved_pictures_carry_pixels_and_settings(self, tmp_path: Path, channels: int) -> None:
        export = export_of(channels=channels)
        output = TiMPipeline(network_of(export), export)(
            ["a Three!", "日本 é"], ["8x8", "16x8"], num_steps=3, seeds=4
        )
        paths = output.save(tmp_path / "pictures")
        assert [path.name for path in paths] == ["0000_a-three_seed4.png", "0001_日本-é_seed5.png"]
        for path, image in zip(paths, output.pixels, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(image.shape), image)
        settings = read_settings(paths[1])
        assert settings == output.picture_settings(1)
        assert (settings["prompt"], settings["size"], settings["seed"]) == ("日本 é", "16x8", 5)
        assert (settings["num_steps"], settings["nfe"], settings["mode"]) == (3, 3, "transition")

    def test_stored_settings_repeat_the_picture(self, pipe: TiMPipeline, tmp_path: Path) -> None:
        [path] = pipe("a two", "8x16", num_steps=3, seeds=11).save(tmp_path)
        s = read_settings(path)
        again = pipe(s["prompt"], s["size"], num_steps=s["num_steps"], mode=s["mode"], seeds=[s["seed"]])
        np.testing.assert_array_equal(np.asarray(Image.open(path))[..., None], again.pixels[0])

    def test_nothing_is_overwritten(self, pipe: TiMPipeline, tmp_path: Path) -> None:
        output = pipe(["a", "b"], "8x8")
        [second] = [path for path in output.save(tmp_path) if path.name.startswith("0001")]
        (tmp_path / "0000_a_seed0.png").unlink()
        second.write_bytes(b"mine")
        with pytest.raises(RequestError, match=r"0001_b_seed1.png: exists and is not overwritten"):
            output.save(tmp_path)
        assert second.read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0001_b_seed1.png"]

    def test_a_full_disk_leaves_nothing_half_written(
        self, pipe: TiMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = pipe("a", "8x8")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(CheckpointError, match="cannot be written"):
            output.save(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_pictures_of_other_programs_have_no_settings(self, tmp_path: Path) -> None:
        Image.new("L", (4, 4)).save(tmp_path / "plain.png")
        with pytest.raises(RequestError, match="carries no settings"):
            read_settings(tmp_path / "plain.png")
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(RequestError, match="not a picture that can be read"):
            read_settings(tmp_path / "text.png")

    def test_metadata_is_an_ordinary_png_text(self, tmp_path: Path) -> None:
        path = tmp_path / "one.png"
        write_png(path, np.zeros((4, 4, 1), dtype=np.uint8), {"prompt": "日本", "seed": 1})
        image = Image.open(path)
        image.load()
        assert image.info["Description"] == "日本"
        assert image.info[PNG_KEY] == '{"prompt": "日本", "seed": 1}'
