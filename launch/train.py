"""Train, or continue, the run of a recipe: see tim_ds/trainer/cli.py for the command line."""

import sys

from tim_ds.trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
