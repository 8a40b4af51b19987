"""GenEval's rules on worked examples, its file formats, its aggregation, calibration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.tiny_scorers import save_clip, write_random_picture
from tim_ds.errors import RequestError
from tim_ds.eval import calibration, geneval
from tim_ds.eval.clip import Clip
from tim_ds.eval.detector import Detection
from tim_ds.eval.generate import open_pictures, picture_set
from tim_ds.eval.geneval import Clause, Rules, Task
from tim_ds.eval.results import ScoreLog

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "tv remote", "count": 1}],
        "prompt": "a photo of a dog and a tv remote",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    },
    {
        "tag": "colors",
        "include": [{"class": "car", "count": 1, "color": "red"}],
        "prompt": "a photo of a red car",
    },
    {
        "tag": "position",
        "include": [{"class": "couch", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a couch",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "green"},
            {"class": "bowl", "count": 1, "color": "blue"},
        ],
        "prompt": "a photo of a green cup and a blue bowl",
    },
]


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def tasks(metadata: Path) -> list[Task]:
    return geneval.read_metadata(metadata)


def box(x: float, y: float, width: float = 10, height: float = 10) -> tuple[float, float, float, float]:
    """Around a centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def seen(name: str, score: float = 0.95, at: tuple[float, float, float, float] = (0, 0, 10, 10)) -> Detection:
    return Detection(name, score, at)


def no_colours(found: Sequence[Detection], name: str) -> list[str]:
    pytest.fail("colours were asked for")


class TestPosition:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            # Two boxes of 10 pixels: 0.1 x (10 + 10) = 2 pixels of slack an axis.
            (box(0, 0), box(100, 0), {"left of"}),
            (box(100, 0), box(0, 0), {"right of"}),
            (box(0, 0), box(0, 100), {"above"}),
            (box(0, 100), box(0, 0), {"below"}),
            # (100, 100) - 2 over 141.4 is 0.69 on both axes.
            (box(100, 100), box(0, 0), {"right of", "below"}),
            # (30, 100): 28 / 104.4 = 0.27 says nothing on x.
            (box(30, 100), box(0, 0), {"below"}),
            # Offset 2 is all slack; offset 5 leaves 3 / 5 = 0.6; 4 leaves 2 / 4 = 0.5, not beyond one half.
            (box(2, 0), box(0, 0), set()),
            (box(5, 0), box(0, 0), {"right of"}),
            (box(4, 0), box(0, 0), set()),
            (box(0, 0), box(0, 0), set()),
            # The sizes enter by axis: 0.1 x (200 + 10) = 21 of 30 in x leave 9 / 30.
            (box(30, 0, width=200), box(0, 0), set()),
            (box(30, 0, height=200), box(0, 0), {"right of"}),
        ],
    )
    def test_worked_examples(self, a: Any, b: Any, expected: set[str]) -> None:
        assert geneval.relations(a, b) == expected

    def test_swapping_the_boxes_mirrors_the_relation(self) -> None:
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        rng = np.random.default_rng(0)
        said = set()
        for _ in range(200):
            a, b = (box(*rng.uniform(0, 60, 2), *rng.uniform(1, 30, 2)) for _ in range(2))
            found = geneval.relations(a, b)
            assert geneval.relations(b, a) == {mirror[name] for name in found}
            said |= found
        assert said == set(mirror)

    def test_without_slack_only_the_direction_counts(self) -> None:
        assert geneval.relations(box(1, 0), box(0, 0), position_threshold=0.0) == {"right of"}


