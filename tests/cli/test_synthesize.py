"""`fourfold synthesize`: what it writes, read back by the safetensors package; what it refuses and leaves.

Formats: docs/formats.md, sections 3a, 3b, 3d and 3f.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import checkpoints as ck
from command import (
    ERROR,
    SANITIZED,
    USAGE,
    Result,
    assert_fine,
    assert_refused,
    assert_usage,
    layertest,
    limit_file_size,
    obey_permissions,
    run,
)

# Experts, hidden, intermediate, top-k: small, nothing square, more experts than patterns of gate and up.
SHAPE = (6, 64, 96, 2)
EXPERTS, HIDDEN, INNER, TOP_K = SHAPE
TOKENS = 32
HALVES = {"mxfp4": ("w1", "w3", "w2"), "bf16": ("gate_proj", "up_proj", "down_proj")}
LAYER = {"mxfp4": "layers.{}.ffn.", "bf16": "model.layers.{}.mlp."}
NAMES = ("inputs.safetensors", "nvfp4", "original")
both_originals = pytest.mark.parametrize("original", ["mxfp4", "bf16"])


def synthesize(
    directory: Path,
    original: str = "mxfp4",
    *arguments: str,
    shape: str = ",".join(map(str, SHAPE)),
    **options: Any,
) -> Result:
    fixed = ("--shape", shape, "--original", original, "--tokens", str(TOKENS))
    return run("synthesize", directory, *fixed, *arguments, **options)


def read_file(path: Path) -> ck.Tensors:
    """Tensors as the safetensors package sees them, which refuses what it does not like."""
    return {
        name: ck.Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def read_model(directory: Path) -> ck.Tensors:
    """All shards, which must be those of the index."""
    tensors: ck.Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = read_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, by its path from there."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output for either original, made once."""
    root = tmp_path_factory.mktemp("made")
    for original in ("mxfp4", "bf16"):
        assert_fine(synthesize(root / original, original))
    return lambda original: root / original


# ---- what is written ----


