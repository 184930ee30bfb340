"""`fourfold bench`: the command line, the table, JSON, routings from files, and what is refused.

Every run here is tiny: times mean nothing, their presence does. That a wrong layer gets no time is shown in
tests/bench_test.cpp.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from command import Json, Result, assert_fine, assert_refused, assert_usage, run

SHAPE = "6,64,32,2"
FAST = ("--backend", "reference", "--repeats", "3", "--min-time", "0.001")
LIMIT_S = 60  # ceilings take a second or two, and the machine may be busy


def bench(*arguments: str | Path, shape: str = SHAPE, threads: str = "1") -> Result:
    return run("bench", "--shape", shape, "--threads", threads, *FAST, *arguments, time_limit_s=LIMIT_S)


def report(folder: Path, *arguments: str | Path, **options: str) -> Json:
    """Runs with --json and -> what was written; `options` are those of bench()."""
    result = bench(*arguments, "--json", folder / "report.json", **options)
    assert_fine(result)
    return json.loads((folder / "report.json").read_text())


def test_table_and_json_agree(tmp_path: Path) -> None:
    result = bench("--tokens", "1,5", "--json", tmp_path / "report.json")
    assert_fine(result)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "something is left behind"
    found = json.loads((tmp_path / "report.json").read_text())
    names = [case["case"] for case in found["cases"]]
    assert names == [f"reference/{SHAPE}/1", f"reference/{SHAPE}/5"]
    for name in names:
        assert re.search(rf"^{re.escape(name)} +nvfp4 +1 ", result.stdout, re.MULTILINE), str(result)
    head = result.stdout.index("DRAM read")
    assert head < result.stdout.index(names[0]), "ceilings come first"


def test_json_of_a_case(tmp_path: Path) -> None:
    """What docs/bench.md promises."""
    found = report(tmp_path, "--tokens", "7", "--stages")
    assert found["seed"] == 0 and found["routing"] == "uniform"
    assert found["activation_scale"] == {"x": "static", "intermediate": "static"}
    (machine,) = found["machines"]
    assert machine["threads"] == 1 and machine["cache_bytes"] > 0
    assert machine["read_bandwidth"]["per_second"] > 1e8
    peaks = {peak["name"]: peak for peak in machine["peaks"]}
    assert {"f32", "f32-avx2", "f32-avx512", "int8-vnni-avx512", "bf16-avx512", "bf16-amx"} <= peaks.keys()
    assert all(peak["per_second"] or peak["note"] for peak in peaks.values())
    (case,) = found["cases"]
    assert (case["backend"], case["model"], case["tokens"]) == ("reference", SHAPE, 7)
    assert [case[key] for key in ("experts", "hidden", "intermediate", "top_k")] == [6, 64, 32, 2]
    assert (case["activations"], case["threads"], case["status"]) == ("nvfp4", 1, "ok")
    assert case["rows"] == 14 and 2 <= case["experts_hit"] <= 6
    assert case["weight_bytes"] == pytest.approx(case["experts_hit"] * 3 * 64 * 32 * 9 / 16)
    assert case["bytes"] == pytest.approx(case["weight_bytes"] + 2 * 7 * 64 * 2)
    assert case["operations"] == 2 * 14 * 3 * 64 * 32
    seconds = case["seconds"]
    assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"] and seconds["samples"] >= 3
    assert case["bytes_per_second"] == pytest.approx(case["bytes"] / seconds["median"])
    floor = case["floor"]
    memory = case["bytes"] / machine["read_bandwidth"]["per_second"]
    arithmetic = case["operations"] / case["peak"]["per_second"]
    assert floor["seconds"] == pytest.approx(max(memory, arithmetic))
    assert floor["by"] == ("memory" if memory >= arithmetic else "arithmetic")
    assert floor["fraction"] == pytest.approx(floor["seconds"] / seconds["median"])
    assert case["peak"]["name"] == "f32"
    assert [stage["stage"] for stage in case["stages"]] == ["permute", "stage+experts", "combine"]
    assert case["rotation"]["routings"] >= 8 and case["rotation"]["cold"] is False


@pytest.fixture(scope="module")
def forty_tokens(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The case of a run with seed 3."""
    (case,) = report(tmp_path_factory.mktemp("forty"), "--tokens", "40", "--seed", "3")["cases"]
    return case


