"""layertest --html: a well-formed page that holds what --json holds, escapes what files say, and loads nothing.
Looked at in a real browser where there is one.
"""

import re
from pathlib import Path

import pytest

import checkpoints as ck
from command import ERROR, FINDING, FINE, assert_usage, layertest, report_of, run
from models import Model
from pages import assert_looks_well, page_of, screenshots

SCATTER = "worst_token"


def test_page_holds_what_the_json_holds(tmp_path: Path, cast: Path, mxfp4: Path) -> None:
    file = tmp_path / "report.html"
    report = report_of(tmp_path, cast, "--original", mxfp4, "--html", file, code=FINE)
    page = page_of(file)
    charts = report["charts"]
    assert page.count("svg") == len(charts["expert_errors"]) + 3
    assert page.count("circle") == len(charts[SCATTER]["reference"]) == charts[SCATTER]["columns"]
    for comparison in report["comparisons"].values():
        for figures in comparison.values():
            assert f"{figures['rel_l2']:.3e}" in page.text
    for fact in report["facts"].values():
        assert fact in page.text
    for errors in charts["expert_errors"]:
        stages = report["comparisons"][errors["comparison"]]
        assert len(errors["rel_l2"]) == len(errors["experts"]) * len(errors["stages"])
        for stage, name in enumerate(errors["stages"]):
            worst = max(range(len(errors["experts"])), key=lambda e: errors["rel_l2"][e * 3 + stage])
            if stages[name]["rel_l2"] > 0:
                assert errors["experts"][worst] == stages[name]["worst_expert"], (errors["comparison"], name)
    tokens = [sum(h["counts"]) + h["zeros"] + h["not_finite"] for h in charts["errors"]]
    assert set(tokens) == {64}


def test_block_scales_are_all_counted(tmp_path: Path, models: Path) -> None:
    """Against the bytes of the file: every block scale in the bin of its power of two."""
    directory = models / "qwen3-moe" / "nvfp4"
    report = report_of(tmp_path, directory)
    model = Model.read(directory)
    for histogram, matrix in zip(report["charts"]["block_scales"], ("gate", "up", "down"), strict=True):
        expected = [0] * len(histogram["counts"])
        zeros = 0
        for name, tensor in model.tensors.items():
            if re.fullmatch(rf"model\.layers\.0\.mlp\.experts\.\d+\.{matrix}_proj\.weight_scale", name):
                for value in tensor.array().astype(float).flat:
                    if value == 0:
                        zeros += 1
                    else:
                        expected[int(f"{value.hex().split('p')[1]}") + 9] += 1
        assert (histogram["counts"], histogram["zeros"]) == (expected, zeros)


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    """A model type and a folder that would be markup."""
    model = ck.write_single(tmp_path / "m<b>&amp;", ck.CAST.tensors, ck.CAST.config)
    file = tmp_path / "report.html"
    result = layertest(model, "--html", file)
    assert result.code == FINE, str(result)
    page = page_of(file)
    assert page.count("b") == 0 and "m<b>&amp;" in page.text


def test_a_finding_and_nan(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "qwen3-moe" / "nvfp4")
    model.set_bytes("model.layers.0.mlp.experts.2.up_proj.weight_scale", 0x7F, 3)
    (tmp_path / "m").mkdir()
    file = tmp_path / "report.html"
    result = layertest(model.write(tmp_path / "m"), "--html", file)
    assert result.code == FINDING, str(result)
    page = page_of(file)
    assert "block scales are NaN or negative" in page.text and "up: 1 NaN or negative" in page.text


def test_whole_models(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "report.html"
    assert layertest(models / "qwen3-moe" / "nvfp4", "--all-layers", "--html", file).code == FINE
    page = page_of(file)
    assert page.count("section") == 2 and "Layer 1" in page.text


def test_pages_that_can_not_be(tmp_path: Path, cast: Path) -> None:
    result = layertest(cast, "--html", tmp_path / "nosuch" / "report.html")
    assert result.code == ERROR and "nosuch" in result.stderr
    assert_usage(run("layertest", "--stress", "--html", tmp_path / "a.html"), "--html")
    assert_usage(layertest(cast, "--html", ""), "--html")


def test_in_a_browser(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "report.html"
    layertest(models / "qwen3-moe" / "nvfp4", "--all-layers", "--html", file)
    assert_looks_well(file, tmp_path / "shots")


def test_the_browser_check_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://elsewhere.invalid/x.png"><script>console.error("no")</script>')
    result = screenshots(page, tmp_path / "shots")
    assert result.returncode == 1
    assert "request: http://elsewhere.invalid/x.png" in result.stdout and "console: " in result.stdout
