"""Running the command `fourfold` as a user does, and what every run must keep to.

FOURFOLD_COMMAND names the binary. FOURFOLD_SANITIZED=1 says that it was built with sanitizers: address space
can't be limited then, and everything takes longer.
"""

import contextlib
import ctypes
import itertools
import json
import os
import pty
import re
import resource
import signal
import subprocess
import threading
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND_VARIABLE = "FOURFOLD_COMMAND"
SANITIZED = os.environ.get("FOURFOLD_SANITIZED") == "1"
TIME_LIMIT_S = 15
SANITIZER_SLOWDOWN = 8
ADDRESS_SPACE = 1 << 30
LEAKS_ONE_IN = 8  # runs that look for leaks at their end, a third of a sanitized process's time
# Of the stack of an allocation, which a report shows beside that of the error; all of it costs a third of the time in
# which a sanitized process starts and ends. By hand, without this option, the report has it.
ALLOCATION_FRAMES = 2
SANITIZER_EXIT_CODE = 86  # else a sanitizer's report ends with 1, which is the code of ordinary errors

FINE, ERROR, USAGE, FINDING = 0, 1, 2, 3

Json = dict[str, Any]

CRASH_REPORTS = re.compile(
    r"Sanitizer|runtime error:|terminate called|Traceback|Assertion|stack smashing|core dumped"
)
run_numbers = itertools.count()
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SETPCAP = 24, 1, 2, 8


@dataclass(frozen=True)
class Result:
    """A finished run."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return (
            f"fourfold {' '.join(self.arguments)}\nexit code {self.code}\n"
            f"--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"
        )


def command_path() -> str:
    """Absolute path of the binary under test; its absence is an error, not a reason to skip."""
    command = os.environ.get(COMMAND_VARIABLE)
    if not command or not os.access(command, os.X_OK):
        raise RuntimeError(f"{COMMAND_VARIABLE} must name the fourfold binary, found {command!r}")
    return os.path.abspath(command)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without what steers the command; `changes` of None unset."""
    looks_for_leaks = next(run_numbers) % LEAKS_ONE_IN == 0
    steering = ("FOURFOLD_BACKEND", "NO_COLOR", "OMP_NUM_THREADS")
    result = {name: value for name, value in os.environ.items() if name not in steering}
    result |= {
        "OMP_NUM_THREADS": "2",  # each thread costs address space, of which there is a limit
        "OMP_WAIT_POLICY": "passive",  # threads that wait must not burn the cores of other tests
        "ASAN_OPTIONS": f"exitcode={SANITIZER_EXIT_CODE}:allocator_may_return_null=1"
        f":detect_leaks={int(looks_for_leaks)}:malloc_context_size={ALLOCATION_FRAMES}"
        ":handle_sigill=1",  # undefined behaviour: cmake/FourfoldOptions.cmake
        "UBSAN_OPTIONS": f"exitcode={SANITIZER_EXIT_CODE}:print_stacktrace=1",
    }
    for name, value in (changes or {}).items():
        result.pop(name, None)
        if value is not None:
            result[name] = value
    return result


def limit_address_space() -> None:
    """For the child: no more memory than a hostile file may cost. Sanitizers reserve terabytes: not there."""
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def limit_file_size(size: int, sigxfsz: signal.Handlers) -> Callable[[], None]:
    """For the child: files may not grow beyond `size`; what SIGXFSZ does is part of the environment."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, sigxfsz)

    return limit


def drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "can't drop a capability")


def obey_permissions() -> Callable[[], None]:
    """For the child: root too is refused what file modes forbid. Skips where root may not give that up."""
    if os.geteuid() != 0:
        return lambda: None
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    if not effective >> CAP_SETPCAP & 1:
        pytest.skip("root without CAP_SETPCAP ignores file modes and can't be made to obey them")
    return drop_capabilities


def start(
    arguments: tuple[str, ...],
    env: Mapping[str, str | None] | None,
    in_child: Callable[[], None] | None,
    time_limit_s: float,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end, within its limits of memory and time."""

    def prepare() -> None:
        limit_address_space()
        if in_child is not None:
            in_child()

    time_limit_s *= SANITIZER_SLOWDOWN if SANITIZED else 1
    try:
        return subprocess.run(
            [command_path(), *arguments],
            stdin=subprocess.DEVNULL,
            timeout=time_limit_s,
            env=environment(env),
            preexec_fn=prepare,
            stdout=stdout,
            stderr=stderr,
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"fourfold {' '.join(arguments)}: still running after {time_limit_s} s"
        ) from None


def check(result: Result) -> Result:
    """What holds for every run: no crash, no report of a sanitizer, an exit code that is documented."""
    assert result.code >= 0, f"killed by signal {-result.code}\n{result}"
    assert result.code in (FINE, ERROR, USAGE, FINDING), str(result)
    assert not CRASH_REPORTS.search(result.stdout + result.stderr), str(result)
    return result


