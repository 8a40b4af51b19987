"""Benchmarks while training, in one process: what is kept between evaluations, and what ends none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.eval.tiny_scorers import TinyFeatures
from tests.networks import export_of, write_tiny_export
from tests.trainer.ranks import recipe
from tim_ds.errors import RequestError
from tim_ds.eval.inception import Inception
from tim_ds.eval.results import read_rows
from tim_ds.pipeline import PipelineOutput, TiMPipeline
from tim_ds.pipeline.request import RequestRules
from tim_ds.trainer.benchmarks import Benchmarks
from tim_ds.trainer.preview import Previews
from tim_ds.trainer.world import World

REFERENCE_PICTURES = 9


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> TinyFeatures:
    found = TinyFeatures()
    monkeypatch.setattr(Inception, "load", lambda weights: found)
    return found


@pytest.fixture
def pipeline(tmp_path: Path) -> TiMPipeline:
    export = export_of(name="classes", condition="class", channels=3)
    return TiMPipeline.from_pretrained(write_tiny_export(tmp_path / "export", export))


def imagenet(pipeline: TiMPipeline, folder: Path, entered: list[str], **settings: object) -> Benchmarks:
    """One benchmark of 10 pictures at 8 x 8, in one and in two steps."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (REFERENCE_PICTURES, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", arr_0=pictures)
    asked = {"kind": "imagenet", "size": "8x8", "count": 10, "reference": folder / "ref.npz", **settings}
    benchmark = ", ".join(f"{name}: {value}" for name, value in asked.items())
    evaluation = f"every_steps: 1, kinds: [], num_steps: [1, 2], benchmarks: [{{{benchmark}}}]"
    found = recipe(Path("shards"), f"train.evaluation={{{evaluation}}}")
    return Benchmarks(
        found, pipeline, folder / "run", World(), None, entered=entered.append, stopping=lambda: False
    )


def test_the_reference_is_looked_at_once_and_the_pictures_of_the_last_step_stay(
    network: TinyFeatures, pipeline: TiMPipeline, tmp_path: Path
) -> None:
    entered: list[str] = []
    evaluate = imagenet(pipeline, tmp_path, entered, batch=4)
    for step in (5, 10, 10):
        values, failures = evaluate(step)
        assert not failures
        names = {f"imagenet/8x8/{n}_steps/{key}" for n in (1, 2) for key in ("fid", "sfid", "precision")}
        assert names < values.keys() and all(value is not None for value in values.values())
    # Six evaluations of 10 pictures; each has three calls, and a meeting before, between and after.
    assert sum(network.seen) == REFERENCE_PICTURES + 6 * 10
    assert set(entered) == {"evaluation"} and len(entered) >= 6 * 5
    place = tmp_path / "run" / "evaluations" / "imagenet_8x8"
    rows = read_rows(place / "results.json", "imagenet")
    # The second time at step 10 replaces the first.
    assert [(row.label, row.nfe) for row in rows] == [
        ("step 5", 1),
        ("step 5", 2),
        ("step 10", 1),
        ("step 10", 2),
    ]
    assert all(row.made_by and row.made_by["recipe_sha256"] == "f" * 64 for row in rows)
    assert len(list(place.rglob("0*.png"))) == 20 and not list(place.rglob("features_*"))
    assert len(list((place / "references").iterdir())) == 1


def test_pictures_are_drawn_while_the_encoders_are_beside_the_network(
    network: TinyFeatures, pipeline: TiMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a benchmark and of a preview; between them the encoders are where they were."""
    moved: list[str] = []
    drawn: list[str] = []

    def to(device: object) -> None:
        moved.append(str(device))
        monkeypatch.setattr(pipeline.autoencoder, "device", device)

    run = TiMPipeline.run

    def watched(self: TiMPipeline, *arguments: object, **options: object) -> PipelineOutput:
        drawn.append("beside" if len(moved) % 2 else "alone")
        return run(self, *arguments, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(pipeline.autoencoder, "to", to, raising=False)
    monkeypatch.setattr(pipeline.autoencoder, "device", "elsewhere", raising=False)
    # As in a run.
    pipeline.checks_memory = False
    monkeypatch.setattr(TiMPipeline, "run", watched)
    imagenet(pipeline, tmp_path, [], batch=5)(1)
    preview = "train.preview={every_steps: 1, prompts: [a, b], sizes: [8x8, 8x8], num_steps: [1, 2]}"
    previews = Previews(recipe(Path("shards"), preview), pipeline, tmp_path / "run", World(), None)
    monkeypatch.setattr(RequestRules, "prompts", lambda _, prompts: [0] * len(prompts))
    previews(1)
    assert (tmp_path / "run" / "previews" / "step_000000001.png").stat().st_size > 0
    # Two calls at each of two step counts, and two sheets' rows.
    assert drawn == ["beside"] * 6 and moved == ["cpu", "elsewhere"] * 6


def test_another_count_than_of_whole_classes_ends_the_run_before_its_first_step(
    network: TinyFeatures, pipeline: TiMPipeline, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="expected a multiple of the number of classes, 5"):
        imagenet(pipeline, tmp_path, [], count=11)
    with pytest.raises(RequestError, match=r"train.evaluation.benchmarks\[0\]: limit: not read by imagenet"):
        imagenet(pipeline, tmp_path, [], limit=3)
    with pytest.raises(RequestError, match="both sides must be multiples of 4"):
        imagenet(pipeline, tmp_path, [], size="8x10")
