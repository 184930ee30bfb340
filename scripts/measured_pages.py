"""Pages whose tables and plots come from docs/measured/*.json: what the scripts *_figures.py share.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`. A plot carries the digest of the data it shows.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def row(columns: Iterable[str]) -> str:
    return "| " + " | ".join(columns) + " |\n"


def replace_section(text: str, name: str, content: str, file: Path) -> str:
    """What stands between the comments of `name`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda match: match.group(1) + content + match.group(2), text)
    if count != 1:
        sys.exit(f"error: {file}: expected the section '{name}' once, found it {count} times")
    return replaced


def with_tables(file: Path, sections: dict[str, Callable[[], str]]) -> str:
    """The text of `file` as it has to be."""
    text = file.read_text()
    for name, content in sections.items():
        text = replace_section(text, name, "\n" + content() + "\n", file)
    return text


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def require_checked(file: Path, case: dict) -> None:
    """A time of `fourfold bench`, in `file`, counts when its results were compared in the same run."""
    if case["status"] != "ok" or not case["check"]["stages"] or case["check"]["findings"]:
        sys.exit(
            f"error: {file}: {case['case']} {case['activations']}: expected a checked time, found {case['status']}"
        )


def measured_times(case: dict) -> dict:
    """What is kept of such a time."""
    return {
        "seconds": case["seconds"]["median"],
        "p10": case["seconds"]["p10"],
        "p90": case["seconds"]["p90"],
        "floor_seconds": case["floor"]["seconds"],
        "floor_by": case["floor"]["by"],
        "worst_stage_rel_l2": max(stage["rel_l2"] for stage in case["check"]["stages"]),
    }


def pyplot():
    """matplotlib's, set up to write the same SVG for the same data."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: expected the package matplotlib, found none; pip install matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fourfold", "svg.fonttype": "none", "font.family": "sans-serif"})
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_plot(figure, file: Path, data: str) -> None:
    """`data`: the digest of what it shows."""
    figure.patch.set_facecolor("white")
    figure.savefig(file, metadata={"Date": None, "Description": data})


def report_stale(texts: dict[Path, str], plots: dict[Path, str], source: str, script: str) -> int:
    """Exit status of `check`: names pages that differ from `texts`, and plots of other data than the digests in `plots`."""
    stale = [file for file, text in texts.items() if file.read_text() != text]
    stale += [file for file, data in plots.items() if not file.exists() or data not in file.read_text()]
    for file in stale:
        print(f"{file.relative_to(ROOT)}: not what {source} says; run scripts/{script} write")
    return 1 if stale else 0
