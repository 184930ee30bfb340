"""layertest --json: its schema, its figures, and that it is written whole or not at all."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import BF16, NVFP4, Tensor, changed, zeros
from command import (
    ERROR,
    FINDING,
    Json,
    assert_refused,
    layertest,
    limit_file_size,
    obey_permissions,
    report_of,
)

FIGURES = {"cosine", "norm_ratio", "rel_l2", "worst_token", "worst_expert", "limit"}
BACKENDS = pytest.mark.parametrize("backend", [(), ("--backend", "reference")], ids=["default", "reference"])

# ---- JSON ----


def check_stages(stages: Json, first: str) -> None:
    """Stages in order from `first` on, each with all of its figures, of the documented types."""
    names = ["weights", "l1", "activation", "l2", "out"]
    assert list(stages) == names[names.index(first) :]
    for name, figures in stages.items():
        assert set(figures) == FIGURES, name
        for key in ("cosine", "norm_ratio", "rel_l2", "limit"):
            value = figures[key]
            finite = isinstance(value, float) and math.isfinite(value)
            assert finite or value in ("nan", "inf", "-inf") or (key == "limit" and value is None), (
                name,
                key,
            )
        for key in ("worst_token", "worst_expert"):
            assert figures[key] is None or (type(figures[key]) is int and figures[key] >= 0), (name, key)
        assert (figures["worst_token"] is None) == (name == "weights")
        assert (figures["worst_expert"] is None) == (name == "out")


def check_schema(report: Json) -> None:
    """docs/layertest.md, section --json: what programs may rely on."""
    assert report["verdict"] in ("fine", "kernel", "checkpoint", "activations")
    for key in ("backend", "kernel", "model"):
        assert isinstance(report[key], str) and report[key], key
    assert type(report["layer"]) is int
    for key in ("findings", "notes"):
        assert isinstance(report[key], list) and all(isinstance(text, str) for text in report[key]), key
    assert (report["verdict"] == "fine") == (not report["findings"])
    assert all(isinstance(text, str) for text in report["facts"].values())

    for scales in report.get("input_scales", {}).values():
        assert set(scales) == {"worst_expert", "ratio", "limit"}
        assert type(scales["worst_expert"]) is int
        assert isinstance(scales["ratio"], float) or scales["ratio"] in ("nan", "inf")

    comparisons, left_out = report["comparisons"], report["left_out"]
    assert list(comparisons) == ["checkpoint", "activations", "kernel"]
    assert set(left_out) == {"checkpoint", "kernel"}
    check_stages(comparisons["activations"], "l1")
    for name, first in (("checkpoint", "weights"), ("kernel", "l1")):
        assert bool(comparisons[name]) != bool(left_out[name]), f"{name} was left out, or was not; {left_out}"
        if comparisons[name]:
            check_stages(comparisons[name], first)
    assert bool(report["kernel_end_to_end"]) == bool(comparisons["kernel"])
    if comparisons["kernel"]:
        check_stages(report["kernel_end_to_end"], "l1")


@BACKENDS
def test_json_schema(tmp_path: Path, cast: Path, mxfp4: Path, backend: tuple[str, ...]) -> None:
    report = report_of(tmp_path, cast, "--original", mxfp4, *backend, code=0)
    check_schema(report)
    assert report["model"] == "deepseek_v4" and report["layer"] == 0
    assert report["comparisons"]["checkpoint"]["weights"]["rel_l2"] == 0
    assert report["notes"] == []
    if backend:
        assert report["backend"] == "reference" and report["comparisons"]["kernel"] == {}


@BACKENDS
def test_json_schema_without_original(tmp_path: Path, cast: Path, backend: tuple[str, ...]) -> None:
    report = report_of(tmp_path, cast, *backend, code=0)
    check_schema(report)
    assert report["comparisons"]["checkpoint"] == {} and "--original" in report["left_out"]["checkpoint"]
    assert "mxfp4_blocks" not in report


def test_json_agrees_with_the_table(tmp_path: Path, cast: Path, mxfp4: Path) -> None:
    """The same run, printed twice: relative L2 of every stage."""
    result = layertest(cast, "--original", mxfp4)
    report = report_of(tmp_path, cast, "--original", mxfp4)
    table = re.findall(
        r"^  (?:checkpoint|activations|kernel)? +(\w+) +\S.* (\d\.\d{3}e[+-]\d\d) ", result.stdout, re.M
    )
    stages = [
        (name, f"{figures['rel_l2']:.3e}")
        for comparison in report["comparisons"].values()
        for name, figures in comparison.items()
    ]
    assert table[: len(stages)] == stages, str(result)


def test_json_nan(tmp_path: Path) -> None:
    """NaN among the block scales: JSON has no NaN, so figures are the string "nan"."""
    name = "model.layers.0.mlp.experts.0.down_proj.weight_scale"
    scales = NVFP4.tensors[name].array().copy()
    scales[0, 0] = np.nan
    directory = ck.write_single(
        tmp_path / "nvfp4", changed(NVFP4.tensors, name, Tensor.of(scales)), NVFP4.config
    )
    original = ck.write_model(tmp_path / "original", BF16)
    report = report_of(tmp_path, directory, "--original", original, code=FINDING)
    check_schema(report)
    weights = report["comparisons"]["checkpoint"]["weights"]
    assert weights["rel_l2"] == weights["cosine"] == "nan" and weights["worst_expert"] == 0
    assert report["verdict"] == "checkpoint"


def test_json_infinity(tmp_path: Path) -> None:
    """Against an original of zeros, every relative error is infinite: the string "inf"."""
    zeroed = {name: zeros("BF16", *tensor.shape) for name, tensor in BF16.tensors.items()}
    original = ck.write_single(tmp_path / "original", zeroed, BF16.config)
    directory = ck.write_model(tmp_path / "nvfp4", NVFP4)
    report = report_of(tmp_path, directory, "--original", original, code=FINDING)
    check_schema(report)
    assert report["comparisons"]["checkpoint"]["weights"]["rel_l2"] == "inf"


def test_json_replaces_an_old_report(tmp_path: Path, cast: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "report.json").write_text("old" * 10_000)
    check_schema(report_of(tmp_path, cast))


def refused_json(
    target: Path, cast: Path, in_child: Callable[[], None] | None = None, *, after_work: bool = False
) -> None:
    """The run ends in an error that names the target, leaving the folder as it was: before the work where it can be
    known. `after_work`: it can't, and the table is printed all the same.
    """

    def contents() -> dict[str, bytes | None]:
        folder = target.parent if target.parent.is_dir() else target.parent.parent
        return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}

    before = contents()
    result = layertest(cast, "--json", target, in_child=in_child)
    assert ("verdict: " in result.stdout) == after_work, str(result)
    assert_refused(replace(result, stdout="") if after_work else result, target)
    assert contents() == before


def test_json_nowhere(tmp_path: Path, cast: Path) -> None:
    """Targets that can't be: no such folder, a folder itself, beneath a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("content")
    refused_json(tmp_path / "nosuch" / "report.json", cast)
    refused_json(tmp_path / "folder", cast)
    refused_json(tmp_path / "file" / "report.json", cast)


