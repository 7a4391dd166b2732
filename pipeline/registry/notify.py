"""The webhook that hears that a review waits, by a JSON POST. Its address is secret, so never printed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import httpx

from pipeline.config.schema import NotifyConfig

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every address at INFO

TIMEOUT_S = 10.0
TRIES = 3


def review_waits(summary: Mapping[str, Any], settings: NotifyConfig) -> bool:
    """POST a build's summary to the webhook; returns whether that took it. A deaf webhook never fails a build.

    The body holds `text` (which chat webhooks show) beside name, version, run_id, unit_digest and page.
    """
    if not settings.webhook_env:
        return False
    url = os.environ.get(settings.webhook_env, "").strip()
    if not url:
        log.warning("nobody was told that a review waits: %s of notify.webhook_env isn't set", settings.webhook_env)
        return False
    version = f"{summary['name']} version {summary['version']}"
    text = f"{version} passed its gate and waits for review: {summary['page']}"
    why = _post(url, {"text": text, **summary})
    if why:
        log.warning("nobody was told that a review waits: the webhook of %s %s", settings.webhook_env, why)
    return why is None


def _post(url: str, body: Mapping[str, Any]) -> str | None:
    """The failure, in words without the address; None when the webhook took the body."""
    try:
        with httpx.Client(timeout=TIMEOUT_S, transport=httpx.HTTPTransport(retries=TRIES - 1)) as client:
            answer = client.post(url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return f"can't be reached ({type(error).__name__})"
    return None if answer.is_success else f"answered {answer.status_code}"
