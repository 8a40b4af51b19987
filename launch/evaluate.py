"""Score a trained network: `python launch/evaluate.py --help` lists the evaluations."""

import sys

from tim_ds.eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
