"""Imported once by the server that forks the ranks of these tests, so that a rank starts in a blink."""

import importlib

for name in (
    "tim_ds.trainer.cli",
    "torch.utils.tensorboard",
    # deepspeed.initialize imports these.
    "torch._dynamo",
    "torch._inductor.compile_fx",
):
    importlib.import_module(name)
