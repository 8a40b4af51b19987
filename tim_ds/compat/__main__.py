"""`import` the authors' weight files, `export` ours under their names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.command import command
from tim_ds.compat.authors import AUTHORS_SWITCHES, RELEASED
from tim_ds.compat.convert import differences_from_authors, export_weights, import_weights
from tim_ds.errors import TimError
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import meta_network


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tim_ds.compat", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="a released weight file into a new export folder")
    into.add_argument("file", help="the authors' .bin or .safetensors file")
    into.add_argument("--out", required=True, metavar="DIR", help="export folder to write")
    into.add_argument(
        "--model", choices=sorted(RELEASED), help="released model; by default told from the shapes"
    )
    out = commands.add_parser("export", help="an export folder into one file under the authors' names")
    out.add_argument("folder", metavar="DIR", help="export folder to read")
    out.add_argument("--out", required=True, metavar="FILE", help=".safetensors, .bin or .pt file to write")
    given = parser.parse_args(arguments)
    if given.command == "import":
        export = import_weights(given.file, given.out, model=given.model)
        print(f"{given.file}: {export.source.name}, {parameter_line(export.model)}")
        print(f"written to {given.out} with the authors' settings:")
        for key, value in AUTHORS_SWITCHES.items():
            if export.text_encoder is not None or not key.startswith("text_encoder."):
                print(f"  {key}: {value}")
    else:
        export = export_weights(given.folder, given.out)
        print(f"{given.out}: {parameter_line(export.model)}")
        for line in differences_from_authors(export):
            print(f"warning: the authors' code would draw other pictures: {line}", file=sys.stderr)
    return 0


def parameter_line(model: ModelConfig) -> str:
    network = meta_network(model)
    total = sum(p.numel() for p in network.parameters())
    tensors = len(network.state_dict())
    if network.projector is None:
        return f"{total:,} parameters in {tensors} tensors, no projector"
    projector = sum(p.numel() for p in network.projector.parameters())
    return (
        f"{total:,} parameters in {tensors} tensors: {total - projector:,} and a projector of {projector:,}"
    )


if __name__ == "__main__":
    sys.exit(main())
