"""layertest --candidate: an engine in numpy that shares no code with fourfold (numpy_engine.py) computes layers of tiny
models, sound or with a bug; the tool must name it, call the sound ones fine, and read what engines dump.
"""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from command import FINDING, FINE, SANITIZED, Json, Result, assert_refused, assert_usage, run
from models import Model
from numpy_engine import DEEPSEEK_V4, QWEN, Array, Engine
from pages import assert_looks_well, page_of

TIME_LIMIT_S = 60
TOKENS = 24

FORMATS = ("bf16", "fp8", "nvfp4-static", "nvfp4-max-over-experts", "nvfp4-dynamic-token")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates")
    shape = ("--shape", "8,128,96,3", "--layers", "2", "--tokens", str(TOKENS))
    for family in ("qwen3-moe", "deepseek-v4"):
        assert run("synthesize", folder / family, "--family", family, *shape).code == FINE
    routed = ("--original", "bf16")
    assert run("synthesize", folder / "deepseek-v3", "--family", "deepseek-v3", *shape, *routed).code == FINE
    return folder


def engine_of(folder: Path, family: str, bug: str = "", activations: str = "bf16") -> Engine:
    model, layer = folder / family / "nvfp4", 1
    if family == "deepseek-v4":
        return Engine(model, layer, DEEPSEEK_V4, 3, activations, bug, 10.0, "sqrtsoftplus", "gate.bias", 1.5)
    if family == "deepseek-v3":
        bias = "gate.e_score_correction_bias"
        return Engine(model, layer, QWEN, 3, activations, bug, np.inf, "sigmoid", bias, 2.5, (4, 2))
    return Engine(model, layer, QWEN, 3, activations, bug)


def hidden_states(seed: int, loudness: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal((TOKENS, 128)) * loudness).astype(ml_dtypes.bfloat16)


def dump(file: Path, tensors: dict[str, Array]) -> Path:
    file.write_bytes(ck.valid_bytes({name: ck.Tensor.of(np.ascontiguousarray(t)) for name, t in tensors.items()}))
    return file


def candidate(model: Path, *arguments: str | Path, layer: int = 1) -> Result:
    return run(
        "layertest", "--nvfp4", model, "--layer", str(layer), "--candidate", *arguments, time_limit_s=TIME_LIMIT_S
    )


def diagnosis(folder: Path, model: Path, *arguments: str | Path, layer: int = 1) -> tuple[Result, Json]:
    file = folder / "diagnosis.json"
    result = candidate(model, *arguments, "--json", file, layer=layer)
    report = json.loads(file.read_text())
    assert result.code == (FINE if report["verdict"] == "fine" else FINDING), str(result)
    assert f"verdict: {report['verdict']}: {report['explanation']}" in result.stdout, str(result)
    return result, report


def computed(engine: Engine, seed: int = 1, loudness: float = 1.0, stages: bool = False) -> dict[str, Array]:
    """What the engine's own router and layer make of random hidden states."""
    x = hidden_states(seed, loudness)
    ids, weights = engine.route(x.astype(np.float32))
    out = engine.run(x.astype(np.float32), ids, weights)
    given = out if stages else {"output": out["output"]}
    return {"x": x, "topk_ids": ids, "topk_weights": weights} | given


