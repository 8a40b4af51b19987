"""A whole training step, side by side: ours by objective, kernels or their definitions, and the authors'
network in plain PyTorch, eager and compiled.

    python -m tim_ds.trainer.bench RECIPE                     measure and print
    python -m tim_ds.trainer.bench RECIPE --out step.json     and store, with a table and a plot beside
    python -m tim_ds.trainer.bench RECIPE --out step.json --append --sizes 2048
                                                              measure a part, and keep the rest
    python -m tim_ds.trainer.bench --render step.json         table and plot of stored results

A step is forward, time derivative, loss, backward, clipping and AdamW, with the recipe's tokens_per_pack,
precision and activation checkpointing, the same for all. Averages of the weights, also the same for all, are
left out. A contender is timed only after its loss and gradient agreed with the baseline's in float32, and its
timed steps are compared too. Sizes and contenders come in the order of their worth: --seconds may end the run
at any of them. Without a GPU nothing is timed, unless --device cpu asks for it, for show.
"""
