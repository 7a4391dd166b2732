"""What the real vLLM refuses: the fake only claims it. Its answers and its stop are in test_quantize_awq.py."""

from __future__ import annotations

import pytest
import stages

from pipeline import environments, serving
from pipeline.config import ServeConfig
from pipeline.errors import ServingError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_vllms_own_refusal_is_told_with_its_remedy(tmp_path, monkeypatch):
    """A length that the model wasn't made for: vLLM's words, and the setting to lower."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    model, environment = stages.tiny(tmp_path / "model"), environments.find("serve")
    serve = ServeConfig(max_model_len=100_000, kv_cache_memory="64MiB", enforce_eager=True)
    unit = serving.served_unit(model, serve, "tiny", environment)
    with pytest.raises(ServingError) as caught:
        serving.start(unit, model, serve, "tiny", tmp_path / "server", environment, keep=False, on_event=lambda _: None)
    assert "100000" in caught.value.problems[0].what
    assert "serve.max_model_len" in caught.value.problems[0].remedy