# The engine's bug, the family, the activations that it needs, and the fault that must come first.
BUGS = [
    ("w13: transposed scales", "qwen3-moe", "nvfp4-static", "scales-transposed.w13"),
    ("w2: transposed scales", "qwen3-moe", "bf16", "scales-transposed.w2"),
    ("w13: scales never swizzled", "qwen3-moe", "nvfp4-static", "scales-linear-as-swizzled.w13"),
    ("w2: e8m0 scales", "qwen3-moe", "bf16", "scales-as-e8m0.w2"),
    ("high nibble first", "qwen3-moe", "nvfp4-dynamic-token", "nibbles-swapped"),
    ("3.5 for 3", "qwen3-moe", "bf16", "e2m1-code-5-as-3.5"),
    ("up first", "qwen3-moe", "fp8", "gate-up-swapped"),
    ("interleaved", "qwen3-moe", "bf16", "gate-up-read-interleaved"),
    ("gate's global for up", "qwen3-moe", "bf16", "gate-global-for-up"),
    ("w2 without weight_scale_2", "qwen3-moe", "nvfp4-static", "weight-global-dropped.w2"),
    ("alpha without the activation's scale", "qwen3-moe", "nvfp4-static", "input-scale-dropped"),
    ("expert off by one", "qwen3-moe", "nvfp4-max-over-experts", "expert-next"),
    ("layer before", "qwen3-moe", "bf16", "layer-before"),
    ("gelu", "qwen3-moe", "nvfp4-static", "activation-gelu-tanh"),
    ("no routing weights", "qwen3-moe", "bf16", "weight-missing"),
    ("worst first", "qwen3-moe", "nvfp4-static", "weights-reversed"),
    ("rows reversed", "qwen3-moe", "fp8", "tokens-reversed"),
    ("no all-reduce", "qwen3-moe", "bf16", "ranks-upper-inner-missing"),
    ("K rounded down", "qwen3-moe", "nvfp4-static", "k-tail-dropped-64.w2"),
    ("no clamp", "deepseek-v4", "bf16", "clamp-missing-everywhere"),
    ("no shared expert", "deepseek-v4", "nvfp4-static", "shared-missing"),
    ("shared expert twice", "deepseek-v3", "nvfp4-static", "shared-twice"),
]


@pytest.mark.parametrize(("bug", "family", "activations", "fault"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_in_the_layer_is_named(
    tmp_path: Path, folder: Path, bug: str, family: str, activations: str, fault: str
) -> None:
    engine = engine_of(folder, family, bug, activations)
    loudness = 40.0 if bug == "no clamp" else 1.0
    file = dump(tmp_path / "dump.safetensors", computed(engine, loudness=loudness))
    _, report = diagnosis(tmp_path, engine.model, file)
    experts = report["experts"]
    named = [experts["best"]["id"], *experts["alike"]]
    assert experts["verdict"] == "explained" and fault in named, experts
    assert report["explanations"][0]["fault"].startswith(experts["best"]["id"])
    assert experts["best"]["distance"] <= experts["best"]["limit"] < experts["as_is"]["distance"]
    assert experts["runner_up"]["distance"] > experts["best"]["distance"]


ROUTER_BUGS = [
    ("not normalised", "qwen3-moe", "router-renormalise"),
    ("not normalised", "deepseek-v3", "router-renormalise"),
    ("no scaling factor", "deepseek-v3", "scaling-factor-missing"),
    ("biased weights", "deepseek-v3", "router-bias-in-weights"),
]


@pytest.mark.parametrize(("bug", "family", "fault"), ROUTER_BUGS)
def test_bug_in_the_router_is_named(tmp_path: Path, folder: Path, bug: str, family: str, fault: str) -> None:
    engine = engine_of(folder, family, bug)
    _, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "dump.safetensors", computed(engine)))
    assert report["verdict"] == "routing", report
    assert report["experts"]["verdict"] == "fine"  # with the engine's own routing
    assert report["routing"]["best"]["id"] == fault


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v4", "deepseek-v3"])
def test_sound_engine_is_fine(tmp_path: Path, folder: Path, family: str, activations: str) -> None:
    engine = engine_of(folder, family, "", activations)
    file = dump(tmp_path / "dump.safetensors", computed(engine, seed=2))
    _, report = diagnosis(tmp_path, engine.model, file)
    assert report["verdict"] == "fine", report["experts"]
    _, told = diagnosis(tmp_path, engine.model, file, "--activation-format", activations)
    assert told["verdict"] == "fine"
    assert told["experts"]["as_is"]["activations"].split(",")[0] == activations.split("-")[0]


