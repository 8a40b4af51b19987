"""Scores of handwriting on pictures whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.handwriting import Prompt, Scans, compose, draw_prompt
from tim_ds.errors import RequestError
from tim_ds.eval.frechet import fit_gaussian, frechet_distance
from tim_ds.eval.handwriting import HandwritingScorer
from tim_ds.eval.reader import scans_in_unit_range

Picture = np.ndarray


def to_bytes(image: np.ndarray) -> Picture:
    """float [1, H, W] in [-1, 1] -> uint8 [H, W, 1]."""
    return np.round((image[0, ..., None] + 1) * 127.5).astype(np.uint8)


def pictures(prompts: list[Prompt], scans: Scans, seed: int = 0) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [to_bytes(compose(p, scans, rng)) for p in prompts]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [draw_prompt(rng, max_cells=3, gap_share=0.1) for _ in range(400)]


def test_training_scans_score_perfectly(scorer: HandwritingScorer, scans, prompts: list[Prompt]) -> None:
    scores = scorer.score(prompts, pictures(prompts, scans[0]))
    # The reader was trained on these very scans; two of 1,297 lie on the wrong side of its margin.
    assert scores.prompt_accuracy >= 0.99
    assert scores.digit_accuracy >= 0.99
    assert scores.count_accuracy == 1.0
    assert scores.position_accuracy == 1.0
    assert scores.num_pictures == 400
    assert scores.num_digit_cells == sum(c is not None for p in prompts for c in p.cells)
    # Composed training scans are draws from the set whose distance is the floor, so the two are close; draws
    # of 750 cells with replacement add about 64 * 67 / (4 * 750) of a unit-variance distance, here some 0.05.
    assert scores.frechet_floor < scores.frechet_distance < scores.frechet_floor + 0.3


def test_floor_is_the_distance_of_training_to_held_back_scans(scorer: HandwritingScorer, scans) -> None:
    """Prompts with the digits in equal shares: both sides are weighted to 1/10 a digit."""
    prompts = [Prompt((d,)) for d in range(10) for _ in range(20)]
    fits = []
    for part in scans:
        weights = (1 / np.bincount(part.labels, minlength=10))[part.labels]
        fits.append(fit_gaussian(scans_in_unit_range(part).reshape(len(part), -1), weights))
    scores = scorer.score(prompts, pictures(prompts, scans[0]))
    # The weights differ by rounding; constant pixels turn 1e-16 in an eigenvalue into 1e-8 in its root.
    assert scores.frechet_floor == pytest.approx(frechet_distance(*fits), abs=1e-6)


def test_reference_follows_the_mix_of_digits_asked_for(scorer: HandwritingScorer, scans) -> None:
    """Only ones asked for and only ones drawn: the distance must not count the other digits as missing."""
    ones = [Prompt((1,)) for _ in range(200)]
    threes = [Prompt((3,)) for _ in range(200)]
    right = scorer.score(ones, pictures(ones, scans[1]))
    wrong = scorer.score(ones, pictures(threes, scans[1]))
    assert right.frechet_distance < 0.5
    # The mean one and the mean three differ by several units.
    assert wrong.frechet_distance > 5.0
    assert right.prompt_accuracy > 0.95 and wrong.prompt_accuracy == 0.0
    assert right.digit_accuracy_by_digit["one"] == right.digit_accuracy
    assert right.digit_accuracy_by_digit["two"] is None


def test_wrong_order_lowers_position_and_not_count(scorer: HandwritingScorer, scans) -> None:
    asked = [Prompt((2, 6)) for _ in range(60)]
    drawn = [Prompt((6, 2)) if i % 4 == 0 else Prompt((2, 6)) for i in range(60)]
    scores = scorer.score(asked, pictures(drawn, scans[0]))
    assert scores.count_accuracy == 1.0
    assert scores.num_position_pictures == 60
    assert scores.position_accuracy == 0.75
    assert scores.prompt_accuracy == 0.75
    assert scores.digit_accuracy == 0.75


def test_an_extra_digit_lowers_count(scorer: HandwritingScorer, scans) -> None:
    asked = [Prompt((2, None), "column") for _ in range(80)]
    drawn = [Prompt((2, 4), "column") if i % 2 == 0 else Prompt((2, None), "column") for i in range(80)]
    scores = scorer.score(asked, pictures(drawn, scans[0]))
    assert scores.count_accuracy == 0.5
    assert scores.digit_accuracy == 1.0
    assert scores.prompt_accuracy == 0.5
    # Only pictures with the right digits enter the position accuracy, and there all are in place.
    assert (scores.position_accuracy, scores.num_position_pictures) == (1.0, 40)


def test_prompts_with_one_order_do_not_enter_position(scorer: HandwritingScorer, scans) -> None:
    asked = [Prompt((4, 4)) for _ in range(40)]
    scores = scorer.score(asked, pictures(asked, scans[0]))
    assert scores.position_accuracy is None
    assert scores.num_position_pictures == 0


def test_noise_scores_nothing(scorer: HandwritingScorer, prompts: list[Prompt]) -> None:
    rng = np.random.default_rng(3)
    noise = [rng.integers(0, 256, (*p.size_px, 1), dtype=np.uint8) for p in prompts]
    scores = scorer.score(prompts, noise)
    assert scores.frechet_distance > 5.0
    assert scores.digit_accuracy < 0.3


def test_pictures_that_do_not_fit_their_prompts_are_refused(scorer: HandwritingScorer) -> None:
    prompts = [Prompt((1, 2))] * 2
    good = np.zeros((8, 16, 1), dtype=np.uint8)
    with pytest.raises(RequestError, match=r"one picture a prompt and at least one \(2\), received 1"):
        scorer.score(prompts, [good])
    with pytest.raises(RequestError, match=r"one picture a prompt and at least one \(0\), received 0"):
        scorer.score([], [])
    with pytest.raises(RequestError, match="picture 1 is 16x8, its prompt asks for 8x16"):
        scorer.score(prompts, [good, good.transpose(1, 0, 2)])


def test_too_few_digits_for_a_distance_are_refused(scorer: HandwritingScorer, scans) -> None:
    prompts = [Prompt((1, 2))] * 30
    with pytest.raises(RequestError, match="at least 65 rows for 64 features, received 60"):
        scorer.score(prompts, pictures(prompts, scans[0]))
