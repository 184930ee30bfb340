"""Shared experts in checkpoints: what layertest says of them, and what it refuses where they are damaged, or
where config.json or the original disagree.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import Config, Tensor, Tensors, changed, zeros
from command import Result, assert_finding, assert_fine, assert_refused, fact, layertest, report_of, run
from test_synthesize import read_model

EXPERTS, HIDDEN, INNER = 4, 64, 96
FAMILIES = ("deepseek-v4", "deepseek-v3", "qwen2-moe", "qwen3-moe")
SHARED = {
    "deepseek-v4": "layers.0.ffn.shared_experts.",
    "deepseek-v3": "model.layers.0.mlp.shared_experts.",
    "qwen2-moe": "model.layers.0.mlp.shared_expert.",
}
SHARED_GATE = "model.layers.0.mlp.shared_expert_gate.weight"


class Pair:
    """An original and its NVFP4, tensors and configs, to damage and write again."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensors] = {}
        self.configs: dict[str, Config] = {}
        for which in ("original", "nvfp4"):
            self.tensors[which] = read_model(folder / which)
            self.configs[which] = json.loads((folder / which / "config.json").read_text())
        quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        self.configs["nvfp4"].setdefault("quantization_config", quantization)

    def write(
        self, directory: Path, which: str, change: dict[str, Tensor | None] | None = None, **config: object
    ) -> Path:
        """One of the two with tensors replaced, added or left out (None), and members of its config."""
        tensors = self.tensors[which]
        for name, tensor in (change or {}).items():
            tensors = changed(tensors, name, tensor)
        return ck.write_single(directory / which, tensors, self.configs[which] | config)

    def without(self, which: str, prefix: str) -> dict[str, None]:
        return dict.fromkeys(name for name in self.tensors[which] if name.startswith(prefix))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    root = tmp_path_factory.mktemp("shared")
    for family in FAMILIES:
        assert_fine(
            run("synthesize", root / family, "--family", family, "--shape", f"{EXPERTS},{HIDDEN},{INNER},2")
        )
    pairs = {family: Pair(root / family) for family in FAMILIES}
    return lambda family: pairs[family]


def notes(result: Result) -> list[str]:
    """But for experts that the router of a tiny model happens to leave out."""
    found = re.findall(r"^note +(.*)$", result.stdout, re.MULTILINE)
    return [note for note in found if "get no token" not in note]


# ---- what is said ----

FACTS = {
    "deepseek-v4": (
        "w1,w3,w2}: fp8, intermediate 96;",
        "activations bf16 (its weights are not NVFP4)",
        "clamp(u, -10, 10)",
    ),
    "deepseek-v3": (
        "gate_proj,up_proj,down_proj}: nvfp4, intermediate 96;",
        "activations nvfp4, silu(g) * u",
    ),
    "qwen2-moe": ("nvfp4, intermediate 192, x sigmoid of its gate;", "activations nvfp4, silu(g) * u"),
}


@pytest.mark.parametrize("family", SHARED)
def test_shared_expert_is_reported(tmp_path: Path, pair: Callable[[str], Pair], family: str) -> None:
    directory = pair(family).write(tmp_path, "nvfp4")
    result = layertest(directory)
    assert_fine(result)
    assert fact(result, "shared").startswith(SHARED[family])
    assert all(part in fact(result, "shared") for part in FACTS[family]) and not notes(result)
    stages = report_of(tmp_path, directory)["comparisons"]["activations"]
    assert {"shared_l1", "shared_activation", "shared_l2"} <= stages.keys()


