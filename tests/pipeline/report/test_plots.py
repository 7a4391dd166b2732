"""A report's pictures."""

from __future__ import annotations

import struct

import pytest
from support.sample_build import full_build, sample_build

from pipeline.artifacts import Build
from pipeline.report import plots


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Build:
    return full_build(tmp_path_factory.mktemp("full"))


def test_saved_plots_are_pictures(build, full, tmp_path):
    """One for each section that has something to show, wide enough to read."""
    assert [path.name for path in plots.save_plots(build, tmp_path / "some")] == ["gate.png", "scores.png", "load.png"]
    paths = plots.save_plots(full, tmp_path / "plots")
    assert [path.name for path in paths] == ["gate.png", "ledger.png", "scores.png", "load.png"]
    for path in paths:
        picture = path.read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", picture[16:20])[0] > 1000
