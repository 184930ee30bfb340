#!/usr/bin/env python3
"""Looks at a page of `fourfold layertest --html` with a headless Chromium: screenshots in light and dark, and
the page as it prints.

    scripts/report_screenshots.py report.html OUT      -> OUT/light.png, OUT/dark.png, OUT/print.pdf

Exit code 0; 1 where the browser's console complains or the page asks for anything from the network; 77 where
there is no Chromium (apt-get install chromium).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SKIPPED = 77
TIME_LIMIT_S = 90
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--proxy-server=127.0.0.1:9",  # nothing leaves: the discard port, where nobody listens
)
NO_ORIGIN = "not an origin"  # as the browser's network log names the initiator of what no page asked for
VIEWS = {
    "light.png": ("--blink-settings=preferredColorScheme=1",),
    "dark.png": ("--blink-settings=preferredColorScheme=0",),
    "print.pdf": ("--no-pdf-header-footer",),
}


def requests_of_the_page(net_log: Path) -> list[str]:
    """What documents asked of the network; the browser's own errands have no origin."""
    log = json.loads(net_log.read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event.get("params", {}) for event in log["events"] if event["type"] == start]
    return [job["url"] for job in jobs if job.get("initiator", NO_ORIGIN) != NO_ORIGIN and is_remote(job["url"])]


def is_remote(url: str) -> bool:
    return not url.startswith(("data:", "file:", "about:", "blob:"))


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(browser: str, page: Path, target: Path, flags: tuple[str, ...], height: int) -> list[str]:
    """Makes one view; what is wrong with it."""
    output = f"--print-to-pdf={target}" if target.suffix == ".pdf" else f"--screenshot={target}"
    with tempfile.TemporaryDirectory() as folder:
        net_log = Path(folder) / "net.json"
        command = [browser, *FLAGS, *flags, f"--user-data-dir={folder}/profile", f"--window-size=1100,{height}"]
        result = subprocess.run(
            [*command, f"--log-net-log={net_log}", output, page.resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
        )
        requests = requests_of_the_page(net_log)
    troubles = [f"console: {line}" for line in re.findall(r"CONSOLE.*", result.stderr)]
    troubles += [f"request: {url}" for url in requests]
    if result.returncode != 0 or not target.exists():
        troubles.append(f"{browser}: exit code {result.returncode}: {result.stderr[-500:]}")
    return troubles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--height", type=int, default=2600, help="of the screenshots, in pixels")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        print(f"report_screenshots: {arguments.page}: expected a page, found no file", file=sys.stderr)
        return 1
    browser = find_browser()
    if browser is None:
        print("report_screenshots: no Chromium here: skipped (apt-get install chromium)", file=sys.stderr)
        return SKIPPED
    arguments.out.mkdir(parents=True, exist_ok=True)
    troubles = []
    for name, flags in VIEWS.items():
        for trouble in look(browser, arguments.page, arguments.out.resolve() / name, flags, arguments.height):
            troubles.append(f"{name}: {trouble}")
    print("\n".join(troubles) if troubles else f"{', '.join(VIEWS)}: no complaint of the console, no request")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
