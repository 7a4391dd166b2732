"""Passes as CUDA graphs: padding changes no loss, and a graph computes what its pass computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The figures of tests/proofs/graph_proofs.py."""
    base = programs.tiny(tmp_path_factory.mktemp("graphs") / "base")
    return json.loads(programs.python(Path(__file__).parents[2] / "proofs" / "graph_proofs.py", base).splitlines()[-1])


@pytest.mark.slow
def test_padding_changes_no_loss(proofs: dict) -> None:
    """Rows that nobody attends to and targets without loss; the sizes are the next multiples."""
    plain, padded = proofs["padding"]["losses"]
    assert padded == pytest.approx(plain, rel=1e-3)
    assert proofs["padding"]["tokens"][1] % 256 == 0
    assert proofs["padding"]["trained"][1] % (proofs["padding"]["tokens"][1] // 4) == 0


@pytest.mark.slow
def test_a_pass_that_finds_no_room_beside_smaller_ones_takes_theirs(proofs: dict) -> None:
    """All graphs are dropped and the larger one is recorded; with nothing to drop it is out of memory, which isn't hidden."""
    assert proofs["rooms"]["kept"][:4] == [[0, True], [1, True], [1, True], [2, True]]
    assert proofs["rooms"]["raised"] == "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.slow
def test_a_model_that_cannot_be_recorded_goes_on_as_it_is(proofs: dict) -> None:
    """No graph is kept, and none is tried again."""
    assert proofs["rooms"]["kept"][4] == [0, False]


@pytest.mark.gpu
def test_a_graph_computes_what_its_pass_computes(proofs: dict) -> None:
    """Loss and gradient of several passes of one shape, which is recorded once."""
    found = proofs["replays"]
    assert found["recorded"] == 1
    for plain, by_graph in found["losses"]:
        assert by_graph == pytest.approx(plain, rel=5e-3)
    assert len({plain for plain, _ in found["losses"]}) == 5
    assert max(found["apart"]) < 0.05


@pytest.mark.gpu
def test_a_replay_draws_new_masks(proofs: dict) -> None:
    """Dropout's seeds are data of the graph: the same rows have another loss each time."""
    assert len(set(proofs["replays"]["dropped"])) == 4
