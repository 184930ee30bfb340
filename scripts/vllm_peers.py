#!/usr/bin/env python3
"""Peers for `fourfold bench` on Hopper: the same expert layers by vLLM's kernels, timed in the same run.

    marlin          NVFP4 weights, bf16 activations: Marlin as vLLM's fused MoE calls it: slots sorted by expert, gate/up
                    GEMM, SiLU and product, down GEMM with the routing weights, sum. Whole layer.
    triton_kernels  MXFP4 weights (a scale per 32: 5.6% fewer bytes), bf16 activations: matmul_ogs with its Hopper layout,
                    SiLU and product in the first GEMM, weights and sum in the second. **Routing is left out**: slots are
                    sorted and indices made before the clock starts, which favours it.
    humming         NVFP4 weights, bf16 activations: the indexed GEMMs of humming-kernels, with vLLM's sort and
                    activation, and its own weighted sum. Whole layer.

Weights are Gaussian and quantized here, an expert at a time. Routings are uniform and differ from call to call; experts
are handed out in turn, as in `fourfold bench`, so that one is hit again only after all others were. A call goes from x
(bf16), topk_ids and topk_weights to y; the calls of a rotation are captured into one CUDA graph, a sample is a replay,
and the median counts. Before it is timed, a case is compared with float32 sums over the decoded weights, on tokens spread
over the call: relative L2 at most 2e-2 (bf16 at every step: 5e-3 is usual).

vLLM itself isn't imported: FOLDER is its package folder, of which this needs _C_stable_libtorch.abi3.so,
_moe_C_stable_libtorch.abi3.so and third_party/triton_kernels. Signatures are those of vLLM 0.26 and humming-kernels
0.1.10. On Hopper the driver compiles Marlin from PTX on first use, Triton and humming compile for each shape: the first
run on a machine takes longer, its times do not.

Exit status: 0 done, 1 error, 2 usage, 3 a peer failed or computed wrong numbers, 77 no vLLM or no GPU here.

usage: vllm_peers.py [--shape NAMES] [--tokens LIST] [--json FILE] [--beside GRID_JSON]
                     [--peers marlin,triton_kernels,humming] [--vllm FOLDER] [--routing uniform]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

try:
    import torch
    import triton
    import triton.language as tl
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: expected PyTorch with CUDA, and Triton, which comes with it: pip install torch")
from bench_shapes import SHAPES, models_of, names_of, numbers_of
from torch_grouped import MOST_ERROR, ROTATION, line, routing, time_rotation, times_beside

DEVICE = "cuda"
CHECKED_TOKENS = 8
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E4M3_MAX = 448.0
SKIPPED = 77
EXTENSIONS = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")


# ---- weights ----


@dataclass
class Matrices:
    """A matrix an expert, in e2m1: value = code * scale of its block * scale of its expert.

    codes [E, N, K / 2] uint8, two values a byte, the even column in the low half; scales [E, N, K / block], e4m3 (NVFP4)
    or the exponent + 127 of a power of two as uint8 (MXFP4); expert_scales [E] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    expert_scales: torch.Tensor

    def decode(self, expert: int) -> torch.Tensor:
        """[N, K] float32."""
        codes = self.codes[expert].int()
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        values = torch.tensor(E2M1, device=codes.device)[codes & 7] * (1 - 2 * (codes >> 3))
        scales = self.scales[expert]
        factors = (scales.int() - 127).float().exp2() if scales.dtype == torch.uint8 else scales.float()
        blocks = values.view(*factors.shape, -1) * factors[..., None]
        return blocks.flatten(1) * self.expert_scales[expert]


