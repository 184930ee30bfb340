"""`fourfold calibrate`: what it takes, what it says of experts without tokens, and that outputs are whole.
tests/oracle/test_calibrate_figures.py holds its figures against numpy.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import Tensor, Tensors
from command import FINE, Result, assert_refused, assert_usage, run
from models import Model

EXPERTS, HIDDEN = 8, 128
NAMES = "model.layers.{}.mlp.experts.{}."


def bf16(values: np.ndarray) -> Tensor:
    """By cutting bits off: the values here are exact."""
    return Tensor(
        "BF16", values.shape, (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    )


def inputs(experts: list[int], values: list[float], before: str = "") -> Tensors:
    """One token an entry, x = value everywhere, to one expert each."""
    x = np.repeat(np.array(values, np.float32)[:, None], HIDDEN, axis=1)
    ids, weights = np.array(experts, np.int32)[:, None], np.ones((len(experts), 1), np.float32)
    return {
        f"{before}x": bf16(x),
        f"{before}topk_ids": Tensor("I32", ids.shape, ids.tobytes()),
        f"{before}topk_weights": Tensor("F32", weights.shape, weights.tobytes()),
    }


def scales_of(file: Path) -> dict[str, float]:
    header, data = ck.read_header(file)
    return {
        name: float(np.frombuffer(data[slice(*entry["data_offsets"])], np.float32)[0])
        for name, entry in header.items()
        if name.endswith("input_scale")
    }


def calibrate(model: Path, folder: Path, files: list[Tensors], *options: object) -> tuple[Result, Path]:
    paths = [ck.write_inputs(folder / f"{i}.safetensors", file) for i, file in enumerate(files)]
    output = folder / "scales.safetensors"
    return run("calibrate", model, "--output", output, "--input", *paths, *map(str, options)), output


@pytest.fixture
def model(models: Path) -> Path:
    return models / "qwen3-moe/nvfp4"


def test_by_hand(tmp_path: Path, model: Path) -> None:
    """Files add up, each expert has its own largest x, and nothing of what goes elsewhere."""
    files = [inputs([0, 1, 2, 3], [1.0, -2.0, 4.0, 0.5]), inputs([4, 5, 6, 7, 0], [8.0, 1.0, 1.0, 1.0, -3.0])]
    result, output = calibrate(model, tmp_path, files, "--layer", 1, "--unreached", "error")
    assert result.code == FINE and not result.stderr, str(result)
    scales = scales_of(output)
    assert len(scales) == 3 * EXPERTS
    for expert, amax in enumerate([3.0, 2.0, 4.0, 0.5, 8.0, 1.0, 1.0, 1.0]):
        for half in ("gate_proj", "up_proj"):
            assert scales[NAMES.format(1, expert) + half + ".input_scale"] == np.float32(amax) / np.float32(
                2688
            )
        assert scales[NAMES.format(1, expert) + "down_proj.input_scale"] > 0


def test_pieces_are_the_whole(tmp_path: Path, model: Path) -> None:
    """A token more or less a file, and the order of files, change nothing: amax is a maximum."""
    experts, values = [i % EXPERTS for i in range(24)], [1.0 + i % 7 for i in range(24)]
    whole = calibrate(model, tmp_path, [inputs(experts, values)], "--layer", 0)[1].read_bytes()
    parts = [inputs(experts[at : at + 5], values[at : at + 5]) for at in (20, 10, 15, 5, 0)]
    assert calibrate(model, tmp_path, parts, "--layer", 0)[1].read_bytes() == whole


def test_unreached_experts(tmp_path: Path, model: Path) -> None:
    """Named, with counts; they get the layer's largest, nothing, or end the run."""
    files = [inputs([0, 1, 4], [1.0, 2.0, 4.0])]
    result, output = calibrate(model, tmp_path, files, "--layer", 1)
    assert result.code == FINE and "5 experts got no token: they have the largest scale" in result.stdout, (
        str(result)
    )
    assert "layer 1, 5 of 8: 2-3, 5-7 of model.layers.1.mlp.experts.E" in result.stdout, str(result)
    scales = scales_of(output)
    for half in ("gate_proj", "up_proj", "down_proj"):
        own = [scales[NAMES.format(1, expert) + half + ".input_scale"] for expert in (0, 1, 4)]
        for expert in (2, 3, 5, 6, 7):
            assert scales[NAMES.format(1, expert) + half + ".input_scale"] == max(own)

    result, output = calibrate(model, tmp_path, files, "--layer", 1, "--unreached", "skip")
    assert result.code == FINE and "they have no scale" in result.stdout, str(result)
    assert {name.split(".")[5] for name in scales_of(output)} == {"0", "1", "4"}

    output.unlink()
    result, output = calibrate(model, tmp_path, files, "--layer", 1, "--unreached", "error")
    assert_refused(result, "tokens for all 8 experts", "layer 1: 2-3, 5-7", "--unreached max")
    assert not output.exists()


def test_zeros_are_no_calibration(tmp_path: Path, model: Path) -> None:
    """A scale of 0 would become infinity in engines."""
    result, output = calibrate(model, tmp_path, [inputs(list(range(8)), [1.0] * 7 + [0.0])], "--layer", 0)
    assert result.code == FINE and "1 expert got zeros alone" in result.stdout, str(result)
    assert min(scales_of(output).values()) > 0
    result, _ = calibrate(model, tmp_path, [inputs([0, 1], [0.0, 0.0])], "--layer", 0)
    assert_refused(result, "activations that are not all zero")


