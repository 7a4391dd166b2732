"""pipeline.quantize in its own environments, on a tiny Llama, and what vLLM makes of its folders."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from loopback import free_port
from stages import TESTS, artifact, environ, python, run_many

from pipeline import environments
from pipeline.digests import digest_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROOFS = TESTS / "quantize_proofs.py"
ENVIRONMENT = {"llmcompressor": "train", "autoawq": "autoawq"}
METHODS = pytest.mark.parametrize("method", list(ENVIRONMENT))
SENTENCE = "my card was charged twice for order A-1042 please refund the second payment of 19.99 to my account"
LINEAR_LAYERS = 14
PROMPT = 30


def conversation(number: int) -> dict:
    """One of 50 to 90 tokens."""
    words = SENTENCE.split()
    question = " ".join(words[(number * 5 + step * 3) % len(words)] for step in range(16))
    answer = json.dumps({"category": words[number % len(words)], "count": number})
    return {
        "id": f"{number:x}",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def config(method: str, **settings: object) -> dict:
    """What the flow hands the stage: 8 conversations of at most 48 tokens."""
    chosen = {"method": method, "num_calibration_samples": 8, "max_calibration_tokens": 48, **settings}
    return {"quantize": chosen, "seed": 1}


class Quantized:
    """What one method made in one process: stage folders and details by name."""

    def __init__(self, method: str, inputs: dict, folder: Path) -> None:
        tied = {"merge": inputs["merge"], "prepare": inputs["prepare"]}
        untied = {"merge": inputs["untied"], "prepare": inputs["prepare"]}
        asked = {
            "first": (config(method), tied),
            "again": (config(method), tied),
            "untied": (config(method, group_size=32), untied),
        }
        if method == "llmcompressor":
            asked["symmetric"] = (config(method, zero_point=False), tied)
        self.model = Path(inputs["merge"]["path"]) / "payload"
        self.folders = {name: folder / name for name in asked}
        for leftover in ("payload", "scratch/made"):  # as a killed run leaves them
            (self.folders["again"] / leftover).mkdir(parents=True)
            (self.folders["again"] / leftover / "model.safetensors").write_bytes(b"half")
            (self.folders["again"] / leftover / "half.json").write_bytes(b"half")
        requests = [(self.folders[name], *rest) for name, rest in asked.items()]
        details = run_many("pipeline.quantize", requests, folder, ENVIRONMENT[method])
        self.details = dict(zip(asked, details, strict=True))

    def payload(self, name: str = "first") -> Path:
        """The finished folder."""
        return self.folders[name] / "payload"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, dict]:
    """A merged model with tied embeddings, one without, and a prepared data set of 12 conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    python(PROOFS, "make", *(folder / name / "payload" for name in ("merge", "untied")))
    (folder / "prepare" / "payload").mkdir(parents=True)
    lines = [json.dumps(conversation(number)) + "\n" for number in range(12)]
    (folder / "prepare" / "payload" / "calibration.jsonl").write_text("".join(lines))
    return {
        name: artifact(folder / name, stage, {})
        for name, stage in (("merge", "merge"), ("untied", "merge"), ("prepare", "prepare"))
    }


@pytest.fixture(scope="module")
def rows(inputs) -> Path:
    """The calibration conversations."""
    return Path(inputs["prepare"]["path"]) / "payload" / "calibration.jsonl"


@pytest.fixture(scope="module")
def quantized(inputs, tmp_path_factory):
    """Gives what a method made, making it once."""
    made: dict[str, Quantized] = {}

    def get(method: str) -> Quantized:
        if method not in made:
            made[method] = Quantized(method, inputs, tmp_path_factory.mktemp(method))
        return made[method]

    return get


@pytest.fixture(scope="module")
def seen(quantized, rows, tmp_path_factory) -> dict:
    """What the train environment sees in the folders (see quantize_proofs.train)."""
    new, old = quantized("llmcompressor"), quantized("autoawq")
    folders = [
        new.payload("first"),
        new.payload("symmetric"),
        old.payload("first"),
        new.payload("untied"),
        old.payload("untied"),
    ]
    return json.loads(python(PROOFS, "train", new.model, rows, tmp_path_factory.mktemp("spoiled"), *folders))


@pytest.fixture(scope="module")
def seen_by_autoawq(quantized, inputs, rows, tmp_path_factory) -> dict:
    """What the autoawq environment sees (see quantize_proofs.autoawq)."""
    folder, made = tmp_path_factory.mktemp("unmended"), quantized("autoawq")
    request = folder / "request.json"
    asked = {"config": config("autoawq"), "inputs": inputs, "folder": str(folder / "work")}
    request.write_text(json.dumps(asked))
    arguments = (made.model, rows, folder / "scratch", made.payload(), request)
    return json.loads(python(PROOFS, "autoawq", *arguments, environment="autoawq"))


@METHODS
def test_the_result_is_near_the_original(quantized, method):
    """All samples are used, the group fits, every layer's error is one of rounding, and all is recorded."""
    detail = quantized(method).details["first"]
    assert (detail["method"], detail["group_size"], detail["linear_layers"]) == (method, 64, LINEAR_LAYERS)
    assert (detail["samples"], detail["trimmed"], detail["tokens"]) == (8, 8, 8 * 48)
    assert len(detail["layer_errors"]) == 2
    assert 0.05 < max(detail["layer_errors"]) < 0.4
    assert detail["perplexity_after"] < 3 * detail["perplexity_before"]


@METHODS
def test_the_same_request_gives_the_same_bytes(quantized, method):
    """Run again over what a killed run left, the stage gives the same digest; no path is in it."""
    made = quantized(method)
    assert digest_folder(made.payload("again")) == digest_folder(made.payload())
    assert "/" not in (made.payload() / "config.json").read_text()


