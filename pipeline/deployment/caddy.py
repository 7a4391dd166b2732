"""Caddy's config: which requests pass, which are refused and how, and where the rest is sent.

Errors have the form of OpenAI's, so that clients' libraries understand them. Pure functions of the settings.
"""

from __future__ import annotations

import ipaddress
import json
from contextlib import suppress
from typing import Any

from pipeline.config.schema import PromoteConfig

ALLOWED = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
)
RETRY_AFTER_S = 5
TRY_FOR_S = 5
MAX_BODY_BYTES = 16 * 2**20
# The longest time for requests through an address that the proxy has left. The drain, or a stop of Caddy, ends them
# sooner. It is the same for all settings: loading a config that differs in this alone would lose requests.
GRACE_PERIOD = "1h"


def caddy_config(promote: PromoteConfig) -> dict[str, Any]:
    """Caddy's whole config for these settings; it names the key's variable and never holds the key."""
    host = f"[{promote.host}]" if ":" in promote.host else promote.host
    server = {
        "listen": [f"{host}:{promote.port}"],
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "read_header_timeout": "30s",
        "routes": _routes(promote),
        "errors": {"routes": _error_routes()},
    }
    log = {"output": "file", "filename": "caddy.log", "roll_size_mb": 10, "roll_keep": 3}
    return {
        "admin": {"listen": "unix/admin.sock|0600", "config": {"persist": False}},
        "storage": {"module": "file_system", "root": "storage"},
        "logging": {"logs": {"default": {"writer": log, "level": "WARN"}}},
        "apps": {"http": {"grace_period": GRACE_PERIOD, "servers": {"tunegate": server}}},
    }


def _routes(promote: PromoteConfig) -> list[dict[str, Any]]:
    """Unknown paths, missing keys and a missing upstream are answered here; the rest is handed on."""
    endpoints = [{"method": [method], "path": [path]} for method, path in ALLOWED]
    listing = ", ".join(" ".join(pair) for pair in ALLOWED)
    unknown = _error(404, f"Unknown path or method; there are {listing}.", "not_found")
    routes: list[dict[str, Any]] = []
    if not is_loopback(promote.host):
        header = {"Authorization": [f"Bearer {{env.{promote.api_key_env}}}"]}
        refusal = _error(401, "The API key is missing or wrong.", "invalid_api_key")
        refusal["headers"]["WWW-Authenticate"] = ["Bearer"]
        routes.append({"match": [{"not": [{"header": header}]}], "handle": [refusal]})
    routes.append({"match": [{"not": endpoints}], "handle": [unknown]})
    nobody = _unavailable("No model is being served.")
    routes.append({"match": [{"vars": {"{file.upstream}": [""]}}], "handle": [nobody]})
    routes += [_passed(method, path) for method, path in ALLOWED]
    return [{**route, "terminal": True} for route in routes]


def _passed(method: str, path: str) -> dict[str, Any]:
    """The route of one allowed path; the server gets it in this spelling, however a client wrote it."""
    proxy = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": "{file.upstream}"}],
        # Only a refused connection is tried again, with the address read anew: a server that starts again is
        # waited for, and no request reaches a model twice.
        "load_balancing": {"try_duration": f"{TRY_FOR_S}s", "try_interval": "100ms"},
        "headers": {"request": {"delete": ["Authorization"]}},
        # vLLM closes idle connections after 5 s. Caddy closes them before, so none goes away under a request.
        "transport": {"protocol": "http", "keep_alive": {"idle_timeout": "2s"}, "compression": False},
        # flush_interval stays unset: event streams are flushed at once anyway. With -1 a request whose client
        # has gone would occupy the model to its end.
    }
    rewrite = {"handler": "rewrite", "uri": path}
    limit = {"handler": "request_body", "max_size": MAX_BODY_BYTES}
    return {"match": [{"method": [method], "path": [path]}], "handle": [limit, rewrite, proxy]}


def _error_routes() -> list[dict[str, Any]]:
    unreachable = {"match": [{"expression": "{http.error.status_code} in [502, 503, 504]"}]}
    large = {"match": [{"expression": "{http.error.status_code} == 413"}]}
    rest = _error("{http.error.status_code}", "{http.error.status_text}", "bad_request")
    too_large = _error(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", "too_large")
    unavailable = _unavailable("The model's server does not answer now.")
    return [
        {**unreachable, "handle": [unavailable], "terminal": True},
        {**large, "handle": [too_large], "terminal": True},
        {"handle": [rest]},
    ]


def _unavailable(message: str) -> dict[str, Any]:
    answer = _error(503, message, "service_unavailable", "service_unavailable_error")
    answer["headers"]["Retry-After"] = [str(RETRY_AFTER_S)]
    return answer


def _error(status: int | str, message: str, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """A handler that answers in the form of OpenAI's errors."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    headers = {"Content-Type": ["application/json"]}
    return {"handler": "static_response", "status_code": status, "headers": headers, "body": json.dumps(body)}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def client_url(promote: PromoteConfig) -> str:
    """The proxy's URL for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(promote.host, promote.host)  # noqa: S104 - read, not bound
    return f"http://[{host}]:{promote.port}" if ":" in host else f"http://{host}:{promote.port}"


def url_of(config: dict[str, Any]) -> str:
    """The URL for clients of a proxy with this config."""
    host, _, port = config["apps"]["http"]["servers"]["tunegate"]["listen"][0].rpartition(":")
    return client_url(PromoteConfig(host=host.strip("[]"), port=int(port)))
