"""`tunegate setup`: the installer's own command line, also with a store that can't be written."""

from __future__ import annotations

import pytest

from flows import cli
from pipeline.environments import install


def code_of(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("arguments", "names", "device"),
    [
        ((), install.DEFAULT, "cpu"),
        (("judges", "autoawq"), ["judges", "autoawq"], "cpu"),
        (("serve", "--device", "cuda"), ["serve"], "cuda"),
    ],
)
def test_names_and_device_reach_the_installer(monkeypatch, tmp_path, arguments, names, device):
    """The same defaults as `python3 -m pipeline.environments`; the store isn't touched."""
    made = []
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setattr(install, "install", lambda names, device, say: made.append((names, device)))
    assert code_of("setup", *arguments) == 0
    assert made == [(names, device)]


def test_an_unknown_name_is_answered_with_those_there_are(capsys):
    """As without tunegate."""
    assert code_of("setup", "trian") == 2
    assert "control, train, serve, autoawq" in capsys.readouterr().err
