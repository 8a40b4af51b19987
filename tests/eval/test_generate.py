"""Pictures of an evaluation: restartable one by one, refused when half finished or mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.tiny_scorers import write_random_picture
from tests.networks import write_tiny_export
from tim_ds.errors import RequestError, TimError
from tim_ds.eval.generate import (
    MANIFEST_NAME,
    Sampling,
    Wanted,
    generate,
    open_pictures,
    picture_set,
    read_manifest,
)
from tim_ds.pipeline import PipelineOutput, TiMPipeline, read_settings

WANTED = [
    Wanted(f"{n}/p.png", prompt, 10 + n) for n, prompt in enumerate(["a one", "a two", "日本", "a one"])
]
SAMPLING = Sampling(size="8x8", batch=3, num_steps=2)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> TiMPipeline:
    return TiMPipeline.from_pretrained(write_tiny_export(tmp_path_factory.mktemp("generate") / "export"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of all pictures that were sampled."""
    seeds: list[int] = []
    real: Callable[..., PipelineOutput] = TiMPipeline.__call__

    def counted(self: TiMPipeline, *args: Any, **options: Any) -> PipelineOutput:
        seeds.extend(options["seeds"])
        return real(self, *args, **options)

    monkeypatch.setattr(TiMPipeline, "__call__", counted)
    return seeds


def make(
    pipeline: TiMPipeline, folder: Path, sampling: Sampling = SAMPLING, wanted: list[Wanted] = WANTED
) -> None:
    generate(pipeline, wanted, folder, sampling, evaluation="test", progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pictures_carry_their_making(pipeline: TiMPipeline, tmp_path: Path) -> None:
    make(pipeline, tmp_path)
    expected = pipeline([one.prompt for one in WANTED], "8x8", num_steps=2, seeds=[10, 11, 12, 13])
    for one, image in zip(WANTED, expected.pixels, strict=True):
        stored = np.asarray(Image.open(tmp_path / one.name))[..., None].astype(int)
        # Another batch changes the order of float32 sums, which may cross a rounding edge: one level.
        assert np.abs(stored - image).max() <= 1
        settings = read_settings(tmp_path / one.name)
        assert (settings["prompt"], settings["seed"], settings["num_steps"]) == (one.prompt, one.seed, 2)
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["recipe_sha256"] == "f" * 64 and manifest["step"] == 7
    assert manifest["weights_sha256"] == pipeline.weights_sha256 and manifest["count"] == 4
    pictures = open_pictures(tmp_path, WANTED, progress=False)
    assert pictures.made_by is not None and pictures.made_by["nfe"] == 2
    assert pictures.names == tuple(one.name for one in WANTED)


def test_only_missing_pictures_are_made_and_are_the_same(
    pipeline: TiMPipeline, tmp_path: Path, sampled: list[int]
) -> None:
    make(pipeline, tmp_path, replace(SAMPLING, batch=1))
    before = contents(tmp_path)
    (tmp_path / WANTED[1].name).unlink()
    sampled.clear()
    make(pipeline, tmp_path, replace(SAMPLING, batch=1))
    assert sampled == [11] and contents(tmp_path) == before
    sampled.clear()
    make(pipeline, tmp_path, replace(SAMPLING, batch=2))
    assert sampled == []


def test_parts_share_the_work(pipeline: TiMPipeline, tmp_path: Path, sampled: list[int]) -> None:
    make(pipeline, tmp_path, replace(SAMPLING, part=(1, 3)))
    assert sampled == [11]
    with pytest.raises(RequestError, match=r"half finished: 3 of 4 pictures are missing \(0/p.png, 2/p.png"):
        open_pictures(tmp_path, WANTED, progress=False)
    make(pipeline, tmp_path, replace(SAMPLING, part=(0, 3)))
    make(pipeline, tmp_path, replace(SAMPLING, part=(2, 3)))
    assert sorted(sampled) == [10, 11, 12, 13]
    assert len(open_pictures(tmp_path, WANTED, progress=False).names) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 3}, "num_steps was 2, now 3"),
        ({"cfg_scale": 2.0}, "cfg_scale was 1.0, now 2.0"),
        ({"size": "8x16"}, "size was '8x8', now '8x16'"),
        ({"mode": "diffusion"}, "mode was 'transition', now 'diffusion'"),
        ({"seed": 5}, "seed was 0, now 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_another_making_is_refused_and_untouched(
    pipeline: TiMPipeline, tmp_path: Path, sampled: list[int], change: dict[str, Any], message: str
) -> None:
    make(pipeline, tmp_path)
    before = contents(tmp_path)
    sampled.clear()
    with pytest.raises(RequestError, match=message):
        make(pipeline, tmp_path, replace(SAMPLING, **change))
    assert sampled == [] and contents(tmp_path) == before


