"""The command line that draws pictures: jobs, restarts, processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import TextEncoderConfig
from tests.networks import TEXT_WIDTH, export_of, write_tiny_export
from tim_ds.eval import sample
from tim_ds.pipeline import PipelineOutput, TiMPipeline, read_settings

LINES = [
    {"prompt": "a three", "size": "8x8", "seed": 7},
    {"prompt": "a one above a two", "size": "16x8", "steps": 3, "name": "tall"},
    {"prompt": "日本 é", "num": 2, "cfg": 2.0, "cfg_interval": [0.0, 0.6]},
    {"prompt": "a five", "stochasticity": 0.3, "steps": 3, "mode": "transition"},
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("sample") / "export")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def draw(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """draw(words, out) -> (exit status, what was printed, errors)."""

    def run(*words: str, out: str = "out") -> tuple[int, str, str]:
        status = sample.main(["--export", str(export), *words, "--out", str(tmp_path / out)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def pictures(folder: Path) -> dict[str, bytes]:
    """Pixels by name, the grid left out."""
    found = {p.stem: np.asarray(Image.open(p)).tobytes() for p in folder.glob("*.png") if p.stem != "grid"}
    assert found
    return found


class TestJobs:
    def test_every_line_of_a_file_has_its_own_settings(
        self, draw: Any, prompts: Path, tmp_path: Path
    ) -> None:
        status, printed, _ = draw(
            "--prompts-file", str(prompts), "--size", "8x16", "--steps", "2", "--seed", "40"
        )
        assert status == 0
        names = [
            "0000_a-three_seed7",
            "tall",
            "0002_日本-é_seed42",
            "0003_日本-é_seed43",
            "0004_a-five_seed44",
        ]
        found = [read_settings(tmp_path / "out" / f"{name}.png") for name in names]
        assert [s["size"] for s in found] == ["8x8", "16x8", "8x16", "8x16", "8x16"]
        assert [s["seed"] for s in found] == [7, 41, 42, 43, 44]
        assert [s["num_steps"] for s in found] == [2, 3, 2, 2, 3]
        assert [s["nfe"] for s in found] == [2, 3, 3, 3, 3]
        assert [s["stochasticity"] for s in found] == [0, 0, 0, 0, 0.3]
        assert found[2]["prompt"] == "日本 é" and found[2]["cfg_interval"] == [0.0, 0.6]
        assert "ms, peak memory" in printed and str(tmp_path / "out" / "grid.png") in printed

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"prompts.jsonl:1: not JSON"),
            ('{"size": "8x8"}', r"prompts.jsonl:1: expected an object with a prompt"),
            ('{"prompt": "a", "sed": 1}', r"prompts.jsonl:1: unknown key 'sed'; known: prompt, size, seed"),
            ('{"prompt": "a", "seed": true}', r"prompts.jsonl:1: seed: expected int, received True"),
            ('{"prompt": "a", "num": 0}', r"prompts.jsonl:1: num: expected at least 1, received 0"),
            ('{"prompt": "a", "name": "../a"}', r"name: expected a plain file name, received '../a'"),
            ('{"prompt": "a", "name": "a\\u0000b"}', r"name: expected a plain file name, received 'a\x00b'"),
            (
                '{"prompt": "a", "size": "8x8", "name": "grid"}',
                "name: 'grid' is that of the sheet of all pictures",
            ),
            (
                '{"prompt": "a", "size": "8x8", "name": "grid_2"}',
                "name: 'grid_2' is that of the sheet of all pictures",
            ),
            ('{"prompt": "a", "cfg_interval": [0.5]}', "prompts.jsonl:1: cfg_interval: expected two numbers"),
            ('{"prompt": "a", "cfg_interval": [0, "b"]}', "prompts.jsonl:1: cfg_interval: expected two"),
            ('{"prompt": "a"}', "--size: expected one, because"),
            (
                '{"prompt": "a", "size": "8x8", "name": "b"}\n{"prompt": "a", "size": "8x8", "name": "b"}',
                "b.png",
            ),
        ],
    )
    def test_lines_that_cannot_be_drawn_are_named(
        self, draw: Any, tmp_path: Path, line: str, message: str
    ) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(line)
        status, _, error = draw("--prompts-file", str(path))
        assert status == 2 and message in error and not (tmp_path / "out").exists()

    def test_lines_of_other_settings_are_not_summed_up_as_one(self, draw: Any, tmp_path: Path) -> None:
        path = tmp_path / "two.jsonl"
        path.write_text('{"prompt": "a two", "steps": 1}\n{"prompt": "a six", "steps": 3, "cfg": 2}\n')
        _, printed, _ = draw("--prompts-file", str(path), "--size", "8x8")
        assert "2 pictures, 1 to 6 network evaluations and" in printed

    def test_a_prompt_is_exact_up_to_the_end_of_its_line(self, draw: Any, tmp_path: Path) -> None:
        """Other characters that end lines somewhere, and the mark some editors put first, are none here."""
        text = "a \u2028three\x85 or\x0c é"
        (tmp_path / "p.txt").write_text(f"\ufeff{text}\r\na one\n", encoding="utf-8")
        assert draw("--prompts-file", str(tmp_path / "p.txt"), "--size", "8x8")[0] == 0
        found = {read_settings(p)["prompt"] for p in (tmp_path / "out").glob("0*.png")}
        assert found == {text, "a one"}

    def test_half_a_character_is_refused(self, draw: Any, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d cat", "size": "8x8"}\n')
        status, _, error = draw("--prompts-file", str(tmp_path / "p.jsonl"))
        assert status == 2 and "prompts[0]: not text that can be written" in error
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("line", "words", "message"),
        [
            (
                '{"prompt": "a", "size": "8x8"}',
                ["--size", "8x16"],
                "--size: no use: every prompt has its own",
            ),
            ('{"prompt": "a", "steps": 1}', ["--size", "8x8", "--steps", "2"], "--steps: no use"),
            (
                '{"prompt": "a"}',
                ["--size", "8x8", "--negative-prompt", "b"],
                "--negative-prompt: of --prompt",
            ),
        ],
    )
    def test_an_option_that_would_change_nothing_is_refused(
        self, draw: Any, tmp_path: Path, line: str, words: list[str], message: str
    ) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(line)
        status, _, error = draw("--prompts-file", str(path), *words)
        assert status == 2 and message in error and not (tmp_path / "out").exists()

    def test_a_picture_is_repeated_as_it_was_or_not_at_all(self, draw: Any, tmp_path: Path) -> None:
        assert draw("--prompt", "a three", "--size", "8x8", "--steps", "1", out="first")[0] == 0
        (drawn,) = (tmp_path / "first").glob("0*.png")
        status, _, error = draw("--from", str(drawn), "--steps", "2")
        assert status == 2 and "--steps: no use: every prompt has its own" in error
        # Beside a prompt, options are that prompt's.
        options = ["--prompt", "a two", "--size", "8x16", "--steps", "2"]
        assert draw("--from", str(drawn), *options)[0] == 0
        found = [read_settings(p)["num_steps"] for p in sorted((tmp_path / "out").glob("0*.png"))]
        assert sorted(found) == [1, 2]

    def test_no_prompt_at_all_is_refused(self, draw: Any) -> None:
        assert "give --prompt, --prompts-file or --from" in draw("--size", "8x8")[2]

    def test_a_picture_repeats_itself(self, draw: Any, prompts: Path, tmp_path: Path) -> None:
        draw("--prompts-file", str(prompts), "--size", "8x16", "--seed", "40")
        first = pictures(tmp_path / "out")
        words = [w for name in first for w in ("--from", str(tmp_path / "out" / f"{name}.png"))]
        # In float32 another batch may move a value across a rounding edge: one batch a picture on both sides.
        status, _, error = draw(*words, "--tokens-per-batch", "1", out="again")
        draw(
            "--prompts-file",
            str(prompts),
            "--size",
            "8x16",
            "--seed",
            "40",
            "--tokens-per-batch",
            "1",
            out="one",
        )
        assert status == 0 and "warning" not in error
        assert pictures(tmp_path / "again") == pictures(tmp_path / "one")
        assert first.keys() == pictures(tmp_path / "again").keys()

    def test_a_negative_prompt_is_drawn_stored_kept_and_repeated(self, draw: Any, tmp_path: Path) -> None:
        words = ["--prompt", "a two", "--size", "8x8", "--cfg", "2"]
        assert draw(*words, "--negative-prompt", "a nine")[0] == 0
        [first] = (tmp_path / "out").glob("0*.png")
        assert read_settings(first)["negative_prompt"] == "a nine"
        assert "1 picture finished and kept" in draw(*words, "--negative-prompt", "a nine")[1]
        status, _, error = draw(*words)
        assert status == 2 and 'negative_prompt is "a nine", asked for null' in error
        assert draw("--from", str(first), out="again")[0] == 0
        line = json.dumps({"prompt": "a two", "negative_prompt": "a nine", "cfg": 2, "name": first.stem})
        (tmp_path / "one.jsonl").write_text(line)
        assert draw("--prompts-file", str(tmp_path / "one.jsonl"), "--size", "8x8", out="listed")[0] == 0
        assert pictures(tmp_path / "again") == pictures(tmp_path / "out") == pictures(tmp_path / "listed")
        assert draw(*words, out="plain")[0] == 0
        assert pictures(tmp_path / "plain") != pictures(tmp_path / "out")

    def test_other_weights_than_those_of_the_picture_are_named(
        self, draw: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        draw("--prompt", "a three", "--size", "8x8")
        [name] = pictures(tmp_path / "out")
        other = write_tiny_export(tmp_path / "other", seed=1)
        words = ["--export", str(other), "--from", str(tmp_path / "out" / f"{name}.png")]
        assert sample.main([*words, "--out", str(tmp_path / "again")]) == 0
        assert "was drawn with other weights" in caplog.text


class TestRestart:
    WORDS = (
        "--prompt",
        "a three",
        "--prompt",
        "a two",
        "--size",
        "8x8",
        "--num",
        "3",
        "--tokens-per-batch",
        "8",
    )

    def test_finished_pictures_are_kept_and_missing_ones_drawn_as_before(
        self, draw: Any, tmp_path: Path
    ) -> None:
        draw(*self.WORDS)
        out = tmp_path / "out"
        before = pictures(out)
        paths = sorted(out.glob("0*.png"))
        paths[3].unlink()
        kept = {p: p.stat().st_mtime_ns for p in paths if p.exists()}
        status, printed, _ = draw(*self.WORDS)
        assert status == 0 and "5 pictures finished and kept" in printed and "1 picture, " in printed
        assert pictures(out) == before and len(before) == 6
        assert {p: p.stat().st_mtime_ns for p in kept} == kept

    def test_the_grid_of_other_pictures_is_kept(self, draw: Any, tmp_path: Path) -> None:
        draw(*self.WORDS)
        first = (tmp_path / "out" / "grid.png").read_bytes()
        words = ["--prompt", "a nine", "--size", "8x8"]
        for _ in range(2):
            status, printed, _ = draw(*words)
            assert status == 0 and "grid_2.png" in printed
        assert (tmp_path / "out" / "grid.png").read_bytes() == first
        assert sorted(path.name for path in (tmp_path / "out").glob("grid*")) == ["grid.png", "grid_2.png"]

    def test_nothing_is_drawn_when_all_is_finished(self, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        draw(*self.WORDS)
        monkeypatch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
        status, printed, _ = draw(*self.WORDS)
        assert status == 0 and "6 pictures finished and kept" in printed

    def test_another_setting_under_the_same_name_is_refused(self, draw: Any, tmp_path: Path) -> None:
        draw(*self.WORDS)
        before = pictures(tmp_path / "out")
        status, _, error = draw(*self.WORDS, "--steps", "5")
        assert status == 2
        assert "num_steps is 2, asked for 5; choose another --out, or move the file away" in error
        assert pictures(tmp_path / "out") == before

    def test_a_file_of_somebody_else_is_refused(self, draw: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "0000_a-three_seed0.png").write_bytes(b"mine")
        status, _, error = draw(*self.WORDS)
        assert status == 2 and "not a picture that can be read" in error
        assert (tmp_path / "out" / "0000_a-three_seed0.png").read_bytes() == b"mine"

    def test_a_disk_that_fills_up_leaves_whole_pictures_and_a_restart_completes_them(
        self, draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage, room = shutil.disk_usage(tmp_path), iter([10**9] * 3)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(room, 10)))
            status, _, error = draw(*self.WORDS)
        assert status == 2 and "cannot be written" in error and "the disk has 10 bytes left" in error
        assert len(pictures(tmp_path / "out")) == 3 and not list((tmp_path / "out").glob(".*"))
        assert draw(*self.WORDS)[0] == 0
        draw(*self.WORDS, out="whole")
        assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")


class TestProcesses:
    # Three batches, of 2, 2 and 1 pictures, go round; the last process draws first.
    @pytest.mark.parametrize(("world", "shares"), [(2, [2, 3]), (3, [1, 2, 2])])
    def test_pictures_do_not_depend_on_the_number_of_processes(
        self,
        draw: Any,
        prompts: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        world: int,
        shares: list[int],
    ) -> None:
        words = ["--prompts-file", str(prompts), "--size", "8x16", "--tokens-per-batch", "16"]
        assert draw(*words)[0] == 0
        monkeypatch.setenv("WORLD_SIZE", str(world))
        counts = []
        for rank in reversed(range(world)):
            monkeypatch.setenv("RANK", str(rank))
            status, printed, _ = draw(*words, out="shared")
            assert status == 0
            counts.append(printed.count("peak memory") - 1)
            assert ("grid.png" in printed) == (rank == 0)
        assert pictures(tmp_path / "shared") == pictures(tmp_path / "out")
        assert counts == shares


class TestTooMuch:
    def test_a_size_beyond_memory_is_refused_with_what_fits(
        self, draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
        status, _, error = draw(
            "--prompt", "a", "--size", "8x8", "--prompt", "b", "--size", "4000000x4000000"
        )
        assert status == 2 and not (tmp_path / "out").exists()
        assert "sizes[1]: 4000000x4000000: sampling and decoding it takes about" in error
        assert "are left on cpu; squares fit up to" in error

    def test_what_is_said_to_fit_does(self, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tim_ds.pipeline import memory as module

        pipe = TiMPipeline.from_pretrained(export)
        config = pipe.export.sampler
        monkeypatch.setattr(module, "available_bytes", lambda _: pipe.needed_bytes((512, 512), config))
        with pytest.raises(Exception, match="squares fit up to 512x512"):
            pipe.request("a", "516x512")
        assert pipe.request("a", "512x512").sizes == ((512, 512),)
        monkeypatch.setattr(module, "available_bytes", lambda _: 1)
        with pytest.raises(Exception, match="no size fits"):
            pipe.request("a", "4x4")
        monkeypatch.setattr(module, "available_bytes", lambda _: None)
        pipe.request("a", "40000x40000")

    def test_automatic_batches_follow_memory(self, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tim_ds.pipeline import memory as module

        pipe = TiMPipeline.from_pretrained(export)
        found = []
        for room in (1, 1 << 30, 8 << 30):
            monkeypatch.setattr(module, "available_bytes", lambda _, room=room: room)
            found.append(pipe.fitting_tokens())
        assert found[0] == 4096 < found[1] < found[2]

    def test_a_prompt_beyond_the_encoders_limit_is_cut_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = TextEncoderConfig(kind="words", width=TEXT_WIDTH, max_tokens=4)
        folder = write_tiny_export(tmp_path / "export", replace(export_of(), text_encoder=text))
        words = ["--export", str(folder), "--size", "8x8", "--prompt", "a one above a two above a three"]
        assert sample.main([*words, "--out", str(tmp_path / "out")]) == 0
        assert "caption of 9 tokens cut to 4: 'a one above a two above a three'" in caplog.text


def test_the_device_of_a_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert sample.device_of_process("cuda") == "cuda:3" and sample.device_of_process("cuda:1") == "cuda:1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert sample.device_of_process(None) == "cuda:3" and sample.device_of_process("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sample.device_of_process(None) == "cpu"


def test_tiles_belong_to_autoencoders_with_weights(draw: Any) -> None:
    status, _, error = draw("--prompt", "a", "--size", "8x8", "--tile", "64")
    assert status == 2 and "--tile: this network's autoencoder has no weights" in error
    assert (
        "expected a number of at least 1 or auto"
        in draw("--prompt", "a", "--size", "8x8", "--tokens-per-batch", "many")[2]
    )


def test_output_is_what_the_pipeline_gives(export: Path, draw: Any, tmp_path: Path) -> None:
    draw("--prompt", "a three", "--size", "8x8", "--seed", "5")
    output: PipelineOutput = TiMPipeline.from_pretrained(export)("a three", "8x8", seeds=5)
    [path] = (tmp_path / "out").glob("0*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path))[..., None], output.pixels[0])
    assert read_settings(path) == output.picture_settings(0)


def test_offloaded_the_pictures_are_the_same(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--prompt", "a three", "--size", "8x8", "--device", "cpu")
    draw(*words)
    asked: list[str] = []
    enable = TiMPipeline.enable_model_cpu_offload

    def watched(self: TiMPipeline, *, device: str) -> None:
        asked.append(device)
        enable(self, device=device)

    monkeypatch.setattr(TiMPipeline, "enable_model_cpu_offload", watched)
    status, printed, _ = draw(*words, "--offload")
    assert status == 0 and asked == ["cpu"] and "1 picture finished and kept" in printed
    draw(*words, "--offload", out="offloaded")
    assert pictures(tmp_path / "offloaded") == pictures(tmp_path / "out")
