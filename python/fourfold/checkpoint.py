"""Checkpoints: a model directory, the experts and the router of its layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from fourfold import _native
from fourfold._arrays import F32, I32, Array, empty_like, exported, require_dimensions
from fourfold.layer import MoeLayer
from fourfold.quantization import ActivationFormat, ScalePolicy, ScaleRule

GateUpOrder = Literal["gate-first", "up-first", "interleaved"]
WeightScheme = Literal["modelopt", "compressed-tensors", "mxfp4"]
ExpertLayer = _native.ExpertLayer


class Router:
    """A layer's router: from hidden states to topk_ids and topk_weights, on the host."""

    def __init__(self, router: _native.Router) -> None:
        self._router = router

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return self._router.top_k

    @property
    def description(self) -> str:
        """The rule in words."""
        return self._router.description

    def route(self, x: Array, token_ids: Array | None = None) -> tuple[Any, Any]:
        """x [T, H] bfloat16 -> topk_ids int32 [T, K], best first, and topk_weights float32 [T, K].

        Hash-routed layers (DeepSeek-V4's first) need `token_ids`, int64 [T]. Raises InvalidArgumentError without them.
        """
        tokens, _ = require_dimensions(x, "x", "[T, H]", 2)
        ids = empty_like(x, (tokens, self.top_k), I32)
        weights = empty_like(x, (tokens, self.top_k), F32)
        given = None if token_ids is None else exported(token_ids, "token_ids")
        self._router.route(exported(x, "x"), given, ids, weights)
        return ids, weights


class Checkpoint:
    """An opened model directory (config.json, and model.safetensors or shards with an index), or one .safetensors file.

    Files are mapped, not read. Raises Error naming file and tensor, also for damaged and hostile files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._checkpoint = _native.open_checkpoint(os.fspath(path))

    @property
    def config(self) -> _native.ModelConfig:
        """What config.json says: model_type, hidden, intermediate, experts, top_k, layers, quantization."""
        return self._checkpoint.config

    @property
    def family(self) -> str:
        """The model's family, e.g. "qwen3-moe"; empty where it is not known."""
        return self._checkpoint.family

    @property
    def layers(self) -> list[int]:
        """Layers that hold experts, ascending."""
        return self._checkpoint.layers()

    @property
    def tensor_names(self) -> list[str]:
        """Of all tensors, sorted."""
        return self._checkpoint.tensor_names()

    def load_experts(
        self,
        layer: int,
        *,
        experts: Sequence[int] = (),
        gate_up_order: GateUpOrder | None = None,
        scheme: WeightScheme | None = None,
    ) -> ExpertLayer:
        """The experts of `layer`: all, or those in `experts` (ascending); their scheme, naming and notes.

        `gate_up_order` and `scheme` replace what family and tensors say. Raises Error naming file, tensor, expected
        and found.
        """
        return _native.load_experts(self._checkpoint, layer, list(experts), gate_up_order or "", scheme or "")

    def load_router(self, layer: int, *, rule: str = "") -> Router:
        """The router of `layer`, computed as the family says, or by `rule`, e.g. "sigmoid,top-k=8,scale=2.5".

        Raises NotFoundError where the layer has none.
        """
        experts = self.load_experts(layer)
        hidden = experts.weights(False).hidden
        count = max(experts.expert_ids) + 1 if self.config.experts is None else self.config.experts
        return Router(_native.load_router(self._checkpoint, layer, count, hidden, rule))

    def make_layer(
        self,
        layer: int,
        *,
        experts: Sequence[int] = (),
        shared: bool = True,
        top_k: int | None = None,
        activation: str = "",
        activations: ActivationFormat = "nvfp4",
        x_scale: ScalePolicy | None = None,
        intermediate_scale: ScalePolicy | None = None,
        activation_rule: ScaleRule = "amax",
        gate_up_order: GateUpOrder | None = None,
        scheme: WeightScheme | None = None,
        backend: str = "",
    ) -> MoeLayer:
        """The MoE layer as its family computes it; the arguments of load_experts and of MoeLayer.

        `shared` False leaves the shared expert to the caller. `top_k` is needed where the family is not known, and
        `activation` too. With `experts`, ids in a routing are positions in that list.
        """
        found = self.load_experts(layer, experts=experts, gate_up_order=gate_up_order, scheme=scheme)
        config = _native.config_of_checkpoint(self._checkpoint, found, activation, top_k or 0, shared)
        made = MoeLayer.__new__(MoeLayer)
        made._make(found.weights(shared), config, activations, x_scale, intermediate_scale, activation_rule, backend)
        return made


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Checkpoint(path)."""
    return Checkpoint(path)
