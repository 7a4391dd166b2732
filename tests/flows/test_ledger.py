"""A loss ledger explains a verdict, and its lack costs none; its stage is the chain's test."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from support.released import a_config

from flows import ledger
from pipeline.errors import ConfigError, ModelError, ResourceError


@pytest.mark.parametrize("kind", [ResourceError, ConfigError])
def test_a_ledger_that_cannot_be_had_loses_no_verdict(monkeypatch, kind):
    """Neither for want of memory nor for a user's scorer; a broken model stops the build."""
    said = []
    monkeypatch.setattr(ledger, "ledger_step", lambda _config: "a step")
    for error, ends in ((kind, nullcontext()), (ModelError, pytest.raises(ModelError))):

        def asked(*_, error=error):
            raise error("it doesn't fit")

        monkeypatch.setattr(ledger, "_asked", asked)
        with ends:
            assert ledger.ledger_of(a_config(), "key", {}, None, {}, said.append) == ()
    assert [event["text"] for event in said] == ["no loss ledger: it doesn't fit"]
