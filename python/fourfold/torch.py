"""MoE layers in PyTorch: the operator torch.ops.fourfold.moe_experts, a module, and models of transformers whose
experts are fourfold's.

The operator has a fake implementation (torch.compile, fullgraph too), runs on the current stream, and neither waits
nor allocates but from torch's allocator: on a GPU it can be captured in a CUDA graph. It has no gradient.
"""

from __future__ import annotations

import itertools
import os
import re
import weakref
from typing import Any

import torch

from fourfold.checkpoint import Checkpoint
from fourfold.errors import InvalidArgumentError, UnsupportedError
from fourfold.layer import MoeLayer, expert_weights
from fourfold.quantization import ActivationFormat, ScaleRule, quantize

# The operator's arguments are tensors and numbers: it knows layers by number.
_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, MoeLayer] = weakref.WeakValueDictionary()


def register_layer(layer: MoeLayer) -> int:
    """A number by which the operator knows `layer`, for as long as the caller keeps it alive."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("fourfold::moe_experts", mutates_args=())
def moe_experts(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int) -> torch.Tensor:
    """x [T, H] bfloat16, topk_ids [T, K] int32 or int64, topk_weights [T, K] float32 -> y [T, H] bfloat16.

    `layer`: of register_layer. The same bits as MoeLayer.forward. An id of -1 contributes nothing. Raises
    InvalidArgumentError for shapes, types, and a layer that is no more.
    """
    found = _layers.get(layer)
    if found is None:
        raise InvalidArgumentError(f"layer: expected the number of a layer that is alive, found {layer}")
    return found.forward(x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous())  # type: ignore[no-any-return]


@moe_experts.register_fake
def _(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


class FourfoldExperts(torch.nn.Module):
    """The routed experts of a MoE block, with the call of transformers' modules:

    forward(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H] in hidden_states' type.

    hidden_states become bfloat16 and the weights float32. The layer's weights are not parameters: they are not moved
    by .to(), trained or saved.
    """

    def __init__(self, layer: MoeLayer) -> None:
        super().__init__()
        self.layer = layer
        self.number = register_layer(layer)

    @classmethod
    def from_module(
        cls,
        experts: torch.nn.Module,
        *,
        top_k: int,
        rule: ScaleRule = "amax",
        activations: ActivationFormat = "bf16",
        backend: str = "",
    ) -> FourfoldExperts:
        """The experts module of a transformers MoE block (Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss), its weights
        quantized to NVFP4 by `rule`; see fourfold.quantize.

        `activations`: as MoeLayer's; NVFP4 has scales a token, since a module knows no calibration. Raises
        UnsupportedError for a module that is built otherwise.
        """
        matrices, biases = _matrices_of(experts), _biases_of(experts)
        gate, up, down = ([quantize(m, rule=rule) for m in matrices[name]] for name in ("gate", "up", "down"))
        weights = expert_weights(
            gate=gate,
            up=up,
            down=down,
            gate_bias=biases.get("gate_bias"),
            up_bias=biases.get("up_bias"),
            down_bias=biases.get("down_bias"),
        )
        return cls(
            MoeLayer(
                weights,
                top_k=top_k,
                activation=_activation_of(experts),
                activations=activations,
                backend=backend,
            )
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, layer: int, **options: Any) -> FourfoldExperts:
        """The routed experts of `layer`, bit for bit as the checkpoint has them; a block's shared expert stays the
        block's. `options`: of Checkpoint.make_layer."""
        return cls(checkpoint.make_layer(layer, shared=False, **options))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        y: torch.Tensor = moe_experts(
            hidden_states.to(torch.bfloat16), top_k_index, top_k_weights.float(), self.number
        )
        return y.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return repr(self.layer)


def replace_experts(
    model: torch.nn.Module, *, checkpoint: str | os.PathLike[str] | Checkpoint | None = None, **options: Any
) -> list[str]:
    """Puts FourfoldExperts in the place of the experts of every MoE block of a transformers model; -> their names.

    Without `checkpoint` their weights are quantized (`options`: of FourfoldExperts.from_module); with one they are
    taken from its layers (`options`: of Checkpoint.make_layer). `top_k` is the model's own unless it is given. Raises
    UnsupportedError where nothing can be replaced; then the model is as it was.
    """
    if "top_k" not in options:
        options["top_k"] = _top_k_of(model)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    made: dict[str, FourfoldExperts] = {}
    for name, module in model.named_modules():
        if not name.endswith("experts") or not hasattr(module, "gate_up_proj"):
            continue
        if checkpoint is None:
            made[name] = FourfoldExperts.from_module(module, **options)
            continue
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number is None:
            raise UnsupportedError(f"{name}: expected a name with layers.N, which tells the checkpoint's layer")
        made[name] = FourfoldExperts.from_checkpoint(checkpoint, int(number.group(1)), **options)
    if not made:
        raise UnsupportedError(
            f"{type(model).__name__}: expected MoE blocks whose `experts` have gate_up_proj and down_proj, found none"
        )
    for name, experts in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)
    return list(made)


# ---- what modules of transformers hold ----


def _is_gpt_oss(experts: torch.nn.Module) -> bool:
    """Transposed, gate and up in turn, with biases."""
    return hasattr(experts, "gate_up_proj_bias")


def _matrices_of(experts: Any) -> dict[str, list[torch.Tensor]]:
    """gate, up [I, H] and down [H, I] of every expert, on the host."""
    for name in ("gate_up_proj", "down_proj"):
        if getattr(getattr(experts, name, None), "ndim", 0) != 3:
            raise UnsupportedError(f"{type(experts).__name__}: expected {name} of three dimensions, found none")
    gate_up, down = experts.gate_up_proj.detach().cpu(), experts.down_proj.detach().cpu()
    if _is_gpt_oss(experts):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        halves = gate_up[:, 0::2], gate_up[:, 1::2]
    else:
        halves = gate_up.chunk(2, dim=1)
    stacks = {"gate": halves[0], "up": halves[1], "down": down}
    return {name: [matrix.contiguous() for matrix in stack] for name, stack in stacks.items()}


def _biases_of(experts: Any) -> dict[str, list[torch.Tensor]]:
    if not _is_gpt_oss(experts):
        return {}
    gate_up, down = experts.gate_up_proj_bias.detach().cpu(), experts.down_proj_bias.detach().cpu()
    stacks = {"gate_bias": gate_up[:, 0::2], "up_bias": gate_up[:, 1::2], "down_bias": down}
    return {name: [bias.contiguous() for bias in stack] for name, stack in stacks.items()}


def _activation_of(experts: Any) -> str:
    if _is_gpt_oss(experts):
        return f"swiglu,alpha={experts.alpha},beta=1,limit={experts.limit}"
    name = type(experts.act_fn).__name__.lower()
    known = {"silu": "swiglu", "siluactivation": "swiglu", "geluactivation": "geglu"}
    if name not in known:
        raise UnsupportedError(f"{type(experts).__name__}: expected act_fn to be SiLU or GELU, found {name}")
    return known[name]


def _top_k_of(model: Any) -> int:
    """Experts a token, as the model's config says."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    for name in ("num_experts_per_tok", "experts_per_token"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise UnsupportedError(f"{type(model).__name__}: expected config.num_experts_per_tok, found none; pass top_k=")


__all__ = ["FourfoldExperts", "moe_experts", "register_layer", "replace_experts"]
