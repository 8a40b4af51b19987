"""Pictures while training: fixed prompts and seeds, one row a step count, from whatever weights are given."""

from __future__ import annotations

from torch import nn

from tim_ds.eval.sheet import Picture, SheetBlock, SheetRow, contact_sheet
from tim_ds.model.export_folder import Export
from tim_ds.pipeline import TiMPipeline
from tim_ds.trainer.config import PreviewConfig


def preview_sheet(network: nn.Module, export: Export, preview: PreviewConfig) -> Picture:
    """Sample the prompts of `preview` at each of its step counts: uint8 [H, W, 3].

    Args:
        network: usually the averaged weights.
        export: what the network is, as it would be written beside its weights; its `sampler` holds the rest.
    Raises:
        RequestError: if a prompt or size does not fit the network.
    """
    pipeline = TiMPipeline(network, export)
    rows = []
    for num_steps in preview.num_steps:
        output = pipeline(
            preview.prompts,
            preview.sizes,
            num_steps=num_steps,
            seeds=preview.seed,
        )
        rows.append(SheetRow("1 step" if num_steps == 1 else f"{num_steps} steps", output.images))
    return contact_sheet(preview.prompts, [SheetBlock("", rows)])
