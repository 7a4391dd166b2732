"""The real vLLM on a tiny random Llama: what the fake only claims about it."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support import programs
from support.released import processes_under
from support.wire import under_way

from pipeline.config.schema import ServeConfig
from pipeline.environments import interpreters
from pipeline.errors import ServingError
from pipeline.serving import serve as serving
from pipeline.serving.diagnosis import last_run
from pipeline.serving.server import ToServe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

NAME = "tiny"
# Where other work takes every core, TOKENS last four minutes; vLLM rightly cuts them off at its shutdown timeout.
PATIENCE_S = 400
SERVE = ServeConfig(
    max_model_len=1024, max_num_seqs=8, kv_cache_memory="64MiB", enforce_eager=True, shutdown_timeout=PATIENCE_S
)
TOKENS = 800
COMPILED = ("model", "vllm_compile_cache.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model in it, which is home as well."""
    folder = tmp_path_factory.mktemp("vllm")
    programs.tiny(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEGATE_HOME", str(folder / "home"))
        yield folder


def start(place, serve=SERVE, model=None):
    """Start it for real."""
    model = model or place / "model"
    environment = interpreters.find("serve")
    unit = serving.served_unit(model, serve, NAME, environment)
    to_serve = ToServe(unit, model, serve, NAME, place / "server", environment)
    server = serving.start(to_serve, keep=False, on_event=lambda _: None)
    return unit, server


def long_stream(server):
    """The end of a streamed completion of TOKENS tokens: finish reason, tokens by its usage, last line.

    Pieces aren't tokens: vLLM puts those that wait for a slow reader into one.
    """
    body = {
        "model": NAME,
        "prompt": "Hello",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
        *pieces, usage, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    finish_reason = json.loads(pieces[-1])["choices"][0]["finish_reason"]
    return finish_reason, json.loads(usage)["usage"]["completion_tokens"], last


def test_vllm_starts_answers_counts_and_finishes_what_is_in_flight_when_stopped(place):
    """The unit names its version, /metrics counts, and a stream survives the stop to its last token.

    On a busy machine the stream may be over when the stop comes; then it is tried again.
    """
    for _ in range(3):
        log = stopped_while_streaming(place)
        assert "mode=drain" in log
        assert "unrecognized" not in log
        if "draining in-flight requests count=1" in log:
            return
    pytest.fail("no stop found a request in flight")


def stopped_while_streaming(place) -> str:
    """The log of a server that was stopped while a stream was under way, which ended whole."""
    unit, server = start(place)
    try:
        assert httpx.get(f"{server.url}/version", timeout=30).json()["version"] == unit.vllm_version
        cards = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
        assert [(card["id"], card["max_model_len"]) for card in cards] == [(NAME, 1024)]
        with ThreadPoolExecutor(1) as pool:
            stream = under_way(pool, lambda: long_stream(server), lambda: serving.in_flight(server) == 1)
            serving.stop(server, PATIENCE_S)
            assert stream.result() == ("length", TOKENS, "[DONE]")
    finally:
        serving.stop(server, 0)
    assert not serving.is_alive(server)
    assert processes_under(place, "vllm") == []
    return "\n".join(last_run(server.log))


def test_vllms_own_refusal_is_told_with_its_remedy(place):
    """A length that the model wasn't made for: vLLM's words, and the setting to lower."""
    serve = SERVE.model_copy(update={"max_model_len": 100_000})
    with pytest.raises(ServingError) as caught:
        start(place, serve)
    assert "100000" in caught.value.problems[0].what
    assert "serve.max_model_len" in caught.value.problems[0].remedy


def test_the_same_bytes_in_another_folder_start_from_what_was_compiled_before(place, tmp_path):
    """A promotion serves from another folder than the evaluation did, and vLLM's key of its compiled graph is the same.

    On a CPU vLLM 0.32 finds the file and can't load it (its backend there returns a plain function); what Inductor made is
    found all the same.
    """
    moved = shutil.copytree(place / "model", tmp_path / "moved", copy_function=os.link)
    cache = place / "home" / "vllm-cache" / "torch_compile_cache"
    serve = SERVE.model_copy(update={"enforce_eager": False})
    kept = []
    for model in (place / "model", moved):
        _, server = start(place, serve, model)
        serving.stop(server, 1)
        kept.append({path.relative_to(cache) for path in cache.rglob("*") if path.name in COMPILED})
    assert kept[0] == kept[1] != set()
    told = re.findall(
        r"(?:Directly load AOT compilation from path|load failure from) \S+", "\n".join(last_run(server.log))
    )
    assert [Path(line.split()[-1].rstrip(",")).relative_to(cache) in kept[0] for line in told] == [True]


def test_a_model_in_two_parts_answers_as_the_whole_one_does(place):
    """Tensor parallelism through the same interface, each part a process with a core of its own; both end with the server."""
    answers = []
    for parts in (1, 2):
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(parts))}
        serve = SERVE.model_copy(update={"tensor_parallel_size": parts, "env": bound, "dtype": "float32"})
        _, server = start(place, serve)
        try:
            body = {"model": NAME, "prompt": "Which category", "max_tokens": 8, "temperature": 0}
            answers.append(
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
            )
        finally:
            serving.stop(server, 1)
        assert processes_under(place, "vllm") == []
    assert answers[0] == answers[1]
