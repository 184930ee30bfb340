"""layertest: where a layer's numbers go wrong, in the checkpoint, the activations or the kernel. docs/layertest.md."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourfold._arrays import Array, to_numpy
from fourfold._command import COMMAND
from fourfold.errors import Error, InvalidArgumentError
from fourfold.quantization import ActivationFormat

_FINDING = 3  # the command's exit code
_SAFETENSORS_TYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
}


@dataclass(frozen=True)
class StageComparison:
    """How two runs differ at one stage."""

    cosine: float
    norm_ratio: float
    rel_l2: float
    #: The token and the expert with the largest relative L2; None where the stage has none.
    worst_token: int | None
    worst_expert: int | None
    #: On rel_l2; a finding above it. None: no limit.
    limit: float | None


@dataclass(frozen=True)
class LayertestReport:
    """What layertest found. Stages: "weights", "l1", "activation", "l2", "shared_...", "out"."""

    #: "fine", or what is at fault: "kernel", "checkpoint" or "activations".
    verdict: str
    findings: list[str]
    #: Disagreements between config.json and tensors.
    notes: list[str]
    backend: str
    kernel: str
    model: str
    layer: int
    #: The original weights against the dequantized NVFP4 weights, by stage; empty without an original.
    checkpoint: dict[str, StageComparison]
    #: The dequantized layer against quantized activations.
    activations: dict[str, StageComparison]
    #: The specification against the backend, each stage fed with the backend's own previous output.
    kernel_stages: dict[str, StageComparison]
    kernel_end_to_end: dict[str, StageComparison]
    #: The whole report, as `fourfold layertest --json` writes it.
    json: dict[str, Any]

    @property
    def is_fine(self) -> bool:
        """Whether nothing exceeds its limit."""
        return self.verdict == "fine"


def _number(value: Any) -> float:
    """JSON has no NaN or infinity: they are null or text there."""
    return float("nan") if value is None else float(value)


def _stages(stages: Mapping[str, Any]) -> dict[str, StageComparison]:
    return {
        name: StageComparison(
            _number(stage["cosine"]),
            _number(stage["norm_ratio"]),
            _number(stage["rel_l2"]),
            stage["worst_token"],
            stage["worst_expert"],
            None if stage["limit"] is None else _number(stage["limit"]),
        )
        for name, stage in stages.items()
    }


def _write_inputs(path: Path, arrays: Mapping[str, Array]) -> None:
    """A safetensors file."""
    header, data, offset = {}, [], 0
    for name, array in arrays.items():
        values = np.ascontiguousarray(to_numpy(array, name))
        spelled = _SAFETENSORS_TYPES.get(values.dtype.name)
        if spelled is None:
            raise InvalidArgumentError(
                f"inputs[{name!r}]: expected one of {', '.join(_SAFETENSORS_TYPES)}, found {values.dtype.name}"
            )
        data.append(values.tobytes())
        end = offset + len(data[-1])
        header[name] = {"dtype": spelled, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def layertest(
    nvfp4: str | os.PathLike[str],
    original: str | os.PathLike[str] | None = None,
    *,
    layer: int = 0,
    experts: Sequence[int] = (),
    inputs: Mapping[str, Array] | str | os.PathLike[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    activations: ActivationFormat = "nvfp4",
    backend: str = "",
    options: Sequence[str] = (),
) -> LayertestReport:
    """Runs a layer of the checkpoint `nvfp4` stage by stage against a bf16 reference and says what is at fault.

    `original`: the checkpoint that it was made from; without it, what the conversion lost is not told.
    `inputs`: a safetensors file, or arrays: "x" [T, H] (bfloat16, float16 or float32) and, optionally, "topk_ids" and
    "topk_weights" [T, K], or "token_ids" [T]. Without them x is N(0, 1) from `seed`, `tokens` of them (64).
    `options`: others of the command, e.g. ["--gate-up", "fold"]; `fourfold layertest --help` lists them.

    It is the command `fourfold layertest`, which the package carries. Raises Error with its message where it can't
    run; findings are in the report, not raised.
    """
    arguments = ["--nvfp4", os.fspath(nvfp4), "--layer", str(layer), "--seed", str(seed)]
    arguments += ["--activations", activations]
    if original is not None:
        arguments += ["--original", os.fspath(original)]
    if experts:
        arguments += ["--experts", ",".join(map(str, experts))]
    if tokens is not None:
        arguments += ["--tokens", str(tokens)]
    if backend:
        arguments += ["--backend", backend]
    with tempfile.TemporaryDirectory(prefix="fourfold-layertest-") as folder:
        if isinstance(inputs, Mapping):
            _write_inputs(Path(folder) / "inputs.safetensors", inputs)
            inputs = Path(folder) / "inputs.safetensors"
        if inputs is not None:
            arguments += ["--input", os.fspath(inputs)]
        report = Path(folder) / "report.json"
        command = [str(COMMAND), "layertest", *arguments, "--json", str(report), *options]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode not in (0, _FINDING):
            raise Error(ran.stderr.strip() or f"fourfold layertest: exit code {ran.returncode}")
        found = json.loads(report.read_text("utf-8"))
    return LayertestReport(
        verdict=found["verdict"],
        findings=found["findings"],
        notes=found["notes"],
        backend=found["backend"],
        kernel=found["kernel"],
        model=found["model"],
        layer=found["layer"],
        checkpoint=_stages(found["comparisons"]["checkpoint"]),
        activations=_stages(found["comparisons"]["activations"]),
        kernel_stages=_stages(found["comparisons"]["kernel"]),
        kernel_end_to_end=_stages(found["kernel_end_to_end"]),
        json=found,
    )
