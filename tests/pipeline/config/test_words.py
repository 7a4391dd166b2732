"""pydantic's findings in words."""

from __future__ import annotations

from pipeline.config import words


def test_truths_are_found_where_numbers_are_wanted_and_nowhere_else():
    """In sections, lists and lists of sections; not where a truth value is one of several kinds."""
    data = {
        "seed": True,
        "finetune": {"load_in_4bit": True, "gradient_checkpointing": False, "max_steps": False},
        "loadtest": {"max_concurrency": [1, True]},
        "gate": {"metrics": [{"metric": "accuracy", "required": False, "min": True}]},
        "serve": {"extra_args": {"flag": True}},
        "unknown": True,
    }
    assert list(words.truths(data)) == [
        ("seed",), ("finetune", "max_steps"), ("loadtest", "max_concurrency", 1), ("gate", "metrics", 0, "min"),
    ]  # fmt: skip


def test_what_is_allowed_has_an_example_where_the_field_has_one():
    """A form by its examples or in words; a list by its default."""
    pattern = {"type": "string_pattern_mismatch", "ctx": {"pattern": "x"}}

    def allowed(detail, *at):
        return words.allowed(detail, at, (), ())

    assert allowed(pattern, "serve", "kv_cache_memory") == "such as 512MiB or 1.5GiB"
    assert "up to 63 letters" in str(allowed(pattern, "name"))
    assert allowed(pattern, "kubernetes", "nothing") == "text matching x"
    assert allowed({"type": "tuple_type"}, "loadtest", "max_concurrency") == "a list, such as [1, 4, 8]"
    assert allowed({"type": "tuple_type"}, "data", "columns") == "a list"
