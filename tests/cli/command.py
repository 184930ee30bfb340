"""Running the command `fourfold` as a user does, and what every run must keep to.

FOURFOLD_COMMAND names the binary. FOURFOLD_SANITIZED=1 says that it was built with sanitizers: address space
can't be limited then, and everything takes longer.
"""

import ctypes
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND_VARIABLE = "FOURFOLD_COMMAND"
SANITIZED = os.environ.get("FOURFOLD_SANITIZED") == "1"
TIME_LIMIT_S = 60 if SANITIZED else 15
ADDRESS_SPACE = 1 << 30
SANITIZER_EXIT_CODE = 86  # else a sanitizer's report ends with 1, which is the code of ordinary errors

FINE, ERROR, USAGE, FINDING = 0, 1, 2, 3

CRASH_REPORTS = re.compile(
    r"Sanitizer|runtime error:|terminate called|Traceback|Assertion|stack smashing|core dumped"
)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


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
    steering = ("FOURFOLD_BACKEND", "NO_COLOR", "OMP_NUM_THREADS")
    result = {name: value for name, value in os.environ.items() if name not in steering}
    result |= {
        "OMP_NUM_THREADS": "2",  # each thread costs address space, of which there is a limit
        "ASAN_OPTIONS": f"exitcode={SANITIZER_EXIT_CODE}:allocator_may_return_null=1:detect_leaks=1",
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


def obey_permissions() -> None:
    """For the child: root too is refused what file modes forbid."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "can't drop a capability")


def run(
    *arguments: str | Path,
    env: Mapping[str, str | None] | None = None,
    in_child: Callable[[], None] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run the command to its end. Whatever it was given, it must not crash, hang or print a report of a
    sanitizer.
    """
    texts = tuple(str(argument) for argument in arguments)

    def prepare() -> None:
        limit_address_space()
        if in_child is not None:
            in_child()

    process = subprocess.run(
        [command_path(), *texts],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIME_LIMIT_S,
        env=environment(env),
        preexec_fn=prepare,
        cwd=cwd,
    )
    result = Result(texts, process.returncode, process.stdout.decode(), process.stderr.decode())
    assert result.code >= 0, f"killed by signal {-result.code}\n{result}"
    assert result.code in (FINE, ERROR, USAGE, FINDING), str(result)
    assert not CRASH_REPORTS.search(result.stdout + result.stderr), str(result)
    return result


def layertest(nvfp4: Path, *arguments: str | Path, **options: object) -> Result:
    return run("layertest", "--nvfp4", nvfp4, *arguments, **options)  # type: ignore[arg-type]


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


def assert_refused(result: Result, *parts: str | Path) -> None:
    """An error on stderr, nothing on stdout: one message of bearable length that holds all of `parts`, and
    no control characters, which a hostile name could smuggle to a terminal.
    """
    assert result.code == ERROR, str(result)
    assert not result.stdout, str(result)
    assert result.stderr.startswith("fourfold: ") and result.stderr.endswith("\n"), str(result)
    assert len(result.stderr) <= MOST_MESSAGE_BYTES, f"{len(result.stderr)} bytes of message"
    unprintable = [c for c in result.stderr.removesuffix("\n") if not c.isprintable()]
    assert not unprintable, f"control characters {unprintable[:5]} in {result.stderr!r}"
    for part in parts:
        assert str(part) in result.stderr, f"the message lacks {str(part)!r}\n{result}"


def assert_usage(result: Result, *parts: str) -> None:
    """A command line that makes no sense: exit code 2, the reason on stderr, nothing on stdout."""
    assert result.code == USAGE, str(result)
    assert not result.stdout and result.stderr, str(result)
    for part in parts:
        assert part in result.stderr, f"the message lacks {part!r}\n{result}"
