"""MoE layers: expert weights from arrays, a layer on a backend, its forward pass with taps on every stage."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fourfold import _arrays, _native
from fourfold._arrays import (
    BF16,
    F32,
    I32,
    U8,
    Array,
    empty_like,
    exported,
    exported_for_writing,
    is_on_cuda,
    require_dimensions,
)
from fourfold.backends import OutputType
from fourfold.errors import InvalidArgumentError
from fourfold.quantization import (
    ActivationFormat,
    ScalePolicy,
    ScaleRule,
    StagedActivations,
    WeightMatrix,
    native_weight,
)

ExpertWeights = _native.ExpertWeights

_PLANS_KEPT = 64  # numbers of tokens whose plans a layer remembers


def expert_weights(
    gate: Sequence[WeightMatrix] | None,
    up: Sequence[WeightMatrix],
    down: Sequence[WeightMatrix],
    *,
    gate_bias: Sequence[Array] | None = None,
    up_bias: Sequence[Array] | None = None,
    down_bias: Sequence[Array] | None = None,
    gate_input_scales: Sequence[float] | None = None,
    up_input_scales: Sequence[float] | None = None,
    down_input_scales: Sequence[float] | None = None,
) -> ExpertWeights:
    """The weights of one layer's experts, one entry an expert; views, nothing is copied.

    gate and up [I, H] and down [H, I]: QuantizedMatrix, Fp8Matrix, or dense arrays. `gate` None: the activation has
    none. Biases: arrays [I] and [H]. Input scales: calibrated activation scales (multipliers, amax / 2688) for the
    static policies. Raises InvalidArgumentError, naming expert and matrix, where shapes disagree.
    """
    weights = ExpertWeights()
    given = {
        "gate": gate,
        "down": down,
        "gate_bias": gate_bias,
        "up_bias": up_bias,
        "down_bias": down_bias,
        "gate_input_scales": gate_input_scales,
        "up_input_scales": up_input_scales,
        "down_input_scales": down_input_scales,
    }
    for name, entries in given.items():
        if entries is not None and len(entries) != len(up):
            raise InvalidArgumentError(f"{name}: expected {len(up)} entries, as up has, found {len(entries)}")

    def bias(entries: Sequence[Any] | None, expert: int, name: str) -> Any:
        return None if entries is None else exported(entries[expert], f"{name}[{expert}]")

    def scale(entries: Sequence[float] | None, expert: int) -> float | None:
        return None if entries is None else float(entries[expert])

    for expert in range(len(up)):
        weights.add_expert(
            f"experts.{expert}",
            None if gate is None else native_weight(gate[expert], f"gate[{expert}]"),
            native_weight(up[expert], f"up[{expert}]"),
            native_weight(down[expert], f"down[{expert}]"),
            bias(gate_bias, expert, "gate_bias"),
            bias(up_bias, expert, "up_bias"),
            bias(down_bias, expert, "down_bias"),
            scale(gate_input_scales, expert),
            scale(up_input_scales, expert),
            scale(down_input_scales, expert),
        )
    weights.validate()
    return weights


@dataclass
class SharedTaps:
    """Outputs of the shared expert's stages; rows are tokens."""

    staged_x: StagedActivations
    #: bfloat16 [T, 2S], gate's columns first; [T, S] without a gate.
    h: Any
    #: bfloat16 [T, S].
    activation: Any
    staged_intermediate: StagedActivations
    #: bfloat16 [T, H].
    z: Any
    #: float32 [T]: what z is multiplied by.
    z_weight: Any


@dataclass
class StageTaps:
    """Outputs of all stages. Rows are sorted by expert; M of the T * K slots have one."""

    #: int32 [E+1]: rows of expert e are group_offsets[e] to group_offsets[e+1].
    group_offsets: Any
    #: int32 [M]: token * K + k of every row.
    slot_of_row: Any
    #: int32 [T*K]: the reverse; -1 where a slot has no row.
    row_of_slot: Any
    #: [M, H].
    staged_x: StagedActivations
    #: bfloat16 [M, 2I], gate's columns first; [M, I] without a gate.
    h: Any
    #: bfloat16 [M, I].
    activation: Any
    #: [M, I].
    staged_intermediate: StagedActivations
    #: bfloat16 [M, H], before routing weights.
    z: Any
    shared: SharedTaps | None = None

    def _trim(self) -> None:
        """Keeps the rows that were written."""
        rows = int(self.group_offsets[-1])
        self.slot_of_row, self.h, self.activation, self.z = (
            array[:rows] for array in (self.slot_of_row, self.h, self.activation, self.z)
        )
        self.staged_x, self.staged_intermediate = (
            StagedActivations(staged.format, **{name: array[:rows] for name, array in _parts(staged)})
            for staged in (self.staged_x, self.staged_intermediate)
        )