def quantize(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] float32 -> codes, scales and expert scale of Matrices: NVFP4 for blocks of 16, MXFP4 for 32."""
    blocks = weight.view(weight.shape[0], -1, block)
    largest = blocks.abs().amax(-1)
    if block == 16:
        expert_scale = largest.max() / (E2M1[-1] * E4M3_MAX)
        scales = (largest / (E2M1[-1] * expert_scale)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        factors = scales.float() * expert_scale
    else:
        expert_scale = torch.ones((), device=weight.device)
        exponents = largest.log2().floor() - 2  # 2 is the exponent of 6, the largest value
        scales = (exponents + 127).to(torch.uint8)
        factors = exponents.exp2()
    magnitudes = torch.bucketize((blocks / factors[..., None]).abs(), torch.tensor(MIDPOINTS, device=weight.device))
    codes = (magnitudes + 8 * (blocks < 0)).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales, expert_scale


def gaussian_matrices(experts: int, rows: int, cols: int, block: int) -> Matrices:
    """Quantized N(0, 1 / cols) weights, an expert at a time: there is no float32 copy of the whole."""
    scale_type = torch.float8_e4m3fn if block == 16 else torch.uint8
    made = Matrices(
        torch.empty(experts, rows, cols // 2, dtype=torch.uint8, device=DEVICE),
        torch.empty(experts, rows, cols // block, dtype=scale_type, device=DEVICE),
        torch.empty(experts, dtype=torch.float32, device=DEVICE),
    )
    for expert in range(experts):
        codes, scales, expert_scale = quantize(torch.randn(rows, cols, device=DEVICE) / cols**0.5, block)
        made.codes[expert], made.scales[expert], made.expert_scales[expert] = codes, scales, expert_scale
    return made


# ---- vLLM's extensions ----


def vllm_folder(given: Path | None) -> Path | None:
    """Where vLLM's compiled extensions are; None where no folder is given and no package is installed."""
    if given is None:
        spec = importlib.util.find_spec("vllm")  # finds without importing: vLLM's dependencies may be absent
        if spec is None or not spec.submodule_search_locations:
            return None
        given = Path(next(iter(spec.submodule_search_locations)))
    missing = [name for name in EXTENSIONS if not (given / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{given}: expected the package folder of vLLM 0.26, with {' and '.join(EXTENSIONS)}, found no {missing[0]}; "
            "unzip them from its wheel, or give another folder as --vllm FOLDER"
        )
    return given


def load_extensions(folder: Path) -> None:
    for name in EXTENSIONS:
        torch.ops.load_library(str((folder / name).resolve()))


def vllm_version(folder: Path) -> str:
    """Of the metadata beside or in the folder; "unknown" where parts of a wheel were unpacked without it."""
    for metadata in [*folder.parent.glob("vllm-*.dist-info/METADATA"), folder / "METADATA"]:
        if metadata.is_file():
            for text in metadata.read_text().splitlines():
                if text.startswith("Version: "):
                    return text.removeprefix("Version: ")
    return "unknown"


def sort_slots(ids: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """vLLM's moe_align_block_size: slots of ids [T, K] int32 in the order of their experts, each expert's padded to a
    multiple of `block`; the expert of every block; and the number of padded slots [1]. All int32, all on the device."""
    most = ids.numel() + experts * (block - 1)
    if ids.numel() < experts:
        most = min(most, ids.numel() * block)

    def buffer(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    slots, block_experts, padded = buffer(most), buffer(-(-most // block)), buffer(1)
    torch.ops._moe_C.moe_align_block_size(ids, experts, block, slots, block_experts, padded, None)
    return slots, block_experts, padded


# ---- peers ----


@dataclass
class Setup:
    """What a peer is made for."""

    experts: int
    hidden: int
    intermediate: int
    slots: list[int]  # tokens * top_k of the calls to come
    folder: Path  # vLLM's


class Peer(Protocol):
    """An expert layer. `gate_rows` and `up_rows` say which rows of gate_up belong to which."""

    gate_up: Matrices
    down: Matrices
    gate_rows: slice
    up_rows: slice

    def prepare(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[Any, Any]:
        """What the clock leaves out: of ids [T, K] and weights [T, K], the two arguments of forward after x."""

    def forward(self, x: torch.Tensor, routed: Any, more: Any) -> torch.Tensor:
        """x [T, H] bf16 -> y [T, H] bf16."""


def scalar_type_id(exponent: int, mantissa: int, signed: bool, bias: int, finite_only: bool, nan_kind: int) -> int:
    """The number by which vLLM's operators know an element type: its fields side by side, the first in the low bits."""
    number, offset = 0, 0
    for value, bits in ((exponent, 8), (mantissa, 8), (signed, 1), (bias, 32), (finite_only, 1), (nan_kind, 8)):
        number |= int(value) << offset
        offset += bits
    return number


def marlin_scales(scales: torch.Tensor, factor: float) -> torch.Tensor:
    """scales [N, K / 16] e4m3 -> [K / 16, N], permuted and as Marlin reads them.

    A block of 64 columns is a transposed 8 x 8 square, so that a thread finds its scales side by side; within four, the
    middle two change places for its way of decoding two at a time. A byte has no sign and five bits of exponent: it is the
    upper bits of 2^7 * factor * scale as a half.
    """
    groups = scales.shape[1]
    square = scales.float().T.reshape(groups, -1, 8, 8).transpose(-1, -2)
    ordered = square.reshape(groups, -1, 2, 2).transpose(-1, -2).reshape(groups, -1)
    halves = (ordered * (factor * 2**7)).half()
    halves = torch.where(
        halves < 2, torch.zeros_like(halves), halves
    )  # would lose the exponent's upper bit, which is implied
    return ((halves.view(torch.int16).int() >> 7) & 255).to(torch.uint8).view(torch.float8_e4m3fn)


class MarlinMatrices:
    """The matrices of a layer in Marlin's layout.

    codes [E, K / 16, 2 * N] int32; scales [E, K / 16, N], a byte each; expert_scales [E] float32, with the powers of two
    that decoding leaves out.
    """

    def __init__(self, matrices: Matrices) -> None:
        experts, self.rows, half = matrices.codes.shape
        self.cols = 2 * half
        if self.rows % 64 or self.cols % 64:
            raise ValueError(
                f"Marlin: expected multiples of 64 rows and columns, found {self.rows} x {self.cols}; leave the shape out"
            )
        no_order = torch.empty(0, dtype=torch.int32, device=DEVICE)
        self.codes = torch.empty(experts, self.cols // 16, 2 * self.rows, dtype=torch.int32, device=DEVICE)
        self.scales = torch.empty(experts, self.cols // 16, self.rows, dtype=torch.float8_e4m3fn, device=DEVICE)
        largest = max(scales.float().max().item() for scales in matrices.scales)
        factor = 2.0 ** max(0, math.floor(math.log2(E4M3_MAX / largest)))
        for expert in range(experts):
            words = matrices.codes[expert].view(torch.int32).T.contiguous()
            self.codes[expert] = torch.ops._C.gptq_marlin_repack(words, no_order, self.cols, self.rows, 4, False)
            self.scales[expert] = marlin_scales(matrices.scales[expert], factor)
        # 126 is what the exponents of e2m1 and bf16 are apart, 7 is in the scales
        self.expert_scales = matrices.expert_scales * 2.0 ** (126 - 7) / factor


class Marlin:
    """NVFP4 weights by vLLM's moe_wna16_marlin_gemm."""

    BLOCK_ROWS = (8, 16, 32, 48, 64)
    E2M1_ID = scalar_type_id(exponent=2, mantissa=1, signed=True, bias=0, finite_only=True, nan_kind=0)

    def __init__(self, setup: Setup) -> None:
        load_extensions(setup.folder)
        self.experts, self.hidden, self.intermediate = setup.experts, setup.hidden, setup.intermediate
        self.gate_rows, self.up_rows = slice(0, setup.intermediate), slice(setup.intermediate, None)
        self.gate_up = gaussian_matrices(setup.experts, 2 * setup.intermediate, setup.hidden, 16)
        self.down = gaussian_matrices(setup.experts, setup.hidden, setup.intermediate, 16)
        self.first, self.second = MarlinMatrices(self.gate_up), MarlinMatrices(self.down)
        units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        self.locks = torch.zeros(4 * units, dtype=torch.int32, device=DEVICE)

    @staticmethod
    def version(folder: Path) -> str:
        return f"vllm {vllm_version(folder)}"

    def prepare(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids.int(), weights  # int32 is what vLLM's router gives

    def multiply(
        self,
        rows: torch.Tensor,
        into: torch.Tensor,
        matrices: MarlinMatrices,
        order: tuple,
        block: int,
        weights: torch.Tensor,
        top_k: int,
        weigh: bool,
    ) -> None:
        """rows [M, K] bf16, of which each is used top_k times -> into [M * top_k, N], slot by slot."""
        absent = None
        torch.ops._moe_C.moe_wna16_marlin_gemm(
            rows, into, matrices.codes, absent, matrices.scales, absent, matrices.expert_scales, absent, absent, absent,
            self.locks, *order, weights, block, top_k, weigh, self.E2M1_ID, rows.shape[0], matrices.rows, matrices.cols,
            True, False, True, False,  # all of K; no atomic sums, but float32 ones; zero points aren't float
            -1, -1, -1,  # its own choice of tiles and blocks
        )  # fmt: skip

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = ids.numel()
        rows_an_expert = slots / self.experts
        block = next((rows for rows in self.BLOCK_ROWS if rows_an_expert / rows < 0.9), self.BLOCK_ROWS[-1])
        order = sort_slots(ids, self.experts, block)
        h = x.new_empty(slots, 2 * self.intermediate)
        self.multiply(x, h, self.first, order, block, weights, ids.shape[1], False)
        activated = x.new_empty(slots, self.intermediate)
        torch.ops._C.silu_and_mul(activated, h)
        z = x.new_empty(slots, self.hidden)
        self.multiply(activated, z, self.second, order, block, weights, 1, True)
        y = torch.empty_like(x)
        torch.ops._moe_C.moe_sum(z.view(*ids.shape, self.hidden), y)
        return y


class TritonKernels:
    """MXFP4 weights by triton_kernels' matmul_ogs."""

    EXPERTS_AT_ONCE = 8  # a change of layout takes some ten times the bytes

    def __init__(self, setup: Setup) -> None:
        third_party = str(setup.folder / "third_party")
        if third_party not in sys.path:
            sys.path.append(third_party)
        from triton_kernels import matmul_ogs, routing
        from triton_kernels.matmul_ogs_details import opt_flags

        opt_flags.update_opt_flags_constraints({"split_k": 1})  # as vLLM sets it on Hopper
        self.ogs, self.routing = matmul_ogs, routing
        self.experts = setup.experts
        self.gate_rows, self.up_rows = slice(0, None, 2), slice(1, None, 2)  # the activation takes pairs of columns
        self.gate_up = gaussian_matrices(setup.experts, 2 * setup.intermediate, setup.hidden, 32)
        self.down = gaussian_matrices(setup.experts, setup.hidden, setup.intermediate, 32)
        self.first, self.first_precision = self.hopper_layout(self.gate_up)
        self.second, self.second_precision = self.hopper_layout(self.down)
        specs = matmul_ogs.FnSpecs("silu_product", _silu_product, ())
        self.activation = matmul_ogs.FusedActivation(specs, (), 2)

    @staticmethod
    def version(folder: Path) -> str:
        return f"of vllm {vllm_version(folder)}"

    def hopper_layout(self, matrices: Matrices) -> tuple[Any, Any]:
        """The weights [E, K, N] as triton_kernels' tensor, and a precision that holds their scales."""
        from triton_kernels.tensor import FP4, Storage, Tensor, convert_layout, wrap_torch_tensor
        from triton_kernels.tensor_details import layout

        def converted(stored: torch.Tensor, element: Any, kind: Any, options: dict) -> Any:
            """stored [E, N, bytes of K] -> the tensor [E, K, N] in layout `kind`."""
            pieces = [
                convert_layout(wrap_torch_tensor(piece.transpose(-2, -1), dtype=element), kind, **options)
                for piece in stored.split(self.EXPERTS_AT_ONCE)
            ]
            # the layouts leave K contiguous, which the kernel asks for: join the pieces so that it stays so
            data = torch.cat([piece.storage.data.mT for piece in pieces]).mT
            if data.stride(-2) != 1:
                raise ValueError(
                    f"triton_kernels: expected {kind.__name__} to keep K contiguous, found strides {data.stride()}; "
                    "take the triton_kernels of vLLM 0.26"
                )
            whole = stored.transpose(-2, -1)
            return Tensor(
                Storage(data, kind(whole.shape, **options)),
                dtype=pieces[0].dtype,
                shape=[len(stored), *pieces[0].shape[1:]],
            )

        values = converted(matrices.codes, FP4, *layout.make_default_matmul_mxfp4_w_layout(mx_axis=1))
        scale_layout = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        scales = converted(matrices.scales, None, *scale_layout)
        return values, self.ogs.PrecisionConfig(weight_scale=scales)

    def prepare(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[Any, Any]:
        """Slots in the order of their experts, by PyTorch, and blocks of rows by triton_kernels: outside the time."""
        experts = ids.flatten()
        order = torch.argsort(experts, stable=True)
        place = torch.argsort(order, stable=True)
        counts = torch.bincount(experts, minlength=self.experts).int()
        blocks = self.routing.compute_expt_data(counts, self.experts, ids.numel())
        routed = self.routing.RoutingData(weights.flatten()[order], counts, self.experts, ids.shape[1], blocks)
        order, place = order.int(), place.int()
        return routed, (self.routing.GatherIndx(order, place), self.routing.ScatterIndx(place, order))

    def forward(self, x: torch.Tensor, routed: Any, indices: Any) -> torch.Tensor:
        gather, scatter = indices
        h = self.ogs.matmul_ogs(
            x,
            self.first,
            None,
            routed,
            gather_indx=gather,
            precision_config=self.first_precision,
            fused_activation=self.activation,
        )
        return self.ogs.matmul_ogs(
            h,
            self.second,
            None,
            routed,
            scatter_indx=scatter,
            precision_config=self.second_precision,
            gammas=routed.gate_scal,
        )


@triton.jit(repr=lambda _: "_silu_product")
def _silu_product(values):
    """silu(even columns) * odd columns. The one that triton_kernels brings is gpt-oss's: with alpha, and (up + 1)."""
    gate, up = tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


class Humming:
    """NVFP4 weights by humming-kernels' indexed GEMM, as vLLM calls it; nvcc compiles a kernel for each size of call."""

    def __init__(self, setup: Setup) -> None:
        os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # builds in the background would disturb the clock
        os.environ.setdefault("HUMMING_COMPILER", "nvcc")  # the toolkit's; nvrtc would need a helper built first
        import humming.layer
        import humming.ops.moe

        load_extensions(setup.folder)
        self.method, self.mul_sum = humming.layer.HummingMethod, humming.ops.moe.moe_fused_mul_sum
        self.experts, self.hidden, self.intermediate = setup.experts, setup.hidden, setup.intermediate
        self.gate_rows, self.up_rows = slice(0, setup.intermediate), slice(setup.intermediate, None)
        self.gate_up = gaussian_matrices(setup.experts, 2 * setup.intermediate, setup.hidden, 16)
        self.down = gaussian_matrices(setup.experts, setup.hidden, setup.intermediate, 16)
        self.layer = torch.nn.Module()
        self.layer.register_buffer("locks", torch.zeros(1024, dtype=torch.int32, device=DEVICE))
        self.compute = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"}
        self.tuning: dict[str, list] = {}
        for name, matrices in (("w13", self.gate_up), ("w2", self.down)):
            self.add(name, matrices, setup.slots)

    @staticmethod
    def version(folder: Path) -> str:
        return f"humming-kernels {importlib.metadata.version('humming-kernels')}, vllm {vllm_version(folder)}"

    def add(self, name: str, matrices: Matrices, slots: list[int]) -> None:
        """The weights in humming's layout, and its kernels for calls of so many slots."""
        from humming import dtypes
        from humming.kernel.humming import HummingKernel
        from humming.schema import HummingWeightSchema

        experts, rows, half = matrices.codes.shape
        schema = HummingWeightSchema(
            b_dtype=dtypes.float4e2m1,
            bs_dtype=dtypes.float8e4m3,
            weight_scale_group_size=16,
            weight_scale_type="group_tensor",
        )
        meta = self.method.prepare_layer_meta(
            self.layer, rows, 2 * half, schema, num_experts=experts, pad_n_to_multiple=256, pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16, sublayer_name=name,
        )  # fmt: skip
        stored = {
            "weight": matrices.codes.view(torch.int32),
            "weight_scale": matrices.scales,
            "global_scale": matrices.expert_scales,
        }
        for part, tensor in stored.items():
            setattr(self.layer, f"{name}_{part}", torch.nn.Parameter(tensor, requires_grad=False))
        self.method.transform_humming_layer(self.layer, sublayer_name=name)
        tuning = self.method.get_default_tuning_configs(self.layer, gemm_type="indexed", sublayer_name=name)
        # it would compile a kernel for every size of call: these are the ones that will be called
        self.tuning[name] = [entry for entry in tuning if any(entry[0] < count <= entry[1] for count in slots)]
        os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "0"  # these by 16 threads, while nothing is timed
        HummingKernel.prepare_kernels(meta.to_str(), json.dumps(self.compute), json.dumps(self.tuning[name]))
        os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"

    def prepare(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids.int(), weights

    def block_rows(self, name: str, slots: int) -> int:
        return next(config["block_shape"][0] for low, high, config in self.tuning[name] if low < slots <= high)

    def multiply(self, name: str, rows: torch.Tensor, into: torch.Tensor, order: tuple, top_k: int, slots: int) -> None:
        """rows [M, K] bf16, of which each is used top_k times -> into [M * top_k, N], slot by slot."""
        self.method.forward_layer(
            self.layer, rows, into, None, *order, top_k=top_k, valid_shape_m=slots, compute_config=self.compute,
            tuning_config=self.tuning[name], sublayer_name=name,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = ids.numel()
        block, other = self.block_rows("w13", slots), self.block_rows("w2", slots)
        if block != other:
            raise ValueError(
                f"humming: expected both GEMMs of {slots} slots to take blocks of equal rows, found {block} and {other}; "
                "leave this number of tokens out"
            )
        order = sort_slots(ids, self.experts, block)
        h = x.new_empty(slots, 2 * self.intermediate)
        self.multiply("w13", x, h, order, ids.shape[1], slots)
        activated = x.new_empty(slots, self.intermediate)
        torch.ops._C.silu_and_mul(activated, h)
        z = x.new_empty(slots, self.hidden)
        self.multiply("w2", activated, z, order, 1, slots)
        return self.mul_sum(z.view(*ids.shape, self.hidden), weights)


# ---- measuring ----


class Dealer:
    """Gives experts out in turn, so that one is hit again only after all others were: `fourfold bench` does, or else L2
    would hold some of the weights of a small call."""

    def __init__(self, experts: int) -> None:
        self.deck = torch.randperm(experts, device=DEVICE)
        self.next = 0

    def deal(self, ids: torch.Tensor) -> torch.Tensor:
        """The same routing, of the experts whose turn it is."""
        hit = ids.unique()
        places = (self.next + torch.arange(hit.numel(), device=ids.device)) % self.deck.numel()
        self.next += hit.numel()
        names = torch.zeros_like(self.deck)
        names[hit] = self.deck[places]
        return names[ids]


def exact(layer: Peer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A few tokens in float32, expert by expert: x [T, H] -> y [T, H]."""
    y = torch.zeros(x.shape, device=x.device)
    for expert in ids.unique().tolist():
        gate_up, down = layer.gate_up.decode(expert), layer.down.decode(expert)
        for token, slot in (ids == expert).nonzero().tolist():
            h = gate_up @ x[token].float()
            activated = torch.nn.functional.silu(h[layer.gate_rows]) * h[layer.up_rows]
            y[token] += weights[token, slot] * (down @ activated)
    return y


def measure(layer: Peer, peer: str, model: str, tokens: int) -> dict:
    """A case as JSON has it; seconds of a call, or none where results are wrong."""
    experts, hidden, _, top_k = SHAPES[model]
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    dealer = Dealer(experts)
    routings = [
        (dealer.deal(ids), weights) for ids, weights in (routing(tokens, experts, top_k) for _ in range(ROTATION))
    ]
    prepared = [layer.prepare(ids, weights) for ids, weights in routings]
    few = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), device=DEVICE).round().long()
    ids, weights = routings[0]
    expected = exact(layer, x[few], ids[few], weights[few])
    found = layer.forward(x, *prepared[0])[few].float()
    error = ((found - expected).norm() / expected.norm()).item()
    result = {"peer": peer, "model": model, "tokens": tokens, "rel_l2": error, "seconds": None}
    if error <= MOST_ERROR:  # false for NaN, too
        result["seconds"] = statistics.median(time_rotation(layer, x, prepared))
    return result


PEERS: dict[str, Any] = {"marlin": Marlin, "triton_kernels": TritonKernels, "humming": Humming}


def run_model(
    name: str, model: str, tokens: list[int], folder: Path, beside: dict, results: list[dict], write: Callable[[], None]
) -> None:
    """All cases of a peer and a model: appended to results, printed and written one by one."""
    experts, hidden, intermediate, top_k = SHAPES[model]
    started = time.monotonic()
    layer = PEERS[name](Setup(experts, hidden, intermediate, [count * top_k for count in tokens], folder))
    torch.cuda.synchronize()
    print(f"{name}: {model} set up in {time.monotonic() - started:.1f} s", flush=True)
    for count in tokens:
        started = time.monotonic()
        results.append(measure(layer, name, model, count))
        text = line(results[-1], beside.get((model, count), {}))
        error, took = results[-1]["rel_l2"], time.monotonic() - started
        print(f"{name:<15} {text}   relative L2 {error:.1e}, took {took:.1f} s", flush=True)
        write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="A,B,C", help="names or aliases, with commas")
    parser.add_argument("--tokens", default="1,16,256,4096", help="numbers of tokens, with commas")
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    parser.add_argument("--beside", type=Path, help="JSON of `fourfold bench` to print beside")
    parser.add_argument("--peers", default="marlin,triton_kernels", help=f"of {', '.join(PEERS)}, with commas")
    parser.add_argument("--vllm", type=Path, help="vLLM's package folder; without it, the installed package's")
    parser.add_argument("--routing", default="uniform", choices=["uniform"])
    arguments = parser.parse_args()
    models = models_of(parser, arguments.shape)
    peers = names_of(parser, "--peers", arguments.peers, PEERS)
    tokens = numbers_of(parser, "--tokens", arguments.tokens)
    try:
        folder = vllm_folder(arguments.vllm)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if not torch.cuda.is_available():
        print("skipped: PyTorch finds no CUDA device on this machine")
        return SKIPPED
    if folder is None:
        print("skipped: no package vllm on this machine; install it, or give its folder as --vllm FOLDER")
        return SKIPPED
    torch.manual_seed(0)
    beside = times_beside(arguments.beside) if arguments.beside else {}
    versions: dict[str, str] = {}
    results: list[dict] = []

    def write() -> None:
        if arguments.json:
            report = {
                "torch": torch.__version__,
                "gpu": torch.cuda.get_device_name(),
                "routing": arguments.routing,
                "peers": versions,
                "cases": results,
            }
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")

    failed = False
    for name in peers:
        for model in models:
            try:
                if name not in versions:
                    versions[name] = PEERS[name].version(folder)
                    print(
                        f"{name}: {versions[name]}, torch {torch.__version__}, {torch.cuda.get_device_name()}",
                        flush=True,
                    )
                run_model(name, model, tokens, folder, beside, results, write)
            except Exception:  # whatever it is, the other peers and models are worth their time
                traceback.print_exc()
                print(f"{name}: {model} failed", flush=True)
                failed = True
            torch.cuda.empty_cache()
    write()
    return 3 if failed or not all(result["seconds"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