def test_json_in_a_folder_that_forbids_it(tmp_path: Path, cast: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    refused_json(folder / "report.json", cast, obey_permissions())


@pytest.mark.parametrize("content", [None, "old"], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("sigxfsz", [signal.SIG_IGN, signal.SIG_DFL], ids=["error", "signal"])
def test_json_whole_or_not_at_all(
    tmp_path: Path, cast: Path, sigxfsz: signal.Handlers, content: str | None
) -> None:
    """No room for the report (`ulimit -f`): an error, no part of it left, an old one untouched. The limit
    comes with a signal that kills by default; a command that writes reports should take the error instead.
    """
    target = tmp_path / "report.json"
    if content is not None:
        target.write_text(content)
    refused_json(target, cast, limit_file_size(512, sigxfsz), after_work=True)


@pytest.mark.parametrize("through_link", [False, True], ids=["pipe", "link-to-pipe"])
def test_json_into_a_pipe(tmp_path: Path, cast: Path, through_link: bool) -> None:
    """--json /dev/stdout, or a named pipe: the report goes through, or is refused; the pipe is not replaced
    by a file (as root, that would be /dev/stdout or /dev/null of the whole machine).
    """
    target = fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    if through_link:
        target = tmp_path / "link"
        target.symlink_to(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # else a writer would wait for one
    try:
        result = layertest(cast, "--json", target)
        received = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert fifo.is_fifo() and target.is_symlink() == through_link, "the target was replaced by a file"
    assert result.code == ERROR or json.loads(received)["verdict"] == "fine", str(result)
    assert {p.name for p in tmp_path.iterdir()} == {fifo.name, target.name}


def test_no_json_after_an_error(tmp_path: Path, cast: Path) -> None:
    layertest(cast, "--layer", "9", "--json", tmp_path / "report.json")
    assert not list(tmp_path.iterdir())