def test_json_of_the_check(forty_tokens: Json) -> None:
    check = forty_tokens["check"]
    assert check["depth"] == "stages" and check["findings"] == []
    assert check["rows"] == 80 and check["tokens"] == 40 and check["whole_experts"] == 3
    assert check["staged_values"] > 0
    stages = {stage["stage"]: stage for stage in check["stages"]}
    assert list(stages) == ["gemm1", "activate", "gemm2", "combine"]
    for stage in stages.values():
        assert 0 <= stage["rel_l2"] <= stage["limit"] and stage["worst_row_rel_l2"] <= stage["worst_row_limit"]


def test_every_format_and_thread_count_is_a_case(tmp_path: Path) -> None:
    found = report(tmp_path, "--tokens", "2", "--activations", "bf16,fp8,nvfp4x2", threads="1,2")
    cases = [(case["activations"], case["threads"]) for case in found["cases"]]
    assert cases == [(name, threads) for name in ("bf16", "fp8", "nvfp4x2") for threads in (1, 2)]
    assert [machine["threads"] for machine in found["machines"]] == [1, 2]
    operations = {case["activations"]: case["operations"] for case in found["cases"]}
    assert operations["nvfp4x2"] == 2 * operations["bf16"]


@pytest.mark.parametrize("policy", ["max-over-experts", "dynamic-token,static"])
def test_activation_scale(tmp_path: Path, policy: str) -> None:
    found = report(tmp_path, "--tokens", "9", "--activation-scale", policy)
    x, *rest = policy.split(",")
    assert found["activation_scale"] == {"x": x, "intermediate": rest[0] if rest else x}
    assert found["cases"][0]["status"] == "ok"


def test_activation_rule(tmp_path: Path) -> None:
    found = report(tmp_path, "--tokens", "9", "--activation-rule", "four-over-six")
    assert found["activation_rule"] == "four-over-six" and found["cases"][0]["status"] == "ok"
    assert_usage(bench("--tokens", "9", "--activations", "nvfp4,bf16", "--activation-rule", "mse"), "found bf16")


def test_experts_bounds_a_named_shape(tmp_path: Path) -> None:
    (case,) = report(tmp_path, "--tokens", "1", "--experts", "8", shape="B")["cases"]
    assert (case["model"], case["experts"], case["hidden"]) == ("qwen3-30b-a3b", 8, 2048)


@pytest.mark.parametrize("routing", ["one-expert", "sequences"])
def test_every_routing_gives_each_token_its_experts(tmp_path: Path, routing: str) -> None:
    (case,) = report(tmp_path, "--tokens", "30", "--routing", routing)["cases"]
    assert case["rows"] == 60 and case["status"] == "ok"


def test_the_same_seed_gives_the_same_check(tmp_path: Path, forty_tokens: Json) -> None:
    same, other = (report(tmp_path, "--tokens", "40", "--seed", seed)["cases"][0]["check"] for seed in "34")
    assert same == forty_tokens["check"] != other


# ---- routings from files ----


def routing_file(path: Path, ids: list[list[int]]) -> Path:
    weights = [[1.0 / len(row)] * len(row) for row in ids]
    tensors = {
        "topk_ids": ck.Tensor.of(np.array(ids, np.int32)),
        "topk_weights": ck.Tensor.of(np.array(weights, np.float32)),
    }
    return ck.write_inputs(path, tensors)