def test_a_copy_without_the_scales_of_the_source(tmp_path: Path, model: Path) -> None:
    """Absent scales are added; with skip, what was there stays."""
    bare = Model.read(model)
    kept = NAMES.format(0, 7) + "up_proj.input_scale"
    for name in [n for n in bare.tensors if n.endswith(".input_scale") and n != kept]:
        del bare.tensors[name]
    bare.set_float(kept, 0.125)
    source = bare.write(tmp_path / "bare")
    (source / "tokenizer.json").write_text("{}")
    file = ck.write_inputs(
        tmp_path / "all.safetensors",
        inputs(list(range(7)), [1.0] * 7, "layers.0.") | inputs(list(range(8)), [2.0] * 8, "layers.1."),
    )
    result = run("calibrate", source, tmp_path / "copy", "--input", file, "--unreached", "skip")
    assert result.code == FINE, str(result)
    after = Model.read(tmp_path / "copy")
    assert after.get_float(kept) == 0.125
    assert set(after.tensors) - set(bare.tensors) == {
        NAMES.format(layer, expert) + half + ".input_scale"
        for layer in (0, 1)
        for expert in range(7 + layer)
        for half in ("gate_proj", "up_proj", "down_proj")
    }
    assert (tmp_path / "copy/tokenizer.json").read_text() == "{}"
    assert_refused(run("calibrate", source, tmp_path / "copy", "--input", file), "a name that is free")


def test_layers_of_inputs(tmp_path: Path, model: Path) -> None:
    x = inputs(list(range(8)), [1.0] * 8)
    assert_refused(calibrate(model, tmp_path, [x])[0], "'layers.L.x' for 2 layers", "found 'x'")
    named = inputs(list(range(8)), [1.0] * 8, "layers.1.")
    result, output = calibrate(model, tmp_path, [named])
    assert result.code == FINE and "not asked for: 0" in result.stdout, str(result)
    assert all(".layers.1." in name for name in scales_of(output))
    result, _ = calibrate(model, tmp_path, [named | inputs([0], [1.0], "layers.7.")])
    assert result.code == FINE and "layers 7 were passed over" in result.stdout, str(result)
    assert_refused(
        calibrate(model, tmp_path, [named], "--layers", "0-1")[0], "'layers.0.x' in one of the files"
    )
    assert_refused(calibrate(model, tmp_path, [named], "--layers", "7")[0], "layer 7")
    assert_refused(
        calibrate(model, tmp_path, [inputs([0], [1.0], "layers.7.")])[0], "layer with experts (0-1)"
    )
    assert_refused(calibrate(model, tmp_path, [x | named])[0], "found both")


def test_layertest_reads_the_same_files(tmp_path: Path, model: Path) -> None:
    """Its --layer picks the inputs of a file that has several layers'."""
    file = ck.write_inputs(tmp_path / "all.safetensors", inputs(list(range(8)), [1.0] * 8, "layers.1."))
    result = run(
        "layertest", "--nvfp4", model, "--layer", "1", "--input", file, "--activation-scale", "dynamic-token"
    )
    assert result.code == FINE and f"8 tokens, x: {file}" in result.stdout, str(result)
    assert_refused(run("layertest", "--nvfp4", model, "--input", file), "layers.0.x")


def test_bad_inputs(tmp_path: Path, models: Path, model: Path) -> None:
    def copy(source: Path, target: Path) -> Result:
        return run("calibrate", source, target, "--input", tmp_path / "0.safetensors", "--layer", "0")

    nan = inputs([0], [float("nan")])
    assert_refused(calibrate(model, tmp_path, [nan], "--layer", 0)[0], "expected finite numbers, found nan")
    narrow = {"x": ck.zeros("BF16", 2, 64)}
    assert_refused(calibrate(model, tmp_path, [narrow], "--layer", 0)[0], "[T, 128]")
    assert_refused(calibrate(model, tmp_path, [{"y": narrow["x"]}], "--layer", 0)[0], "'x'")
    assert_refused(
        calibrate(model, tmp_path, [inputs([9], [1.0])], "--layer", 0)[0], "expert numbers below 8"
    )
    result = copy(models / "mixtral/original", tmp_path / "c")
    assert_refused(result, "expert numbers below 8")
    ck.write_inputs(tmp_path / "0.safetensors", inputs(list(range(8)), [1.0] * 8))
    result = copy(models / "mixtral/original", tmp_path / "c")
    assert_refused(result, "NVFP4 experts", "--output")
    assert not (tmp_path / "c").exists()
    assert_refused(copy(model, model / "in"), "outside of DIR")
    assert not (model / "in").exists()


def test_without_router_or_ids(tmp_path: Path, model: Path) -> None:
    """A random routing would calibrate experts on tokens that they never see."""
    headless = Model.read(model)
    headless.remove("model.layers.0.mlp.gate.")
    x = {"x": inputs([0], [1.0])["x"]}
    result, output = calibrate(headless.write(tmp_path / "m"), tmp_path, [x], "--layer", 0)
    assert_refused(result, "topk_ids and topk_weights beside x, or a router")
    assert not output.exists()


def test_usage(tmp_path: Path, model: Path) -> None:
    file = ck.write_inputs(tmp_path / "x.safetensors", inputs([0], [1.0]))
    assert_usage(run("calibrate", model, "--input", file), "--output FILE or DST")
    assert_usage(run("calibrate", model, "--output", "s"), "--input")
    assert_usage(run("calibrate", model, "--output", "s", "--input", file, "--unreached", "zero"), "max")
    assert_usage(run("calibrate", model, "--output", "s", "--input", file, "--layers", "1-"), "--layers")
    assert_refused(
        run("calibrate", model, "--output", tmp_path / "no/s", "--input", file, "--layer", "0"), "no/s"
    )
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors"]