@pytest.mark.parametrize(
    "switch",
    [
        {"cfg_upper": "exclusive"},
        {"schedule_dtype": "bfloat16"},
        {"cfg_interval": (0.1, 0.9)},
        {"stochasticity": 0.5},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_every_switch_of_the_exports_sampler_is_part_of_the_making(
    pipeline: TiMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: dict[str, Any]
) -> None:
    make(pipeline, tmp_path)
    export = pipeline.export
    monkeypatch.setattr(pipeline, "export", replace(export, sampler=replace(export.sampler, **switch)))
    with pytest.raises(RequestError, match=f"{next(iter(switch))} was"):
        make(pipeline, tmp_path)


def test_other_weights_and_prompts_are_refused(pipeline: TiMPipeline, tmp_path: Path) -> None:
    make(pipeline, tmp_path / "pictures")
    other = TiMPipeline.from_pretrained(write_tiny_export(tmp_path / "export", seed=1))
    with pytest.raises(RequestError, match="weights_sha256 was"):
        make(other, tmp_path / "pictures")
    changed = [*WANTED[:3], replace(WANTED[3], prompt="a three")]
    with pytest.raises(RequestError, match="prompts_sha256 was"):
        make(pipeline, tmp_path / "pictures", wanted=changed)
    with pytest.raises(RequestError, match="of other prompts or seeds"):
        open_pictures(tmp_path / "pictures", changed, progress=False)


def test_pictures_of_unknown_making_are_not_built_upon(pipeline: TiMPipeline, tmp_path: Path) -> None:
    write_random_picture(tmp_path / WANTED[0].name, 0)
    with pytest.raises(RequestError, match=rf"holds 1 pictures \(0/p.png\) but no {MANIFEST_NAME}"):
        make(pipeline, tmp_path)


def test_a_picture_of_another_making_mixed_in_is_found(pipeline: TiMPipeline, tmp_path: Path) -> None:
    make(pipeline, tmp_path / "a")
    make(pipeline, tmp_path / "b", replace(SAMPLING, num_steps=3))
    (tmp_path / "a" / WANTED[2].name).write_bytes((tmp_path / "b" / WANTED[2].name).read_bytes())
    with pytest.raises(RequestError, match=r"2/p.png: mixed in: its num_steps is 3, pictures.json says 2"):
        open_pictures(tmp_path / "a", WANTED, progress=False)
    (tmp_path / "a" / WANTED[2].name).write_bytes((tmp_path / "a" / WANTED[1].name).read_bytes())
    with pytest.raises(RequestError, match=r"2/p.png: mixed in: its prompt is 'a two'"):
        open_pictures(tmp_path / "a", WANTED, progress=False)


def test_damaged_and_extra_pictures_are_refused(pipeline: TiMPipeline, tmp_path: Path) -> None:
    make(pipeline, tmp_path)
    path = tmp_path / WANTED[1].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(RequestError, match=r"1/p.png: damaged .*delete it and generate it again"):
        open_pictures(tmp_path, WANTED, progress=False)
    path.write_bytes(whole)
    write_random_picture(tmp_path / "extra.jpg", 0)
    with pytest.raises(
        RequestError, match=r"holds 1 pictures that this evaluation does not ask for \(extra.jpg"
    ):
        open_pictures(tmp_path, WANTED, progress=False)
    with pytest.raises(RequestError, match="holds 1 foreign pictures"):
        make(pipeline, tmp_path)


def test_foreign_pictures_are_scored_with_nothing_known_of_them(tmp_path: Path) -> None:
    for n, one in enumerate(WANTED):
        write_random_picture(tmp_path / one.name, n)
    first = open_pictures(tmp_path, WANTED, progress=False)
    assert first.made_by is None
    assert open_pictures(tmp_path, WANTED, progress=False).sha256 == first.sha256
    write_random_picture(tmp_path / WANTED[0].name, 99)
    assert open_pictures(tmp_path, WANTED, progress=False).sha256 != first.sha256


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_that_was_cut_short_is_found_in_any_format(tmp_path: Path, suffix: str) -> None:
    write_random_picture(tmp_path / f"a{suffix}", 0, side=256)
    assert picture_set(tmp_path, [f"a{suffix}"], progress=False).names == (f"a{suffix}",)
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(RequestError, match=f"a{suffix}: damaged"):
        picture_set(tmp_path, [f"a{suffix}"], progress=False)


def test_pictures_of_a_data_set_may_lie_beside_others(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        write_random_picture(tmp_path / name, 0)
    assert picture_set(tmp_path, ["a/1.jpg", "b/3.jpg"], progress=False).names == ("a/1.jpg", "b/3.jpg")
    with pytest.raises(RequestError, match=r"1 of 2 pictures are missing \(c/4.jpg\)"):
        picture_set(tmp_path, ["a/1.jpg", "c/4.jpg"], progress=False)


def test_a_folder_that_is_none_and_a_manifest_that_is_none(pipeline: TiMPipeline, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none: no such folder of pictures"):
        open_pictures(tmp_path / "none", WANTED, progress=False)
    (tmp_path / MANIFEST_NAME).write_text("[")
    with pytest.raises(RequestError, match=r"pictures.json: cannot be read"):
        make(pipeline, tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps([]))
    with pytest.raises(RequestError, match="expected a mapping, received list"):
        make(pipeline, tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"size": "8x8", "seed": 0}))
    with pytest.raises(RequestError, match="no weights_sha256, num_steps, mode, cfg_scale, stochasticity"):
        make(pipeline, tmp_path)


def test_a_mistake_leaves_no_mark_and_a_run_given_up_before_its_first_picture_neither(
    pipeline: TiMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for wrong in ({"num_steps": 0}, {"size": "8x10"}, {"cfg_scale": float("nan")}):
        with pytest.raises(TimError):
            make(pipeline, folder, replace(SAMPLING, **wrong))
        assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            make(pipeline, folder, replace(SAMPLING, seed=5))
    assert read_manifest(folder) is not None
    make(pipeline, folder)
    assert len(list(folder.rglob("*.png"))) == len(WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "big"}, "--size: "),
        ({"batch": 0}, "--batch: expected at least 1"),
        ({"part": (3, 3)}, "--part: expected K/N with 0 <= K < N, received 3/3"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Sampling(**change)
    assert message in str(caught.value)
