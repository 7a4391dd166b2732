"""pipeline.out_of_memory: which errors are about memory, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs

from pipeline import out_of_memory, program
from pipeline.environments import interpreters
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The artefacts of a small model and of prepared rows."""
    folder = tmp_path_factory.mktemp("full")
    programs.tiny(folder / "base" / "payload", "--hidden", "512", "--layers", "4")
    (folder / "prepare" / "payload").mkdir(parents=True)
    for name in ("train", "val", "calibration"):
        rows = [
            {"id": f"{number:x}", "messages": [{"role": "user", "content": f"Is order {number} paid?"},
                                               {"role": "assistant", "content": f"no, {number * 7}"}]}
            for number in range(24)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prepare" / "payload" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {
        stage: programs.artifact(folder / place, stage, {})
        for stage, place in (("base", "base"), ("merge", "base"), ("prepare", "prepare"))
    }


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "config", "said", "key"),
    [
        ("finetune", {"finetune": {}, "sequence_len": 256, "seed": 1}, "bitsandbytes ended the program", None),
        ("quantize", {"quantize": {"max_calibration_tokens": 64}}, "quantizing ran out of memory: CUDA",
         "quantize.max_calibration_tokens"),
    ],
)  # fmt: skip
def test_a_full_gpu_is_told_by_the_stage(
    stage: str, config: dict, said: str, key: str | None, made: dict[str, dict], tmp_path: Path
):
    """With 24 MiB left torch raises while quantizing, and bitsandbytes ends the process that loads a base in 4 bits."""
    train = interpreters.find("train")
    command = [str(train.interpreter), str(programs.TESTS / "gpu" / "full_gpu.py"), f"pipeline.{stage}", "24"]
    with pytest.raises(ResourceError, match=said) as raised:
        program.run(command, programs.environ(), program.Request(config, made, tmp_path), lambda _event: None)
    (problem,) = raised.value.problems
    assert problem.key == key


def test_bitsandbytes_last_words_are_found_in_its_run(tmp_path: Path):
    """Behind a progress bar, before what others go on to write; not in an earlier run's part, nor where there is no log."""
    log = tmp_path / "log.txt"
    assert out_of_memory.that_ended(log, 0) is None
    log.write_text(
        "Loading: 58%Error out of memory at line 74 in file /src/csrc/ops.cu\nanother process\n", encoding="utf-8"
    )
    error = out_of_memory.that_ended(log, 0)
    assert error is not None
    (problem,) = error.problems
    assert problem.what.endswith("ended the program: Error out of memory at line 74 in file /src/csrc/ops.cu")
    assert (problem.file, "finetune.micro_batch_size" in (problem.remedy or "")) == (str(log), True)
    assert out_of_memory.that_ended(log, log.stat().st_size) is None
