"""Logs as vLLM 0.32 writes them, and the line and remedy that are told."""

from __future__ import annotations

import pytest

from pipeline import serving_diagnosis

HEAD = f"{serving_diagnosis.START} 0.32.0\n"
PREFIX = "(EngineCore pid=77) ERROR 11-23 08:30:01 [core.py:1189] "


def death(tmp_path, text, how="ended with status 1"):
    """The problem told for a log."""
    log = tmp_path / "vllm.log"
    log.write_text(HEAD + text)
    return serving_diagnosis.of_death(log, how).problems[0]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("OSError: [Errno 98] Address already in use", "port"),
        (PREFIX + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB.", "uses the GPU"),
        (PREFIX + "ValueError: No available memory for the cache blocks.", "uses the GPU"),
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
    assert (
        serving_diagnosis.of_death(log, "ended with status 3").problems[0].what
        == "vLLM ended with status 3 without a word"
    )
    assert serving_diagnosis.of_silence(log, 5).problems[0].what.endswith("last words: none")
