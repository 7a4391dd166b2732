"""What uv is told about the sources that pip is configured with."""

from __future__ import annotations

import os
import sys

import pytest

from pipeline.environments import uv
from pipeline.errors import EnvironmentMissing


def test_every_package_source_of_pip_reaches_uv():
    """Indexes, find-links, certificates, proxies and time limits arrive, joined as uv reads them."""
    listed = """:env:.default-timeout='180'
global.cert='/etc/ca.pem'
global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'
global.find-links='/wheels /more'
global.index-url='https://user:key@mirror.example/simple'
global.proxy='http://proxy.example:3128'
global.trusted-host='mirror.example'
global.disable-pip-version-check='1'
"""
    assert uv.from_pip(listed) == {
        "UV_HTTP_TIMEOUT": "180",
        "SSL_CERT_FILE": "/etc/ca.pem",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://user:key@mirror.example/simple",
        "ALL_PROXY": "http://proxy.example:3128",
        "UV_INSECURE_HOST": "mirror.example",
    }


def test_pips_order_of_precedence_is_kept():
    """An environment variable outranks a command's section, and that the global one, in any order."""
    assert uv.from_pip(":env:.find-links='/env'\nglobal.find-links='/global'\ninstall.find-links='/install'\n") == {
        "UV_FIND_LINKS": "/env"
    }
    assert uv.from_pip("install.find-links='/install'\nglobal.find-links='/global'\n") == {"UV_FIND_LINKS": "/install"}
    assert uv.from_pip("download.find-links='/other'\n") == {}


def test_what_is_set_for_uv_itself_wins(tmp_path, monkeypatch):
    """UV_FIND_LINKS is left as it is; pip's own setting is handed on only where uv has none."""
    (tmp_path / "pip.conf").write_text("[global]\nfind-links = /from-pip\ntimeout = 7\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("UV_HTTP_TIMEOUT", raising=False)
    monkeypatch.setenv("UV_FIND_LINKS", "/from-uv")
    found = uv.environ()
    assert found["UV_FIND_LINKS"] == "/from-uv"
    monkeypatch.delenv("UV_FIND_LINKS")
    assert uv.environ()["UV_FIND_LINKS"] == "/from-pip"


def test_a_uv_that_is_too_old_is_passed_over(tmp_path, monkeypatch):
    """Only a uv that knows the options used counts as there."""
    old = tmp_path / "uv"
    old.write_text("#!/bin/sh\necho uv 0.4.30\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    with pytest.raises(EnvironmentMissing, match="uv isn't there"):
        uv.find()
    old.write_text("#!/bin/sh\necho 'uv 0.13.9 (x86_64-unknown-linux-gnu)'\n")
    assert uv.find() == old


def test_a_python_without_venv_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Debian's Python has no venv module until a package is installed: the message says which."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'ensurepip is not available' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    with pytest.raises(EnvironmentMissing, match="ensurepip is not available") as caught:
        uv.bring(str(python))
    assert "python3-venv" in str(caught.value)


def test_no_network_is_told_with_what_to_check(tmp_path, monkeypatch, capfd):
    """Where pip finds no uv the error says what to look at."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    for key, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(EnvironmentMissing, match="pip could not install uv") as caught:
        uv.bring(sys.executable)
    assert "network" in str(caught.value)
    assert "uv" in capfd.readouterr().err
