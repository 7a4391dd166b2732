"""A command line run in this process."""

from __future__ import annotations

import pytest

from flows import cli


def ended(*arguments):
    """A command's exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code or 0
