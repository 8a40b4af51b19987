"""`python -m tests.parity --goldens DIR`: compare this project with stored results of the authors' code.

Exits 0 when everything is within tolerance, 1 when something is not, 2 when DIR holds no whole goldens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.command import command
from tests.parity.compare import Report
from tests.parity.formula_case import compare_formulas
from tests.parity.golden import GoldenFile
from tests.parity.network_case import compare_network
from tim_ds.errors import CheckpointError, TimError


def golden_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("golden_*.json"))


def compare_file(path: Path) -> Report:
    """Raises CheckpointError if the case is not whole, another TimError if the project refuses it."""
    golden = GoldenFile.read(path)
    compare = compare_network if "network" in golden.description else compare_formulas
    try:
        report = compare(golden)
    except KeyError as error:
        raise CheckpointError(f"{path}: the case has no {error}, which the comparison reads") from error
    if not report.comparisons:
        raise CheckpointError(f"{path}: holds nothing that the comparison knows")
    return report


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare this project with stored results of the authors' code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=main.__doc__)
    parser.add_argument("--goldens", required=True, type=Path, metavar="DIR", help="holds golden_*.json")
    folder = parser.parse_args(arguments).goldens
    paths = golden_files(folder)
    if not paths:
        print(f"error: {folder}: no golden_*.json here", file=sys.stderr)
        return 2
    compared = failed = 0
    for path in paths:
        try:
            report = compare_file(path)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except TimError as error:
            print(f"{path.name}: FAILED, refused: {error}")
            failed += 1
            continue
        print("\n".join(report.lines()))
        compared += len(report.comparisons)
        failed += len(report.failures)
        for failure in report.failures:
            print(f"  FAILED {failure.tensor}: {failure.error:.2e}, tolerance {failure.tolerance:.1e}")
    print(f"{len(paths)} files, {compared} comparisons, {failed} beyond tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