class TestKeep:
    def test_the_threshold_itself_is_not_enough(self) -> None:
        kept = geneval.keep([seen("cat", 0.3), seen("cat", 0.301)], 0.3, max_objects=16, max_overlap=1.0)
        assert [one.score for one in kept["cat"]] == [0.301]

    def test_the_surest_come_first_and_only_so_many(self) -> None:
        found = [seen("cat", 0.5 + n / 100) for n in range(20)]
        kept = geneval.keep(found, 0.3, max_objects=16, max_overlap=1.0)
        assert [one.score for one in kept["cat"]] == sorted((one.score for one in found), reverse=True)[:16]

    def test_at_overlap_1_equal_boxes_stay_and_below_they_go(self) -> None:
        found = [seen("cat", 0.9), seen("cat", 0.8), seen("cat", 0.7, box(500, 500)), seen("dog", 0.6)]
        assert len(geneval.keep(found, 0.3, max_objects=16, max_overlap=1.0)["cat"]) == 3
        kept = geneval.keep(found, 0.3, max_objects=16, max_overlap=0.5)
        assert [one.score for one in kept["cat"]] == [0.9, 0.7] and len(kept["dog"]) == 1

    def test_overlap_counts_the_last_pixel(self) -> None:
        # 11 x 11 pixels each, 11 x 6 shared: 66 / (242 - 66).
        assert geneval.overlap((0, 0, 10, 10), (0, 5, 10, 15)) == pytest.approx(66 / 176)
        assert geneval.overlap((0, 0, 10, 10), (50, 50, 60, 60)) == 0

    def test_the_rules_are_the_published_ones(self) -> None:
        """Confidence 0.3, 0.9 in counting; 16 objects a class; no suppression; offset 0.1 of the sizes."""
        assert Rules() == Rules(
            threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0, position_threshold=0.1
        )

    def test_counting_has_its_own_threshold(self) -> None:
        assert Rules().detection_threshold("counting") == 0.9
        assert {Rules().detection_threshold(tag) for tag in geneval.TASKS if tag != "counting"} == {0.3}


class TestJudge:
    def judge(self, task: Task, objects: Sequence[Detection], colours: Any = no_colours) -> geneval.Verdict:
        return geneval.judge(task, geneval.keep(objects, 0.3, max_objects=16, max_overlap=1.0), colours)

    def test_single_object(self, tasks: list[Task]) -> None:
        assert self.judge(tasks[0], [seen("bench")]).is_correct
        assert self.judge(tasks[0], [seen("bench"), seen("bench"), seen("dog")]).is_correct, (
            "more is not wrong"
        )
        wrong = self.judge(tasks[0], [seen("dog")])
        assert not wrong.is_correct and wrong.reasons == ("bench: wanted 1, detected 0",)

    def test_two_objects_need_both(self, tasks: list[Task]) -> None:
        assert self.judge(tasks[1], [seen("dog"), seen("tv remote")]).is_correct
        assert not self.judge(tasks[1], [seen("dog")]).is_correct

    @pytest.mark.parametrize(("count", "is_correct"), [(2, False), (3, True), (4, False)])
    def test_counting_is_exact(self, tasks: list[Task], count: int, is_correct: bool) -> None:
        assert self.judge(tasks[2], [seen("clock")] * count).is_correct == is_correct

    def test_colour_is_asked_of_the_surest_object_alone(self, tasks: list[Task]) -> None:
        colour_of = {0.9: "red", 0.8: "blue"}

        def read(found: Sequence[Detection], name: str) -> list[str]:
            assert name == "car"
            return [colour_of[one.score] for one in found]

        assert self.judge(tasks[3], [seen("car", 0.8), seen("car", 0.9)], read).is_correct
        colour_of = {0.9: "blue", 0.8: "red"}
        wrong = self.judge(tasks[3], [seen("car", 0.8), seen("car", 0.9)], read)
        assert wrong.reasons == ("car: wanted 1 red, read as 1 blue",)

    def test_position_is_relative_to_the_earlier_object(self, tasks: list[Task]) -> None:
        couch = seen("couch", at=box(100, 0))
        assert self.judge(tasks[4], [couch, seen("cat", at=box(0, 0))]).is_correct
        wrong = self.judge(tasks[4], [couch, seen("cat", at=box(200, 0))])
        assert wrong.reasons == ("cat: wanted left of, lies right of",)
        lost = self.judge(tasks[4], [seen("cat", at=box(0, 0))])
        assert lost.reasons == (
            "couch: wanted 1, detected 0",
            "cat: wanted left of an object that was not found",
        )

    def test_every_pair_must_stand_as_asked(self) -> None:
        task = Task("position", "", (Clause("dog", 2), Clause("cat", 1, None, ("above", 0))), (), {})
        cat, one = seen("cat", at=box(0, 0)), seen("dog", at=box(0, 100))
        assert self.judge(task, [cat, one, seen("dog", at=box(5, 90))]).is_correct
        assert not self.judge(task, [cat, one, seen("dog", at=box(5, -90))]).is_correct

    def test_colour_attribution_needs_each_colour_on_its_object(self, tasks: list[Task]) -> None:
        objects = [seen("cup"), seen("bowl")]
        right = {"cup": ["green"], "bowl": ["blue"]}
        swapped = {"cup": ["blue"], "bowl": ["green"]}
        assert self.judge(tasks[5], objects, lambda _, name: right[name]).is_correct
        assert len(self.judge(tasks[5], objects, lambda _, name: swapped[name]).reasons) == 2