@METHODS
def test_everything_but_the_weights_is_the_inputs(quantized, method):
    """Tokenizer, template and generation config are the input's bytes; config.json gains one key."""
    made = quantized(method)
    files = {path.name for path in made.model.iterdir()}
    assert {path.name for path in made.payload().iterdir()} == files
    for name in files - {"model.safetensors", "config.json"}:
        assert (made.payload() / name).read_bytes() == (made.model / name).read_bytes()
    written = json.loads((made.payload() / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == made.details["first"]["format"]
    assert written == json.loads((made.model / "config.json").read_text())


def test_embeddings_stay_tied_or_apart(quantized, seen):
    """lm_head is never quantized: not written with tied embeddings, written as it was without."""
    new, symmetric, old, *untied = seen["names"]
    for names in (new, symmetric, old):
        assert [name for name in names if "lm_head" in name or "embed" in name] == ["model.embed_tokens.weight"]
    for names in untied:
        assert "lm_head.weight" in names
    assert all(quantized(method).details["untied"]["group_size"] == 32 for method in ENVIRONMENT)


def test_zero_points_are_there_when_asked_for(seen):
    """With zero_point: false the folder has none; compressed-tensors reads it as the check does."""
    new, symmetric, *_ = seen["names"]
    assert sum(name.endswith("zero_point") for name in new) == LINEAR_LAYERS
    assert not any(name.endswith("zero_point") for name in symmetric)


def test_weights_that_autoawq_corrupts_are_refused(seen_by_autoawq):
    """Without the copy that AutoAWQ forgets on a CPU, its result doesn't pass for the model it came from."""
    assert "the quantizer corrupted the weights" in seen_by_autoawq["unmended"]
    assert "layer 0 adds something else" in seen_by_autoawq["unmended"]


@pytest.mark.parametrize(
    ("spoiled", "kind", "said"),
    [
        ("larger", "StageFailed", "layer 1 adds something else than the original's"),
        ("negative", "ModelError", "model.layers.1.mlp.down_proj.weight_scale: 128 scales aren't positive"),
        (
            "nan",
            "ModelError",
            "model.layers.1.mlp.down_proj.weight_scale: 2 of 128 values are NaN or infinite",
        ),
        ("infinite", "ModelError", "model.norm.weight: 64 of 64 values are NaN or infinite"),
        ("missing", "ModelError", "model.norm.weight is missing"),
    ],
)
def test_a_spoiled_folder_is_refused(seen, spoiled, kind, said):
    """One wrong tensor is enough, and is named; the intact folder passes."""
    assert seen["spoiled"]["intact"] is None
    assert seen["spoiled"][spoiled]["type"] == kind
    assert any(said in problem["what"] for problem in seen["spoiled"][spoiled]["problems"])


def test_autoawq_sees_the_models_own_rope_theta(seen_by_autoawq):
    """A config.json that only has transformers 5's rope_parameters keeps its theta on the way to AutoAWQ."""
    assert seen_by_autoawq["rope_theta"] == 50000
    assert math.isclose(seen_by_autoawq["frequency"], 50000 ** (-2 / 32), rel_tol=1e-6)


def test_both_environments_see_the_same_tokens(seen, seen_by_autoawq):
    """Calibration tokens are those of transformers' own tokenizer, in the old environment too."""
    assert seen["tokens"] == seen_by_autoawq["tokens"]
    assert len(seen["tokens"]) == 12
    assert seen["tokens"][0][0] == 1


@contextmanager
def served(model: Path, log: Path) -> Iterator[httpx.Client]:
    """A client of a vLLM that serves the folder on a port of its own."""
    port = free_port()
    command = [
        *environments.command(environments.find("serve"), "vllm.entrypoints.openai.api_server"),
        "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager",
    ]  # fmt: skip
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as sink, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        server = subprocess.Popen(command, env=environ("serve", **cpu), stdout=sink, stderr=sink)
        try:
            wait_until_ready(client, server, log)
            yield client
        finally:
            server.terminate()
            server.wait(60)


def wait_until_ready(client: httpx.Client, server: subprocess.Popen, log: Path) -> None:
    """Return when /health answers; fail with the log when the server ends, or after 10 minutes."""
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])


@METHODS
def test_vllm_serves_what_was_checked(quantized, seen, tmp_path, method):
    """Served over HTTP, tokens are as likely as by the unpacked weights, and the answers are the same."""
    expected = seen["meaning"][list(ENVIRONMENT).index(method)]
    with served(quantized(method).payload(), tmp_path / "vllm.log") as client:
        answers = [complete(client, text["ids"]) for text in expected]
    apart = [
        abs(one - other)
        for text, (likely, _) in zip(expected, answers, strict=True)
        for one, other in zip(text["logprobs"], likely, strict=True)
    ]
    size = [abs(value) for text in expected for value in text["logprobs"]]
    assert sum(apart) < 0.02 * sum(size)
    same = [text["answer"] == answer for text, (_, answer) in zip(expected, answers, strict=True)]
    assert sum(same) >= 3, (expected, answers)


def complete(client: httpx.Client, ids: list[int]) -> tuple[list[float], list[int]]:
    """Log-probabilities of a text's tokens after its first, and the greedy answer to its beginning."""
    asked = {"model": "m", "temperature": 0, "return_token_ids": True}
    likely = {**asked, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    choice = client.post("/v1/completions", json=likely).raise_for_status().json()["choices"][0]
    chances = [
        entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
    ]
    greedy = {**asked, "prompt": ids[:PROMPT], "max_tokens": 8}
    choice = client.post("/v1/completions", json=greedy).raise_for_status().json()["choices"][0]
    return chances, choice["token_ids"]
