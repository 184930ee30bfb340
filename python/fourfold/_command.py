"""The command `fourfold`, which the package carries."""

import os
import sys
from pathlib import Path

COMMAND = Path(__file__).parent / "bin" / "fourfold"


def main() -> None:
    """Becomes the command."""
    os.execv(COMMAND, [str(COMMAND), *sys.argv[1:]])
