"""Measure what tests/pipeline/serving/test_avx2.py asserts, in the serve environment: `python tests/proofs/unpacked_proofs.py`.

Prints one JSON object: for each kind of 4-bit weight how far a layer served by the plugin is from its weights' own
product, and whether the plugin put itself in vLLM's kernel's place on this CPU.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import torch
import tunegate_vllm_avx2
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

INPUTS, OUTPUTS, GROUP = 128, 64, 32


def parameter(data: torch.Tensor, packed_dim: int | None = None) -> Any:
    """An (out, in) parameter as vLLM's loader leaves it, in compressed-tensors' layout."""
    made = torch.nn.Parameter(data, requires_grad=False)
    made.input_dim, made.output_dim, made.packed_dim = 1, 0, packed_dim
    return made


def apart(*, zero_point: bool) -> float:
    """The largest difference between the plugin's product and that of the unpacked weights, both in float32."""
    torch.manual_seed(0)
    values = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.int32)
    zeros = torch.randint(0, 16, (OUTPUTS, INPUTS // GROUP), dtype=torch.int32)
    scales = torch.rand(OUTPUTS, INPUTS // GROUP) + 0.1
    kind = scalar_types.uint4 if zero_point else scalar_types.uint4b8
    layer = torch.nn.Module()
    layer.weight_packed = parameter(pack_quantized_values_into_int32(values, kind, 1), packed_dim=1)
    layer.weight_scale = parameter(scales.clone())
    if zero_point:
        layer.weight_zero_point = parameter(pack_quantized_values_into_int32(zeros, kind, 0), packed_dim=0)
    shape = (INPUTS, OUTPUTS)
    config = MPLinearLayerConfig(
        full_weight_shape=shape, partition_weight_shape=shape, weight_type=kind, act_type=torch.float32,
        group_size=GROUP, zero_points=zero_point,
    )  # fmt: skip
    kernel = tunegate_vllm_avx2._unpacking(CPUWNA16LinearKernel)(
        config, w_q_param_name="weight_packed", w_s_param_name="weight_scale", w_zp_param_name="weight_zero_point"
    )
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, INPUTS)
    middle = zeros.repeat_interleave(GROUP, 1) if zero_point else 8
    expected = x @ ((values - middle) * scales.repeat_interleave(GROUP, 1)).t()
    return float((kernel.apply_weights(layer, x) - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Measure and print."""
    from vllm.platforms import current_platform

    os.environ.pop(tunegate_vllm_avx2.DISABLED, None)
    tunegate_vllm_avx2.register()
    tunegate_vllm_avx2.register()
    current_platform.import_kernels()
    found = SimpleNamespace(
        apart=[apart(zero_point=True), apart(zero_point=False)],
        has_kernel=torch.cpu._is_avx512_supported(),
        disabled=os.environ.get(tunegate_vllm_avx2.DISABLED, ""),
    )
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
