"""`tunegate chat`: with what serves, with a candidate before its approval, past any proxy of the environment."""

from __future__ import annotations

import argparse
import builtins

import pytest
from support.registered import EASY, a_build, new_home, registered
from support.released import ENVIRONMENT, a_config, servers_under
from support.wire import fake_vllm

from flows.commands import chat
from pipeline.chat import client
from pipeline.errors import ReviewError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes

NAME = "tickets"


def options(*, candidate: bool = False, message: str | None = "hello", system: str | None = None):
    """The options of one chat."""
    return argparse.Namespace(name=NAME, candidate=candidate, message=message, system=system)


@pytest.fixture
def candidate(tmp_path, monkeypatch):
    """A registered version on which nobody decided, whose server says "version 1"."""
    new_home(tmp_path, monkeypatch)
    monkeypatch.setattr(runtimes, "environment_of", lambda config: ENVIRONMENT)
    yield registered(a_build(tmp_path, config=a_config(gate=EASY.model_dump())))
    assert servers_under(tmp_path) == []


@pytest.fixture
def heard(monkeypatch):
    """Every list of messages that a server was sent, where each answer is "aye"."""
    bodies = []

    def answer(_http, _model, messages):
        bodies.append([(message["role"], message["content"]) for message in messages])
        return iter(["a", "ye"])

    monkeypatch.setattr(chat, "stream", answer)
    return bodies


def test_a_chat_reaches_the_proxy_of_the_release_past_any_other(monkeypatch, capsys):
    """Also where it listens at an address that no list names."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with fake_vllm("m", answer="as learned") as url, client(url, 30) as http:
        assert chat._say(http, "m", [{"role": "user", "content": "hello"}]) == "as learned"
    assert "as learned" in capsys.readouterr().out


def test_a_server_that_refuses_or_is_gone_is_an_error_with_a_command(capsys):
    """With its answer, as far as it gave one."""
    messages = [{"role": "user", "content": "hello"}]
    with fake_vllm("m") as url, client(url, 30) as http, pytest.raises(ServingError, match="ended in 404") as refused:
        chat._say(http, "another", messages)
    with client("http://127.0.0.1:9", 30) as http, pytest.raises(ServingError, match="got no answer") as gone:
        chat._say(http, "m", messages)
    for error in (refused.value, gone.value):
        assert "tunegate logs" in error.problems[0].remedy


def test_a_candidate_is_started_for_the_chat_alone(candidate, capsys):
    """Before anybody approved it; nothing of it runs afterwards."""
    assert chat.chat(options(candidate=True)) == 0
    assert "version 1" in capsys.readouterr().out


def test_without_a_release_or_a_candidate_the_other_is_named(candidate):
    """Both errors name the command that leads on."""
    with pytest.raises(ServingError, match="no release is live") as nothing:
        chat.chat(options())
    assert "tunegate chat tickets --candidate" in nothing.value.problems[0].remedy
    versions.decide(NAME, candidate, "rejected", "ann", "no")
    with pytest.raises(ReviewError, match="no version waits for review"):
        chat.chat(options(candidate=True))


def test_a_conversation_keeps_what_was_said(candidate, heard, monkeypatch):
    """The system prompt stays in front; an empty line ends it, as the end of the input does."""
    for end in ("", EOFError()):
        lines = iter(["hello", "  and then?  ", end])

        def typed(_prompt, lines=lines):
            line = next(lines)
            if isinstance(line, EOFError):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", typed)
        heard.clear()
        assert chat.chat(options(candidate=True, message=None, system="Be brief.")) == 0
        first = [("system", "Be brief."), ("user", "hello")]
        assert heard[0][:2] == first
        assert heard[1][:4] == [*first, ("assistant", "aye"), ("user", "and then?")]
        assert len(heard) == 2