def decoded(output: bytes | None) -> str:
    """Bytes that are no UTF-8 become lone surrogates."""
    return (output or b"").decode(errors="surrogateescape")


def run(
    *arguments: str | Path,
    env: Mapping[str, str | None] | None = None,
    in_child: Callable[[], None] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    stdout: int = subprocess.PIPE,
) -> Result:
    """Run the command without a terminal."""
    texts = tuple(map(str, arguments))
    process = start(texts, env, in_child, time_limit_s, stdout)
    return check(Result(texts, process.returncode, decoded(process.stdout), decoded(process.stderr)))


def run_on_terminal(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> Result:
    """The same with stdout and stderr on terminals of their own."""
    texts = tuple(map(str, arguments))
    try:
        masters, slaves = zip(pty.openpty(), pty.openpty(), strict=True)
    except OSError as error:  # a bare chroot has no /dev/pts
        pytest.skip(f"this machine gives no pseudo-terminals: {error}")
    outputs: list[bytearray] = [bytearray(), bytearray()]

    def read(stream: int) -> None:
        """Until the terminal hangs up, which the system tells as an error."""
        with contextlib.suppress(OSError):
            while chunk := os.read(masters[stream], 4096):
                outputs[stream] += chunk

    readers = [threading.Thread(target=read, args=(stream,)) for stream in (0, 1)]
    for reader in readers:
        reader.start()
    try:
        process = start(texts, env, None, TIME_LIMIT_S, stdout=slaves[0], stderr=slaves[1])
    finally:
        for slave in slaves:
            os.close(slave)
        for reader, master in zip(readers, masters, strict=True):
            reader.join()
            os.close(master)
    return check(Result(texts, process.returncode, *(decoded(bytes(output)) for output in outputs)))


def layertest(nvfp4: Path, *arguments: str | Path, **options: Any) -> Result:
    return run("layertest", "--nvfp4", nvfp4, *arguments, **options)


def fact(result: Result, label: str) -> str:
    """What stands beside `label` in the head of layertest's report."""
    lines = re.findall(rf"^{re.escape(label)} +(.*)$", result.stdout, re.MULTILINE)
    assert len(lines) == 1, f"{label}: {lines}\n{result}"
    return lines[0]


def report_of(folder: Path, nvfp4: Path, *arguments: str | Path, code: int | None = None) -> Json:
    """Runs layertest with --json, which must agree with the exit code and be all that is left behind."""
    folder = folder / "json"
    folder.mkdir(exist_ok=True)
    result = layertest(nvfp4, *arguments, "--json", folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    assert os.listdir(folder) == ["report.json"]
    assert result.code == (FINE if report["verdict"] == "fine" else FINDING), str(result)
    assert code in (None, result.code), str(result)
    return report


def assert_fine(result: Result) -> None:
    """It ran, and there is nothing to complain about on stderr."""
    assert result.code == FINE, str(result)
    assert result.stdout and not result.stderr, str(result)


def assert_finding(result: Result, *parts: str) -> None:
    """It ran, and says on stdout what is at fault."""
    assert result.code == FINDING, str(result)
    assert not result.stderr, str(result)
    for part in ("finding", "verdict", *parts):
        assert part in result.stdout, f"stdout lacks {part!r}\n{result}"


MOST_MESSAGE_BYTES = 3000


def printable(text: str) -> bool:
    """UTF-8 throughout, and no control characters but line feeds."""
    return not any(c != "\n" and unicodedata.category(c) in ("Cc", "Cs") for c in text)


def assert_refused(result: Result, *parts: str | Path) -> None:
    """An error on stderr, nothing on stdout: one message of bearable length that holds all of `parts`, in
    UTF-8 and without control characters, which a hostile name could smuggle to a terminal.
    """
    assert result.code == ERROR, str(result)
    assert not result.stdout, str(result)
    assert result.stderr.startswith("fourfold: ") and result.stderr.endswith("\n"), str(result)
    assert len(result.stderr) <= MOST_MESSAGE_BYTES, f"{len(result.stderr)} bytes of message"
    message = result.stderr.removesuffix("\n")
    assert "\n" not in message, f"more than one line\n{result}"
    assert printable(message), repr(message)
    for part in parts:
        assert str(part) in result.stderr, f"the message lacks {str(part)!r}\n{result}"


def assert_usage(result: Result, *parts: str) -> None:
    """A command line that makes no sense: exit code 2, the reason on stderr, nothing on stdout."""
    assert result.code == USAGE, str(result)
    assert not result.stdout and result.stderr, str(result)
    for part in parts:
        assert part in result.stderr, f"the message lacks {part!r}\n{result}"
