"""`tunegate setup`: make the locked environments. `python3 -m pipeline.environments` does it before tunegate is there."""

from __future__ import annotations

import argparse

from pipeline.environments import install


def setup(options: argparse.Namespace) -> int:
    """Make the environments that aren't made from today's locks; the exit code is the installer's own."""
    device = ["--device", options.device] if options.device else []
    return install.main([*options.names, *device])
