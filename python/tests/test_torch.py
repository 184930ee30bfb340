"""Torch tensors, the operator, the module, and models of transformers with fourfold's experts. On the host; a GPU's
part is test_torch_cuda.py. Skipped where torch or transformers is not installed."""

from typing import Any

import numpy as np
import pytest

import fourfold

torch = pytest.importorskip("torch")

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 64, 48, 4, 2, 6


def layer_and_inputs() -> tuple[fourfold.MoeLayer, Any, Any, Any]:
    generator = torch.Generator().manual_seed(3)

    def matrices(rows: int, cols: int) -> list[fourfold.QuantizedMatrix]:
        return [fourfold.quantize(torch.randn(rows, cols, generator=generator)) for _ in range(EXPERTS)]

    weights = fourfold.expert_weights(
        gate=matrices(INNER, HIDDEN), up=matrices(INNER, HIDDEN), down=matrices(HIDDEN, INNER)
    )
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return fourfold.MoeLayer(weights, top_k=TOP_K), x, ids, torch.rand(TOKENS, TOP_K, generator=generator)


def test_tensors_in_tensors_out() -> None:
    x = torch.randn(4, 32).bfloat16()
    q = fourfold.quantize(x)
    assert q.codes.dtype == torch.uint8
    same = fourfold.QuantizedMatrix(
        "nvfp4", q.codes.view(torch.float4_e2m1fn_x2), q.scales.view(torch.float8_e4m3fn), q.global_scale
    )
    assert torch.equal(fourfold.dequantize(same), fourfold.dequantize(q))
    of_numpy = fourfold.quantize(x.float().numpy())
    np.testing.assert_array_equal(q.codes.numpy(), of_numpy.codes)
    assert fourfold.gemm(x, q).dtype == torch.bfloat16
    dense = torch.randn(2, 16, requires_grad=True)
    assert torch.equal(fourfold.dequantize(dense.half()), dense.half().float())


def test_layer_takes_tensors() -> None:
    layer, x, ids, weights = layer_and_inputs()
    y = layer.forward(x, ids, weights)
    assert y.dtype == torch.bfloat16
    due = layer.forward(x.view(torch.uint16).numpy().view("bfloat16"), ids.numpy(), weights.numpy())
    np.testing.assert_array_equal(y.view(torch.uint16).numpy(), due.view(np.uint16))


def test_operator() -> None:
    from fourfold.torch import moe_experts, register_layer

    layer, x, ids, weights = layer_and_inputs()
    number = register_layer(layer)
    due = layer.forward(x, ids, weights)
    assert torch.equal(moe_experts(x, ids, weights, number), due)
    # Rows apart are brought together.
    wide = torch.zeros(TOKENS, 2 * HIDDEN).bfloat16()
    wide[:, :HIDDEN] = x
    assert torch.equal(moe_experts(wide[:, :HIDDEN], ids, weights, number), due)
    torch.library.opcheck(moe_experts, (x, ids, weights, number))
    del layer
    with pytest.raises(fourfold.InvalidArgumentError, match="layer that is alive"):
        moe_experts(x, ids, weights, number)


def test_compiled_whole() -> None:
    from fourfold.torch import FourfoldExperts

    layer, x, ids, weights = layer_and_inputs()
    module = FourfoldExperts(layer)

    def run(x: Any) -> Any:
        return module(x * 2, ids, weights) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))
    assert "MoeLayer" in repr(module) and not list(module.parameters())


FAMILIES = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": INNER, "head_dim": 16},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": INNER,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": EXPERTS, "intermediate_size": INNER, "head_dim": 16},
    ),
}


def tiny_model(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config_name, model_name, options = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=TOP_K,
        vocab_size=128,
        **options,
    )
    model = getattr(transformers, model_name)(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def keep_what_nvfp4_holds(experts: Any) -> None:
    """Rounds a module's weights to what quantizing them keeps."""
    from fourfold.torch import _matrices_of

    for name, stack in _matrices_of(experts).items():
        for e, matrix in enumerate(stack):
            exact = fourfold.dequantize(fourfold.quantize(matrix))
            with torch.no_grad():
                if hasattr(experts, "gate_up_proj_bias"):
                    where = experts.down_proj[e] if name == "down" else experts.gate_up_proj[e, :, name == "up" :: 2]
                    where.copy_(exact.T)
                else:
                    inner = experts.down_proj.shape[2]
                    rows = slice(inner, None) if name == "up" else slice(0, inner)
                    where = experts.down_proj[e] if name == "down" else experts.gate_up_proj[e, rows]
                    where.copy_(exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str) -> None:
    """With the weights that NVFP4 holds, transformers' own experts and fourfold's agree within bf16's roundings."""
    from fourfold.torch import FourfoldExperts, replace_experts

    model = tiny_model(family)
    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "gate_up_proj"):
            keep_what_nvfp4_holds(module)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 128
    with torch.no_grad():
        due = model(tokens).logits
        names = replace_experts(model)
        found = model(tokens).logits
    assert len(names) == 2 and isinstance(model.get_submodule(names[0]), FourfoldExperts)
    error = ((found - due).norm() / due.norm()).item()
    assert 0.0 < error < 1e-2, error


def test_replacing_nothing_is_an_error() -> None:
    from fourfold.torch import replace_experts

    with pytest.raises(fourfold.UnsupportedError, match="top_k"):
        replace_experts(torch.nn.Linear(2, 2))
    with pytest.raises(fourfold.UnsupportedError, match="MoE blocks"):
        replace_experts(torch.nn.Linear(2, 2), top_k=1)
