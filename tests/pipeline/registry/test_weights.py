"""The weights of a version: linked or copied once, refused when they changed, found where they lay before."""

from __future__ import annotations

import pytest
from support.registered import a_build, new_home, opened, registered
from support.released import ENVIRONMENT, a_model, write_weights

from pipeline.config.schema import Config
from pipeline.digests import digest_folder
from pipeline.errors import RegistryError
from pipeline.registry import versions
from pipeline.registry import weights as registry_weights
from pipeline.registry.client import artifact_uri, asking, local_folder
from pipeline.serving import serve

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


def test_registering_links_the_weights(home, tmp_path):
    """The version's weights are the judged files themselves: one inode, no second copy."""
    build = a_build(tmp_path)
    registered(build)
    released = versions.model_path(versions.versions(NAME)[0])
    assert released.is_relative_to(home / "artifacts" / NAME)
    for file in build.model_path.iterdir():
        assert (released / file.name).stat().st_ino == file.stat().st_ino


def test_weights_are_copied_where_links_are_impossible(home, tmp_path, monkeypatch):
    """On another file system the same bytes are there."""

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(registry_weights.os, "link", refuse)
    build = a_build(tmp_path)
    registered(build)
    copied = versions.model_path(versions.versions(NAME)[0]) / "model.safetensors"
    assert copied.read_bytes() == (build.model_path / "model.safetensors").read_bytes()
    assert copied.stat().st_ino != (build.model_path / "model.safetensors").stat().st_ino


def test_weights_that_changed_since_are_not_registered(home, tmp_path):
    """One byte of difference to what was judged stops the registration and leaves nothing behind."""
    build = a_build(tmp_path)
    run_id = opened(build)
    (build.model_path / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match="changed since it was judged"):
        versions.register(run_id, build)
    assert versions.versions(NAME) == []
    assert list((local_folder(artifact_uri(run_id)) / "models").iterdir()) == []


def another_unit(build, folder, weights):
    """The same build's key, made where the store was empty: its weights came out otherwise."""
    write_weights(folder, weights)
    config = Config.model_validate(build.config)
    unit = serve.served_unit(folder, config.serve, config.name, ENVIRONMENT)
    quantized = build.artifacts["quantize"].model_copy(update={"digest": digest_folder(folder)})
    return build.model_copy(
        update={
            "unit": unit,
            "model_path": folder,
            "artifacts": {**build.artifacts, "quantize": quantized},
            "verdict": build.verdict.model_copy(update={"unit_digest": unit.digest}),
        }
    )


def test_weights_of_another_unit_take_nobodys_place(home, tmp_path):
    """A second unit registered from the same run leaves the approved version's files as they are."""
    build = a_build(tmp_path)
    registered(build)
    versions.decide(NAME, "1", "approved", "tests", "")
    other = another_unit(build, a_model(tmp_path / "elsewhere" / "payload"), "other weights")
    assert versions.register(opened(build), other) == "2"
    for number, made in (("1", build), ("2", other)):
        version = versions.version(NAME, number)
        assert digest_folder(versions.model_path(version)) == version.model_digest
        assert version.model_digest == made.artifacts["quantize"].digest
    assert versions.release(NAME, "1").unit == build.unit


def test_a_changed_store_leaves_registered_weights_alone(home, tmp_path):
    """Whether the refused weights are another version's or this one's: what is served stays."""
    build = a_build(tmp_path)
    registered(build)
    served = versions.model_path(versions.version(NAME, "1"))
    weights = build.model_path / "model.safetensors"
    judged = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(judged + b"x")
    unit = build.unit.model_copy(update={"vllm_version": "9"})
    verdict = build.verdict.model_copy(update={"unit_digest": unit.digest})
    run_id = opened(build)
    assert versions.register(run_id, build.model_copy(update={"unit": unit, "verdict": verdict})) == "2"
    with pytest.raises(RegistryError, match="changed since it was judged"):
        versions.register(run_id, another_unit(build, build.model_path, "judged").model_copy(
            update={"model_path": a_model(tmp_path / "elsewhere" / "payload")}
        ))  # fmt: skip
    assert (served / "model.safetensors").read_bytes() == judged
    assert [folder for folder in served.parent.iterdir() if folder != served] == []


def test_damaged_weights_are_put_right(home, tmp_path):
    """A folder that isn't what its name says gives way to the judged files, in one step."""
    build = a_build(tmp_path)
    run_id = opened(build)
    place, digest = registry_weights.put(run_id, build)
    folder = local_folder(artifact_uri(run_id)) / place
    (folder / "config.json").unlink()
    assert registry_weights.put(run_id, build) == (place, digest)
    assert digest_folder(folder) == digest
    assert [beside.name for beside in folder.parent.iterdir()] == [digest]


def test_versions_from_before_keep_their_weights_place(home, tmp_path):
    """A version without the tag of its place has its weights under `model`; a new unit of its run lies beside them."""
    build = a_build(tmp_path)
    registered(build)
    found = versions.version(NAME, "1")
    before = versions.model_path(found).rename(local_folder(artifact_uri(found.run_id)) / "model")
    with asking() as client:
        client.delete_model_version_tag(NAME, "1", versions.PLACE)
    other = another_unit(build, a_model(tmp_path / "elsewhere" / "payload"), "other weights")
    versions.register(opened(build), other)
    assert versions.model_path(versions.version(NAME, "1")) == before
    assert digest_folder(before) == found.model_digest


def test_lost_weights_are_named(home, tmp_path):
    """A release whose folder is gone says where it was."""
    registered(a_build(tmp_path))
    found = versions.versions(NAME)[0]
    lost = versions.model_path(found)
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="not on this machine") as error:
        versions.model_path(found)
    assert error.value.problems[0].file == str(lost)
