"""Imported once by the server that forks the ranks of these tests, so that a rank starts in a blink."""

import torch._dynamo
import torch._inductor.compile_fx
import torch.utils.tensorboard

import tim_ds.trainer.run
