"""Rows as one stream of tokens; that its loss is each row's own is proved by test_train.py."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace

import pytest
from support import programs

from pipeline.finetune import loss
from pipeline.finetune.packing import Row

STREAM = """
import json
from array import array
from types import SimpleNamespace
from pipeline.finetune import loss
from pipeline.finetune.packing import Row
def row(ids, labels):
    return Row(array("i", ids), array("i", labels), 0, False)
rows = [row([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]), row([5, 6, 4, 3], [-100, -100, -100, 3])]
told = []
for shares in (True, False):
    stream = loss.inputs(rows, SimpleNamespace(shares_prefixes=shares))
    told.append({name: part.tolist() if hasattr(part, "tolist") else part for name, part in vars(stream).items()})
print(json.dumps(told))
"""


def test_passes_take_as_many_tokens_as_the_execution_says() -> None:
    """In order, whole rows, and no more rows than are asked for."""
    rows = [Row(array("i", [1] * length), array("i", [1] * length), 0, is_cut=False) for length in (4, 4, 6, 12, 1, 1)]
    execution = SimpleNamespace(tokens_a_pass=10)
    assert [[row.length for row in part] for part in loss.passes(rows, execution)] == [[4, 4], [6], [12], [1, 1]]
    assert [len(part) for part in loss.passes(rows, execution, most=1)] == [1] * 6


@pytest.mark.slow
def test_a_stream_is_rows_behind_each_other_with_their_common_beginning_first() -> None:
    """Positions go on behind the beginning, each row's end is known, and only tokens before one with loss are asked."""
    shared, plain = json.loads(programs.python(STREAM).splitlines()[-1])
    assert shared == {
        "ids": [5, 6, 7, 8, 9, 4, 3], "positions": [0, 1, 2, 3, 4, 2, 3], "ends": [0, 2, 5, 7], "at": [2, 3, 5],
        "targets": [8, 9, 3], "longest": 3, "has_prefix": True,
    }  # fmt: skip
    assert plain == {
        "ids": [5, 6, 7, 8, 9, 5, 6, 4, 3], "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3], "ends": [0, 5, 9], "at": [2, 3, 7],
        "targets": [8, 9, 3], "longest": 5, "has_prefix": False,
    }  # fmt: skip
