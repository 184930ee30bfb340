"""Models that `fourfold synthesize` made, read, damaged and written again by code that shares nothing with
the C++ reader; and `fourfold inspect` on them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import checkpoints as ck
from checkpoints import Config, Tensor, Tensors
from command import FINDING, FINE, Json, Result, run

FAMILIES = ("deepseek-v4", "deepseek-v3", "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss")
SCHEMES = ("nvfp4", "original")
LAYERS = 2

# Of Qwen's and DeepSeek-V3's: the second layer's block, and a matrix that is neither first nor last.
QWEN = "model.layers.1.mlp."
UP = QWEN + "experts.3.up_proj"


@dataclass
class Model:
    """All of a model directory, to change and write again."""

    tensors: Tensors
    config: Config
    quantization: Config | None

    @staticmethod
    def read(directory: Path) -> "Model":
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            header, data = ck.read_header(file)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
        side = directory / "hf_quant_config.json"
        quantization = json.loads(side.read_text()) if side.exists() else None
        return Model(tensors, json.loads((directory / "config.json").read_text()), quantization)

    def write(self, directory: Path) -> Path:
        ck.write_shards(directory, self.tensors, self.config)
        if self.quantization is not None:
            ck.write_json(directory / "hf_quant_config.json", self.quantization)
        return directory

    def set_bytes(self, name: str, value: int, *at: int) -> None:
        """Bytes `at` of a tensor, or all of them."""
        data = bytearray(self.tensors[name].data)
        for index in at or range(len(data)):
            data[index] = value
        self.tensors[name] = replace(self.tensors[name], data=bytes(data))

    def set_float(self, name: str, value: float, index: int = 0) -> None:
        values = np.frombuffer(self.tensors[name].data, np.float32).copy()
        values[index] = value
        self.tensors[name] = replace(self.tensors[name], data=values.tobytes())

    def get_float(self, name: str) -> float:
        return float(np.frombuffer(self.tensors[name].data, np.float32)[0])

    def remove(self, prefix: str) -> None:
        gone = [name for name in self.tensors if name.startswith(prefix)]
        assert gone, prefix
        for name in gone:
            del self.tensors[name]


def inspect(folder: Path, model: Path, *arguments: str) -> tuple[Result, Json]:
    """Text and JSON agree with each other and with the exit code."""
    file = folder / "inspection.json"
    result = run("inspect", model, "--json", file, *arguments)
    report = json.loads(file.read_text())
    assert result.code == (FINDING if report["findings"] else FINE), str(result)
    assert (report["verdict"] == "clean") == (result.code == FINE)
    assert not result.stderr, str(result)
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"{len(report['findings'])} problem" if report["findings"] else "model "), first
    for finding in report["findings"]:
        assert finding["kind"] in result.stdout
        assert (finding["tensor"] or finding["file"]) in result.stdout, str(result)
        assert finding["remedy"] in result.stdout
    return result, report


def found(report: Json) -> set[tuple[str, str]]:
    return {(finding["kind"], finding["tensor"]) for finding in report["findings"]}
