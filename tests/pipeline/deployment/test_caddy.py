"""Caddy's config as a function of the settings; tests of the proxy run it for real."""

from __future__ import annotations

import json

import pytest

from pipeline.config.schema import PromoteConfig
from pipeline.deployment import caddy


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")],
        *[(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")],
    ],
)
def test_which_addresses_are_loopback(host, alone):
    """Only addresses that no other machine reaches do without a key."""
    assert caddy.is_loopback(host) is alone


def routes(promote: PromoteConfig):
    """The routes of its one server."""
    return caddy.caddy_config(promote)["apps"]["http"]["servers"]["tunegate"]["routes"]


def test_on_loopback_no_key_is_asked_for_and_elsewhere_first_of_all():
    """By the name of its variable: the key itself is in no config."""
    alone = routes(PromoteConfig(port=8080))
    shared = routes(PromoteConfig(host="0.0.0.0", port=8080, api_key_env="OUR_KEY"))
    assert shared[1:] == alone
    assert "Bearer {env.OUR_KEY}" in json.dumps(shared[0]["match"])
    assert shared[0]["handle"][0]["status_code"] == 401
    assert "OUR_KEY" not in json.dumps(alone)


def test_only_what_is_listed_is_handed_on():
    """Each endpoint in its own spelling, once something is there to answer; a 404 names them all."""
    *answered, models, health = routes(PromoteConfig(port=8080))
    unknown, nobody = answered[0]["handle"][0], answered[1]["handle"][0]
    assert all(" ".join(pair) in json.loads(unknown["body"])["error"]["message"] for pair in caddy.ALLOWED)
    assert (unknown["status_code"], nobody["status_code"]) == (404, 503)
    assert nobody["headers"]["Retry-After"] == [str(caddy.RETRY_AFTER_S)]
    rewrites = [route["handle"][1]["uri"] for route in [*answered[2:], models, health]]
    assert rewrites == [path for _, path in caddy.ALLOWED]


def test_settings_of_the_promotion_alone_change_nothing():
    """Loading a config that differs would lose requests, so only what the proxy needs is in it."""
    plain = caddy.caddy_config(PromoteConfig(port=8080))
    assert caddy.caddy_config(PromoteConfig(port=8080, drain_timeout=9, keep_old=True)) == plain
    assert caddy.caddy_config(PromoteConfig(port=8081)) != plain


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:8080"),
        ("::1", "http://[::1]:8080"),
        ("10.0.0.1", "http://10.0.0.1:8080"),
    ],
)
def test_a_clients_url_is_in_the_config_too(host, url):
    """What listens everywhere is reached by loopback; the URL of a running Caddy is read from its config."""
    promote = PromoteConfig(host=host, port=8080)
    assert caddy.client_url(promote) == url
    assert caddy.url_of(caddy.caddy_config(promote)) == url
