"""Runs a CUDA compilation and keeps what ptxas reports beside the object, for tests/ptxas_report_test.py.

usage: record_ptxas.py COMMAND... (a compiler launcher). Everything else on stderr goes through.
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    command = sys.argv[1:]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    report = [line for line in lines if line.startswith(("ptxas", "    "))]
    sys.stderr.writelines(line + "\n" for line in lines if line not in report)
    if done.returncode == 0 and "-o" in command:
        target = Path(command[command.index("-o") + 1])
        target.with_name(target.name + ".ptxas").write_text("\n".join(report) + "\n")
    elif done.returncode != 0:
        sys.stderr.writelines(line + "\n" for line in report)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
