"""`fourfold convert`: what becomes of which tensor, round trips, configs, refusals, and targets that are whole or
not there.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from command import (
    FINE,
    SANITIZED,
    assert_refused,
    assert_usage,
    command_path,
    layertest,
    limit_file_size,
    obey_permissions,
    run,
)
from models import FAMILIES, QWEN, Model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FUSED_FAMILY = "gpt-oss"
SCHEMES_OF = {
    "nvfp4": ("modelopt", "compressed-tensors"),
    "mxfp4": ("modelopt", "compressed-tensors"),
    "bf16": ("",),
}


def convert(source: Path, target: Path, to: str, *options: str | Path) -> Model:
    """Converts, and requires that inspect finds nothing wrong with the result."""
    result = run("convert", source, target, "--to", to, *options)
    assert result.code == FINE and not result.stderr, str(result)
    assert not target.with_name(target.name + ".partial").exists()
    inspected = run("inspect", target)
    assert inspected.code == FINE, f"{result}\n{inspected}"
    return Model.read(target)


def is_expert(name: str) -> bool:
    return ".experts." in name or ".shared_expert" in name and "_gate." not in name


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def float_of(model: Model, name: str) -> np.float32:
    return np.frombuffer(model.tensors[name].data, np.float32)[0]


# ---- every layout ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", ["original", "nvfp4"])
@pytest.mark.parametrize("to", ["nvfp4", "mxfp4", "bf16"])
def test_every_family(models: Path, tmp_path: Path, family: str, half: str, to: str) -> None:
    """It converts and is clean, or is refused with the reason; what is no expert stays byte for byte."""
    source = models / family / half
    before = Model.read(source)
    for scheme in SCHEMES_OF[to]:
        options = ["--scheme", scheme] if scheme else []
        target = tmp_path / f"out-{scheme}"
        result = run("convert", source, target, "--to", to, *options)
        if result.code != FINE:
            has_fp8 = family == "deepseek-v4" and scheme == "compressed-tensors"
            has_no_layout = family == FUSED_FAMILY and scheme == "compressed-tensors"
            reason = (
                "FP8"
                if has_fp8
                else "no layout"
                if has_no_layout
                else f"expected experts to convert, found that they are {to}"
            )
            assert_refused(result, reason)
            assert not os.listdir(tmp_path)
            continue
        assert run("inspect", target).code == FINE
        after = Model.read(target)
        for name, tensor in before.tensors.items():
            if not is_expert(name) or name.endswith("_bias"):
                assert after.tensors[name] == tensor, name
        if to == "nvfp4":
            result = layertest(target, "--activation-scale", "dynamic-token")
            assert result.code == FINE and "\nnote" not in result.stdout, str(result)
        for file in target.iterdir():
            file.unlink()
        target.rmdir()


@pytest.mark.parametrize("family", ["deepseek-v4", "gpt-oss"])
def test_cast_is_what_synthesize_makes(models: Path, tmp_path: Path, family: str) -> None:
    """Codes and scales of the model that was cast in memory; its input scales, taken from a file, too."""
    expected = Model.read(models / family / "nvfp4").tensors
    found = convert(models / family / "original", tmp_path / "out", "nvfp4").tensors
    for name, tensor in found.items():
        assert tensor == expected[name], name
    missing = {name: tensor for name, tensor in expected.items() if name not in found}
    assert missing and all(name.endswith("input_scale") for name in missing)
    (tmp_path / "scales.safetensors").write_bytes(ck.valid_bytes(missing))
    found = convert(
        models / family / "original",
        tmp_path / "all",
        "nvfp4",
        "--input-scale",
        tmp_path / "scales.safetensors",
    ).tensors
    assert found == expected


# ---- round trips ----


@pytest.mark.parametrize("family", ["deepseek-v4", "gpt-oss"])
def test_mxfp4_by_nvfp4_to_bf16(models: Path, tmp_path: Path, family: str) -> None:
    """The cast is exact: the way by NVFP4 ends in the same bytes."""
    original = models / family / "original"
    directly = convert(original, tmp_path / "directly", "bf16")
    convert(original, tmp_path / "nvfp4", "nvfp4")
    assert convert(tmp_path / "nvfp4", tmp_path / "by-nvfp4", "bf16").tensors == directly.tensors


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe", "mixtral", "deepseek-v3"])
def test_modelopt_by_compressed_tensors_to_modelopt(models: Path, tmp_path: Path, family: str) -> None:
    source = models / family / "nvfp4"
    before = Model.read(source)
    other = convert(source, tmp_path / "other", "nvfp4", "--scheme", "compressed-tensors")
    after = convert(tmp_path / "other", tmp_path / "back", "nvfp4", "--scheme", "modelopt")
    assert after.tensors.keys() == before.tensors.keys()
    inexact = 0
    for name, tensor in before.tensors.items():
        if name.endswith((".weight_scale_2", ".input_scale")):
            found, expected = float_of(after, name), float_of(before, name)
            assert abs(found - expected) <= np.spacing(expected), name
            inexact += found != expected
            divisor = name.replace("weight_scale_2", "weight_global_scale").replace(
                "input_scale", "input_global_scale"
            )
            assert float_of(other, divisor) == np.float32(1) / expected
            assert other.tensors[divisor].shape == (1,)
        else:
            assert after.tensors[name] == tensor, name
            if is_expert(name) and name.endswith(".weight"):
                assert other.tensors[name + "_packed"].data == tensor.data
    assert inexact > 0


def test_converted_twice(models: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        convert(models / "qwen3-moe/original", tmp_path / name, "nvfp4", "--scale", "mse")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_source_stays(models: Path, tmp_path: Path) -> None:
    source = models / "deepseek-v4/original"
    before = files_of(source)
    convert(source, tmp_path / "out", "nvfp4")
    assert files_of(source) == before


def test_fused_bf16_becomes_single_experts(tmp_path: Path) -> None:
    """As the same weights stored one by one."""
    fused = ck.write_model(tmp_path / "fused", ck.FUSED)
    single = ck.write_model(tmp_path / "single", ck.BF16)
    options = ["--tie-gate-up"]
    found = run("convert", fused, tmp_path / "a", "--to", "nvfp4", *options)
    assert found.code == FINE, str(found)
    assert run("convert", single, tmp_path / "b", "--to", "nvfp4", *options).code == FINE
    assert Model.read(tmp_path / "a").tensors == Model.read(tmp_path / "b").tensors


# ---- options ----


def test_layers(models: Path, tmp_path: Path) -> None:
    """Others are carried as they are, and the configs leave them out."""
    source = models / "qwen3-moe/original"
    before = Model.read(source)
    for scheme in ("modelopt", "compressed-tensors"):
        found = convert(source, tmp_path / scheme, "nvfp4", "--layers", "1", "--scheme", scheme)
        for name, tensor in before.tensors.items():
            if name.startswith("model.layers.0."):
                assert found.tensors[name] == tensor, name
        assert any(name.startswith(f"{QWEN}experts.0.gate_proj.weight_scale") for name in found.tensors)
        ignored = found.config["quantization_config"]["ignore"]
        expected = (
            "model.layers.0.mlp.experts*" if scheme == "modelopt" else "model.layers.0.mlp.experts.3.up_proj"
        )
        assert expected in ignored and "model.layers.1.mlp.gate" in ignored and "lm_head" in ignored
        assert not any("layers.1.mlp.experts" in name for name in ignored)


def test_tie_gate_up(models: Path, tmp_path: Path) -> None:
    for source in (models / "qwen3-moe/original", models / "deepseek-v4/original"):
        names = ("gate_proj", "up_proj") if "qwen" in str(source) else ("w1", "w3")
        for tied in (False, True):
            target = tmp_path / f"{source.parent.name}-{tied}"
            model = convert(source, target, "nvfp4", *["--tie-gate-up"] * tied)
            experts = {
                name.rsplit(".", 2)[0]
                for name in model.tensors
                if name.endswith(f"{names[0]}.weight_scale_2")
            }
            pairs = [
                [float_of(model, f"{expert}.{half}.weight_scale_2") for half in names] for expert in experts
            ]
            assert all((a == b) == tied for a, b in pairs)


def test_input_scales(models: Path, tmp_path: Path) -> None:
    source = models / "qwen3-moe/nvfp4"
    dynamic = convert(source, tmp_path / "dynamic", "nvfp4", "--input-scale", "dynamic")
    assert not any("input" in name and "scale" in name for name in dynamic.tensors)
    assert dynamic.config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    names = [name for name in Model.read(source).tensors if name.endswith(".input_scale")]
    scales = {name: ck.Tensor.of(np.array(index + 1, np.float32) / 1024) for index, name in enumerate(names)}
    file = tmp_path / "scales.safetensors"
    file.write_bytes(ck.valid_bytes(scales))
    filled = convert(tmp_path / "dynamic", tmp_path / "filled", "nvfp4", "--input-scale", file)
    assert all(float_of(filled, name) == np.float32(i + 1) / 1024 for i, name in enumerate(names))

    file.write_bytes(ck.valid_bytes(scales | {"model.norm.input_scale": scales[names[0]]}))
    assert_refused(
        run("convert", source, tmp_path / "no", "--to", "nvfp4", "--input-scale", file),
        "model.norm.input_scale",
    )
    file.write_bytes(ck.valid_bytes(scales | {names[3]: ck.zeros("F32")}))
    assert_refused(
        run("convert", source, tmp_path / "no", "--to", "nvfp4", "--input-scale", file), names[3], "positive"
    )
    del scales[names[5]]
    file.write_bytes(ck.valid_bytes(scales))
    assert_refused(run("convert", source, tmp_path / "no", "--to", "nvfp4", "--input-scale", file), names[5])
    assert not (tmp_path / "no").exists()


def test_configs(models: Path, tmp_path: Path) -> None:
    """Everything but the quantization is kept, in its order."""
    before = Model.read(models / "qwen3-moe/original").config
    made = convert(models / "qwen3-moe/original", tmp_path / "modelopt", "nvfp4")
    kept = {key: value for key, value in made.config.items() if key != "quantization_config"}
    assert list(kept.items()) == list(before.items())
    assert (
        made.quantization["quantization"]["exclude_modules"] == made.config["quantization_config"]["ignore"]
    )
    other = convert(tmp_path / "modelopt", tmp_path / "other", "nvfp4", "--scheme", "compressed-tensors")
    assert other.quantization is None
    assert other.config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    plain = convert(tmp_path / "other", tmp_path / "plain", "bf16")
    assert plain.config == before and plain.quantization is None
    blocks = convert(models / "gpt-oss/nvfp4", tmp_path / "blocks", "mxfp4")
    assert blocks.config["quantization_config"]["quant_method"] == "mxfp4"
    mixed = convert(models / "deepseek-v4/original", tmp_path / "mixed", "nvfp4").config[
        "quantization_config"
    ]
    assert (mixed["quant_method"], mixed["moe_quant_algo"], mixed["group_size"]) == ("fp8", "NVFP4", 16)


def test_other_files(tmp_path: Path) -> None:
    source = ck.write_model(tmp_path / "source", ck.BF16)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("old weights")
    (source / "original").mkdir()
    (tmp_path / "secret").write_text("secret")
    result = run("convert", source, tmp_path / "out", "--to", "nvfp4")
    assert (
        "note: pytorch_model.bin: not copied" in result.stdout
        and "note: original: not copied" in result.stdout
    )
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    assert_refused(run("convert", source, tmp_path / "no", "--to", "nvfp4"), "merges.txt", "symbolic link")
    assert not (tmp_path / "no").exists()


def test_other_linears_of_four_bits_follow(models: Path, tmp_path: Path) -> None:
    """A loader reads one format: attention in NVFP4 goes with the experts, but where layers are chosen."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    prefix = "model.layers.0.self_attn.q_proj"
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        model.tensors[f"{prefix}.{suffix}"] = model.tensors[f"{QWEN}experts.0.up_proj.{suffix}"]
    source = model.write(tmp_path / "source")
    found = convert(source, tmp_path / "out", "nvfp4", "--scheme", "compressed-tensors").tensors
    own = {name for name in found if name.startswith(prefix)}
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    assert own == {f"{prefix}.{suffix}" for suffix in suffixes}
    assert found[f"{prefix}.weight_packed"] == model.tensors[f"{prefix}.weight"]
    plain = convert(source, tmp_path / "plain", "bf16")
    assert {name for name in plain.tensors if name.startswith(prefix)} == {f"{prefix}.weight"}
    assert plain.tensors[f"{prefix}.weight"] == plain.tensors[f"{QWEN}experts.0.up_proj.weight"]
    assert "quantization_config" not in plain.config
    part = convert(source, tmp_path / "part", "bf16", "--layers", "1")
    assert part.tensors[f"{prefix}.weight"] == model.tensors[f"{prefix}.weight"]


