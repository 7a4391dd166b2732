"""HTTP to our own servers on this machine: past any proxy of the environment, reading no certificates.

HTTP_PROXY would send even 127.0.0.1 elsewhere, and a client that may meet TLS takes 70 ms to make.
"""

from __future__ import annotations

import httpx


def client(url: str, timeout_s: float) -> httpx.Client:
    """A client whose requests start at `url`, an http:// address of ours."""
    return httpx.Client(base_url=url, timeout=timeout_s, verify=False, trust_env=False)  # noqa: S501 - no TLS here