# ---- what is not known, and what is not finite ----


def damaged(engine: Engine, change: Callable[[Array], None], stages: bool = False) -> dict[str, Array]:
    tensors = computed(engine, stages=stages)
    tensors["output"] = tensors["output"].copy()
    change(tensors["output"])
    return tensors


UNEXPLAINED = "half a minute of arithmetic, of code that Matcher.AdmitsThatItDoesNotKnow runs as well"


@pytest.mark.skipif(SANITIZED, reason=UNEXPLAINED)
def test_unknown_fault_is_not_explained_away(tmp_path: Path, folder: Path) -> None:
    def change(output: Array) -> None:
        output[:, 32:48] = np.random.default_rng(5).standard_normal((TOKENS, 16)) * np.abs(output).max()

    engine = engine_of(folder, "qwen3-moe")
    result, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", damaged(engine, change)))
    assert report["verdict"] == "unexplained"
    assert "none of the known faults explains this" in result.stdout
    assert 32 <= report["where"]["first_bad_column"] < report["where"]["last_bad_column"] <= 47
    assert report["where"]["block"] == 16 and report["where"]["bad_blocks"] == [2]


@pytest.mark.skipif(SANITIZED, reason=UNEXPLAINED)
def test_error_that_repeats_is_told(tmp_path: Path, folder: Path) -> None:
    def change(output: Array) -> None:
        output[:, 3::8] *= -7

    engine = engine_of(folder, "qwen3-moe")
    _, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", damaged(engine, change)))
    assert report["verdict"] == "unexplained" and report["where"]["period"] == 8


@pytest.mark.skipif(SANITIZED, reason=UNEXPLAINED)
def test_stage_that_is_off_is_told(tmp_path: Path, folder: Path) -> None:
    """Wrong between h and the activation: h is right, the output follows from the activation."""
    engine = engine_of(folder, "qwen3-moe")
    tensors = computed(engine, stages=True)
    engine.activate = lambda gate, up: np.sin(gate) * np.abs(up)  # type: ignore[method-assign]
    wrong = engine.run(tensors["x"].astype(np.float32), tensors["topk_ids"], tensors["topk_weights"])
    _, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", tensors | wrong))
    assert report["verdict"] == "unexplained"
    assert {stage["stage"]: stage["off"] for stage in report["stages"]} == {
        "h": False,
        "activation": True,
        "output": False,
    }


@pytest.mark.parametrize("bug", ["", "gelu"])
def test_nan_does_not_hide(tmp_path: Path, folder: Path, bug: str) -> None:
    def change(output: Array) -> None:
        output[7, :3] = np.nan

    engine = engine_of(folder, "qwen3-moe", bug)
    _, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", damaged(engine, change)))
    assert report["where"]["not_finite"] == 3
    assert "3 of 3072 elements of the output are NaN or infinite" in report["explanation"]
    assert report["verdict"] == ("activation" if bug else "unexplained")


def test_zeros_alone_name_no_fault(tmp_path: Path, folder: Path) -> None:
    """Whatever underflows explains them, and so does a hook that ran too early."""

    def change(output: Array) -> None:
        output[:] = 0.0

    engine = engine_of(folder, "qwen3-moe", "")
    _, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", damaged(engine, change)))
    assert report["verdict"] == "unexplained" and "the output is zero everywhere" in report["explanation"]
    assert "hook" in report["remedy"]


# ---- what was quantized ----