# ---- models that are of several formats ----


def test_scheme_is_that_of_the_model(models: Path, tmp_path: Path) -> None:
    """Also where its first layer is plain."""
    plain = models / "qwen3-moe/original"
    source = convert(plain, tmp_path / "source", "nvfp4", "--layers", "1", "--scheme", "compressed-tensors")
    assert f"{QWEN}experts.0.up_proj.weight_packed" in source.tensors
    found = convert(tmp_path / "source", tmp_path / "out", "nvfp4").tensors
    assert found[f"{QWEN}experts.0.up_proj.weight_packed"] == source.tensors[f"{QWEN}experts.0.up_proj.weight_packed"]
    assert "model.layers.0.mlp.experts.0.up_proj.weight_packed" in found


def test_experts_left_beside_bf16_are_not_listed_as_plain(models: Path, tmp_path: Path) -> None:
    found = convert(models / "deepseek-v4/original", tmp_path / "out", "bf16", "--layers", "0")
    assert found.tensors["layers.1.ffn.experts.0.w1.weight"].dtype == "I8"
    listed = found.config["quantization_config"]["modules_to_not_convert"]
    assert "layers.0.ffn.experts.0.w1" in listed and not any("layers.1.ffn.experts" in name for name in listed)


def test_fp8_of_modelopt_keeps_its_entry(models: Path, tmp_path: Path) -> None:
    model = Model.read(models / "qwen3-moe/nvfp4")
    attention = "model.layers.0.self_attn.q_proj"
    model.tensors[f"{attention}.weight"] = ck.zeros("F8_E4M3", 16, 16)
    for suffix in ("weight_scale", "input_scale"):
        model.tensors[f"{attention}.{suffix}"] = ck.Tensor.of(np.array(1.0, np.float32))
    entry = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"]}
    for changed in (entry, {"quant_method": "modelopt"}, {"quant_method": 7}):
        model.config["quantization_config"] = changed
        folder = tmp_path / str(len(str(changed)))
        found = run("convert", model.write(folder / "source"), folder / "out", "--to", "bf16")
        assert found.code == FINE, str(found)
        kept = Model.read(folder / "out").config["quantization_config"]
        assert kept["quant_method"] == changed["quant_method"] and kept.get("quant_algo") == changed.get("quant_algo")


