"""Seeds of the fuzzers from the checkpoints of tests/cli: make_seeds.py FOLDER writes FOLDER/{header,index,config}.

`experts_fuzz` takes bytes that choose a layout and needs no seeds but lengths.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))

import checkpoints as ck  # noqa: E402

SMALL = ck.nvfp4_experts(count=1, hidden=32, inner=32)
SMALL_MX = ck.mxfp4_experts(count=1, hidden=32, inner=32)
MODELS = {
    "modelopt": ck.nvfp4_model(SMALL, ck.QWEN),
    "deepseek": ck.nvfp4_model(SMALL, ck.DEEPSEEK_V4),
    "compressed": ck.compressed_model(SMALL, ck.MIXTRAL),
    "mxfp4": ck.mxfp4_model(SMALL_MX),
    "compressed-mxfp4": ck.compressed_mxfp4_model(SMALL_MX, ck.QWEN),
    "bf16": ck.dense_model(SMALL, ck.QWEN, "BF16"),
    "fused": ck.fused_model(SMALL, ck.QWEN, "F32"),
}
HF_QUANT_CONFIG = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.gate"]},
}
CONFIGS = [
    {"architectures": ["MixtralForCausalLM"], "num_local_experts": 1, "num_experts_per_tok": 1},
    {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "scoring_func": "sigmoid"},
    {"model_type": "gpt_oss", "swiglu_limit": 7.0, "experts_per_token": 1, "hidden_act": "silu"},
    {"text_config": {"model_type": "llama4_text", "hidden_size": 16}, "num_experts_per_tok": 1},
    {"model_type": "qwen2_moe", "norm_topk_prob": True, "shared_expert_intermediate_size": 8},
]
INDEXES = [
    {"a": 1, "b": 1, "c": 2},
    {"a": 1, "c": 2},
    {"a": "../../etc/passwd"},
    {"a": "out.safetensors", "b": "nowhere.safetensors", "c": "folder", "d": "link.safetensors"},
    {"d": "unnamed.safetensors"},
]


def shard(number: object) -> object:
    return f"model-0000{number}-of-00002.safetensors" if isinstance(number, int) else number


def write(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main(root: Path) -> None:
    for name, model in MODELS.items():
        few = dict(list(model.tensors.items())[:4])  # as many as fit the fuzzers' 4096 bytes, without most data
        write(root / "header", name, ck.valid_bytes(few)[:4096])
        write(root / "header", f"{name}-empty", ck.valid_bytes({n: ck.zeros(t.dtype, 0) for n, t in few.items()}))
        write(root / "config", name, json.dumps(model.config).encode())
    for number, config in enumerate(CONFIGS):
        write(root / "config", f"family-{number}", json.dumps(config).encode())
    write(root / "config", "hf-quant", b"2" + json.dumps(HF_QUANT_CONFIG).encode())
    for number, weight_map in enumerate(INDEXES):
        named = {name: shard(value) for name, value in weight_map.items()}
        text = json.dumps({"metadata": {"total_size": 24}, "weight_map": named})
        write(root / "index", f"index-{number}", text.encode())
    rng = random.Random(1)
    for number in range(64):
        write(root / "experts", f"random-{number}", rng.randbytes(24 + number))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
