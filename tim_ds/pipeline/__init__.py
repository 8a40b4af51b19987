"""Prompts to pictures: `TiMPipeline.from_pretrained(folder)(prompts, sizes)`, as diffusers users know it.

pipe = TiMPipeline.from_pretrained("runs/handwriting_tim").to("cpu")
output = pipe("a three above a seven", height=16, width=8, num_inference_steps=4, seeds=7)
output.images[0].save("three_above_seven.png")
output.save("pictures")
"""

from tim_ds.pipeline.encoders import check_device
from tim_ds.pipeline.files import PNG_KEY, file_stem, read_settings, refuse_unwritable, write_png
from tim_ds.pipeline.output import OutputType, PipelineOutput
from tim_ds.pipeline.request import PromptLike, Request, Size
from tim_ds.pipeline.tim_pipeline import OnStepEnd, TiMPipeline

__all__ = [
    "PNG_KEY",
    "OnStepEnd",
    "OutputType",
    "PipelineOutput",
    "PromptLike",
    "Request",
    "Size",
    "TiMPipeline",
    "check_device",
    "file_stem",
    "read_settings",
    "refuse_unwritable",
    "write_png",
]