def swizzled(scales: Array) -> Array:
    """To 128x4 tiles, zero-padded."""
    rows, blocks = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = np.zeros((rows, blocks), np.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded.reshape(rows // 128, 4, 32, blocks // 4, 4).transpose(0, 3, 2, 1, 4).reshape(rows, blocks)


def quantized(rows: Array) -> tuple[Array, Array]:
    blocks = rows.reshape(len(rows), -1, 16)
    factor = np.abs(rows).max(1)[:, None] / 2688
    scales = (np.abs(blocks).max(2) / 6 / factor).astype(ml_dtypes.float8_e4m3fn)
    codes = (blocks / (scales.astype(np.float32) * factor)[..., None]).reshape(rows.shape)
    nibbles = np.clip(codes, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales.view(np.uint8)


@pytest.mark.parametrize(
    ("layout", "name"),
    [(lambda s: s, "row-major"), (swizzled, "swizzled 128x4"), (lambda s: s.T.copy(), "transposed")],
)
def test_layout_of_scales_is_told(
    tmp_path: Path, folder: Path, layout: Callable[[Array], Array], name: str
) -> None:
    engine = engine_of(folder, "qwen3-moe")
    tensors = computed(engine, stages=True)
    for stage in ("x", "activation"):
        codes, scales = quantized(tensors[stage].astype(np.float32))
        tensors |= {f"{stage}_codes": codes, f"{stage}_scales": layout(scales)}
    result, report = diagnosis(tmp_path, engine.model, dump(tmp_path / "d.safetensors", tensors))
    assert [(staged["tensor"], staged["layout"]) for staged in report["staged"]] == [("x", name), ("activation", name)]
    assert all(staged["distance"] <= 1.2 * staged["due"] for staged in report["staged"])
    assert report["verdict"] == "fine" and f"scales read as {name}" in result.stdout


def test_codes_of_something_else_are_told(tmp_path: Path, folder: Path) -> None:
    engine = engine_of(folder, "qwen3-moe")
    tensors = computed(engine)
    codes, scales = quantized(tensors["x"].astype(np.float32)[::-1])
    file = dump(tmp_path / "d.safetensors", tensors | {"x_codes": codes, "x_scales": scales})
    _, report = diagnosis(tmp_path, engine.model, file)
    assert report["verdict"] == "staging"


# ---- files ----


@pytest.fixture(scope="module")
def good(folder: Path) -> tuple[Path, dict[str, Array]]:
    engine = engine_of(folder, "qwen3-moe")
    tensors = computed(engine)
    return engine.model, tensors | {"x": tensors["x"].astype(np.float32)}


def test_npz_and_npy_say_what_safetensors_say(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    model, tensors = good
    _, expected = diagnosis(tmp_path, model, dump(tmp_path / "d.safetensors", tensors))
    np.savez(tmp_path / "d.npz", **tensors)
    _, of_npz = diagnosis(tmp_path, model, tmp_path / "d.npz")
    for name, tensor in tensors.items():
        np.save(tmp_path / f"{name}.npy", tensor)
    _, of_npy = diagnosis(tmp_path, model, *(tmp_path / f"{name}.npy" for name in tensors))
    assert expected["experts"] == of_npz["experts"] == of_npy["experts"]
    _, of_input = diagnosis(tmp_path, model, tmp_path / "output.npy", "--input", tmp_path / "d.npz")
    assert expected["experts"] == of_input["experts"]


def test_zip64_is_read(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    """Sizes and offsets moved to zip64 fields by hand, as in files beyond 4 GiB."""
    model, tensors = good
    np.savez(tmp_path / "plain.npz", **tensors)
    data = (tmp_path / "plain.npz").read_bytes()
    end = data.rindex(b"PK\x05\x06")
    count, start = int.from_bytes(data[end + 10 : end + 12], "little"), int.from_bytes(data[end + 16 : end + 20], "little")
    entries, at = b"", start
    for _ in range(count):
        name, extra = (int.from_bytes(data[at + i : at + i + 2], "little") for i in (28, 30))
        size, offset = data[at + 24 : at + 28], data[at + 42 : at + 46]
        field = b"\x01\x00\x18\x00" + (size + bytes(4)) * 2 + offset + bytes(4)
        entries += data[at : at + 20] + b"\xff" * 8 + data[at + 28 : at + 30] + len(field).to_bytes(2, "little")
        entries += data[at + 32 : at + 42] + b"\xff" * 4 + data[at + 46 : at + 46 + name] + field
        at += 46 + name + extra
    record = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12) + count.to_bytes(8, "little") * 2
    record += len(entries).to_bytes(8, "little") + start.to_bytes(8, "little")
    locator = b"PK\x06\x07" + bytes(4) + (start + len(entries)).to_bytes(8, "little") + b"\x01\x00\x00\x00"
    tail = b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    (tmp_path / "zip64.npz").write_bytes(data[:start] + entries + record + locator + tail)
    with np.load(tmp_path / "zip64.npz") as loaded:
        assert sorted(loaded) == sorted(tensors)
    _, report = diagnosis(tmp_path, model, tmp_path / "zip64.npz")
    assert report["verdict"] == "fine"


def test_int8_ids_and_float64_are_read(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    model, tensors = good
    np.savez(
        tmp_path / "d.npz",
        **tensors | {"topk_ids": tensors["topk_ids"].astype(np.int8), "output": tensors["output"].astype(np.float64)},
    )
    _, report = diagnosis(tmp_path, model, tmp_path / "d.npz")
    assert report["verdict"] == "fine"


REFUSED = [
    ({"output": None}, ("'output'", "found none")),
    ({"x": None}, ("'x'", "--input", "found none")),
    ({"topk_weights": None}, ("topk_ids and topk_weights together",)),
    ({"x": np.zeros((TOKENS, 64), np.float32)}, ("expected [T, 128]", "[24, 64]")),
    ({"x": np.full((TOKENS, 128), np.inf, np.float32)}, ("finite",)),
    ({"output": np.zeros((TOKENS + 1, 128), np.float32)}, ("[24, 128] as x", "[25, 128]")),
    ({"output": np.full((TOKENS, 128), 1e300)}, ("float32", "1e+300")),
    ({"output": np.zeros((TOKENS, 128), np.int32)}, ("'output'", "I32")),
    ({"topk_ids": np.full((TOKENS, 3), 8, np.int32)}, ("8",)),
    ({"topk_ids": np.full((TOKENS, 3), -2, np.int32)}, ("topk_ids", "-2")),
    ({"topk_ids": np.zeros((TOKENS, 3), np.float32)}, ("topk_ids", "whole numbers", "F32")),
    ({"topk_weights": np.full((TOKENS, 3), np.nan, np.float32)}, ("topk_weights", "the router is at fault")),
    ({"h": np.zeros((TOKENS, 192), np.float32)}, ("'h'", "[72, 192]")),
    ({"x_codes": np.zeros((TOKENS, 64), np.uint8)}, ("x_scales",)),
    ({"x_codes": np.zeros((TOKENS, 63), np.uint8), "x_scales": np.zeros(3, np.uint8)}, ("x_codes", "[24, 64]")),
    ({"x_codes": np.zeros((TOKENS, 64), np.uint8), "x_scales": np.zeros(3, np.uint8)}, ("x_scales", "192 bytes")),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED)
def test_tensor_that_does_not_fit_is_refused(
    tmp_path: Path, good: tuple[Path, dict[str, Array]], change: dict[str, Array | None], parts: tuple[str, ...]
) -> None:
    model, tensors = good
    kept = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    assert_refused(candidate(model, dump(tmp_path / "d.safetensors", kept)), *parts)


def test_file_that_is_none_is_refused(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    model, tensors = good
    np.savez_compressed(tmp_path / "c.npz", **tensors)
    assert_refused(candidate(model, tmp_path / "c.npz"), "np.savez, not savez_compressed")
    np.save(tmp_path / "x.npy", np.asfortranarray(tensors["x"]))
    assert_refused(candidate(model, tmp_path / "x.npy"), "C order")
    np.save(tmp_path / "output.npy", tensors["output"].astype(np.complex64))
    assert_refused(candidate(model, tmp_path / "output.npy"), "<c8")
    whole = tmp_path / "whole.npz"
    np.savez(whole, **tensors)
    data = whole.read_bytes()
    for length in (*range(0, 200, 7), len(data) // 2, *range(len(data) - 400, len(data), 9)):
        (tmp_path / "cut.npz").write_bytes(data[:length])
        assert_refused(candidate(model, tmp_path / "cut.npz"), "cut.npz")
    np.save(tmp_path / "output.npy", tensors["output"])
    assert_refused(candidate(model, whole, tmp_path / "output.npy"), "'output' again")


def test_random_damage_does_not_crash(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    model, tensors = good
    np.savez(tmp_path / "whole.npz", **tensors)
    data = (tmp_path / "whole.npz").read_bytes()
    directory = data.index(b"PK\x01\x02")
    rng = np.random.default_rng(3)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(directory, len(data), 2):
            broken[at] = rng.integers(256)
        (tmp_path / "broken.npz").write_bytes(broken)
        candidate(model, tmp_path / "broken.npz")


def test_options_that_would_be_ignored_are_refused(tmp_path: Path, good: tuple[Path, dict[str, Array]]) -> None:
    model, tensors = good
    file = dump(tmp_path / "d.safetensors", tensors)
    for option in (["--original", model], ["--backend", "cpu"], ["--tokens", "4"], ["--stress"], ["--self-test"]):
        assert_usage(candidate(model, file, *option), "excludes")
    assert_usage(run("layertest", "--nvfp4", model, "--activation-format", "bf16"), "--candidate")
    assert_usage(run("layertest", "--candidate", file), "--nvfp4")
    assert_usage(candidate(model, file, "--activation-format", "fp4"), "fp4")


def test_activation_format_that_the_layer_lacks_is_refused(tmp_path: Path) -> None:
    shape = ("--shape", "8,128,96,3", "--family", "qwen3-moe", "--tokens", "16")
    assert run("synthesize", tmp_path / "m", *shape).code == FINE
    model = Model.read(tmp_path / "m" / "nvfp4")
    for name in [n for n in model.tensors if n.endswith("input_scale")]:
        del model.tensors[name]
    directory = model.write(tmp_path / "without")
    tensors = {"x": hidden_states(1), "output": np.zeros((TOKENS, 128), np.float32)}
    result = candidate(
        directory, dump(tmp_path / "d.safetensors", tensors), "--activation-format", "nvfp4-static", layer=0
    )
    assert_refused(result, "nvfp4-static", "input_scale")


def test_page_shows_the_diagnosis(tmp_path: Path, folder: Path) -> None:
    engine = engine_of(folder, "qwen3-moe", "w13: transposed scales", "nvfp4-static")
    page_file = tmp_path / "report.html"
    file = dump(tmp_path / "d.safetensors", computed(engine, stages=True))
    _, report = diagnosis(tmp_path, engine.model, file, "--html", page_file)
    page = page_of(page_file)
    assert report["explanation"] in page.text and report["remedy"] in page.text
    for one in report["explanations"]:
        assert one["fault"] in page.text and one["evidence"] in page.text
    assert page.count("svg") == 4  # the worst token twice, errors, block scales
    assert page.count("circle") == 2 * report["charts"]["worst_token"]["columns"]
    assert_looks_well(page_file, tmp_path / "shots")


# ---- the self-test ----


@pytest.mark.skipif(SANITIZED, reason="half a minute of arithmetic, of code that layertest_test runs as well")
def test_self_test_of_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "self_test.json"
    model = folder / "qwen3-moe" / "nvfp4"
    arguments = ("--nvfp4", model, "--trials", "40", "--json", file)
    result = run("layertest", "--self-test", *arguments, time_limit_s=TIME_LIMIT_S)
    report = json.loads(file.read_text())
    assert result.code == FINE and report["passes"], str(result)
    single = report["single"]
    assert single["trials"] >= 10 and single["named"] + single["in_class"] >= 0.95 * single["trials"]
    assert report["sound"] == {"trials": 40, "claimed": 0, "unexplained": 0}
