#!/usr/bin/env python3
"""Holds `fourfold convert` against what it promises of large models: memory, speed, kills, full disks.

    scripts/convert_check.py [--build build/release] [--size GB] [--folder FOLDER] [--memory MB] [--cores N]

Makes an MXFP4 model of about --size GB: `fourfold synthesize` makes one layer, whose tensors are repeated under the
numbers of further layers. Then, with N cores:

- speed and memory: the model is copied (cp, sync) and converted to NVFP4 in turn, three times each, from a dropped page
  cache where this may be done (root). Converting must reach half the speed of copying, by bytes of the source, medians
  of three. It runs in a memory cgroup of --memory MB, page cache and all, where one can be made; else its own memory
  (RssAnon, which leaves mapped files out) is watched, and must stay below. The report says which.
- two conversions must be identical, and `fourfold inspect` clean.
- a kill (SIGKILL) at a quarter, half and three quarters of the time: nothing that loads, neither under the target's
  name nor as TARGET.partial, or the whole model (in TARGET.partial while it is brought to the disk, before it is
  renamed); the source as it was; the next run succeeds and leaves nothing else behind.
- a full disk: where tmpfs may be mounted, one that is too small from the start, and one that another file fills
  meanwhile. An error, and nothing is left.

Needs Python 3.11 alone. Exit status: 0 all as promised, 1 not, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROUNDS = 3
LAYER_SHAPE, SMALL_SHAPE = "16,2048,1024,4", "4,128,64,2"
SMALL_GB = 0.05  # below this size a layer is small
SMALL_MB = 500  # below this, starting and ending is what takes the time: speed is reported, not judged
INDEX = "model.safetensors.index.json"
MARKER = ".fourfold-partial"  # of a directory in the making; removed just after that has got its name


class Judge:
    def __init__(self) -> None:
        self.is_fine = True

    def say(self, fine: bool, text: str) -> None:
        self.is_fine &= fine
        print(f"{'ok  ' if fine else 'FAIL'}  {text}", flush=True)


# ---- the model ----


def read_header(file: Path) -> tuple[dict, int]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def repeat_layers(layer: Path, target: Path, count: int) -> None:
    """Each shard of the one-layer model, `count` times, with the layer's number changed in its names."""
    target.mkdir()
    shards = sorted(layer.glob("*.safetensors"))
    weight_map, total = {}, 0
    for number in range(count):
        for part, shard in enumerate(shards):
            header, begin = read_header(shard)
            header.pop("__metadata__", None)
            renamed = {name.replace("layers.0.", f"layers.{number}."): entry for name, entry in header.items()}
            text = json.dumps(renamed).encode()
            text += b" " * (-len(text) % 8)
            file = f"model-{number * len(shards) + part + 1:05}-of-{count * len(shards):05}.safetensors"
            with shard.open("rb") as source, (target / file).open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                source.seek(begin)
                shutil.copyfileobj(source, out, 1 << 24)
            weight_map |= dict.fromkeys(renamed, file)
            total += shard.stat().st_size - begin
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config = json.loads((layer / "config.json").read_text()) | {"num_hidden_layers": count}
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text("{}")