def expected_tensors(original: str, which: str, layers: int = 1) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes that the formats prescribe."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        prefix = LAYER[original].format(layer)
        expected[f"{prefix}gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        if original == "mxfp4":
            expected[f"{prefix}gate.bias"] = ("F32", (EXPERTS,))
        for expert in range(EXPERTS):
            for half, name in zip(("gate", "up", "down"), HALVES[original], strict=True):
                rows, cols = (HIDDEN, INNER) if half == "down" else (INNER, HIDDEN)
                linear = f"{prefix}experts.{expert}.{name}"
                if which == "nvfp4":
                    expected[f"{linear}.weight"] = ("U8", (rows, cols // 2))
                    expected[f"{linear}.weight_scale"] = ("F8_E4M3", (rows, cols // 16))
                    expected[f"{linear}.weight_scale_2"] = expected[f"{linear}.input_scale"] = ("F32", ())
                elif original == "mxfp4":
                    expected[f"{linear}.weight"] = ("I8", (rows, cols // 2))
                    expected[f"{linear}.scale"] = ("F8_E8M0", (rows, cols // 32))
                else:
                    expected[f"{linear}.weight"] = ("BF16", (rows, cols))
    return expected


@both_originals
@pytest.mark.parametrize("which", ["original", "nvfp4"])
def test_tensors(made: Callable[[str], Path], original: str, which: str) -> None:
    """Names, dtypes and shapes of the formats page, no more and no fewer."""
    tensors = read_model(made(original) / which)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == expected_tensors(original, which)


@both_originals
@pytest.mark.parametrize("which", ["original", "nvfp4"])
def test_index(made: Callable[[str], Path], original: str, which: str) -> None:
    """weight_map lists every tensor in the shard that holds it; total_size is the tensors'."""
    directory = made(original) / which
    index = json.loads((directory / ck.INDEX_NAME).read_text())
    held = {name: path.name for path in directory.glob("*.safetensors") for name in read_file(path)}
    assert index["weight_map"] == held and len(set(held.values())) >= 2
    size = sum(len(tensor.data) for tensor in read_model(directory).values())
    assert index["metadata"]["total_size"] == size


@both_originals
def test_configs(made: Callable[[str], Path], original: str) -> None:
    """What other programs read from config.json, and where NVFP4 is announced."""
    for which in ("original", "nvfp4"):
        config = json.loads((made(original) / which / "config.json").read_text())
        experts = "n_routed_experts" if original == "mxfp4" else "num_experts"
        for key, value in (
            ("hidden_size", HIDDEN),
            ("moe_intermediate_size", INNER),
            (experts, EXPERTS),
            ("num_experts_per_tok", TOP_K),
            ("num_hidden_layers", 1),
        ):
            assert config[key] == value, key
        hf_quant_config = made(original) / which / "hf_quant_config.json"
        announced = json.dumps(config.get("quantization_config")) + (
            hf_quant_config.read_text() if hf_quant_config.exists() else ""
        )
        assert ("NVFP4" in announced) == (which == "nvfp4")


@both_originals
def test_only_what_is_announced_is_written(made: Callable[[str], Path], original: str) -> None:
    assert sorted(path.name for path in made(original).iterdir()) == list(NAMES)
    names = {path.name.rsplit("-", 1)[0] for path in made(original).rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(".")]


@both_originals
def test_gate_and_up_global_scales_differ(made: Callable[[str], Path], original: str) -> None:
    """In every expert, and not always the same one is larger: taking one for both must show."""
    tensors = read_model(made(original) / "nvfp4")
    gate_name, up_name, _ = HALVES[original]
    prefix = f"{LAYER[original].format(0)}experts."
    ratios = []
    for expert in range(EXPERTS):
        gate, up = (
            float(tensors[f"{prefix}{expert}.{half}.weight_scale_2"].array()) for half in (gate_name, up_name)
        )
        assert gate > 0 and up > 0 and gate != up, f"expert {expert}"
        ratios.append(up / gate)
    assert min(ratios) < 1 < max(ratios)


@both_originals
def test_input_scales(made: Callable[[str], Path], original: str) -> None:
    """Calibrated for every expert: positive, finite; beside MXFP4 originals powers of two."""
    for name, tensor in read_model(made(original) / "nvfp4").items():
        if name.endswith("input_scale"):
            value = float(tensor.array())
            assert 0 < value < np.inf, name
            if original == "mxfp4":
                assert np.frexp(value)[0] == 0.5, name


@both_originals
def test_inputs(made: Callable[[str], Path], original: str) -> None:
    """x, and a routing of every token to different experts with weights that sum to 1."""
    tensors = read_file(made(original) / "inputs.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "x": ("BF16", (TOKENS, HIDDEN)),
        "topk_ids": ("I32", (TOKENS, TOP_K)),
        "topk_weights": ("F32", (TOKENS, TOP_K)),
    }
    assert np.all(np.isfinite(tensors["x"].array().astype(np.float32)))
    ids, weights = tensors["topk_ids"].array(), tensors["topk_weights"].array()
    assert ids.min() >= 0 and ids.max() < EXPERTS
    assert all(len(set(token)) == TOP_K for token in ids.tolist())
    assert np.all(weights > 0) and np.allclose(weights.sum(axis=1), 1, atol=1e-6)


@both_originals
@pytest.mark.parametrize("profile", ["gaussian", "realistic"])
def test_layertest_is_fine_with_it(tmp_path: Path, original: str, profile: str) -> None:
    """A sound conversion, judged with its own input and with a made-up one."""
    directory = tmp_path / "a"
    assert_fine(synthesize(directory, original, "--profile", profile))
    for extra in ((), ("--input", directory / "inputs.safetensors")):
        assert_fine(layertest(directory / "nvfp4", "--original", directory / "original", *extra))


def test_profiles_differ(tmp_path: Path) -> None:
    for profile in ("gaussian", "realistic"):
        assert_fine(synthesize(tmp_path / profile, "bf16", "--profile", profile))
    gaussian, realistic = (
        read_file(tmp_path / profile / "inputs.safetensors")["x"].array().astype(np.float64)
        for profile in ("gaussian", "realistic")
    )
    assert np.abs(gaussian).max() < 6 < np.abs(realistic).max(), "outlier channels, ten times as large"


@both_originals
def test_two_layers(tmp_path: Path, original: str) -> None:
    """--layers 2: both are there, differ, and are sound."""
    directory = tmp_path / "a"
    assert_fine(synthesize(directory, original, "--layers", "2"))
    for which in ("original", "nvfp4"):
        tensors = read_model(directory / which)
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        assert found == expected_tensors(original, which, layers=2)
        half = HALVES[original][0]
        first, second = (tensors[f"{LAYER[original].format(i)}experts.0.{half}.weight"].data for i in (0, 1))
        assert first != second
    for layer in ("0", "1"):
        assert_fine(layertest(directory / "nvfp4", "--original", directory / "original", "--layer", layer))
    assert_refused(layertest(directory / "nvfp4", "--layer", "2"), "layers 0, 1")


@pytest.mark.parametrize(
    ("original", "shape"),
    [("mxfp4", "1,32,32,1"), ("bf16", "1,16,16,1"), ("bf16", "5,48,16,5"), ("mxfp4", "2,32,96,2")],
)
def test_least_shapes(tmp_path: Path, original: str, shape: str) -> None:
    """A single block, a single expert, every expert for every token."""
    assert_fine(synthesize(tmp_path / "a", original, shape=shape))
    assert_fine(layertest(tmp_path / "a" / "nvfp4", "--original", tmp_path / "a" / "original"))


# ---- seeds ----


@both_originals
def test_same_seed_same_bytes(tmp_path: Path, original: str) -> None:
    """Byte for byte, whatever the number of threads."""
    for name, threads in (("a", "1"), ("b", "2"), ("c", "3")):
        assert_fine(synthesize(tmp_path / name, original, "--seed", "5", env={"OMP_NUM_THREADS": threads}))
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b") == contents(tmp_path / "c")


@both_originals
def test_other_seed_other_bytes(tmp_path: Path, made: Callable[[str], Path], original: str) -> None:
    """Another seed changes every weight and every input; the default is 0."""
    for seed in ("0", "1"):
        assert_fine(synthesize(tmp_path / seed, original, "--seed", seed))
    assert contents(tmp_path / "0") == contents(made(original))
    for which in ("original", "nvfp4"):
        first, second = (read_model(tmp_path / seed / which) for seed in ("0", "1"))
        same = [name for name in first if name.endswith(".weight") and first[name].data == second[name].data]
        assert not same
    first, second = (read_file(tmp_path / seed / "inputs.safetensors") for seed in ("0", "1"))
    assert all(first[name].data != second[name].data for name in first)


# ---- refusals ----


def test_usage_errors(tmp_path: Path) -> None:
    """What is missing or means nothing: usage, and nothing is written."""
    target = str(tmp_path / "a")
    shape, original = "--shape=1,32,32,1", "--original=mxfp4"
    for arguments, part in (
        ((shape, original), "DIR"),
        ((target, original), "--shape"),
        ((target, shape), "--original"),
        ((target, shape, "--original=nvfp4"), "--original"),
        ((target, shape, original, "--profile=flat"), "--profile"),
        ((target, shape, original, "--layers=0"), "--layers"),
        ((target, shape, original, "--layers=1001"), "--layers"),
        ((target, shape, original, "--tokens=0"), "--tokens"),
        ((target, shape, original, "--tokens=x"), "--tokens"),
        ((target, shape, original, "--seed=x"), "--seed"),
        ((target, shape, original, "--nosuch"), "--nosuch"),
        ((target, shape, original, "extra"), "extra"),
    ):
        assert_usage(run("synthesize", *arguments), part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616", "1.5"])
def test_seed_that_is_none(tmp_path: Path, seed: str) -> None:
    """A seed that does not fit 64 bits is refused, not replaced by the nearest one."""
    assert_usage(synthesize(tmp_path / "a", "mxfp4", f"--seed={seed}"), "--seed")


GARBAGE = [
    "",
    "x",
    "4,64,96",
    "4,64,96,2,1",
    "4,64,96,2,",
    ",4,64,96,2",
    "4;64;96;2",
    "4, 64,96,2",
    "4,64,96,2.0",
]
GARBAGE += [
    "4,64,96,2x",
    "4,6e1,96,2",
    "0x4,64,96,2",
    "99999999999999999999,64,96,2",
    "deepseek",
    "DEEPSEEK-V3",
]


@pytest.mark.parametrize("shape", GARBAGE)
def test_shape_that_is_none(tmp_path: Path, shape: str) -> None:
    """Not four numbers, nor a model's name: a usage error that lists the names; nothing is written."""
    assert_usage(synthesize(tmp_path / "a", shape=shape), "--shape", "mixtral-8x7b" if shape else "")
    assert not list(tmp_path.iterdir())


IMPOSSIBLE: list[tuple[str, str, str]] = [
    ("mxfp4", "4,48,96,2", "hidden"),
    ("mxfp4", "4,64,80,2", "intermediate"),
    ("bf16", "4,40,96,2", "hidden"),
    ("bf16", "4,64,90,2", "intermediate"),
    ("bf16", "4,65,96,2", "hidden"),
    ("bf16", "4,64,96,5", "top-k"),
    ("bf16", "1,64,96,2", "top-k"),
    ("bf16", "0,64,96,0", "experts"),
    ("bf16", "4,0,96,2", "hidden"),
    ("bf16", "4,64,0,2", "intermediate"),
    ("bf16", "4,64,96,0", "top-k"),
    ("bf16", "-4,64,96,2", "experts"),
    ("bf16", "4,-64,96,2", "hidden"),
    ("bf16", "4,64,-96,2", "intermediate"),
    ("bf16", "4,64,96,-2", "top-k"),
    ("bf16", "65537,64,96,2", "experts"),
    ("bf16", "4,9223372036854775792,96,2", "hidden"),
    ("bf16", "4,64,1048592,2", "intermediate"),
]


@pytest.mark.parametrize(("original", "shape", "what"), IMPOSSIBLE)
def test_impossible_shape(tmp_path: Path, original: str, shape: str, what: str) -> None:
    """Four numbers that make no checkpoint: which of them, what it must be, and nothing is written."""
    result = synthesize(tmp_path / "a", original, shape=shape)
    assert result.code in (ERROR, USAGE) and not result.stdout, str(result)
    for part in ("--shape", what, "expected", "found"):
        assert part in result.stderr, str(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", ["1", "256", "1000"])
def test_shape_beyond_the_disk(tmp_path: Path, layers: str) -> None:
    """The largest numbers that --shape takes: refused for lack of disk before anything is made. Their product
    overflows 64 bits: with 256 layers to exactly zero.
    """
    result = synthesize(tmp_path / "a", "mxfp4", "--layers", layers, shape="65536,1048576,1048576,1")
    assert_refused(result, tmp_path / "a", "disk", "expected", "found")
    assert not contents(tmp_path)


def test_existing_output_is_kept(tmp_path: Path) -> None:
    """Without --force nothing is replaced, even if only one of the three things is there."""
    for name in NAMES:
        target = tmp_path / name / "target"
        (target / name).mkdir(parents=True)
        (target / name / "precious").write_text("precious")
        result = synthesize(target)
        assert_refused(result, target, name, "--force")
        assert contents(target) == {f"{name}/precious": b"precious"}


@both_originals
def test_force_replaces(tmp_path: Path, made: Callable[[str], Path], original: str) -> None:
    """With --force the output is that of a fresh run: no file of the old one stays in it; strangers do."""
    target = tmp_path / "a"
    other = "bf16" if original == "mxfp4" else "mxfp4"
    assert_fine(synthesize(target, other, "--seed", "9"))
    (target / "nvfp4" / "old.safetensors").write_text("old")
    (target / "notes.txt").write_text("notes")
    assert_refused(synthesize(target, original), target, "--force")
    assert_fine(synthesize(target, original, "--force"))
    assert contents(target) == contents(made(original)) | {"notes.txt": b"notes"}


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    assert_fine(synthesize(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "notes.txt"])


# ---- failures ----


def assert_nothing_left(directory: Path) -> None:
    """No file, no partial directory; at most the empty target itself."""
    left = [path for path in directory.rglob("*") if path.name != "target"]
    assert not left, f"left behind: {left}"


def test_target_beneath_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    for target in (tmp_path / "file", tmp_path / "file" / "target"):
        assert_refused(synthesize(target), target)
    assert contents(tmp_path) == {"file": b"content"}


@pytest.mark.parametrize("exists", [True, False])
def test_target_that_forbids_writing(tmp_path: Path, exists: bool) -> None:
    """The target, or the folder in which it would be made, is not writable."""
    target = tmp_path / "target"
    forbidding = target if exists else tmp_path
    forbidding.mkdir(exist_ok=True)
    forbidding.chmod(0o555)
    try:
        result = synthesize(target, in_child=obey_permissions())
    finally:
        forbidding.chmod(0o755)
    assert_refused(result, target, "Permission denied")
    assert_nothing_left(tmp_path)


FILE_LIMITS = [0, 100, 4_000, 30_000]
"""Within the first header, within the first shard, within the second or the NVFP4 checkpoint."""


@both_originals
@pytest.mark.parametrize("size", FILE_LIMITS)
def test_no_room(tmp_path: Path, original: str, size: int) -> None:
    """Files may not grow (`ulimit -f`): an error that names a file, and nothing left behind."""
    result = synthesize(tmp_path / "target", original, in_child=limit_file_size(size, signal.SIG_IGN))
    assert_refused(result, tmp_path / "target", "File too large")
    assert_nothing_left(tmp_path)


def test_no_room_by_signal(tmp_path: Path) -> None:
    """The same where the limit's signal was not ignored by the parent, as in a shell."""
    result = synthesize(tmp_path / "target", in_child=limit_file_size(4_000, signal.SIG_DFL))
    assert_refused(result, tmp_path / "target", "File too large")
    assert_nothing_left(tmp_path)


def test_failed_force_keeps_the_old_output(tmp_path: Path) -> None:
    """Until the new output is whole, the old one stays."""
    target = tmp_path / "target"
    assert_fine(synthesize(target))
    before = contents(target)
    result = synthesize(target, "bf16", "--force", in_child=limit_file_size(4_000, signal.SIG_IGN))
    assert_refused(result, target)
    assert contents(target) == before
    assert sorted(os.listdir(target)) == list(NAMES)


@pytest.mark.skipif(SANITIZED, reason="sanitizers allow no limit of address space")
def test_no_memory(tmp_path: Path) -> None:
    """Inputs larger than memory: an error that says so, and nothing left behind."""
    largest = ("--shape", "1,1048576,16,1", "--tokens", str(1 << 20), "--original", "bf16")
    assert_refused(run("synthesize", tmp_path / "target", *largest), "memory")
    assert_nothing_left(tmp_path)