def test_no_shared_expert(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    directory = pair("qwen3-moe").write(tmp_path, "nvfp4")
    assert not re.search(r"^(shared| .* shared_)", layertest(directory).stdout, re.MULTILINE)
    assert not [s for s in report_of(tmp_path, directory)["comparisons"]["activations"] if "shared" in s]


# ---- configs that lie ----

LIES: list[tuple[str, Config, tuple[str, ...]]] = [
    ("deepseek-v4", {"n_shared_experts": 0}, ("0", "shared")),
    ("deepseek-v4", {"n_shared_experts": 2}, ("2", "shared")),
    ("deepseek-v3", {"n_shared_experts": 0}, ("0", "shared")),
    ("deepseek-v3", {"n_shared_experts": 3}, ("3", "shared")),
    ("qwen2-moe", {"shared_expert_intermediate_size": 64}, ("64", "192")),
    ("qwen3-moe", {"n_shared_experts": 1}, ("1", "shared", "none")),
]


@pytest.mark.parametrize(("family", "lie", "parts"), LIES, ids=str)
def test_config_that_lies(
    tmp_path: Path, pair: Callable[[str], Pair], family: str, lie: Config, parts: tuple[str, ...]
) -> None:
    """The tensors are used, and the disagreement is one note."""
    result = layertest(pair(family).write(tmp_path, "nvfp4", **lie))
    assert_fine(result)
    found = notes(result)
    assert len(found) == 1 and all(part in found[0] for part in parts), str(result)


def test_config_of_a_shared_expert_that_is_not_there(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    v4 = pair("deepseek-v4")
    result = layertest(v4.write(tmp_path, "nvfp4", v4.without("nvfp4", SHARED["deepseek-v4"])))
    assert_fine(result)
    assert len(notes(result)) == 1 and "shared" in notes(result)[0], str(result)


# ---- original and NVFP4 ----


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize("without", ["original", "nvfp4"])
def test_shared_expert_in_one_of_the_two(
    tmp_path: Path, pair: Callable[[str], Pair], family: str, without: str
) -> None:
    both = pair(family)
    change = both.without(without, SHARED[family])
    if family == "qwen2-moe":
        change |= {SHARED_GATE: None}
    changes = {without: change}
    original, nvfp4 = (both.write(tmp_path, which, changes.get(which)) for which in ("original", "nvfp4"))
    assert_refused(
        layertest(nvfp4, "--original", original),
        "--original",
        original,
        nvfp4,
        "shared expert",
        "expected",
        "found",
    )


def test_shared_experts_of_other_sizes(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    both = pair("qwen2-moe")
    smaller = {
        f"{SHARED['qwen2-moe']}{half}.weight": zeros("BF16", rows, cols)
        for half, rows, cols in (
            ("gate_proj", 96, HIDDEN),
            ("up_proj", 96, HIDDEN),
            ("down_proj", HIDDEN, 96),
        )
    }
    result = layertest(both.write(tmp_path, "nvfp4"), "--original", both.write(tmp_path, "original", smaller))
    assert_refused(result, "shared expert", "192", "96", "expected", "found")


def test_shared_expert_that_lost_something(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    """It is compared like the others: a global scale of another size is a finding that names it."""
    both, name = pair("deepseek-v3"), f"{SHARED['deepseek-v3']}up_proj.weight_scale_2"
    scale = both.tensors["nvfp4"][name].array()
    wrong = {name: Tensor.of(np.array(scale * 2, np.float32))}
    result = layertest(both.write(tmp_path, "nvfp4", wrong), "--original", both.write(tmp_path, "original"))
    assert_finding(result, "verdict: checkpoint", "shared_experts up")


# ---- damage ----


def fp8(*shape: int) -> Tensor:
    return zeros("F8_E4M3", *shape)


V4, V3, Q2 = (SHARED[family] for family in ("deepseek-v4", "deepseek-v3", "qwen2-moe"))
NAN_E8M0 = Tensor("F8_E8M0", (1, 1), b"\xff")
DAMAGE: dict[str, tuple[str, str, str, Tensor | None]] = {
    "fp8-rows": ("deepseek-v4", "nvfp4", f"{V4}w1.weight", fp8(97, 64)),
    "fp8-columns": ("deepseek-v4", "nvfp4", f"{V4}w1.weight", fp8(96, 65)),
    "fp8-down": ("deepseek-v4", "nvfp4", f"{V4}w2.weight", fp8(64, 95)),
    "fp8-rank-3": ("deepseek-v4", "nvfp4", f"{V4}w1.weight", fp8(1, 96, 64)),
    "fp8-e5m2": ("deepseek-v4", "nvfp4", f"{V4}w1.weight", Tensor("F8_E5M2", (96, 64), bytes(96 * 64))),
    "fp8-missing": ("deepseek-v4", "nvfp4", f"{V4}w1.weight", None),
    "tile-scales-missing": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", None),
    "tile-scales-too-many": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", zeros("F8_E8M0", 1, 2)),
    "tile-scales-f32": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", zeros("F32", 1, 1)),
    "tile-scales-u8": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", zeros("U8", 1, 1)),
    "tile-scales-scalar": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", zeros("F8_E8M0")),
    "tile-scale-nan": ("deepseek-v4", "nvfp4", f"{V4}w1.scale", NAN_E8M0),
    "scale-inv-nan": (
        "deepseek-v3",
        "original",
        f"{V3}up_proj.weight_scale_inv",
        Tensor.of(np.float32([[np.nan]])),
    ),
    "scale-inv-inf": (
        "deepseek-v3",
        "original",
        f"{V3}up_proj.weight_scale_inv",
        Tensor.of(np.float32([[np.inf]])),
    ),
    "scale-inv-negative": (
        "deepseek-v3",
        "original",
        f"{V3}up_proj.weight_scale_inv",
        Tensor.of(np.float32([[-1]])),
    ),
    "scale-inv-bf16": ("deepseek-v3", "original", f"{V3}up_proj.weight_scale_inv", zeros("BF16", 1, 1)),
    "scale-inv-rank-3": ("deepseek-v3", "original", f"{V3}up_proj.weight_scale_inv", zeros("F32", 1, 1, 1)),
    "scale-inv-too-many": ("deepseek-v3", "original", f"{V3}up_proj.weight_scale_inv", zeros("F32", 2, 1)),
    "nvfp4-columns": ("qwen2-moe", "nvfp4", f"{Q2}up_proj.weight", zeros("U8", 192, 31)),
    "nvfp4-rows": ("qwen2-moe", "nvfp4", f"{Q2}up_proj.weight", zeros("U8", 191, 32)),
    "nvfp4-scales": ("qwen2-moe", "nvfp4", f"{Q2}up_proj.weight_scale", zeros("F8_E4M3", 192, 3)),
    "nvfp4-no-scales": ("qwen2-moe", "nvfp4", f"{Q2}up_proj.weight_scale", None),
    "nvfp4-global-nan": (
        "qwen2-moe",
        "nvfp4",
        f"{Q2}up_proj.weight_scale_2",
        Tensor.of(np.float32(np.nan).reshape(())),
    ),
    "nvfp4-no-up": ("qwen2-moe", "nvfp4", f"{Q2}up_proj.weight", None),
    "gate-columns": ("qwen2-moe", "nvfp4", SHARED_GATE, zeros("BF16", 1, HIDDEN + 1)),
    "gate-rank-1": ("qwen2-moe", "nvfp4", SHARED_GATE, zeros("BF16", HIDDEN)),
    "gate-u8": ("qwen2-moe", "nvfp4", SHARED_GATE, zeros("U8", 1, HIDDEN)),
}


@pytest.mark.parametrize(("family", "which", "name", "tensor"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_shared_expert(
    tmp_path: Path, pair: Callable[[str], Pair], family: str, which: str, name: str, tensor: Tensor | None
) -> None:
    """Refused, with the checkpoint, the shared expert and what was found."""
    both = pair(family)
    directories = {
        w: both.write(tmp_path, w, {name: tensor} if w == which else None) for w in ("original", "nvfp4")
    }
    result = layertest(directories["nvfp4"], "--original", directories["original"])
    assert_refused(
        result, directories[which], name.split(".weight")[0].rsplit(".", 1)[0], "expected", "found"
    )


@pytest.mark.parametrize("half", ["gate_proj", "down_proj"])
def test_missing_linear(tmp_path: Path, pair: Callable[[str], Pair], half: str) -> None:
    """All tensors of one of its matrices are gone."""
    q2 = pair("qwen2-moe")
    result = layertest(q2.write(tmp_path, "nvfp4", q2.without("nvfp4", f"{Q2}{half}.")))
    assert_refused(result, tmp_path, f"'{Q2}{half}.weight'", "expected", "found")


def test_missing_gate_of_the_output(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    """Qwen2-MoE has one by its rules: without it, the output is not taken as it is."""
    directory = pair("qwen2-moe").write(tmp_path, "nvfp4", {SHARED_GATE: None})
    assert_refused(layertest(directory), directory, SHARED_GATE, "expected", "found")


@pytest.mark.parametrize(
    ("code", "what"), [(0x7F, "shared_l1: NaN"), (0x81, "block scales")], ids=["nan", "negative"]
)
def test_bad_block_scale(tmp_path: Path, pair: Callable[[str], Pair], code: int, what: str) -> None:
    """A finding of the checkpoint that names the matrix."""
    q2, name = pair("qwen2-moe"), f"{Q2}up_proj.weight_scale"
    scales = bytearray(q2.tensors["nvfp4"][name].data)
    scales[5] = code
    tensor = Tensor("F8_E4M3", q2.tensors["nvfp4"][name].shape, bytes(scales))
    result = layertest(q2.write(tmp_path, "nvfp4", {name: tensor}))
    assert_finding(
        result, "verdict: checkpoint", f"{Q2[:-1]} up: 1 of 768 block scales are NaN or negative", what
    )


def test_nan_among_fp8_codes(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    """It shows as far as it reaches."""
    v4, name = pair("deepseek-v4"), f"{V4}w2.weight"
    codes = bytearray(v4.tensors["nvfp4"][name].data)
    codes[100] = 0x7F
    tensor = Tensor("F8_E4M3", v4.tensors["nvfp4"][name].shape, bytes(codes))
    assert_finding(
        layertest(v4.write(tmp_path, "nvfp4", {name: tensor})), "verdict: checkpoint", "shared_l2", "NaN"
    )


def test_input_scale_of_the_shared_expert(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    """In NVFP4 it is staged like the others, so static scales need its own."""
    for value in (None, np.inf, 0.0):
        tensor = None if value is None else Tensor.of(np.float32(value).reshape(()))
        directory = pair("qwen2-moe").write(tmp_path, "nvfp4", {f"{Q2}down_proj.input_scale": tensor})
        assert_refused(
            layertest(directory), "input_scale", f"{Q2[:-1]} down", "--activation-scale dynamic-token"
        )
        assert_fine(layertest(directory, "--activation-scale", "dynamic-token"))


def test_two_shared_experts(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    """Under both names at once."""
    q2 = pair("qwen2-moe")
    again = {
        name.replace("shared_expert.", "shared_experts."): t
        for name, t in q2.tensors["nvfp4"].items()
        if name.startswith(Q2)
    }
    assert_refused(layertest(q2.write(tmp_path, "nvfp4", again)), "shared_expert", "expected", "found")


def test_folding_folds_the_shared_expert_too(tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    q2 = pair("qwen2-moe")
    directory = q2.write(tmp_path, "nvfp4")
    exact, folded = (
        report_of(tmp_path, directory, "--gate-up", how)["comparisons"]["activations"]["shared_l1"]["rel_l2"]
        for how in ("exact", "fold")
    )
    assert exact != folded