def make_model(command: Path, folder: Path, gigabytes: float) -> Path:
    shape = SMALL_SHAPE if gigabytes < SMALL_GB else LAYER_SHAPE
    run(command, "synthesize", folder / "seed", "--shape", shape, "--original", "mxfp4", "--tokens", "16")
    layer = folder / "seed/original"
    layers = max(1, round(gigabytes * 1e9 / size_of(layer)))
    repeat_layers(layer, folder / "model", layers)
    shutil.rmtree(folder / "seed")
    return folder / "model"


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def digest(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but MARKER."""
    found = {}
    for file in sorted(directory.iterdir()):
        if file.name == MARKER:
            continue
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


# ---- running ----


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, arguments))}: exit code {result.returncode}\n{result.stderr}")
    return result


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def memory_cgroup(megabytes: int) -> Iterator[Path | None]:
    """A child of this process's memory cgroup, version 1 or 2, with a limit; None where there can be none."""
    group = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup/memory" if controllers == "memory" else "/sys/fs/cgroup")
        limit = "memory.limit_in_bytes" if controllers == "memory" else "memory.max"
        if controllers not in ("memory", ""):
            continue
        candidate = root / path.lstrip("/") / f"fourfold-check-{os.getpid()}"
        try:
            candidate.mkdir()
            (candidate / limit).write_text(str(megabytes << 20))
            group = candidate
            break
        except OSError:
            with contextlib.suppress(OSError):
                candidate.rmdir()
    try:
        yield group
    finally:
        if group is not None:
            with contextlib.suppress(OSError):
                group.rmdir()


def enter(group: Path | None, cores: int) -> None:
    """For the child."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def start_convert(command: Path, model: Path, target: Path, cores: int, group: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [command, "convert", model, target, "--to", "nvfp4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cores)},
        preexec_fn=lambda: enter(group, cores),
    )


def watch_memory(process: subprocess.Popen) -> tuple[int, int]:
    """Largest RssAnon and RssFile in bytes, until it ends."""
    largest = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in largest:
                    largest[name] = max(largest[name], int(value.split()[0]) << 10)
        time.sleep(0.02)
    return largest["RssAnon"], largest["RssFile"]


# ---- the checks ----


def check_speed(judge: Judge, command: Path, model: Path, folder: Path, memory: int, cores: int) -> float:
    """Returns the median time of a conversion."""
    copies, conversions, anonymous, mapped = [], [], 0, 0
    dropped = True
    with memory_cgroup(memory) as group:
        for _ in range(ROUNDS):
            shutil.rmtree(folder / "copy", ignore_errors=True)
            shutil.rmtree(folder / "nvfp4", ignore_errors=True)
            dropped &= drop_caches()
            begin = time.monotonic()
            run("cp", "-r", model, folder / "copy")
            os.sync()
            copies.append(time.monotonic() - begin)
            shutil.rmtree(folder / "copy")
            dropped &= drop_caches()
            begin = time.monotonic()
            process = start_convert(command, model, folder / "nvfp4", cores, group)
            peak = watch_memory(process)
            os.sync()
            conversions.append(time.monotonic() - begin)
            anonymous, mapped = max(anonymous, peak[0]), max(mapped, peak[1])
            if process.returncode != 0:
                judge.say(False, f"convert: exit code {process.returncode} {process.stdout.read()}")
                return conversions[-1]
        how = f"in a memory cgroup of {memory} MB" if group else "without a cgroup, by RssAnon"
    size = size_of(model) / 1e6
    copy, convert = statistics.median(copies), statistics.median(conversions)
    times = ", ".join(f"{a:.1f}/{b:.1f}" for a, b in zip(copies, conversions, strict=True))
    cache = "caches dropped" if dropped else "caches as they were"
    judge.say(
        convert <= 2 * copy or size < SMALL_MB,
        f"{size:.0f} MB: copied at {size / copy:.0f} MB/s, converted at {size / convert:.0f} MB/s of source, ratio "
        f"{copy / convert:.2f} ({cores} cores, {cache}; seconds copy/convert {times})",
    )
    judge.say(
        anonymous < memory << 20,
        f"memory, {how}: at most {anonymous / 2**20:.0f} MB of its own, {mapped / 2**20:.0f} MB of mapped files",
    )
    return convert


def check_output(judge: Judge, command: Path, model: Path, folder: Path, cores: int) -> None:
    start_convert(command, model, folder / "again", cores).wait()
    judge.say(digest(folder / "nvfp4") == digest(folder / "again"), "converted twice: the same files")
    shutil.rmtree(folder / "again")
    result = subprocess.run([command, "inspect", folder / "nvfp4"], capture_output=True, text=True)
    judge.say(result.returncode == 0, f"inspect: exit code {result.returncode}")


def loads(command: Path, directory: Path) -> bool:
    return subprocess.run([command, "inspect", directory], capture_output=True).returncode in (0, 3)


def check_kills(judge: Judge, command: Path, model: Path, folder: Path, seconds: float, cores: int) -> None:
    before, converted = digest(model), digest(folder / "nvfp4")
    target, partial = folder / "killed", folder / "killed.partial"
    for part in (0.25, 0.5, 0.75):
        process = start_convert(command, model, target, cores)
        time.sleep(part * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        was_running = process.returncode == -signal.SIGKILL
        # What has the target's name is whole. What is in the making loads with its last file, when it is whole too.
        found = [one for one in (target, partial) if one.exists() and (one == target or loads(command, one))]
        broken = [one.name for one in found if digest(one) != converted]
        state = f"not whole: {broken}" if broken else f"whole: {[one.name for one in found]}"
        judge.say(
            not broken,
            f"killed after {part:.0%} of the time{'' if was_running else ' (it had ended)'}: "
            f"{state if found else 'nothing loads'}",
        )
        shutil.rmtree(target, ignore_errors=True)
    judge.say(digest(model) == before, "the source is as it was")
    process = start_convert(command, model, target, cores)
    process.wait()
    fine = process.returncode == 0 and digest(target) == converted and not (target / MARKER).exists()
    judge.say(fine and not partial.exists(), "run again: the same model, and nothing else left")
    shutil.rmtree(target)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
    try:
        yield disk if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", disk], check=True)
        disk.rmdir()


def check_full_disks(judge: Judge, command: Path, model: Path, folder: Path, cores: int) -> None:
    needed = size_of(folder / "nvfp4")
    for size, what in ((needed // 2, "too small"), (needed + needed // 4, "filled meanwhile")):
        with small_disk(folder, size) as disk:
            if disk is None:
                print("--    full disk: this process may not mount a tmpfs")
                return
            process = start_convert(command, model, disk / "target", cores)
            if what == "filled meanwhile":
                while process.poll() is None and not list(disk.glob("target.partial/*")):
                    time.sleep(0.001)
                with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
                    os.posix_fallocate(filler.fileno(), 0, needed // 2)
            message = process.communicate()[0].strip()
            left = sorted(entry.name for entry in disk.iterdir() if entry.name != "filler")
            judge.say(
                process.returncode == 1 and not left,
                f"disk {what}: exit code {process.returncode}, left {left}: {message}",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build/release")
    parser.add_argument("--size", type=float, default=6.0, metavar="GB", help="of the model (default: 6)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MB")
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    command, judge = arguments.build.resolve() / "fourfold", Judge()
    if not command.is_file():
        parser.error(f"--build: expected a folder with the command fourfold, found no {command}; build it first")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model = make_model(command, folder, arguments.size)
        seconds = check_speed(judge, command, model, folder, arguments.memory, arguments.cores)
        if judge.is_fine:
            check_output(judge, command, model, folder, arguments.cores)
            check_kills(judge, command, model, folder, seconds, arguments.cores)
            check_full_disks(judge, command, model, folder, arguments.cores)
    print("all as promised" if judge.is_fine else "not as promised")
    return 0 if judge.is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
