"""A cluster's section by itself: the forms of names and quantities, and what holds unless one says so."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.config.kubernetes import (
    DnsLabel,
    DnsName,
    KubernetesConfig,
    LabelKey,
    LabelValue,
    PodConfig,
    Quantity,
    VariableName,
)
from pipeline.plan import steps

IMAGE = f"registry.example/tunegate@sha256:{'0a' * 32}"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (DnsLabel, "a"), (DnsLabel, "a-1"), (DnsLabel, "a" * 63),
        (DnsName, "a.b-c.9"), (DnsName, ".".join(["a" * 61] * 4)),
        (LabelKey, "app"), (LabelKey, "nvidia.com/mig-1g.5gb"), (LabelKey, "a_B.c"),
        (LabelValue, ""), (LabelValue, "eu_1.A"), (LabelValue, "x" * 63),
        (VariableName, "_a1"), (Quantity, "500m"), (Quantity, "1.5"), (Quantity, "200Gi"), (Quantity, "1e9"), (Quantity, "2k"),
    ],
)  # fmt: skip
def test_a_form_takes_what_kubernetes_takes(form, text):
    """Up to the longest label."""
    assert TypeAdapter(form).validate_python(text) == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (DnsLabel, ""), (DnsLabel, "a" * 64), (DnsLabel, "a-"), (DnsLabel, "A"), (DnsLabel, "a\n"),
        (DnsName, "a..b"), (DnsName, ".a"), (DnsName, ".".join(["a" * 62] * 4) + ".bcd"),
        (LabelKey, ""), (LabelKey, "a/b/c"), (LabelKey, "Upper.example/app"), (LabelKey, "x" * 64),
        (LabelValue, "-a"), (LabelValue, "a/b"), (LabelValue, "x" * 64),
        (VariableName, "1A"), (VariableName, "A B"), (VariableName, ""),
        (Quantity, ""), (Quantity, "-1"), (Quantity, "1GiB"), (Quantity, "1."), (Quantity, "1Ki "), (Quantity, "1ki"),
    ],
)  # fmt: skip
def test_a_form_refuses_what_kubernetes_refuses(form, text):
    """One letter too many, a wrong end, a unit of another tool, a line break behind the name."""
    with pytest.raises(ValidationError):
        TypeAdapter(form).validate_python(text)


@pytest.mark.parametrize(
    "image",
    ["tunegate:latest", "tunegate", f"tunegate@sha256:{'a' * 63}", f"tunegate@sha256:{'A' * 64}", f"{IMAGE}-x"],
)
def test_an_image_needs_its_whole_digest(image):
    """A tag may mean another image by the time that a stage's job starts."""
    assert KubernetesConfig(image=IMAGE).image == IMAGE
    with pytest.raises(ValidationError, match="image"):
        KubernetesConfig(image=image)


def test_the_image_is_all_that_must_be_said():
    """Every other key has a default, and the names are all tunegate's."""
    keys = [key for key, entry in KubernetesConfig.model_fields.items() if entry.is_required()]
    assert keys == ["image"]
    cluster = KubernetesConfig(image=IMAGE)
    names = {cluster.namespace, cluster.claim_name, cluster.service_account_name, cluster.secret_name}
    assert names == {"tunegate"}
    assert (cluster.storage, cluster.storage_class_name) == ("200Gi", None)
    assert (cluster.env, cluster.jobs, cluster.image_pull_secrets, cluster.flow) == ({}, {}, (), PodConfig())
    assert cluster.pod_watch_timeout_seconds < cluster.finished_job_ttl


def test_defaults_hold_by_the_sections_own_rules():
    """Pydantic doesn't look at defaults, and a cluster would."""
    cluster = KubernetesConfig(image=IMAGE)
    assert KubernetesConfig.model_validate(cluster.model_dump()) == cluster


def test_a_job_is_of_a_stage_that_runs_as_a_program():
    """All of the plan's stages may have one, and nothing else; what serves runs in the flow's pod."""
    stages = {
        step.stage
        for step in steps.all_steps(
            {"quantize": {"method": "awq", "backend": "llmcompressor"}, "evaluate": {"ledger_items": 1}}
        )
    }
    assert set(KubernetesConfig(image=IMAGE, jobs={stage: {} for stage in stages}).jobs) == stages
    for name in ("evaluate", "serve", "flow"):
        with pytest.raises(ValidationError, match=f"jobs.{name}"):
            KubernetesConfig(image=IMAGE, jobs={name: {}})


def test_a_count_stays_a_count_and_a_quantity_stays_text():
    """Kubernetes takes 2 and "2" alike, a digest of the config doesn't."""
    limits = {"cpu": 2, "memory": "8Gi", "nvidia.com/gpu": "1"}
    pod = PodConfig(resources={"limits": limits})
    assert pod.resources.limits == limits
    assert [type(amount) for amount in pod.resources.limits.values()] == [int, str, str]
    assert pod.resources.requests == {}


def test_tolerations_are_a_pods_own_words():
    """Keys of a pod's spec with text or seconds; a list in place of text is refused."""
    toleration = {"key": "gpu", "operator": "Exists", "tolerationSeconds": 30}
    assert PodConfig(tolerations=[toleration]).tolerations == (toleration,)
    with pytest.raises(ValidationError, match=r"tolerations\.0\.key"):
        PodConfig(tolerations=[{"key": ["gpu"]}])


@pytest.mark.parametrize("key", ["pod_watch_timeout_seconds", "finished_job_ttl"])
def test_a_wait_is_of_a_second_at_least(key):
    """None at all would take a job away before anybody reads its end."""
    assert getattr(KubernetesConfig(image=IMAGE, **{key: 1}), key) == 1
    with pytest.raises(ValidationError, match=key):
        KubernetesConfig(image=IMAGE, **{key: 0})


@pytest.mark.parametrize(
    "settings",
    [{"nodeSelector": {}}, {"flow": {"nodeSelector": {}}}, {"flow": {"resources": {"limit": {}}}}],
)
def test_kubernetes_own_spelling_of_a_pods_keys_is_unknown_at_every_depth(settings):
    """A selector that is passed over would put a job on any node."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        KubernetesConfig(image=IMAGE, **settings)


def test_keys_that_a_cluster_does_not_explain_are_described():
    """And every example of a name or a quantity is a right one; the image's shows where its digest stands."""
    properties = KubernetesConfig.model_json_schema()["properties"]
    assert {key for key, entry in properties.items() if "description" not in entry} <= {
        "namespace",
        "image_pull_secrets",
    }
    assert "@sha256:" in properties["image"]["examples"][0]
    for form in (DnsLabel, DnsName, Quantity):
        adapter = TypeAdapter(form)
        assert [adapter.validate_python(text) for text in adapter.json_schema()["examples"]]