def _parts(staged: StagedActivations) -> Iterator[tuple[str, Any]]:
    """The arrays that are there, by name."""
    for field in fields(staged):
        if field.name != "format" and (array := getattr(staged, field.name)) is not None:
            yield field.name, array


class MoeLayer:
    """One MoE layer, prepared for one backend. It may be called from several threads at once.

    weights: of expert_weights() or a checkpoint. top_k: experts a token. activation: the function between the GEMMs,
    "swiglu", "swiglu-step", "geglu", "geglu-tanh", "relu2", "silu" or "gelu" with ",alpha=A", ",beta=B", ",limit=L"
    (gpt-oss: "swiglu,alpha=1.702,beta=1,limit=7"). weight_on_input: routing weights multiply the experts' input.
    activations: what activations become before a GEMM, "nvfp4", "nvfp4x2", "fp8" or "bf16".
    x_scale, intermediate_scale: where NVFP4's global scale of x and of the intermediate comes from; None: "static"
    where every expert has input scales, "dynamic-token" where none has.
    activation_rule: how block scales of "nvfp4" activations are chosen, "amax", "four-over-six" or "mse"; others than
    "amax" run on CPUs.
    backend: see backends(); "" is the best that can compute this layer, or the environment's FOURFOLD_BACKEND.

    Raises InvalidArgumentError where the pieces do not fit each other, UnsupportedError where no backend, or not the
    one that is named, can compute it, with the reason for each.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        top_k: int,
        activation: str = "swiglu",
        weight_on_input: bool = False,
        activations: ActivationFormat = "nvfp4",
        x_scale: ScalePolicy | None = None,
        intermediate_scale: ScalePolicy | None = None,
        activation_rule: ScaleRule = "amax",
        backend: str = "",
    ) -> None:
        config = _native.config_of_weights(weights, top_k, activation, weight_on_input)
        self._make(weights, config, activations, x_scale, intermediate_scale, activation_rule, backend)

    def _make(
        self,
        weights: ExpertWeights,
        config: _native.LayerConfig,
        activations: str,
        x_scale: str | None,
        intermediate_scale: str | None,
        activation_rule: str,
        backend: str,
    ) -> None:
        self._layer = _native.make_layer(
            weights, config, activations, x_scale or "", intermediate_scale or "", activation_rule, backend
        )
        self._shared_activations = _native.shared_activations(weights, activations)
        self._plans: OrderedDict[int, _native.LayerPlan] = OrderedDict()
        self._plans_lock = threading.Lock()

    @property
    def config(self) -> _native.LayerConfig:
        """hidden, intermediate, experts, top_k, activation, weight_on_input, shared_intermediate (0: none)."""
        return self._layer.config

    @property
    def activations(self) -> str:
        """The format of its activations."""
        return self._layer.activations

    @property
    def scale_policies(self) -> tuple[str, str]:
        """Of x and of the intermediate."""
        return self._layer.x_scale, self._layer.intermediate_scale

    @property
    def activation_rule(self) -> str:
        """How block scales of its activations are chosen."""
        return self._layer.activation_rule

    @property
    def backend(self) -> str:
        """The name of its backend."""
        return self._layer.backend

    @property
    def backend_reason(self) -> str:
        """Why this backend and none of the better ones."""
        return self._layer.reason

    @property
    def cuda_device(self) -> int | None:
        """The GPU that it computes on; None: the host."""
        return self._layer.cuda_device

    def __repr__(self) -> str:
        config = self.config
        return (
            f"MoeLayer(hidden={config.hidden}, intermediate={config.intermediate}, experts={config.experts}, "
            f"top_k={config.top_k}, activation={config.activation!r}, activations={self.activations!r}, "
            f"backend={self.backend!r})"
        )

    def plan(self, max_tokens: int) -> _native.LayerPlan:
        """The choice of kernels for up to `max_tokens` tokens: kernel, reason, workspace_bytes."""
        with self._plans_lock:
            plan = self._plans.get(max_tokens)
            if plan is None:
                plan = self._plans[max_tokens] = self._layer.plan(max_tokens)
                if len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return plan

    def update_weights(self, weights: ExpertWeights) -> None:
        """Replaces the weights in place; shapes and formats must be the same. No call may be under way on the host."""
        self._layer.update_weights(weights)

    def forward(
        self,
        x: Array,
        topk_ids: Array,
        topk_weights: Array,
        *,
        out: Any = None,
        out_dtype: OutputType = "bf16",
        plan: _native.LayerPlan | None = None,
        workspace: Any = None,
        status: Any = None,
        stream: int | None = None,
        taps: bool = False,
    ) -> Any:
        """x [T, H] bfloat16, topk_ids [T, K] int32 or int64, topk_weights [T, K] float32 -> y [T, H].

        An id of -1 contributes nothing. y is bfloat16, or float32 with out_dtype "f32" (for partial sums over ranks),
        of torch where x is, else of numpy; `out` is written where given. With taps=True: (y, StageTaps), bit for bit
        what a run without taps computes.

        On the host the call returns when y is there; ids out of range raise InvalidArgumentError, unless `status`, an
        int32 array [1], is given: then they count as -1 and set bit 0 of it. The GIL is released.

        A layer on a GPU takes device arrays and enqueues on `stream` (a number; None: the current stream of torch or
        cupy, else the default one), with a workspace of torch's, or `workspace`: at least plan.workspace_bytes bytes
        at a multiple of 256. Such a call neither allocates by itself nor waits, and can be captured in a CUDA graph.
        Arrays of frameworks other than torch need `workspace` for that; without it the call waits for its end. Arrays
        of the host are copied to the GPU and y back, and waited for. Ids out of range count as -1 there; `status` says so.

        `plan`: of a larger number of tokens, so that calls with different ones use the same kernels.
        Raises InvalidArgumentError for shapes, element types, layouts and places that do not fit.
        """
        tokens, _ = require_dimensions(x, "x", "[T, H]", 2)
        if plan is None:
            plan = self.plan(tokens)
        if out is None:
            out = empty_like(x, (tokens, self.config.hidden), self._output_element(out_dtype))
        if workspace is None and _arrays.torch_tensor(x) is not None and is_on_cuda(x):
            workspace = empty_like(x, (plan.workspace_bytes,), U8)
        tapped: dict[str, Any] = {}
        stages = self._make_taps(x, tokens, tapped) if taps else None
        found = self._layer.forward(
            plan,
            exported(x, "x"),
            exported(topk_ids, "topk_ids"),
            exported(topk_weights, "topk_weights"),
            exported_for_writing(out, "out"),
            None if workspace is None else exported_for_writing(workspace, "workspace"),
            None if status is None else exported_for_writing(status, "status"),
            {name: exported(array, name) for name, array in tapped.items()},
            _arrays.stream_of(x) if stream is None else stream,
        )
        if found != 0:
            raise InvalidArgumentError(
                f"topk_ids: expected -1 or experts from 0 to {self.config.experts - 1}, found others; "
                "pass status= to have them count as -1"
            )
        if stages is None:
            return out
        stages._trim()
        return out, stages

    @staticmethod
    def _output_element(out_dtype: str) -> str:
        if out_dtype not in (BF16, F32):
            raise InvalidArgumentError(f"out_dtype: expected bf16 or f32, found {out_dtype!r}")
        return out_dtype

    def _make_taps(self, like: Any, tokens: int, tapped: dict[str, Any]) -> StageTaps:
        """Arrays for all taps, by name in `tapped`, and as they are returned."""
        config = self.config
        rows = tokens * config.top_k

        def tap(name: str, shape: tuple[int, ...], element: str) -> Any:
            array = tapped[name] = empty_like(like, shape, element)
            return array

        def staged(name: str, format: Any, rows: int, cols: int) -> StagedActivations:
            shapes = _staged_shapes(format, rows, cols)
            return StagedActivations(
                format, **{part: tap(f"{name}.{part}", *shape) for part, shape in shapes.items()}
            )

        stages = StageTaps(
            group_offsets=tap("group_offsets", (config.experts + 1,), I32),
            slot_of_row=tap("slot_of_row", (rows,), I32),
            row_of_slot=tap("row_of_slot", (rows,), I32),
            staged_x=staged("staged_x", self.activations, rows, config.hidden),
            h=tap("h", (rows, config.h_columns), BF16),
            activation=tap("activation", (rows, config.intermediate), BF16),
            staged_intermediate=staged("staged_intermediate", self.activations, rows, config.intermediate),
            z=tap("z", (rows, config.hidden), BF16),
        )
        if config.shared_intermediate > 0:
            inner, format = config.shared_intermediate, self._shared_activations
            h_columns = inner * config.h_columns // config.intermediate
            stages.shared = SharedTaps(
                staged_x=staged("shared.staged_x", format, tokens, config.hidden),
                h=tap("shared.h", (tokens, h_columns), BF16),
                activation=tap("shared.activation", (tokens, inner), BF16),
                staged_intermediate=staged("shared.staged_intermediate", format, tokens, inner),
                z=tap("shared.z", (tokens, config.hidden), BF16),
                z_weight=tap("shared.z_weight", (tokens,), F32),
            )
        return stages


def _staged_shapes(format: str, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and elements of staged activations, by member."""
    if format == "bf16":
        return {"values": ((rows, cols), BF16)}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"row_scales": ((rows,), F32)}
    shapes["codes"] = ((rows, cols if format == "fp8" else cols // 2), U8)
    if format != "fp8":
        shapes["scales"] = ((rows, cols // 16), U8)
    if format == "nvfp4x2":
        shapes |= {"residual_codes": ((rows, cols // 2), U8), "residual_scales": ((rows, cols // 16), U8)}
    return shapes
