"""Where a model directory leads, and files that change while they are read: errors, never signals, and never a
result that was computed from half a file.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

import checkpoints as ck
from checkpoints import NVFP4
from command import (
    ERROR,
    Result,
    assert_fine,
    assert_refused,
    check,
    command_path,
    decoded,
    environment,
    layertest,
)

SHARD = ck.shard_name(1, 2)


# ---- the way out of a directory ----


@pytest.mark.parametrize(
    "way",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "sub/model.safetensors", "./" + SHARD, "../m/" + SHARD, ""],
)
def test_index_that_leads_elsewhere(tmp_path: Path, way: str) -> None:
    """Names of files beside the index, and nothing else: no path, though it came to a sound file."""
    directory = ck.write_shards(tmp_path / "m", NVFP4.tensors, NVFP4.config)
    (directory / "sub").mkdir()
    index = directory / ck.INDEX_NAME
    index.write_text(index.read_text().replace(f'"{SHARD}"', f'"{way}"'))
    assert_refused(layertest(directory), index, "name of a file beside the index", f"'{way}'")


def test_shard_that_links_out(tmp_path: Path) -> None:
    """A link in a downloaded folder must not choose what is opened outside of it, be it a sound shard."""
    directory = ck.write_shards(tmp_path / "m", NVFP4.tensors, NVFP4.config)
    outside = tmp_path / "outside.safetensors"
    (directory / SHARD).rename(outside)
    for target in (outside, Path("..") / outside.name, Path("/etc/passwd")):
        (directory / SHARD).unlink(missing_ok=True)
        (directory / SHARD).symlink_to(target)
        result = layertest(directory)
        assert_refused(result, directory, f"'{SHARD}'", "symbolic link", (directory / target).resolve())


def test_links_that_stay(tmp_path: Path) -> None:
    """Within the directory, to the directory itself, and as Hugging Face's cache has them."""
    cache = tmp_path / "models--x--y"
    directory = ck.write_shards(cache / "snapshots" / "0a1b", NVFP4.tensors, NVFP4.config)
    (directory / "real").mkdir()
    (directory / SHARD).rename(directory / "real" / "5f3c")
    (directory / SHARD).symlink_to("real/5f3c")
    assert_fine(layertest(directory))
    (tmp_path / "name").symlink_to(directory)
    assert_fine(layertest(tmp_path / "name"))
    (cache / "blobs").mkdir()
    (directory / "real" / "5f3c").rename(cache / "blobs" / "5f3c")
    (directory / SHARD).unlink()
    (directory / SHARD).symlink_to("../../blobs/5f3c")
    assert_fine(layertest(directory))
    (cache / "blobs").rename(cache / "other")
    (directory / SHARD).unlink()
    (directory / SHARD).symlink_to("../../other/5f3c")
    assert_refused(layertest(directory), directory, "symbolic link")


# ---- files that are truncated while they are read ----


def start_and_truncate(directory: Path, file: Path, size: int) -> Result:
    """Truncates `file` as soon as a run of layertest has mapped it; that run takes a second or more."""
    arguments = ("layertest", "--nvfp4", str(directory), "--tokens", "6000", "--backend", "reference")
    process = subprocess.Popen(
        [command_path(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 30
    while str(file) not in maps.read_text():
        assert process.poll() is None and time.monotonic() < deadline, "the file was never mapped"
        time.sleep(0.001)
    os.truncate(file, size)
    stdout, stderr = process.communicate(timeout=200)
    return check(Result(arguments, process.returncode, decoded(stdout), decoded(stderr)))


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_truncated_while_read(tmp_path: Path, part: float) -> None:
    """To nothing, in the middle, and by one byte, which raises no signal at all."""
    directory = ck.write_model(tmp_path / "m", NVFP4).resolve()
    file = directory / ck.SINGLE_NAME
    result = start_and_truncate(directory, file, int(part * (file.stat().st_size - 1)))
    assert result.code == ERROR and "verdict" not in result.stdout, str(result)
    assert str(file) in result.stderr and "truncated" in result.stderr, str(result)
