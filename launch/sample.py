"""Pictures from prompts: see tim_ds/eval/sample.py for the command line."""

import sys

from tim_ds.eval.sample import main

if __name__ == "__main__":
    sys.exit(main())