class TestMetadata:
    def test_the_published_format_is_read(self, tasks: list[Task]) -> None:
        assert [task.tag for task in tasks] == list(geneval.TASKS)
        assert tasks[4].include[1] == Clause("cat", 1, None, ("left of", 0))
        assert tasks[2].exclude == (Clause("clock", 4),)
        assert not geneval.is_published_suite(tasks)
        full = [task for task in tasks for _ in range(geneval.TASKS[task.tag])]
        assert len(full) == 553 and geneval.is_published_suite(full)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: not JSON"),
            ('{"tag": "colors"}', "line 1: no prompt"),
            ('{"tag": "shapes", "prompt": "a"}', "tag is 'shapes', not one of single_object"),
            ('{"tag": "colors", "prompt": "a", "include": []}', "include is not a list of demands"),
            (
                '{"tag": "colors", "prompt": "a", "include": [{"class": "mouse", "count": 1}]}',
                "include[0]: class 'mouse' is none of the 80",
            ),
            (
                '{"tag": "colors", "prompt": "a", "include": [{"class": "car", "count": true}]}',
                "include[0]: count is True",
            ),
            (
                '{"tag": "colors", "prompt": "a", "include": [{"class": "car", "count": 1, "color": "tan"}]}',
                "color 'tan' is none of red",
            ),
            (
                '{"tag": "position", "prompt": "a", "include": '
                '[{"class": "car", "count": 1, "position": ["left of", 0]}]}',
                "is not [one of left of",
            ),
            ("", "holds no prompts"),
        ],
    )
    def test_other_lines_are_refused_by_number(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "metadata.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(RequestError) as caught:
            geneval.read_metadata(path)
        assert message in str(caught.value) and "djghosh13/geneval" in str(caught.value)

    def test_a_missing_file_says_where_to_get_it(self, tmp_path: Path) -> None:
        with pytest.raises(
            RequestError, match=r"none.jsonl: cannot be read.*evaluation_metadata.jsonl of https"
        ):
            geneval.read_metadata(tmp_path / "none.jsonl")


class TestColours:
    def test_cut_out_is_the_object_on_grey(self) -> None:
        picture = Image.new("RGB", (6, 4), color=(10, 20, 30))
        mask = np.zeros((4, 6), dtype=bool)
        mask[1:3, 2] = True
        cut = np.asarray(geneval.cut_out(picture, Detection("cup", 0.9, (2, 1, 4, 3), mask)))
        assert cut.shape == (2, 2, 3)
        assert (cut[:, 0] == (10, 20, 30)).all() and (cut[:, 1] == 0x99).all()

    def test_without_a_mask_the_box_is_cut_from_the_picture(self) -> None:
        picture = Image.new("RGB", (6, 4), color=(10, 20, 30))
        assert (
            np.asarray(geneval.cut_out(picture, Detection("cup", 0.9, (0, 0, 3, 2)))) == (10, 20, 30)
        ).all()

    def test_a_mask_of_another_size_is_refused(self) -> None:
        with pytest.raises(RequestError, match="mask of cup: expected 4x6"):
            geneval.cut_out(
                Image.new("RGB", (6, 4)), Detection("cup", 1, (0, 0, 1, 1), np.ones((6, 4), bool))
            )

    def test_the_likeliest_colour_by_cosine_is_read(self, tmp_path: Path) -> None:
        clip = Clip.from_pretrained(str(save_clip(tmp_path / "clip")))
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        objects = [Detection("dog", 0.9, box(8, 8)), Detection("dog", 0.8, box(12, 12, 8, 16))]
        read = geneval.ColourReader(clip)(picture, objects, "dog")
        templates = ["a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"]
        for one, colour in zip(objects, read, strict=True):
            cosines = []
            vector = clip.encode_pictures([geneval.cut_out(picture, one)])[0].double()
            for name in geneval.COLOURS:
                texts = clip.encode_captions([t.format(name) for t in templates]).double()
                mean = texts.mean(dim=0)
                cosines.append(float(vector @ mean / mean.norm()))
            assert geneval.COLOURS[int(np.argmax(cosines))] == colour


class TestScoring:
    def write(self, folder: Path, tasks: list[Task], num: int = 2) -> None:
        for n, one in enumerate(geneval.wanted_pictures(tasks, num_per_prompt=num, seed=0)):
            write_random_picture(folder / one.name, n)

    def score(self, folder: Path, tasks: list[Task], log: ScoreLog, detect: Any) -> list[dict[str, Any]]:
        pictures = open_pictures(folder, geneval.pictures_of_layout(folder, tasks), progress=False)

        def colours(picture: Image.Image, found: Sequence[Detection], name: str) -> list[str]:
            return ["red"] * len(found)

        return geneval.score_pictures(pictures, tasks, detect, colours, Rules(), log, progress=False)

    def test_results_are_in_the_published_format_and_an_interruption_loses_one_picture(
        self, tmp_path: Path, tasks: list[Task]
    ) -> None:
        self.write(tmp_path / "pictures", tasks)
        calls: list[float] = []

        def detect(picture: Image.Image, *, threshold: float) -> list[Detection]:
            if len(calls) == 5:
                raise KeyboardInterrupt
            calls.append(threshold)
            return [seen("bench"), seen("car")]

        with pytest.raises(KeyboardInterrupt):
            self.score(tmp_path / "pictures", tasks, ScoreLog(tmp_path, "geneval", {"a": 1}), detect)
        assert calls == [0.3, 0.3, 0.3, 0.3, 0.9]
        seen_before = len(calls)
        calls.append(0)
        results = self.score(tmp_path / "pictures", tasks, ScoreLog(tmp_path, "geneval", {"a": 1}), detect)
        assert len(calls) - 1 - seen_before == 12 - 5
        assert [r["correct"] for r in results] == [True] * 2 + [False] * 4 + [True] * 2 + [False] * 4
        first = results[0]
        assert first["filename"] == "00000/samples/00000.png" and json.loads(first["metadata"]) == LINES[0]
        assert json.loads(first["details"])["bench"] == [[0, 0, 10, 10, 0.95]]
        scores, details = geneval.summarise(results)
        assert scores["overall"] == pytest.approx(2 / 6) and scores["colors"] == 1
        assert details["by_task"]["counting"] == {"correct": 0, "pictures": 2}

    def test_overall_is_the_plain_mean_of_tasks_whatever_their_sizes(self) -> None:
        def result(tag: str, prompt: str, correct: bool) -> dict[str, Any]:
            return {"tag": tag, "metadata": prompt, "correct": correct}

        results = [result("colors", "a", True), result("colors", "a", False)]
        results += [result("counting", p, False) for p in "bcdefg"]
        scores, _ = geneval.summarise(results)
        assert scores["overall"] == pytest.approx((0.5 + 0.0) / 2)
        assert scores["pictures"] == pytest.approx(1 / 8) and scores["prompts"] == pytest.approx(1 / 7)
        assert scores["position"] is None

    def test_another_programs_layout_is_found_with_any_number_of_digits(
        self, tmp_path: Path, tasks: list[Task]
    ) -> None:
        for n in range(len(tasks)):
            for k in range(2):
                write_random_picture(tmp_path / f"{n:05d}" / "samples" / f"{k:04d}.png", n)
        wanted = geneval.pictures_of_layout(tmp_path, tasks)
        assert [one.name for one in wanted[:3]] == [
            "00000/samples/0000.png",
            "00000/samples/0001.png",
            "00001/samples/0000.png",
        ]
        (tmp_path / "00003" / "samples" / "0001.png").unlink()
        with pytest.raises(RequestError, match=r"00003/samples: half finished: expected 2 pictures"):
            geneval.pictures_of_layout(tmp_path, tasks)

    def test_pictures_of_another_order_of_prompts_are_refused(
        self, tmp_path: Path, tasks: list[Task]
    ) -> None:
        self.write(tmp_path, tasks)
        geneval.write_layout(tmp_path, tasks)
        assert len(geneval.pictures_of_layout(tmp_path, tasks)) == 12
        with pytest.raises(RequestError, match=r"00000/metadata.jsonl: of another prompt than line 1"):
            geneval.pictures_of_layout(tmp_path, tasks[::-1])


class TestCalibrate:
    def results(self, verdicts: str) -> list[dict[str, Any]]:
        return [
            {"filename": f"{n:05d}/samples/00000.png", "tag": tag, "correct": verdict == "+"}
            for n, (tag, verdict) in enumerate(zip(["colors"] * 3 + ["counting"] * 2, verdicts, strict=True))
        ]

    def test_agreement_by_task(self, tmp_path: Path) -> None:
        theirs = tmp_path / "results.jsonl"
        lines = [
            {**r, "filename": f"/their/place/{r['filename']}", "reason": ""} for r in self.results("++-+-")
        ]
        theirs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = geneval.calibrate(self.results("+----"), geneval.read_results(theirs))
        # In the order of the tasks: counting has one of theirs alone, colors one of each but ours alone.
        counting, colours = found
        assert (counting.task, counting.only_theirs, counting.both_wrong, counting.agreement) == (
            "counting",
            1,
            1,
            0.5,
        )
        assert (colours.both_right, colours.only_ours, colours.only_theirs, colours.both_wrong) == (
            1,
            0,
            1,
            1,
        )
        assert colours.ours == pytest.approx(1 / 3) and colours.theirs == pytest.approx(2 / 3)

    def test_the_offset_and_its_error(self) -> None:
        # Of 100 pictures 60 right in both, 5 here alone, 1 there alone: 4 points, of which 6 pictures decide.
        one = geneval.Agreement("colors", both_right=60, both_wrong=34, only_ours=5, only_theirs=1)
        assert one.offset == pytest.approx(0.04) and one.agreement == 0.94
        # With half a picture more in each of four counts: variance of +1, -1 and 0 with shares of
        # 5.5, 1.5 and 95 of 102.
        variance = (7 / 102 - (4 / 102) ** 2) / 102
        assert one.offset_error == pytest.approx(variance**0.5)
        other = geneval.Agreement("counting", both_right=5, both_wrong=5, only_ours=0, only_theirs=0)
        # Tasks weigh alike, whatever their pictures.
        of_other = (1 / 12) / 12
        assert calibration.overall([one, other]) == pytest.approx(
            ((0.65 + 0.5) / 2, (0.61 + 0.5) / 2, 0.02, (variance + of_other) ** 0.5 / 2)
        )

    def test_pictures_of_a_prompt_that_fail_together_count_as_one(self) -> None:
        """Ten prompts of four: two where all differ, or eight pictures that differ spread over eight."""
        results = {
            name: [
                {
                    "filename": f"{n:05d}/samples/{k:05d}.png",
                    "tag": "colors",
                    "correct": n < 2 if name == "together" else (k == 0 and n < 8),
                }
                for n in range(10)
                for k in range(4)
            ]
            for name in ("together", "apart")
        }
        theirs = {r["filename"]: {"tag": "colors", "correct": False} for r in results["apart"]}
        [together], [apart] = (geneval.calibrate(results[name], theirs) for name in ("together", "apart"))
        assert together.offset == apart.offset == 0.2 and together.only_ours == apart.only_ours == 8
        # Sums of prompts 4, 4, 0, ... about 0.8: 2 x 3.2^2 + 8 x 0.8^2.
        assert together.offset_error == pytest.approx((25.6 * 10 / 9) ** 0.5 / 40)
        assert apart.offset_error == pytest.approx(((9 / 42) - (8 / 42) ** 2) ** 0.5 / 42**0.5)

    def test_the_worked_example_of_the_readme(self) -> None:
        """Verdicts drawn by a generator in the published format: the table of tim_ds/eval/README.md."""
        rng = np.random.default_rng(0)
        ours, theirs, n = [], {}, 0
        for tag, count in geneval.TASKS.items():
            for _ in range(count):
                quality = rng.beta(2, 1)
                for k in range(4):
                    right = bool(rng.random() < quality)
                    # Of those right there, one in 20 is missed here; of the others, one in 50 is let pass.
                    seen_here = rng.random() > 0.05 if right else rng.random() < 0.02
                    name = f"{n:05d}/samples/{k:05d}.png"
                    ours.append({"filename": name, "tag": tag, "correct": bool(seen_here)})
                    theirs[name] = {"tag": tag, "correct": right}
                n += 1
        agreements = geneval.calibrate(ours, theirs)
        text = calibration.verdicts_table(agreements)
        readme = (Path(geneval.__file__).parent / "README.md").read_text()
        assert text in readme, text
        found, _, offset, error = calibration.overall(agreements)
        said = f"overall {100 * found:.2f}, offset {100 * offset:+.2f} +- {100 * error:.2f}"
        assert said in readme and f"less offset {100 * (found - offset):.2f}" in readme, said

    def test_curves_against_the_threshold(self, tmp_path: Path, tasks: list[Task]) -> None:
        """Detections whose scores are known, against verdicts that another scale of scores would give."""
        asked = [tasks[0]] * 4
        benches = {0: 0.25, 1: 0.45, 2: 0.65, 3: 0.0}
        for n in range(4):
            Image.new("RGB", (4, 4), (n, n, n)).save(tmp_path / f"{n}.png")
        pictures = picture_set(tmp_path, [f"{n}.png" for n in range(4)], progress=False)
        floors = []

        def detect(picture: Image.Image, *, threshold: float) -> list[Detection]:
            floors.append(threshold)
            score = benches[int(np.asarray(picture).flat[0])]
            return [seen("bench", score)] if score > threshold else []

        levels, log = (0.1, 0.3, 0.5, 0.7), ScoreLog(tmp_path, "x", {})
        verdicts = geneval.judge_at_thresholds(
            pictures, asked, detect, lambda *_: pytest.fail("colours"), Rules(), levels, log, progress=False
        )
        assert verdicts == [
            [True, False, False, False],
            [True, True, False, False],
            [True, True, True, False],
            [False] * 4,
        ]
        assert floors == [0.1] * 4, "one look a picture"
        results = [
            {"filename": f"{n}.png", "tag": "single_object", "correct": verdict[1]}
            for n, verdict in enumerate(verdicts)
        ]
        theirs = {f"{n}.png": {"tag": "single_object", "correct": n == 2} for n in range(4)}
        [curve] = calibration.curves(results, verdicts, theirs, Rules(), levels)
        assert curve.ours == (0.75, 0.5, 0.25, 0.0) and curve.agreement == (0.5, 0.75, 1.0, 0.75)
        assert (curve.theirs, curve.published, curve.thresholds[curve.best]) == (0.25, 0.3, 0.5)
        text = calibration.report(geneval.calibrate(results, theirs), [curve])
        # One of four differs, of four prompts: 0.25, and (3 x 0.25^2 + 0.75^2) x 4 / 3 / 4^2 of variance.
        assert "+25.00 +- 25.00" in text and "difference +25.00 points" in text
        line = "agree % | 50.0 | 75.0 | 100.0 | 75.0 | 0.3 | 0.5"
        assert line in re.sub(" +", " ", text)

    def test_an_object_is_asked_for_its_colour_once(self, tmp_path: Path, tasks: list[Task]) -> None:
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        pictures = picture_set(tmp_path, ["a.png"], progress=False)
        asked: list[float] = []

        def read(picture: Image.Image, found: Sequence[Detection], name: str) -> list[str]:
            asked.extend(one.score for one in found)
            return ["red" if one.score > 0.5 else "blue" for one in found]

        def detect(picture: Image.Image, *, threshold: float) -> list[Detection]:
            return [seen("car", 0.4), seen("car", 0.8)]

        log = ScoreLog(tmp_path, "x", {})
        for _ in range(2):
            found = geneval.judge_at_thresholds(
                pictures, [tasks[3]], detect, read, Rules(), (0.1, 0.3, 0.9), log, progress=False
            )
            assert found == [[True, True, False]]
        assert asked == [0.8]

    def test_other_pictures_or_tasks_are_refused(self) -> None:
        ours = self.results("+++++")
        reference = {r["filename"]: r for r in ours}
        with pytest.raises(RequestError, match=r"without a verdict: 00004/samples/00000.png"):
            geneval.calibrate(ours, {k: v for k, v in reference.items() if not k.startswith("00004")})
        reference["00000/samples/00000.png"] = {"tag": "counting", "correct": True}
        with pytest.raises(RequestError, match="of task 'counting' there and 'colors' here"):
            geneval.calibrate(ours, reference)

    @pytest.mark.parametrize(
        "line", ["{", '{"filename": "a/b/c.png"}', '{"filename": "a", "tag": "x", "correct": 1}']
    )
    def test_another_file_is_refused(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "results.jsonl").write_text(line)
        with pytest.raises(RequestError, match="line 1: not a verdict of GenEval's evaluator"):
            geneval.read_results(tmp_path / "results.jsonl")


def test_a_score_of_some_tasks_is_less_the_offset_of_these() -> None:
    agreements = [
        geneval.Agreement("counting", both_right=6, both_wrong=2, only_ours=2, only_theirs=0),
        geneval.Agreement("position", both_right=5, both_wrong=4, only_ours=0, only_theirs=1),
    ]
    found = calibration.Calibration.of(agreements, {}, pictures_sha256="", results_sha256="")
    # Quotients of whole numbers, up to roundings of float64.
    assert found.offset_of(["counting"]) == pytest.approx(0.2, abs=1e-15)
    assert found.offset_of(["counting", "position"]) == pytest.approx(found.offset, abs=1e-15)
    assert found.offset_of(["counting", "colors"]) is None
