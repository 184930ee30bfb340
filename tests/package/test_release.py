"""scripts/release.sh refuses what must not be released. The release itself builds for minutes and is run by hand."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run

VERSION = re.search(r"project\(fourfold VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
ENTRY = f"# Changes\n\n## [{VERSION}] - 2026-01-31\n\n- Something.\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of its own that could be released."""
    folder = tmp_path / "r"
    (folder / "scripts").mkdir(parents=True)
    for name in ("CMakeLists.txt", "scripts/release.sh", "scripts/environment.sh"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "CHANGELOG.md").write_text(ENTRY)
    run("git", "init", "-q", folder)
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    run("git", "add", "-A", cwd=folder)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    run("git", *identity, "commit", "-q", "-m", "x", cwd=folder)


def release(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([folder / "scripts" / "release.sh", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_dry_run_writes_nothing(repository: Path) -> None:
    before = sorted(repository.rglob("*"))
    code, text = release(repository, VERSION, "--dry-run")
    assert code == 0 and f"v{VERSION}" in text, text
    assert sorted(repository.rglob("*")) == before
    assert run("git", "tag", cwd=repository) == ""


def test_refuses_another_version(repository: Path) -> None:
    code, text = release(repository, "9.9.9", "--dry-run")
    assert code == 1 and "VERSION 9.9.9" in text and f"found {VERSION}" in text


@pytest.mark.parametrize(
    ("changelog", "words"),
    [
        ("# Changes\n", "found 'none'"),
        (f"# Changes\n\n## [{VERSION}] - unreleased\n\n- Something.\n", "unreleased"),
        (f"# Changes\n\n## [0.0.1] - 2026-01-31\n\n- Old.\n\n{ENTRY}", "0.0.1"),
        (f"# Changes\n\n## [{VERSION}] - 2026-01-31\n\n## [0.0.1] - 2025-01-31\n\n- Old.\n", "found nothing"),
    ],
)
def test_refuses_without_its_changes(repository: Path, changelog: str, words: str) -> None:
    (repository / "CHANGELOG.md").write_text(changelog)
    commit(repository)
    code, text = release(repository, VERSION, "--dry-run")
    assert code == 1 and "CHANGELOG.md" in text and words in text, text


@pytest.mark.parametrize("name", ["CMakeLists.txt", "new file"])
def test_refuses_a_dirty_tree(repository: Path, name: str) -> None:
    with (repository / name).open("a") as file:
        file.write("\n")
    code, text = release(repository, VERSION, "--dry-run")
    assert code == 1 and "clean tree" in text and name in text, text


def test_refuses_a_tag_that_is_there(repository: Path) -> None:
    run("git", "tag", f"v{VERSION}", cwd=repository)
    code, text = release(repository, VERSION, "--dry-run")
    assert code == 1 and f"no tag v{VERSION}" in text, text


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("1.2",), ("1.2.x",), (VERSION, VERSION), ("--force",)])
def test_usage(repository: Path, arguments: tuple[str, ...]) -> None:
    code, text = release(repository, *arguments)
    assert code == 2 and "--help" in text, text
