"""The plugin that lets vLLM serve 4-bit weights on a CPU without AVX-512, in the serve environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.environments import interpreters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proofs() -> dict:
    """The figures that tests/proofs/unpacked_proofs.py measured."""
    serve = interpreters.find("serve")
    ended = subprocess.run(
        [serve.interpreter, Path(__file__).parents[2] / "proofs" / "unpacked_proofs.py"],
        env=interpreters.child_environ(serve), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_layer_is_the_product_with_its_unpacked_weights(proofs: dict) -> None:
    """Asymmetric weights, as AWQ has them, and symmetric ones."""
    assert max(proofs["apart"]) < 1e-5


def test_vllms_own_kernel_is_replaced_only_where_it_is_missing(proofs: dict) -> None:
    """On a CPU with AVX-512 nothing changes."""
    assert proofs["disabled"] == ("" if proofs["has_kernel"] else "CPUWNA16LinearKernel")