ATTENTION = "model.layers.0.self_attn.q_proj"


def with_fp8_attention(model: Model, *suffixes: str, scale: ck.Tensor | None = None) -> Model:
    model.tensors[f"{ATTENTION}.weight"] = ck.zeros("F8_E4M3", 16, 16)
    for suffix in suffixes:
        model.tensors[f"{ATTENTION}.{suffix}"] = scale or ck.Tensor.of(np.array(1.0, np.float32))
    return model


def test_fp8_of_modelopt_beside_nvfp4_is_mixed_precision(models: Path, tmp_path: Path) -> None:
    """Every layer with its algorithm, in both configs; and back."""
    source = with_fp8_attention(Model.read(models / "qwen3-moe/original"), "weight_scale", "input_scale")
    made = convert(source.write(tmp_path / "source"), tmp_path / "out", "nvfp4")
    entry, file = made.config["quantization_config"], made.quantization["quantization"]
    layers = entry["quantized_layers"]
    assert entry["quant_algo"] == file["quant_algo"] == "MIXED_PRECISION" and file["quantized_layers"] == layers
    assert layers[ATTENTION] == {"quant_algo": "FP8"}
    assert layers[f"{QWEN}experts.3.up_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert len(layers) == 1 + 2 * 8 * 3
    groups = {tuple(group["targets"]): group for group in entry["config_groups"].values()}
    assert groups[(ATTENTION,)]["weights"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert sum(len(targets) for targets in groups) == len(layers)
    assert ATTENTION not in entry["ignore"] and "lm_head" in entry["ignore"]
    back = convert(tmp_path / "out", tmp_path / "back", "bf16").config["quantization_config"]
    assert list(back["quantized_layers"]) == [ATTENTION]
    assert [group["targets"] for group in back["config_groups"].values()] == [[ATTENTION]]
    assert f"{QWEN}experts.3.up_proj" in back["ignore"]


def test_fp8_by_row_and_fp8_without_input_scale(models: Path, tmp_path: Path) -> None:
    by_row = with_fp8_attention(
        Model.read(models / "qwen3-moe/original"), "weight_scale", scale=ck.Tensor.of(np.ones((16, 1), np.float32))
    )
    made = convert(by_row.write(tmp_path / "rows"), tmp_path / "out", "nvfp4").config["quantization_config"]
    assert made["quantized_layers"][ATTENTION] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    plain = with_fp8_attention(Model.read(models / "qwen3-moe/original"), "weight_scale")
    result = run("convert", plain.write(tmp_path / "plain"), tmp_path / "no", "--to", "nvfp4")
    assert_refused(result, ATTENTION, "expected an input scale beside the FP8")
    assert not (tmp_path / "no").exists()


def test_description_in_hf_quant_config_alone(models: Path, tmp_path: Path) -> None:
    model = with_fp8_attention(Model.read(models / "qwen3-moe/nvfp4"), "weight_scale", "input_scale")
    model.config.pop("quantization_config", None)
    layers = {f"{QWEN}experts.{e}.{m}_proj": {"quant_algo": "NVFP4"} for e in range(8) for m in ("gate", "up", "down")}
    layers |= {name.replace("layers.1", "layers.0"): algorithm for name, algorithm in layers.items()}
    model.quantization = {
        "producer": {"name": "modelopt", "version": "0.40"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
            "quantized_layers": layers | {ATTENTION: {"quant_algo": "FP8"}},
        },
    }
    found = convert(model.write(tmp_path / "source"), tmp_path / "out", "bf16")
    entry = found.config["quantization_config"]
    assert entry["quant_method"] == "modelopt" and entry["quantized_layers"] == {ATTENTION: {"quant_algo": "FP8"}}
    assert entry["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    file = found.quantization
    assert file["producer"]["version"] == "0.40" and file["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert file["quantization"]["quantized_layers"] == {ATTENTION: {"quant_algo": "FP8"}}


def test_kv_cache_stays_described(models: Path, tmp_path: Path) -> None:
    """ModelOpt's words for it, compressed-tensors' and back; where the result has none, a note says so."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.tensors["model.layers.0.self_attn.k_proj.k_scale"] = ck.Tensor.of(np.array(1.0, np.float32))
    model.quantization["quantization"]["kv_cache_quant_algo"] = "FP8"
    source = model.write(tmp_path / "source")
    other = convert(source, tmp_path / "other", "nvfp4", "--scheme", "compressed-tensors")
    scheme = {"dynamic": False, "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    assert other.config["quantization_config"]["kv_cache_scheme"] == scheme
    assert "model.layers.0.self_attn.k_proj.k_scale" in other.tensors
    back = convert(tmp_path / "other", tmp_path / "back", "nvfp4", "--scheme", "modelopt")
    assert back.quantization["quantization"]["kv_cache_quant_algo"] == "FP8"
    result = run("convert", source, tmp_path / "plain", "--to", "bf16")
    assert result.code == FINE and "note: the source's KV cache is FP8" in result.stdout, str(result)
    # Only ModelOpt has a name for this one.
    model.quantization["quantization"]["kv_cache_quant_algo"] = "NVFP4"
    source = model.write(tmp_path / "four")
    result = run("convert", source, tmp_path / "words", "--to", "nvfp4", "--scheme", "compressed-tensors")
    assert result.code == FINE and "note: the source's KV cache is NVFP4" in result.stdout, str(result)
    again = convert(tmp_path / "source", tmp_path / "same", "nvfp4", "--input-scale", "dynamic")
    assert again.quantization["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_chosen_layers_leave_attention_in_another_format(models: Path, tmp_path: Path) -> None:
    model = Model.read(models / "qwen3-moe/original")
    model.tensors[f"{ATTENTION}.weight"] = ck.zeros("U8", 16, 16)
    model.tensors[f"{ATTENTION}.weight_scale"] = ck.bytes_of("U8", 120, 16, 1)
    source = model.write(tmp_path / "source")
    result = run("convert", source, tmp_path / "out", "--to", "nvfp4", "--layers", "0,1")
    assert result.code == FINE and "note: 1 four-bit linears outside the experts stay" in result.stdout, str(result)
    made = Model.read(tmp_path / "out")
    assert made.tensors[f"{ATTENTION}.weight"] == model.tensors[f"{ATTENTION}.weight"]
    assert ATTENTION in made.config["quantization_config"]["ignore"]


def test_matrices_without_input_scales_are_counted(models: Path, tmp_path: Path) -> None:
    source = convert(models / "qwen3-moe/original", tmp_path / "none", "nvfp4")
    assert source.config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    # Layer 0 anew, without scales; layer 1 has them.
    mixed = Model.read(models / "qwen3-moe/nvfp4")
    plain = Model.read(models / "qwen3-moe/original")
    for name in list(mixed.tensors):
        if "layers.0.mlp.experts" in name:
            del mixed.tensors[name]
    mixed.tensors |= {name: t for name, t in plain.tensors.items() if "layers.0.mlp.experts" in name}
    result = run("convert", mixed.write(tmp_path / "mixed"), tmp_path / "out", "--to", "nvfp4")
    assert result.code == FINE and "24 of 48 NVFP4 matrices have no input scale" in result.stdout, str(result)
    assert Model.read(tmp_path / "out").config["quantization_config"]["quant_algo"] == "NVFP4"


def test_input_scales_of_experts_leave_attention_its_own(models: Path, tmp_path: Path) -> None:
    """As fourfold calibrate writes them."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    names = [name for name in model.tensors if name.endswith(".input_scale")]
    prefix = "model.layers.0.self_attn.q_proj"
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        model.tensors[f"{prefix}.{suffix}"] = model.tensors[f"{QWEN}experts.0.up_proj.{suffix}"]
    file = tmp_path / "scales.safetensors"
    file.write_bytes(ck.valid_bytes({name: ck.Tensor.of(np.array(0.5, np.float32)) for name in names}))
    found = convert(model.write(tmp_path / "source"), tmp_path / "out", "nvfp4", "--input-scale", file)
    assert float_of(found, names[0]) == 0.5
    assert found.tensors[f"{prefix}.input_scale"] == model.tensors[f"{prefix}.input_scale"]


def test_global_scale_without_a_reciprocal(models: Path, tmp_path: Path) -> None:
    convert(models / "qwen3-moe/original", tmp_path / "mxfp4", "mxfp4")
    model = Model.read(tmp_path / "mxfp4")
    scale = next(name for name in model.tensors if name.startswith(f"{QWEN}experts.3.up_proj") and "scale" in name)
    model.set_bytes(scale, 1)
    source = model.write(tmp_path / "source")
    options = ("--to", "nvfp4", "--scheme", "compressed-tensors")
    assert_refused(run("convert", source, tmp_path / "out", *options), "experts.3.up_proj", "reciprocal")
    assert not (tmp_path / "out").exists()


def test_bias_of_down_alone_is_not_lost(tmp_path: Path) -> None:
    source = Model.read(ck.write_model(tmp_path / "plain", ck.FUSED))
    down = next(name for name in source.tensors if name.endswith("experts.down_proj"))
    experts, hidden, _ = source.tensors[down].shape
    source.tensors[f"{down}_bias"] = ck.zeros("BF16", experts, hidden)
    result = run("convert", source.write(tmp_path / "source"), tmp_path / "out", "--to", "nvfp4")
    assert_refused(result, "biases")


# ---- refusals ----


def test_usage(models: Path, tmp_path: Path) -> None:
    source = models / "qwen3-moe/original"
    for options, part in (
        (["--to", "fp8"], "--to"),
        ([], "--to"),
        (["--to", "bf16", "--scheme", "modelopt"], "--scheme"),
        (["--to", "mxfp4", "--scale", "mse"], "--scale"),
        (["--to", "bf16", "--tie-gate-up"], "--tie-gate-up"),
        (["--to", "nvfp4", "--layers", "3-1"], "--layers"),
        (["--to", "nvfp4", "--layers", "0,x"], "--layers"),
        (["--to", "nvfp4", "--layers", "1,"], "--layers"),
    ):
        assert_usage(run("convert", source, tmp_path / "out", *options), part)
    assert not os.listdir(tmp_path)


def test_refused_targets(models: Path, tmp_path: Path) -> None:
    source = models / "qwen3-moe/original"
    (tmp_path / "there").mkdir()
    assert_refused(
        run("convert", source, tmp_path / "there", "--to", "nvfp4"), "expected nothing of that name"
    )
    (tmp_path / "link").symlink_to("nowhere")
    assert_refused(
        run("convert", source, tmp_path / "link", "--to", "nvfp4"), "expected nothing of that name"
    )
    copy = Model.read(source).write(tmp_path / "copy")
    for inside in (copy / "out", copy, tmp_path / "copy/../copy/deep/out"):
        assert_refused(run("convert", copy, inside, "--to", "nvfp4"), "outside of SRC")
    assert_refused(run("convert", source, tmp_path / "no/such/out", "--to", "nvfp4"), "can't create")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run("convert", source, locked / "out", "--to", "nvfp4", in_child=obey_permissions())
    assert_refused(result, "can't create", "Permission denied")
    assert sorted(os.listdir(tmp_path)) == ["copy", "link", "locked", "there"]


def test_refused_sources(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert_refused(run("convert", tmp_path / "none", target, "--to", "nvfp4"), "nothing of that name")
    dense = ck.write_single(
        tmp_path / "dense", {"model.norm.weight": ck.zeros("BF16", 8)}, {"model_type": "llama"}
    )
    assert_refused(run("convert", dense, target, "--to", "nvfp4"), "experts, found none")
    single = next((models / "qwen3-moe/original").glob("*.safetensors"))
    assert_refused(run("convert", single, target, "--to", "nvfp4"), "expected a model directory")
    result = run("convert", models / "qwen3-moe/original", target, "--to", "nvfp4", "--layers", "0,7")
    assert_refused(result, "--layers", "0, 1", "found 7")
    result = run("convert", models / "qwen3-moe/nvfp4", target, "--to", "nvfp4", "--scale", "mse")
    assert_refused(result, "--scale mse", "weights to quantize")
    result = run("convert", models / "qwen3-moe/nvfp4", target, "--to", "nvfp4", "--tie-gate-up")
    assert_refused(result, "--tie-gate-up", "never rounded again")
    assert not target.exists()


def test_symlinked_shards(models: Path, tmp_path: Path) -> None:
    """Links out of the directory are refused, those of Hugging Face's cache are followed."""
    source = models / "qwen3-moe/original"
    (tmp_path / "linked").mkdir()
    for file in source.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert_refused(run("convert", tmp_path / "linked", tmp_path / "out", "--to", "nvfp4"), "symbolic link")
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "out", "nvfp4")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("suffix", "value", "part"),
    [
        ("weight_scale", 0x7F, "finite"),
        ("weight_scale", 0x81, "finite"),
        ("weight_scale_2", 0, "positive"),
        ("weight_scale_2", float("nan"), "positive"),
    ],
)
def test_what_inspect_objects_to(models: Path, tmp_path: Path, suffix: str, value: float, part: str) -> None:
    """By the tensor's or the matrix's name, for every target."""
    name = f"{QWEN}experts.3.up_proj.{suffix}"
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.set_bytes(name, int(value), 5) if suffix == "weight_scale" else model.set_float(name, value)
    source = model.write(tmp_path / "source")
    for options in (["nvfp4", "--scheme", "compressed-tensors"], ["bf16"], ["mxfp4"]):
        result = run("convert", source, tmp_path / "out", "--to", *options)
        assert_refused(result, f"{QWEN}experts.3.up_proj", part)
    assert os.listdir(tmp_path) == ["source"]


def test_damaged_weights(models: Path, tmp_path: Path) -> None:
    """NaN among bf16 is found while converting: nothing is left."""
    model = Model.read(models / "qwen3-moe/original")
    name = f"{QWEN}experts.3.up_proj.weight"
    model.set_bytes(name, 0xFF, 100, 101)
    source = model.write(tmp_path / "source")
    for to in ("nvfp4", "mxfp4"):
        assert_refused(
            run("convert", source, tmp_path / "out", "--to", to), f"{QWEN}experts.3.up_proj", "NaN"
        )
    model.remove(f"{QWEN}experts.2.down_proj")
    source = model.write(tmp_path / "lacking")
    assert_refused(run("convert", source, tmp_path / "out", "--to", "nvfp4"), f"{QWEN}experts.2.down_proj")
    assert sorted(os.listdir(tmp_path)) == ["lacking", "source"]


def test_unwritable_input_scale(models: Path, tmp_path: Path) -> None:
    """A scale of 0 has no reciprocal; leaving input scales out helps."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.set_float(f"{QWEN}experts.3.up_proj.input_scale", 0)
    source = model.write(tmp_path / "source")
    options = ("--to", "nvfp4", "--scheme", "compressed-tensors")
    result = run("convert", source, tmp_path / "out", *options)
    assert_refused(result, f"{QWEN}experts.3.up_proj.input", "--input-scale dynamic")
    convert(source, tmp_path / "out", *options[1:], "--input-scale", "dynamic")


# ---- whole or not at all ----


def test_promises_of_large_models_in_small() -> None:
    """scripts/convert_check.py: kills and full disks; memory and speed are for real sizes."""
    if SANITIZED:
        pytest.skip("its times are those of the optimised build")
    script = SCRIPTS / "convert_check.py"
    build = Path(command_path()).parent
    command = [sys.executable, script, "--build", build, "--size", "0.02"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ends_with_its_file_size_limit(models: Path, tmp_path: Path) -> None:
    result = run(
        "convert", models / "qwen3-moe/original", tmp_path / "out", "--to", "nvfp4",
        in_child=limit_file_size(100_000, signal.SIG_DFL),
    )  # fmt: skip
    assert_refused(result, "can't write")
    assert not os.listdir(tmp_path)


def test_source_that_shrinks(models: Path, tmp_path: Path) -> None:
    """Truncated while it is read, it is an error that names it: the target does not appear."""
    model = Model.read(models / "qwen3-moe/original")
    for copy in range(60):  # more than a second for one thread
        for name in [name for name in model.tensors if name.startswith("model.layers.1.")]:
            model.tensors[name.replace("layers.1.", f"layers.{copy + 2}.")] = model.tensors[name]
    model.config["num_hidden_layers"] = 62
    source = model.write(tmp_path / "source")
    shard = next(source.glob("*.safetensors"))
    process = subprocess.Popen(
        [command_path(), "convert", source, tmp_path / "out", "--to", "nvfp4", "--scale", "mse"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "out.partial").exists():
        time.sleep(0.001)
    os.truncate(shard, shard.stat().st_size // 2)
    message = process.communicate()[1]
    assert process.returncode == 1 and shard.name in message, message
    assert os.listdir(tmp_path) == ["source"]
