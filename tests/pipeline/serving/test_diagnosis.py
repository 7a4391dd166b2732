"""Logs as vLLM 0.32 writes them, and the line and remedy that are told."""

from __future__ import annotations

import pytest

from pipeline.serving import diagnosis

HEAD = f"{diagnosis.START} 0.32.0\n"
PREFIX = "(EngineCore pid=77) ERROR 11-23 08:30:01 [core.py:1189] "


def death(tmp_path, text, how="ended with status 1"):
    """The problem told for a log."""
    log = tmp_path / "vllm.log"
    log.write_text(HEAD + text)
    return diagnosis.of_death(log, how).problems[0]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("OSError: [Errno 98] Address already in use", "port"),
        (PREFIX + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB.", "uses the GPU"),
        (PREFIX + "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
         "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name).",
         "serve.tensor_parallel_size"),
        (PREFIX + "ValueError: Free memory on device cuda:0 (40.12/79.19 GiB) on startup is less than desired GPU memory "
         "utilization (0.92, 72.85 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
         "serve.extra_args.gpu_memory_utilization"),
        (PREFIX + "ValueError: To serve at least one request with the model's max seq len (8192), (1.00 GiB KV cache is "
         "needed, which is larger than the available KV cache memory (0.50 GiB). Based on the available memory, the "
         "estimated maximum model length is 4096.", "raise serve.kv_cache_memory, or lower serve.max_model_len"),
        (("Value error, World size (2) is larger than the number of available GPUs (1) in this node. If this is "
         "intentional and you are using:"), "number of devices"),
        ("Value error, Total number of attention heads (9) must be divisible by tensor parallel size (2).", "divides"),
        (PREFIX + "ValueError: Available memory on node 0 (1.0/16.0 GiB) on kv cache allocation is less than "
         "requested memory for kv (4.0 GiB).", "serve.kv_cache_memory"),
        (PREFIX + "ValueError: The model's max seq len (8192) is larger than the maximum number of tokens that "
         "can be stored in KV cache (400).", "raise serve.kv_cache_memory"),
        ("Value error, User-specified max_model_len (9000) is greater than the derived max_model_len (8192)",
         "lower serve.max_model_len"),
        ("Value error, Model architectures ['FooForCausalLM'] are not supported for now.", "base_model"),
        ("api_server.py: error: unrecognized arguments: --nonsense", "serve.extra_args"),
        ("ModuleNotFoundError: No module named 'vllm'", "make setup"),
        ("OSError: [Errno 28] No space left on device", "tunegate gc"),
    ],
)  # fmt: skip
def test_known_deaths_are_told_with_their_remedy(tmp_path, line, remedy):
    """The telling line is found among others, without vLLM's prefix, and the remedy names the setting."""
    rest = (
        PREFIX + "Traceback (most recent call last):\n" + line + "\nRuntimeError: Engine core initialization failed. "
    )
    found = death(tmp_path, rest + "See root cause above.\n")
    assert line.removeprefix(PREFIX) in found.what
    assert remedy in found.remedy
    assert found.file.endswith("vllm.log")


OUT = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 40.00 GiB. GPU 0 has a total capacity of 79.19 GiB"


@pytest.mark.parametrize(
    ("frames", "last", "told", "remedy"),
    [
        (("gpu_worker.py:424 load_model", "gpu_model_runner.py:5300 load_model"), OUT, OUT, "quantize"),
        (("core.py:251 _initialize_kv_caches", "gpu_worker.py:465 determine_available_memory",
          "gpu/model_runner.py:680 profile_run"), OUT, OUT, "serve.max_num_seqs, serve.max_model_len"),
        (("core.py:270 _initialize_kv_caches", "gpu_worker.py:733 initialize_from_config",
          "gpu_model_runner.py:7600 initialize_kv_cache", "gpu_model_runner.py:7250 _allocate_kv_cache_tensors"),
         OUT, OUT, "lower serve.kv_cache_memory"),
        (("core.py:270 _initialize_kv_caches", "gpu_worker.py:780 compile_or_warm_up_model",
          "gpu_model_runner.py:6760 capture_model"), "torch.AcceleratorError: CUDA error: out of memory",
         "CUDA error: out of memory", "serve.max_num_seqs: lower that or serve.kv_cache_memory"),
        (("core.py:270 _initialize_kv_caches", "gpu_worker.py:860 compile_or_warm_up_model"),
         ("RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering "
         "`max_num_seqs` or `gpu_memory_utilization` when initializing the engine."), "warming up sampler", "serve.max_num_seqs"),
        ((), OUT, OUT, "stop what else uses the GPU"),
    ],
)  # fmt: skip
def test_a_full_gpu_is_told_with_what_vllm_was_at(tmp_path, frames, last, told, remedy):
    """The same words come for weights, KV cache and CUDA graphs; vLLM's traceback tells which, and so what to lower."""
    text = PREFIX + "EngineCore failed to start.\n" + PREFIX + "Traceback (most recent call last):\n"
    for frame in frames:
        place, _, function = frame.partition(" ")
        file, _, line = place.partition(":")
        text += f'{PREFIX}  File "/site/vllm/v1/worker/{file}", line {line}, in {function}\n{PREFIX}    self.x()\n'
    found = death(
        tmp_path, text + PREFIX + last + "\nRuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert told in found.what
    assert remedy in found.remedy


def test_weights_that_do_not_fit_are_told_by_the_error_and_not_by_vllms_advice(tmp_path):
    """VLLM logs flags that we don't have, and then raises; the error is shorter and the remedy ours."""
    advice = (
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for weights, "
        "increasing --tensor-parallel-size, or using --quantization. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more tips. (original error: CUDA out of memory. "
        "Tried to allocate 112.00 MiB.)"
    )
    frame = '  File "/site/vllm/v1/worker/gpu_model_runner.py", line 5300, in load_model'
    found = death(tmp_path, "".join(f"{PREFIX}{line}\n" for line in (advice, frame, OUT)))
    assert found.what.endswith(OUT)
    assert "serve.tensor_parallel_size" in found.remedy


def test_of_an_unknown_death_the_first_cause_is_told(tmp_path):
    """Not the error that repeats it in another process."""
    text = (
        f"{PREFIX}Traceback (most recent call last):\n{PREFIX}TypeError: the cause\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    assert "vLLM ended with status 1: TypeError: the cause" in death(tmp_path, text).what


def test_a_kill_without_words_points_at_memory(tmp_path):
    """The system's out-of-memory killer leaves no line in the log."""
    found = death(tmp_path, "INFO all is well\n", "killed by signal 9")
    assert "memory ran out" in found.what
    assert "serve.kv_cache_memory" in found.remedy


def test_only_the_last_start_counts(tmp_path):
    """An old death in the same log isn't told again; a server without a word is said to be so."""
    log = tmp_path / "vllm.log"
    log.write_text(f"{HEAD}ValueError: old\n{HEAD}")
    assert diagnosis.of_death(log, "ended with status 3").problems[0].what == "vLLM ended with status 3 without a word"
    assert diagnosis.of_silence(log, 5).problems[0].what.endswith("last words: none")
