"""The command line: help, version, usage errors, streams, colour, FOURFOLD_BACKEND, and gemmtest.

Exit codes: 0 fine, 1 error, 2 a command line that makes no sense, 3 a finding. Results go to stdout, errors
to stderr, never both. What layertest and synthesize do stands in test_layertest_*.py and test_synthesize.py.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import CAST
from command import (
    ERROR,
    FINDING,
    FINE,
    SANITIZED,
    USAGE,
    assert_finding,
    assert_fine,
    assert_refused,
    assert_usage,
    fact,
    layertest,
    run,
    run_on_terminal,
)

OPTIONS = {
    "layertest": [
        *("--nvfp4", "--original", "--layer", "--experts", "--tokens", "--input", "--seed", "--activations"),
        *("--activation-scale", "--activation-rule", "--gate-up", "--accumulate", "--backend", "--isa"),
        *("--double-quantize", "--json"),
    ],
    "synthesize": ["DIR", "--shape", "--original", "--profile", "--layers", "--tokens", "--seed", "--force"],
    "gemmtest": ["--shape", "--backend", "--isa", "--seed"],
    "bench": [
        *("--shape", "--tokens", "--backend", "--isa", "--activations", "--activation-scale", "--activation-rule"),
        *("--routing", "--experts", "--threads", "--repeats", "--min-time", "--stages", "--seed", "--json"),
    ],
}
UNKNOWN_BACKENDS = ["nosuch", "Reference", "reference ", "0"]
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


# ---- help and version ----


def documented(help_text: str) -> Iterator[tuple[str, str]]:
    """Name and description of every option, positional and subcommand in a help text. An entry starts at
    column 2; its description at column 30, or further right where the entry is long, or on the next line.
    """
    entries = re.findall(r"^  (\S.*(?:\n {12,}\S.*)*)", help_text, re.MULTILINE)
    for entry in entries:
        head, *rest = re.split(r"\s{2,}", entry, maxsplit=1)
        for name in re.findall(r"^[A-Z]+\b|^[a-z]+\b|--?[a-z][\w-]*", head.split(":")[0]):
            yield name, " ".join(rest)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_documents_every_option(command: str) -> None:
    """Every option is listed, and whatever is listed says in a few words what it does."""
    result = run(command, "--help")
    assert_fine(result)
    descriptions = dict(documented(result.stdout))
    assert set(OPTIONS[command]) <= descriptions.keys(), str(result)
    for name, description in descriptions.items():
        assert len(description.split()) >= 2, f"{name}: {description!r}\n{result}"


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert_fine(result)
    descriptions = dict(documented(result.stdout))
    for command in OPTIONS:
        assert len(descriptions.get(command, "").split()) >= 4, str(result)


@pytest.mark.parametrize("command", OPTIONS)
def test_short_help_is_the_same(command: str) -> None:
    assert run(command, "-h").stdout == run(command, "--help").stdout


def test_help_names_the_environment_variable() -> None:
    assert "FOURFOLD_BACKEND" in run("layertest", "--help").stdout


def test_version() -> None:
    """A version that programs can parse, and the backends with what keeps them from running here."""
    result = run("--version")
    assert_fine(result)
    first, *others = result.stdout.splitlines()
    assert re.fullmatch(r"fourfold \d+\.\d+\.\d+", first), str(result)
    assert re.fullmatch(r"  reference +\S.*", others[-1]), "the reference can always run, and is last"


# ---- usage errors ----


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nosuch",),
        ("--nosuch",),
        ("layer",),
        ("layertest", "gemmtest"),
        ("gemmtest", "--nosuch"),
        ("gemmtest", "extra"),
        ("gemmtest", "--shape"),
        ("gemmtest", "--seed", "-1"),
        ("gemmtest", "--seed", "x"),
        ("gemmtest", "--seed", "18446744073709551616"),
        ("layertest",),
        ("layertest", "--nvfp4"),
        ("synthesize",),
    ],
    ids=" ".join,
)
def test_usage_error(arguments: tuple[str, ...]) -> None:
    """The reason stands on stderr, with a pointer to --help."""
    assert_usage(run(*arguments), "--help")


LAYERTEST_USAGE = [
    "--nosuch",
    "extra",
    "--layer=-1",
    "--layer=x",
    "--layer=1.5",
    "--layer=99999999999999999999",
    "--layer=",
    "--tokens=0",
    "--tokens=-1",
    "--tokens=x",
    "--tokens=16777217",
    "--tokens=1e3",
    "--seed=-1",
    "--seed=x",
    "--activations=fp4",
    "--activations=NVFP4",
    "--activations=",
    "--activation-scale=nosuch",
    "--activation-scale=static,nosuch",
    "--activation-scale=static,static,static",
    "--activation-scale=,",
    "--activation-scale=static,",
    "--activation-scale=Static",
    "--activation-rule=max",
    "--activation-rule=",
    "--gate-up=none",
    "--accumulate=f16",
    "--experts=x",
    "--experts=1,x",
    "--experts=-1",
    "--experts=1-",
    "--experts=3-1",
    "--experts=1,,2",
    "--experts=,",
    "--experts=1 2",
    "--experts=1.5",
    "--experts=1048576",
    "--experts=0-99999999",
    "--experts=99999999999999999999",
    "--double-quantize=maybe",
]


@pytest.mark.parametrize("argument", LAYERTEST_USAGE)
def test_usage_error_of_layertest(cast: Path, argument: str) -> None:
    """The message names the option; the checkpoint is cast, so nothing else is wrong."""
    assert_usage(layertest(cast, argument), argument.split("=")[0])


@pytest.mark.parametrize("option", ["--layer=0", "--tokens=3", "--nvfp4=x", "--json=x", "--seed=1"])
def test_option_given_twice(cast: Path, option: str) -> None:
    """Which one would count? Neither."""
    assert_usage(layertest(cast, option, option), option.split("=")[0])


@pytest.mark.parametrize("tokens", ["010", "0010", "0xa"])
def test_numbers_are_decimal(cast: Path, tokens: str) -> None:
    """A leading zero does not make a number octal: ten tokens, or a usage error, but not eight."""
    result = layertest(cast, "--tokens", tokens)
    if result.code == USAGE:
        assert_usage(result, "--tokens")
    else:
        assert fact(result, "input").startswith("10 tokens"), str(result)


@pytest.mark.parametrize("activations", ["fp8", "bf16"])
def test_scale_policy_without_nvfp4_activations(cast: Path, activations: str) -> None:
    """The policy would have no effect: said, not ignored."""
    result = layertest(cast, "--activations", activations, "--activation-scale", "static")
    assert_usage(result, "--activation-scale", activations)


# ---- backends ----


@pytest.mark.parametrize("name", UNKNOWN_BACKENDS)
@pytest.mark.parametrize("origin", ["option", "variable"])
@pytest.mark.parametrize("command", ["layertest", "gemmtest"])
def test_unknown_backend(cast: Path, command: str, origin: str, name: str) -> None:
    """The name that was given, and all that are compiled in; never a silent fallback."""
    arguments = (
        ["layertest", "--nvfp4", str(cast)] if command == "layertest" else [command, "--shape=1,1,1,16"]
    )
    if origin == "option":
        result = run(*arguments, "--backend", name)
    else:
        result = run(*arguments, env={"FOURFOLD_BACKEND": name})
    assert result.code in (ERROR, USAGE) and not result.stdout, str(result)
    assert f"'{name}'" in result.stderr and "reference" in result.stderr, str(result)


def test_backend_variable(cast: Path) -> None:
    """FOURFOLD_BACKEND forces a backend; --backend goes before it; empty means unset."""
    forced = layertest(cast, env={"FOURFOLD_BACKEND": "reference"})
    assert_fine(forced)
    assert "reference (forced by FOURFOLD_BACKEND)" in forced.stdout, str(forced)

    overridden = layertest(cast, "--backend", "reference", env={"FOURFOLD_BACKEND": "nosuch"})
    assert_fine(overridden)
    assert "reference (forced by --backend)" in overridden.stdout, str(overridden)

    assert layertest(cast, env={"FOURFOLD_BACKEND": ""}).stdout == layertest(cast).stdout


def test_backend_variable_of_gemmtest() -> None:
    result = run("gemmtest", "--shape=1,1,1,16", env={"FOURFOLD_BACKEND": "reference"})
    assert_fine(result)
    assert re.search(r"^backend +reference ", result.stdout, re.MULTILINE), str(result)


# ---- instruction sets of the backend cpu ----

ISAS = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]


def can_run(isa: str) -> bool:
    """Whether this machine has the instruction set, by the command's own word."""
    return run("gemmtest", "--shape=1,1,1,16", "--backend=cpu", "--isa", isa).code == FINE


