"""The rebuilt GenEval beside the published evaluator on the same pictures: agreement and offset, also against
the detector's threshold.

The scores of `geneval` are those of the published thresholds, whatever is found here. What is found says how
far they can be quoted: an offset is what another training of the detector adds to a score, and a curve that
agrees best elsewhere than at the published threshold says that its confidences are on another scale.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tim_ds.errors import RequestError
from tim_ds.eval import geneval
from tim_ds.eval.geneval import Agreement, Rules
from tim_ds.eval.report import markdown_table
from tim_ds.eval.results import flattened
from tim_ds.eval.sheet import Picture
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import write_png

TEXT_NAME, NUMBERS_NAME, PLOT_NAME = "calibration.md", "calibration.json", "calibration.png"

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Where the curves are taken; the published ones, 0.3 and 0.9, are among them."""


NOT_CALIBRATED = "not calibrated"
_COMPARED = ("protocol", "rules", "detector", "clip")
"""What a calibration is of: the evaluator, whatever pictures it looked at."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found of an evaluator, as result rows carry it."""

    scorer: dict[str, Any]
    """Of the row that was compared (`ResultRow.scorer`)."""
    num_pictures: int
    pictures_sha256: str
    results_sha256: str
    """Of the published evaluator's results file."""
    offset: float
    """Of the overall score: ours minus theirs."""
    offset_error: float
    by_task: dict[str, dict[str, float]]
    """`offset` and `offset_error` of every task."""

    @classmethod
    def of(
        cls,
        agreements: Sequence[Agreement],
        scorer: Mapping[str, Any],
        *,
        pictures_sha256: str,
        results_sha256: str,
    ) -> Calibration:
        _, _, offset, error = overall(agreements)
        return cls(
            scorer=dict(scorer),
            num_pictures=sum(one.num_pictures for one in agreements),
            pictures_sha256=pictures_sha256,
            results_sha256=results_sha256,
            offset=offset,
            offset_error=error,
            by_task={
                one.task: {"offset": one.offset, "offset_error": one.offset_error} for one in agreements
            },
        )

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """The one that `write` left.

        Raises:
            RequestError: if the file is something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))["calibration"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"--calibration {path}: cannot be read ({error!r}); expected the {NUMBERS_NAME} of a run "
                f"with --calibrate"
            ) from error

    def offset_of(self, tasks: Collection[str]) -> float | None:
        """Of an overall score over these tasks alone; None where one of them was not compared."""
        if not set(tasks) <= self.by_task.keys():
            return None
        return sum(self.by_task[task]["offset"] for task in tasks) / len(tasks)

    def refuse_other(self, scorer: Mapping[str, Any], path: Path) -> None:
        """Raises RequestError if `scorer` is another evaluator than the one compared."""
        ours, theirs = (flattened({key: one.get(key) for key in _COMPARED}) for one in (scorer, self.scorer))
        different = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        # A folder may be called otherwise: the weights decide.
        different = [key for key in different if not (key.endswith(".name") and _hashed(key, ours, theirs))]
        if different:
            raise RequestError(
                f"--calibration {path}: of another evaluator: "
                + "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in different[:3])
                + "; make one for this one (--calibrate)"
            )

    def remark(self) -> dict[str, Any]:
        """What a result row says of it."""
        return {name: value for name, value in asdict(self).items() if name != "scorer"}


def _hashed(key: str, *scorers: Mapping[str, Any]) -> bool:
    return all(key.replace(".name", ".weights_sha256") in scorer for scorer in scorers)


@dataclass(frozen=True, slots=True)
class Curve:
    """One task against the threshold above which a detection counts."""

    task: str
    published: float
    """The threshold of the scores."""
    thresholds: tuple[float, ...]
    ours: tuple[float, ...]
    """Share of right pictures at each threshold."""
    agreement: tuple[float, ...]
    """Share of pictures judged alike."""
    theirs: float

    @property
    def best(self) -> int:
        """Place of the threshold that agrees most; of several, the one nearest to the published one."""
        return max(
            range(len(self.thresholds)),
            key=lambda n: (self.agreement[n], -abs(self.thresholds[n] - self.published)),
        )


def curves(
    results: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Sequence[bool]],
    reference: Mapping[str, Mapping[str, Any]],
    rules: Rules,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Curve]:
    """One curve a task.

    Args:
        results: ours, which name the pictures and their tasks.
        verdicts: of `geneval.judge_at_thresholds`, in the same order.
        reference: theirs (`geneval.read_results`).
    """
    found = []
    for task in geneval.TASKS:
        places = [i for i, result in enumerate(results) if result["tag"] == task]
        if not places:
            continue
        theirs = np.array([reference[results[i]["filename"]]["correct"] for i in places])
        ours = np.array([verdicts[i] for i in places])
        found.append(
            Curve(
                task,
                rules.detection_threshold(task),
                tuple(thresholds),
                tuple(ours.mean(axis=0).tolist()),
                tuple((ours == theirs[:, None]).mean(axis=0).tolist()),
                float(theirs.mean()),
            )
        )
    return found


def verdicts_table(agreements: Sequence[Agreement]) -> str:
    """One line a task: verdicts at the published thresholds."""
    header = (
        "task",
        "pictures",
        "agree %",
        "ours %",
        "theirs %",
        "offset",
        "only ours right",
        "only theirs right",
    )
    body = [
        (
            one.task,
            str(one.num_pictures),
            f"{100 * one.agreement:.2f}",
            f"{100 * one.ours:.2f}",
            f"{100 * one.theirs:.2f}",
            f"{100 * one.offset:+.2f} +- {100 * one.offset_error:.2f}",
            str(one.only_ours),
            str(one.only_theirs),
        )
        for one in agreements
    ]
    return markdown_table(header, body)


def report(agreements: Sequence[Agreement], of_tasks: Sequence[Curve]) -> str:
    """Two tables: the verdicts at the published thresholds, and the curves."""
    ours, theirs, offset, error = overall(agreements)
    curve_header = ("task", "", *(f"{t:g}" for t in of_tasks[0].thresholds), "published", "agrees most at")
    curve_body = []
    for one in of_tasks:
        best = f"{one.thresholds[one.best]:g}"
        for name, values in (("ours %", one.ours), ("agree %", one.agreement)):
            curve_body.append(
                (one.task, name, *(f"{100 * v:.1f}" for v in values), f"{one.published:g}", best)
            )
    return (
        f"{geneval.TITLE} against the verdicts of the published evaluator on the same pictures\n\n"
        f"{verdicts_table(agreements)}\n"
        f"Overall: ours {100 * ours:.2f} %, theirs {100 * theirs:.2f} %, difference {100 * offset:+.2f} "
        f"points (+- {100 * error:.2f}).\n"
        "Errors are standard errors, by whole prompts where these say more than their pictures.\n\n"
        "By the threshold above which a detection counts (the scores use the published one)\n\n"
        f"{markdown_table(curve_header, curve_body)}"
    )


def overall(agreements: Sequence[Agreement]) -> tuple[float, float, float, float]:
    """(ours, theirs, offset, its standard error) of the plain mean over tasks."""
    count = len(agreements)
    ours, theirs = (sum(getattr(one, name) for one in agreements) / count for name in ("ours", "theirs"))
    error = sum(one.offset_error**2 for one in agreements) ** 0.5 / count
    return ours, theirs, ours - theirs, error


def plot(of_tasks: Sequence[Curve]) -> Picture:
    """One panel a task: our score and the agreement against the threshold; theirs a line across."""
    columns = min(3, len(of_tasks))
    rows = -(-len(of_tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows + 0.5), layout="constrained", dpi=120)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(of_tasks) :]:
        axes.set_axis_off()
    for axes, one in zip(panels, of_tasks, strict=False):
        curve = {"linewidth": 1.6, "markersize": 5}
        axes.plot(
            one.thresholds, [100 * v for v in one.ours], "o-", color="#1f6feb", label="right, ours", **curve
        )
        axes.plot(
            one.thresholds,
            [100 * v for v in one.agreement],
            "s-",
            color="#2e9d6b",
            label="judged alike",
            **curve,
        )
        axes.axhline(100 * one.theirs, color="#d97706", label="right, published evaluator")
        axes.axvline(
            one.published, color="#6b6b6b", linestyle=":", label="published threshold, of the scores"
        )
        axes.set_title(one.task, fontsize=10)
        axes.set_ylim(-3, 103)
        axes.set_xlim(0, 1)
        axes.set_xlabel("a detection counts above", fontsize=9)
        axes.set_ylabel("pictures, %", fontsize=9)
        axes.grid(True, axis="y", color="#e3e3e3", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(f"{geneval.TITLE} against the published evaluator", fontsize=11)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write(
    agreements: Sequence[Agreement], of_tasks: Sequence[Curve], found: Calibration, out: Path
) -> list[Path]:
    """The tables, the numbers and the plot, in `out`; returns the paths."""
    ours, theirs, offset, error = overall(agreements)
    numbers = {
        "calibration": asdict(found),
        "overall": {"ours": ours, "theirs": theirs, "offset": offset, "offset_error": error},
        "by_task": {
            one.task: {
                **{name: value for name, value in asdict(one).items() if name != "by_prompt"},
                "num_pictures": one.num_pictures,
                "num_prompts": len(one.by_prompt),
                "agreement": one.agreement,
                "ours": one.ours,
                "theirs": one.theirs,
                "offset": one.offset,
                "offset_error": one.offset_error,
            }
            for one in agreements
        },
        "curves": {one.task: asdict(one) for one in of_tasks},
    }
    texts = {TEXT_NAME: report(agreements, of_tasks), NUMBERS_NAME: json.dumps(numbers, indent=2) + "\n"}
    for name, text in texts.items():
        write_aside(
            out / name, len(text.encode()), lambda aside, text=text: aside.write_text(text, encoding="utf-8")
        )
    write_png(out / PLOT_NAME, plot(of_tasks), {"evaluation": "geneval"})
    return [out / name for name in (*texts, PLOT_NAME)]
