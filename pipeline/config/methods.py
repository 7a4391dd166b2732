"""The table METHODS: how a model gets fewer bits a weight, by method and by the tool (backend) that does it.

The config's choices, the plan's environment and packages, the stage's module and the report's words come from here.
A new method is an entry of METHODS, its name in `schema.QuantizeConfig`, and the module that the entry names.
Standard library only. The table lies in config, the lowest room that asks it: every room above may ask it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NONE = "none"  # quantize.method: the merged model is served as it is


@dataclass(frozen=True)
class Method:
    """One method by one backend.

    `label` is METHOD, TOOL as a person reads it; its part before the comma names the method alone. `program` is the dotted
    name of the module with `load`, `quantize` and EFFORT; it takes the `settings` of section quantize by name. `packages` are
    the distributions whose versions decide the result. `quant_method` is the format's name in the quantized config.json.
    `bytes_a_parameter` counts scales too. `fixed` settings have one possible value, each with the reason.
    """

    label: str
    environment: str
    packages: tuple[str, ...]
    program: str
    quant_method: str
    bytes_a_parameter: float
    settings: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    is_served_in_16_bits_only: bool = False

    @property
    def title(self) -> str:
        """The method's name without the tool's."""
        return self.label.partition(",")[0]


METHODS: Mapping[tuple[str, str], Method] = {
    ("awq", "llmcompressor"): Method(
        label="AWQ, llm-compressor",
        environment="train",
        packages=("llmcompressor", "compressed-tensors"),
        program="pipeline.quantize.llmcompressor",
        quant_method="compressed-tensors",
        bytes_a_parameter=0.6,
        settings=("zero_point", "observer"),
    ),
    ("awq", "autoawq"): Method(
        label="AWQ, AutoAWQ",
        environment="autoawq",
        packages=("autoawq",),
        program="pipeline.quantize.autoawq",
        quant_method="awq",
        bytes_a_parameter=0.6,
        settings=("zero_point",),
        fixed={
            "zero_point": (True, "AutoAWQ's format always has a zero point"),
            "observer": ("memoryless_minmax", "AutoAWQ searches by itself where to cut"),
        },
        is_served_in_16_bits_only=True,
    ),
}
ALIASES: Mapping[str, tuple[str, str]] = {"llmcompressor": ("awq", "llmcompressor"), "autoawq": ("awq", "autoawq")}
"""Values of quantize.method in version 0.1, which named the backend: their method and backend."""


def names() -> tuple[str, ...]:
    """The values of quantize.method, without aliases."""
    return (*dict.fromkeys(method for method, _ in METHODS), NONE)


def backends(method: str) -> tuple[str, ...]:
    """The backends of a method, the default first; none of NONE."""
    return tuple(backend for name, backend in METHODS if name == method)


def named(section: Mapping[str, Any]) -> tuple[str, str] | None:
    """Method and backend of a section quantize, the default backend filled in; None for NONE. Version 0.1's spelling too."""
    method, backend = ALIASES.get(section["method"], (section["method"], section.get("backend")))
    return None if method == NONE else (method, backend or next(iter(backends(method)), ""))


def of(section: Mapping[str, Any]) -> Method | None:
    """The record for a section quantize; None for NONE. Raises KeyError for a pair that the table lacks."""
    pair = named(section)
    return METHODS[pair] if pair else None


def needs_16_bits(quant_method: str | None) -> bool:
    """Whether vLLM serves a format, by its name in config.json, in 16 bits only."""
    return any(method.quant_method == quant_method and method.is_served_in_16_bits_only for method in METHODS.values())
