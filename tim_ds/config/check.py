"""Checks recipes and prints them resolved: `python -m tim_ds.config.check RECIPE... [section.key=value]...`.

Needs no torch. The output is itself a recipe: every default is written out, under the hash that checkpoints
and score tables carry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.command import USER_ERROR, command
from tim_ds.config.load import dump, load_recipe, split_arguments
from tim_ds.config.parameters import count_parameters
from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import ConfigError


def describe(recipe: Recipe) -> list[str]:
    """What a reader should know beside the settings: hash, size of the network, parts that nothing trains."""
    counts = count_parameters(recipe.model)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    lines = [f"hash {recipe_hash(recipe)}", f"parameters {sum(counts.values()):,}: {parts}"]
    if "projector" in counts and recipe.objective.repa_weight == 0:
        lines.append(
            "objective.repa_weight is 0: nothing trains the projector (model.z_dim: null leaves it out)"
        )
    return lines


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each recipe, or what is wrong with it. Returns the exit status: 0 if all are right, 2 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.config.check", description="Check recipes and print them with every default."
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, or section.key=value to override one setting")
    parser.add_argument("-q", "--quiet", action="store_true", help="one line a recipe")
    options = parser.parse_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if not paths:
        parser.error("no recipe file among the arguments")

    failed = printed = 0
    for path in paths:
        try:
            recipe = load_recipe(path, overrides)
        except ConfigError as error:
            failed += 1
            print(
                f"{path}: wrong\n" + "\n".join(f"  {line}" for line in str(error).splitlines()),
                file=sys.stderr,
            )
            continue
        if options.quiet:
            total = sum(count_parameters(recipe.model).values())
            print(f"{path}: fine, {total:,} parameters, hash {recipe_hash(recipe)[:12]}")
            continue
        if printed:
            print("---")
        printed += 1
        print(*(f"# {line}" for line in (path, *describe(recipe))), sep="\n")
        print(dump(recipe), end="")
    return USER_ERROR if failed else 0


if __name__ == "__main__":
    sys.exit(main())
