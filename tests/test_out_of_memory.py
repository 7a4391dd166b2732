"""pipeline.out_of_memory: which errors are about memory, and what is said of them."""

from __future__ import annotations

import pytest

from pipeline import out_of_memory
from pipeline.errors import ResourceError

TOLD = [
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", TOLD, ids=str)
def test_too_little_memory_names_what_needed_it_and_what_to_change(error: Exception):
    """One line of torch's words, the key, and the remedy that the caller knows."""
    with pytest.raises(ResourceError) as raised, out_of_memory.named("merging", "merge.merge_base", "set it"):
        raise error
    problem = raised.value.problems[0]
    assert problem.what.startswith("merging ran out of memory: ")
    assert "\n" not in problem.what
    assert (problem.key, problem.remedy) == ("merge.merge_base", "set it")


def test_a_librarys_advice_gives_way_to_torchs_words():
    """llm-compressor names settings of its own, which nobody can set here."""
    advice = RuntimeError("Sequential pipeline ran out of memory. Consider `sequential_targets`")
    advice.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(ResourceError) as raised, out_of_memory.named("quantizing", "key", "remedy"):
        raise advice
    assert raised.value.problems[0].what == "quantizing ran out of memory: CUDA out of memory. Tried to allocate 2 GiB"


def test_it_is_told_by_an_error_that_hides_it():
    """Ending a recording that ran out of memory may raise an error of its own."""
    assert out_of_memory.told(RuntimeError("shape mismatch")) is None
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert out_of_memory.told(error) == "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory")], ids=str)
def test_other_errors_pass_through(error: Exception):
    """An error that isn't torch's about memory isn't renamed."""
    with pytest.raises(type(error)) as raised, out_of_memory.named("merging", "key", "remedy"):
        raise error
    assert raised.value is error
