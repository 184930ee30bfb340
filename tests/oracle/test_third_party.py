"""Checkpoints that llm-compressor and ModelOpt wrote (tests/data/third_party), as the library, the oracle and the
tools themselves read them. scripts/third_party_checkpoints.py made the files, and hashes of what the tools
dequantize them to.
"""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import nvfp4_oracle as oracle
from checkpoint_oracle import read_checkpoint, read_layer
from compare import assert_same
from layertest_figures import fourfold
from nvfp4_oracle import Array
from tensor_file import run_driver

DATA = Path(__file__).resolve().parents[1] / "data" / "third_party"
MODELS = sorted(path.name for path in DATA.iterdir() if path.is_dir())
NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


def in_their_order(model: Path, expert: int, half: str) -> Array:
    """e2m1 x (scale x global), each product rounded to float32: what the tools compute."""
    members = {}
    for name, stored in read_checkpoint(model).items():
        for linear in NAMES[half]:
            if f".experts.{expert}.{linear}." in name:
                members[name.rpartition(".")[2]] = stored.array
    packed = members.get("weight_packed", members.get("weight"))
    stored_scales = members["weight_scale"]
    cols = 2 * packed.shape[1]
    if cols // stored_scales.shape[1] == 32:
        scales = oracle.decode_e8m0(stored_scales)
    elif "weight_global_scale" in members:
        scales = oracle.decode_e4m3(stored_scales) / members["weight_global_scale"]
    else:
        scales = oracle.decode_e4m3(stored_scales) * members["weight_scale_2"]
    ones = np.full((packed.shape[0], cols // 16), 0x38, np.uint8)  # e4m3's 1
    return oracle.decode_nvfp4(packed, ones) * np.repeat(scales, cols // scales.shape[1], axis=1)


def test_there_are_models() -> None:
    """Both tools, both formats, both families."""
    text = " ".join(MODELS)
    for part in ("compressed-tensors", "modelopt", "nvfp4", "mxfp4", "qwen3-moe", "mixtral"):
        assert part in text


@pytest.mark.parametrize("name", MODELS)
def test_weights(name: str) -> None:
    """The library's weights are the oracle's, and the oracle's numbers in the tool's order are the tool's, but
    for the sign of zeros: ModelOpt has none.
    """
    model = DATA / name
    found = run_driver("checkpoint_weights", {}, checkpoint=model)
    hashes = json.loads((model / "dequantized.json").read_text())
    experts = read_layer(model).experts
    assert set(found) == set(hashes) == {f"{e}.{half}" for e in range(len(experts)) for half in NAMES}
    for number, expert in enumerate(experts):
        for half in NAMES:
            key = f"{number}.{half}"
            assert_same(key, found[key], getattr(expert, half).dequantized().values)
            theirs = np.ascontiguousarray(in_their_order(model, number, half)) + np.float32(0)
            assert theirs.dtype == np.float32
            assert hashlib.sha256(theirs.tobytes()).hexdigest() == hashes[key], key


@pytest.mark.parametrize("name", [name for name in MODELS if "nvfp4" in name])
def test_layertest(name: str) -> None:
    """It runs, and has no note: config and tensors agree, as they do where a tool wrote both."""
    command = [fourfold(), "layertest", "--nvfp4", DATA / name, "--activation-scale", "dynamic-token"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "note" not in result.stdout, result.stdout
    assert ("(compressed-tensors)" in result.stdout) == name.startswith("compressed-tensors")
