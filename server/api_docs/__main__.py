"""Writes the file that the command line names."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from server.api_docs.document import api_document


def main() -> int:
    """Exit code 2 without a file to write."""
    parser = ArgumentParser(prog="python -m server.api_docs", description=__doc__)
    parser.add_argument("file", type=Path, help="docs/api.md of a checkout")
    parser.parse_args().file.write_text(api_document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
