"""`fourfold calibrate` against amax over the oracle's own run of the same files, for every family that
synthesize writes and for checkpoints that other tools wrote.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoint_oracle import CheckpointLayer, Stored, read_checkpoint, read_file, read_layer
from layertest_figures import fourfold, run_command
from nvfp4_oracle import Array
from tensor_file import Tensors, write_tensors

FAMILIES = ("deepseek-v4", "deepseek-v3", "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss")
THIRD_PARTY = Path(__file__).resolve().parents[1] / "data" / "third_party"
RANGE = np.float32(2688)
LAYERS, TOKENS = 2, 40
# A bf16 backend may sum in another order, and libms differ in an exponential: one bf16 ulp of h can move the
# product of silu(gate) and up by three.
INTERMEDIATE = 4 * 2.0**-8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / request.param
    command = [fourfold(), "synthesize", folder, "--family", request.param, "--shape", "8,128,64,2"]
    run_command([*command, "--layers", LAYERS, "--tokens", "8"])
    return folder


def layer_inputs(hidden: int, seed: int, layers: range, tokens: int = TOKENS) -> Tensors:
    """Of all layers, which differ in size, and token ids for those that are hash-routed."""
    rng = np.random.default_rng(seed)
    tensors = {"token_ids": rng.integers(0, 100, tokens)}
    for layer in layers:
        x = rng.standard_normal((tokens, hidden)) * (layer + 1)
        tensors[f"layers.{layer}.x"] = x.astype(ml_dtypes.bfloat16)
    return tensors


def expert_amax(layer: CheckpointLayer, files: list[Tensors], number: int) -> tuple[Array, Array, Array]:
    """Of x and of the intermediate (E,), the layer's largest where no token went; and the shared expert's (2,)."""
    x_amax = np.zeros(len(layer.experts), np.float32)
    inner_amax, shared = np.zeros_like(x_amax), np.zeros(2, np.float32)
    for file in files:
        x = file[f"layers.{number}.x"]
        run = layer.layer("bf16", ("dynamic-token",) * 2).run(x, *layer.route(x, file["token_ids"]))
        offsets = run.permutation.group_offsets
        for expert, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            for amax, rows in ((x_amax, run.rows), (inner_amax, run.a)):
                values = np.abs(rows[begin:end].astype(np.float32))
                amax[expert] = max(amax[expert], values.max(initial=0))
        if run.shared is not None:
            seen = [np.abs(rows.astype(np.float32)).max() for rows in (x, run.shared.a)]
            shared = np.maximum(shared, seen)
    x_amax[x_amax == 0], inner_amax[inner_amax == 0] = x_amax.max(), inner_amax.max()
    return x_amax, inner_amax, shared


def calibrate(model: Path, tmp_path: Path, files: list[Tensors], *options: object) -> None:
    for number, file in enumerate(files):
        write_tensors(tmp_path / f"{number}.safetensors", file)
    inputs = [tmp_path / f"{number}.safetensors" for number in range(len(files))]
    targets = (tmp_path / "copy", "--output", tmp_path / "scales.safetensors")
    run_command([fourfold(), "calibrate", model, *targets, "--input", *inputs, *options])


def assert_carried(model: Path, copy: Path) -> None:
    """Everything but input scales is byte for byte what it was, and nothing is gone."""
    before, after = read_checkpoint(model), read_file(copy / "model.safetensors")

    def others(tensors: dict[str, Stored]) -> dict[str, tuple]:
        kept = {
            name: t for name, t in tensors.items() if not name.endswith(("input_scale", "input_global_scale"))
        }
        return {name: (t.dtype, t.array.shape, t.array.tobytes()) for name, t in kept.items()}

    assert others(before) == others(after)
    assert set(before) <= set(after)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json" and file.is_file():
            assert (copy / file.name).read_bytes() == file.read_bytes()


def check_scales(found: list[np.float32 | None], amax: Array, tolerance: float) -> None:
    np.testing.assert_allclose(np.array(found, np.float32), amax / RANGE, rtol=tolerance)


@pytest.mark.parametrize("backend", [(), ("--backend", "reference")], ids=["default", "reference"])
def test_families(family: Path, tmp_path: Path, backend: tuple[str, ...]) -> None:
    model = family / "nvfp4"
    is_fused = family.name == "gpt-oss"
    files = [layer_inputs(128, seed, range(LAYERS)) for seed in (1, 2)]
    calibrate(model, tmp_path, files, *backend)
    assert_carried(model, tmp_path / "copy")
    scales = read_file(tmp_path / "scales.safetensors")
    for number in range(LAYERS):
        x_amax, inner_amax, shared = expert_amax(read_layer(model, number), files, number)
        done = read_layer(tmp_path / "copy", number)
        if is_fused:  # one scale for all experts
            in_copy_x, in_copy_inner = (
                np.full_like(x_amax, x_amax.max()),
                np.full_like(x_amax, inner_amax.max()),
            )
        else:
            in_copy_x, in_copy_inner = x_amax, inner_amax
        check_scales([expert.gate.input_scale for expert in done.experts], in_copy_x, 1e-7)
        check_scales([expert.up.input_scale for expert in done.experts], in_copy_x, 1e-7)
        check_scales([expert.down.input_scale for expert in done.experts], in_copy_inner, INTERMEDIATE)
        if done.shared is not None and done.shared.expert.is_nvfp4():
            own = done.shared.expert
            check_scales([own.gate.input_scale, own.up.input_scale], shared[:1].repeat(2), 1e-7)
            check_scales([own.down.input_scale], shared[1:], INTERMEDIATE)
        if is_fused:
            before = f"model.layers.{number}.mlp.experts."
            check_scales([scales[before + "gate_up_proj_input_scale"].array], x_amax.max(keepdims=True), 1e-7)
            check_scales(
                [scales[before + "down_proj_input_scale"].array], inner_amax.max(keepdims=True), INTERMEDIATE
            )
        for expert, (x, inner) in enumerate(zip(x_amax, inner_amax, strict=True) if not is_fused else ()):
            named = [n for n in scales if f"layers.{number}." in n and f".experts.{expert}." in n]
            assert len(named) == 3
            for name in named:
                is_down = name.endswith(("down_proj.input_scale", "w2.input_scale"))
                assert scales[name].array.shape == ()
                tolerance = INTERMEDIATE if is_down else 1e-7
                check_scales([scales[name].array], np.float32(inner if is_down else x), tolerance)
        command = [fourfold(), "layertest", "--nvfp4", tmp_path / "copy", "--layer", number]
        run_command(
            [*command, "--activation-scale", "static", "--input", tmp_path / "0.safetensors", *backend]
        )


def test_originals_give_scales_for_a_conversion(family: Path, tmp_path: Path) -> None:
    """bf16, FP8 and MXFP4 have no input scales to replace; convert takes the file, and all that is in it."""
    model = family / "original"
    files = [layer_inputs(128, 3, range(LAYERS))]
    write_tensors(tmp_path / "0.safetensors", files[0])
    scales, converted = tmp_path / "scales.safetensors", tmp_path / "converted"
    run_command([fourfold(), "calibrate", model, "--output", scales, "--input", tmp_path / "0.safetensors"])
    run_command([fourfold(), "convert", model, converted, "--to", "nvfp4", "--input-scale", scales])
    for number in range(LAYERS):
        x_amax, inner_amax, _ = expert_amax(read_layer(model, number), files, number)
        if family.name == "gpt-oss":
            x_amax, inner_amax = (np.full_like(amax, amax.max()) for amax in (x_amax, inner_amax))
        done = read_layer(converted, number)
        check_scales([expert.up.input_scale for expert in done.experts], x_amax, 1e-7)
        check_scales([expert.down.input_scale for expert in done.experts], inner_amax, INTERMEDIATE)


@pytest.mark.parametrize(
    "name", sorted(p.name for p in THIRD_PARTY.iterdir() if p.is_dir() and "nvfp4" in p.name)
)
def test_other_tools_checkpoints(name: str, tmp_path: Path) -> None:
    """Multipliers of ModelOpt, divisors of compressed-tensors, under the names that their files have."""
    model = THIRD_PARTY / name
    layer = read_layer(model)
    hidden = layer.experts[0].gate.values.shape[1]
    files = [layer_inputs(hidden, 4, range(1))]
    calibrate(model, tmp_path, files)
    assert_carried(model, tmp_path / "copy")
    x_amax, inner_amax, _ = expert_amax(layer, files, 0)
    after = read_file(tmp_path / "copy" / "model.safetensors")
    assert set(after) == set(read_checkpoint(model))
    divides = name.startswith("compressed-tensors")
    suffix = ".input_global_scale" if divides else ".input_scale"
    stored = {n: t.array.reshape(()) for n, t in after.items() if n.endswith(suffix) and ".experts." in n}
    for linear, amax, tolerance in (
        ("gate_proj", x_amax, 0),
        ("w1", x_amax, 0),
        ("down_proj", inner_amax, 1),
    ):
        for full, value in stored.items():
            expert = int(full.split(".experts.")[1].split(".")[0])
            if not full.endswith(f".{linear}{suffix}"):
                continue
            expected = RANGE / amax[expert] if divides else amax[expert] / RANGE
            np.testing.assert_allclose(value, expected, rtol=tolerance * INTERMEDIATE)
    assert len(stored) == 3 * len(layer.experts)
