"""Writes the file that the command line names."""

import sys
from pathlib import Path

from server.api_docs.document import api_document


def main() -> int:
    """Exit code 2 without a file to write."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m server.api_docs FILE\n")
        return 2
    Path(sys.argv[1]).write_text(api_document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
