"""A plugin of vLLM: 4-bit weights on a CPU without AVX-512, for which vLLM's build has no kernel.

Installed into the serving environment, found by its entry point, loaded in each of vLLM's processes. It unpacks the
weights once, after they are loaded, and multiplies them in the activations' dtype: the values are those of the 4-bit
kernel, for 4 bytes a weight in float32 and 2 in bfloat16. Where vLLM has its kernel, this does nothing.
"""

from __future__ import annotations

import os
from typing import Any

KERNEL = "cpu_gemm_wna16"
DISABLED = "VLLM_DISABLED_KERNELS"
MARK = "tunegate_unpacks"


def register() -> None:
    """Put the unpacking kernel in the place of vLLM's where that lacks its operator; may be called again."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    current_platform.import_kernels()
    if hasattr(torch.ops._C, KERNEL):  # noqa: SLF001 - where vLLM's operators live
        return
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    disabled = {name for name in os.environ.get(DISABLED, "").split(",") if name}  # child processes inherit it
    os.environ[DISABLED] = ",".join(sorted(disabled | {CPUWNA16LinearKernel.__name__}))
    if not hasattr(linear, MARK):
        linear.register_linear_kernel(_unpacking(CPUWNA16LinearKernel), current_platform._enum)  # noqa: SLF001
        setattr(linear, MARK, True)


def _unpacking(kernel: type) -> type:
    """The kernel with its weights unpacked; what it takes and how it reads a checkpoint stay vLLM's."""
    import torch
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    class UnpackedWNA16LinearKernel(kernel):  # type: ignore[misc]
        def _process_gptq_weights_w4a16(self, layer: Any) -> None:
            """Packed (in/8, out), scales (groups, out), zero points (groups, out/8) → (out, in) in the scales' dtype."""
            packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name).data
            zeros = getattr(layer, self.w_zp_name or "", None)
            kind = self.config.weight_type
            values = unpack_quantized_values_into_int32(packed.data, kind, 0)
            middle = kind.bias if zeros is None else unpack_quantized_values_into_int32(zeros.data, kind, 1)[:, None]
            groups, outputs = scales.shape
            grouped = values.view(groups, -1, outputs) - middle
            packed.data = (grouped.to(scales.dtype) * scales[:, None]).view(-1, outputs).t().contiguous()

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return torch.nn.functional.linear(x, getattr(layer, self.w_q_name), bias)

    return UnpackedWNA16LinearKernel