def test_routing_of_a_file_is_taken_part_by_part(tmp_path: Path) -> None:
    """Three parts of two tokens; the last token is left over. Experts hit: 2, 4 and 2."""
    ids = [[0, 1], [0, 1], [2, 3], [4, 5], [1, 2], [2, 1], [0, 5]]
    path = routing_file(tmp_path / "routing.safetensors", ids)
    (case,) = report(tmp_path, "--tokens", "2", "--routing", path)["cases"]
    assert case["rotation"]["routings"] == 3
    assert case["experts_hit"] == pytest.approx(8 / 3) and case["rows"] == 4


def test_slots_without_an_expert_have_no_row(tmp_path: Path) -> None:
    path = routing_file(tmp_path / "routing.safetensors", [[0, -1], [-1, -1], [3, 2]])
    (case,) = report(tmp_path, "--tokens", "3", "--routing", path)["cases"]
    assert case["rows"] == 3 and case["status"] == "ok"


@pytest.mark.parametrize(
    ("ids", "tokens", "part"),
    [([[0, 1]], "2", "at least 2"), ([[0, 1, 2]], "1", "top-k"), ([[0, 6]], "1", "below 6")],
    ids=["too few tokens", "another top-k", "an expert beyond"],
)
def test_routing_that_does_not_fit(tmp_path: Path, ids: list[list[int]], tokens: str, part: str) -> None:
    """Refused before ceilings are measured."""
    path = routing_file(tmp_path / "routing.safetensors", ids)
    result = bench("--tokens", tokens, "--routing", path)
    assert result.code == 1 and part in result.stderr, str(result)
    assert "DRAM read" not in result.stdout, str(result)


def test_routing_file_that_is_not_there() -> None:
    """Refused before anything is measured: a mistyped name must not cost a minute."""
    result = bench("--tokens", "1", "--routing", "/no/such/file")
    assert result.code == 1 and "'/no/such/file'" in result.stderr and "zipf" in result.stderr, str(result)
    assert result.stdout == "", str(result)


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--shape", "nosuch"), "qwen3-30b-a3b"),
        (("--shape", "B,nosuch"), "found 'nosuch' in 'B,nosuch'"),
        (("--shape", "3,4"), "four numbers E,H,I,K"),
        (("--shape", "3,4"), "found '3' in '3,4'"),
        (("--shape", "6,60,32,2"), "multiples of 16"),
        (("--shape", "2,64,32,3"), "top-k"),
        (("--tokens", "0"), "--tokens"),
        (("--tokens", "1,,2"), "--tokens"),
        (("--tokens", "x"), "--tokens"),
        (("--tokens", ""), "--tokens"),
        (("--activations", "int8"), "--activations"),
        (("--activation-scale", "nosuch"), "--activation-scale"),
        (("--threads", "0"), "--threads"),
        (("--experts", "0"), "--experts"),
        (("--repeats", "0"), "--repeats"),
        (("--min-time", "-1"), "--min-time"),
        (("--seed", "-1"), "--seed"),
        (("--routing", ""), "--routing"),
        (("--json", ""), "--json"),
        (("--profile", "--backend", "reference,cpu"), "expected a backend on a GPU, found 'reference'"),
        (("extra",), "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_error(arguments: tuple[str, ...], part: str) -> None:
    assert_usage(run("bench", *arguments), part)


@pytest.mark.parametrize("name", ["nosuch", "reference,nosuch", "reference,"])
def test_unknown_backend(name: str) -> None:
    assert_refused(run("bench", "--backend", name), "backend", "reference")


def test_fewer_experts_than_top_k() -> None:
    result = bench("--tokens", "1", "--experts", "1")
    assert result.code == 1 and "top-k" in result.stderr, str(result)


def test_json_that_cannot_be_written() -> None:
    result = bench("--tokens", "1", "--json", "/no/such/folder/report.json")
    assert result.code == 1 and "/no/such/folder" in result.stderr, str(result)
    assert result.stdout == "", str(result)
