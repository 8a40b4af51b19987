"""Preview sheets show what the pipeline draws, at each step count."""

from __future__ import annotations

import numpy as np

from tests.networks import export_of, network_of
from tim_ds.eval.preview import preview_sheet
from tim_ds.eval.sheet import SheetBlock, SheetRow, contact_sheet
from tim_ds.pipeline import TiMPipeline
from tim_ds.trainer.config import PreviewConfig


def test_one_row_a_step_count_otherwise_sampled_as_the_export_says() -> None:
    export = export_of(num_steps=9)
    network = network_of(export)
    preview = PreviewConfig(
        every_steps=1,
        prompts=("a three", "a one above a two"),
        sizes=("8x8", "16x8"),
        num_steps=(1, 3),
        seed=4,
    )
    pipe = TiMPipeline(network, export)
    rows = [
        SheetRow(
            label,
            pipe(preview.prompts, preview.sizes, num_steps=n, seeds=[4, 5]).images,
        )
        for label, n in (("1 step", 1), ("3 steps", 3))
    ]
    np.testing.assert_array_equal(
        preview_sheet(network, export, preview), contact_sheet(preview.prompts, [SheetBlock("", rows)])
    )