def test_some_instruction_set_always_runs() -> None:
    assert can_run("portable")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("origin", ["option", "variable"])
def test_forced_instruction_set(cast: Path, isa: str, origin: str) -> None:
    """The report names it and who forced it; where it can't run, an error says why, and what else there is."""
    if origin == "option":
        result = layertest(cast, "--isa", isa)
    else:
        result = layertest(cast, env={"FOURFOLD_ISA": isa})
    if can_run(isa):
        assert_fine(result)
        forced_by = "--isa" if origin == "option" else "FOURFOLD_ISA"
        assert f"kernel: {isa}: " in result.stdout and f"(forced by {forced_by})" in result.stdout, str(result)
    else:
        assert_refused(result, f"'{isa}' can't run", *ISAS, "the CPU has no")


def test_instruction_set_option_goes_before_the_variable(cast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--isa wins; an empty variable means unset."""
    monkeypatch.delenv("FOURFOLD_ISA", raising=False)
    result = layertest(cast, "--isa", "portable", env={"FOURFOLD_ISA": "nosuch"})
    assert_fine(result)
    assert "(forced by --isa)" in result.stdout, str(result)
    assert layertest(cast, env={"FOURFOLD_ISA": ""}).stdout == layertest(cast).stdout


@pytest.mark.parametrize("name", ["nosuch", "AVX2", ""])
def test_unknown_instruction_set(cast: Path, name: str) -> None:
    """A usage error as an option; an error that lists all as a variable. Never a silent fallback."""
    assert_usage(layertest(cast, "--isa", name), "--isa", *ISAS)
    if name:
        assert_refused(layertest(cast, env={"FOURFOLD_ISA": name}), f"'{name}'", *ISAS)


# ---- streams and colour ----


def test_no_escapes_without_a_terminal(cast: Path, mxfp4: Path) -> None:
    """Whatever TERM says: files and pipes get plain text, in reports, findings, help and errors."""
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    results = [
        layertest(cast, "--original", mxfp4, env=terminal),
        layertest(cast, "--original", mxfp4, "--double-quantize", env=terminal),
        layertest(cast, "--layer", "9", env=terminal),
        run("gemmtest", "--shape=2,3,4,16", env=terminal),
        run("--help", env=terminal),
        run("--nosuch", env=terminal),
    ]
    assert [result.code for result in results] == [FINE, FINDING, ERROR, FINE, FINE, USAGE]
    for result in results:
        assert ESCAPE not in result.stdout + result.stderr, str(result)
        assert bool(result.stdout) != bool(result.stderr), f"results and errors in one run\n{result}"


def test_colour_on_a_terminal(cast: Path, mxfp4: Path) -> None:
    """Green for fine, red for findings; without its colours the report is the plain one."""
    for extra, colour in (((), "32"), (("--double-quantize",), "31")):
        arguments = ("layertest", "--nvfp4", cast, "--original", mxfp4, *extra)
        result = run_on_terminal(*arguments)
        assert f"{ESCAPE}[{colour}m" in result.stdout, repr(result.stdout)
        plain = COLOUR.sub("", result.stdout).replace("\r\n", "\n")
        assert plain == run(*arguments).stdout


@pytest.mark.parametrize("command", ["layertest", "gemmtest"])
def test_no_color(cast: Path, command: str) -> None:
    """NO_COLOR means no colour, also on a terminal."""
    arguments = (
        ["layertest", "--nvfp4", str(cast)] if command == "layertest" else [command, "--shape=1,1,1,16"]
    )
    assert ESCAPE not in run_on_terminal(*arguments, env={"NO_COLOR": "1"}).stdout
    assert ESCAPE in run_on_terminal(*arguments).stdout


def test_progress_is_wiped(cast: Path, tmp_path: Path) -> None:
    """On a terminal stderr shows what is being done, and is empty again at the end, also after an error."""
    for arguments in (
        ("layertest", "--nvfp4", cast),
        ("synthesize", tmp_path / "a", "--shape=2,32,32,1", "--original=mxfp4"),
    ):
        result = run_on_terminal(*arguments)
        assert result.code == FINE
        assert "..." in result.stderr, "no progress is shown"
        assert result.stderr.endswith("\r\x1b[K") and "\n" not in result.stderr, repr(result.stderr)


@pytest.mark.parametrize(
    "arguments", [("gemmtest", "--shape=1,1,1,16"), ("--version",), ("--help",)], ids=" ".join
)
def test_full_disk_under_stdout(arguments: tuple[str, ...]) -> None:
    """A report that could not be written is no success."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        result = run(*arguments, stdout=descriptor)
    finally:
        os.close(descriptor)
    assert result.code == ERROR and result.stderr, str(result)


# ---- gemmtest ----

ROW = re.compile(
    r"^  (dense|grouped) +(row-major|swizzled) +(emulation|bf16 matmul) +(\S+) +(\S+) +(\S+) +(\S+)$"
)


def check_gemmtest(*arguments: str) -> str:
    """Every operation with every layout against every oracle, all within their limits."""
    result = run("gemmtest", *arguments)
    assert_fine(result)
    rows = [match for line in result.stdout.splitlines() if (match := ROW.match(line))]
    assert len({row.group(1, 2, 3) for row in rows}) == len(rows) == 8, str(result)
    for row in rows:
        relative_l2, limit = float(row[6]), float(row[7])
        assert np.isfinite(limit) and relative_l2 <= limit, row[0]
    assert re.search(r": 0 of \d+ elements differ", result.stdout), str(result)
    assert "verdict: fine" in result.stdout, str(result)
    return result.stdout


def test_gemmtest_default() -> None:
    """The default has an empty group, one of a single row, and nothing that is a multiple of a tile."""
    out = check_gemmtest()
    (offsets,) = re.findall(r"group offsets ([\d ]+)", out)
    sizes = np.diff([int(offset) for offset in offsets.split()])
    assert 0 in sizes and 1 in sizes, out


@pytest.mark.parametrize("shape", ["1,1,1,16", "3,1,1,16", "1,129,127,48", "7,2,5,64", "2,128,128,128"])
def test_gemmtest_shapes(shape: str) -> None:
    """A single element, fewer rows than groups, one more and one less than a tile."""
    groups, rows, columns, depth = shape.split(",")
    out = check_gemmtest("--shape", shape)
    assert f"{groups} groups, M {rows}, N {columns}, K {depth}" in out


@pytest.mark.parametrize("backend", [(), ("--backend", "reference")], ids=["default", "reference"])
def test_gemmtest_seed(backend: tuple[str, ...]) -> None:
    """The seed is what decides: the same one repeats, another one changes the operands."""
    shape = "--shape=2,20,20,32"
    first, again = (check_gemmtest(shape, *backend, "--seed=7") for _ in range(2))
    assert first == again != check_gemmtest(shape, *backend, "--seed=8")
    check_gemmtest(shape, *backend, f"--seed={(1 << 64) - 1}")


@pytest.mark.parametrize("depth", [1, 8, 15, 17, 100])
def test_gemmtest_depth_of_broken_blocks(depth: int) -> None:
    """K is a whole number of NVFP4 blocks."""
    assert_refused(run("gemmtest", f"--shape=1,2,3,{depth}"), "K", "16", "expected", f"found {depth}")


BAD_GEMM_SHAPES = [
    "",
    "x",
    "1,2,3",
    "1,2,3,16,5",
    "1,2,3,16,",
    ",1,2,3,16",
    "0,1,1,16",
    "1,0,1,16",
    "1,1,0,16",
]
BAD_GEMM_SHAPES += ["1,1,1,0", "-1,1,1,16", "1,-1,1,16", "1,1,1,-16", "1.5,1,1,16", "1,1,1,1e2", "1, 1,1,16"]
BAD_GEMM_SHAPES += ["65537,1,1,16", "99999999999999999999,1,1,16", "1,1,1,16x", "0x1,1,1,16", "1;1;1;16"]


@pytest.mark.parametrize("shape", BAD_GEMM_SHAPES)
def test_gemmtest_bad_shape(shape: str) -> None:
    assert_usage(run("gemmtest", f"--shape={shape}"), "--shape", shape)


@pytest.mark.skipif(SANITIZED, reason="sanitizers allow no limit of address space, and would take all memory")
def test_gemmtest_beyond_memory() -> None:
    """More than there is memory: an error that says so, not a crash."""
    assert_refused(run("gemmtest", "--shape=65536,65536,65536,65536"), "memory")


# ---- paths ----


@pytest.mark.parametrize("option", ["--nvfp4", "--original", "--input"])
@pytest.mark.parametrize("path", ["", "nosuch", "/dev/null", "/", "no\nsuch"], ids=repr)
def test_path_of_nothing(cast: Path, option: str, path: str) -> None:
    """Paths that lead to nothing that could be read: named, as an error of the files, not of the usage. An
    empty path, which is what an unset shell variable leaves, is not the absence of the option.
    """
    arguments = [option, path] if option == "--nvfp4" else ["--nvfp4", str(cast), option, path]
    result = run("layertest", *arguments)
    if path:
        assert_refused(result, *path.split("\n"), "expected", "found")
    else:
        assert_usage(result, option)


@pytest.mark.parametrize("name", ["with space", "ünïcode", "-dash", "a'b", "x.safetensors.d"])
def test_paths_with_unusual_names(tmp_path: Path, name: str) -> None:
    """Directories may have any name."""
    directory = ck.write_model(tmp_path / name, CAST)
    result = layertest(directory)
    assert_fine(result)
    assert str(directory) in result.stdout, str(result)


def test_finding_has_no_stderr(cast: Path, mxfp4: Path) -> None:
    """Findings are results: they stand on stdout, and the exit code is 3."""
    assert_finding(layertest(cast, "--original", mxfp4, "--double-quantize"), "verdict: checkpoint")
