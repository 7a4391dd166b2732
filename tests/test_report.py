from __future__ import annotations

import base64
import re
import struct
from html.parser import HTMLParser

import pytest
from sample_build import sample_build

from pipeline import report, report_content
from pipeline.artifacts import Build


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page_text(build) -> str:
    return report.html(build)


class Page(HTMLParser):
    """The tags and texts of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note the tag and what it would load."""
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Hold that tags close in order."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Note the text."""
        self.texts.append(data)


def test_the_page_is_whole_and_loads_nothing(page_text):
    """Every tag is closed, there is no script, and every picture is inside the page."""
    page = Page(page_text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)


def test_what_a_model_said_is_never_markup(page_text):
    """The base's '<script>' stands in the page as text."""
    assert "<script>" not in page_text
    assert "<script>alert(1)</script>" in "".join(Page(page_text).texts)


def test_the_page_says_verdict_scores_digest_and_next_step(build, page_text):
    """What a reviewer needs is there: verdict, figures with intervals, what is served, how to promote."""
    text = " ".join(" ".join(Page(page_text).texts).split())
    score = build.evaluations["candidate"].metrics["json_field_match"]
    for words in (
        "gate: pass",
        f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})",
        "base (Q4_1 GGUF)",
        build.unit.digest,
        "apache-2.0",
        "4f" * 32,
        "tunegate promote tickets",
        "train 171,000, holdout 28,000",
        "no incumbent yet",
    ):
        assert words in text, words


def test_the_plots_are_svg_and_the_same_every_time(build, page_text):
    """Pictures in the page depend on the build alone."""
    assert report.html(build) == page_text
    svg = base64.b64decode(re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page_text)[0])
    assert svg.lstrip().startswith(b"<?xml")


def test_saved_plots_are_pictures(build, tmp_path):
    """scores.png and load.png are written, wide enough to read."""
    written = report.save_plots(build, tmp_path / "plots")
    assert [path.name for path in written] == ["scores.png", "load.png"]
    for path in written:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20])[0] > 1000


def test_a_build_that_measured_nothing_is_still_rendered(build, tmp_path):
    """No evaluation, load test or verdict: a card, a page, an empty table and no plots, without an error."""
    bare = build.model_copy(update={"evaluations": {}, "loadtests": {}, "verdict": None, "artifacts": {}})
    assert "Nothing was evaluated." in report.model_card(bare)
    assert "Nothing was evaluated." in report.html(bare)
    assert report.scores_table(bare) == [["metric"], ["items"]]
    assert report.save_plots(bare, tmp_path) == []


def test_the_scores_table_is_metrics_by_systems(build):
    """One row a metric, one column a system in the order in which they come to be, plain text."""
    head, *rows = report.scores_table(build)
    assert head == ["metric", "base (Q4_1 GGUF)", "merged (before AWQ)", "candidate (AWQ, groups of 64)"]
    assert [row[0] for row in rows][:3] == ["json_valid", "json_field_match", "json_field_match/category"]
    assert rows[-1] == ["items", *["200, 0 failed"] * 3]
    assert all(
        re.fullmatch(r"[01]\.\d{3} \([01]\.\d{3} to [01]\.\d{3}\)", cell) for row in rows[:-1] for cell in row[1:]
    )


def test_the_gate_table_is_a_markdown_table(build):
    """One line a check, with outcome, rule, measured interval and why; a cell can't break the table."""
    lines = report.gate_table(build.verdict).splitlines()
    assert lines[0].startswith("**✅ pass** for the served unit")
    table = lines[2:]
    assert len(table) == 2 + len(build.verdict.checks)
    assert {line.count(" | ") for line in table} == {4}
    assert report.markdown_table(["a"], [["x | y\nz"]]).splitlines()[2] == "| x \\| y z |"


def test_the_card_fits_mlflows_note(build):
    """However long the answers, the card keeps its verdict and what to do, and stays within the limit."""
    items = [
        item.model_copy(update={"answer": "blah " * 400, "prompt": "why " * 400, "expected": "x " * 200})
        for item in build.evaluations["candidate"].items
    ]
    candidate = build.evaluations["candidate"].model_copy(update={"items": tuple(items)})
    long = build.model_copy(update={"evaluations": {**build.evaluations, "candidate": candidate}})
    for card in (report.model_card(build), report.model_card(long)):
        assert len(card) <= report.CARD_LIMIT
        assert "## Gate" in card
        assert "tunegate approve tickets" in card
        assert "licence: `apache-2.0`" in card


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a b", "`a b`"),
        ("a\n  b", "`a b`"),
        ("`x` y", "`` `x` y ``"),
        ("", "`  `"),
        ("x" * 50, f"`{'x' * 19}…`"),
    ],
)
def test_untrusted_text_stays_inside_its_code_span(text, want):
    """Line breaks fold, backticks get a longer fence, long text is cut."""
    assert report.code(text, 20) == want


def test_flips_come_first(build):
    """Examples begin with what the candidate lost against another system, each with every system's answer."""
    shown = report_content.examples(build, each=3)
    assert [example.kind for example in shown] == sorted(
        (example.kind for example in shown), key=list(report_content.EXAMPLE_ORDER).index
    )
    assert shown[0].kind == "lost"
    lost = {answer.role: answer.score for answer in shown[0].answers}
    assert lost["candidate"] < max(lost.values())
    assert set(lost) == {"base", "merged", "candidate"}
    assert max(sum(example.kind == kind for example in shown) for kind in report_content.EXAMPLE_ORDER) == 3


def test_each_step_has_a_paired_difference(build):
    """Fine-tuning and AWQ are told apart: what each did to the headline metric, paired."""
    tuned, awq = report_content.deltas(build)
    assert (tuned.step, awq.step) == ("fine-tuning: merged - base", "AWQ: candidate - merged")
    assert tuned.metric == "json_field_match"
    assert tuned.change.low > 0.5
    means = {role: found.metrics["json_field_match"].value for role, found in build.evaluations.items()}
    assert awq.change.value == pytest.approx(means["candidate"] - means["merged"])


def test_a_system_scored_on_other_items_is_not_compared_item_by_item(build):
    """An incumbent with fewer items is in the tables, not in the examples or differences."""
    short = build.evaluations["merged"].model_copy(
        update={"system": "incumbent", "items": build.evaluations["merged"].items[:50]}
    )
    more = build.model_copy(update={"evaluations": {**build.evaluations, "incumbent": short}})
    assert report.scores_table(more)[0][-1] == "incumbent (champion)"
    assert len(report_content.deltas(more)) == 2
    assert {answer.role for answer in report_content.examples(more, 1)[0].answers} == {
        "base",
        "merged",
        "candidate",
    }


def test_a_system_message_that_all_prompts_share_is_said_once(build):
    """Examples show the user's own words; where prompts begin differently they are shown whole."""
    head = "system: Triage the ticket.\nuser: "
    candidate = build.evaluations["candidate"]
    items = tuple(item.model_copy(update={"prompt": head + item.prompt}) for item in candidate.items)
    told = build.model_copy(
        update={"evaluations": {**build.evaluations, "candidate": candidate.model_copy(update={"items": items})}}
    )
    assert report_content.shared_prompt(told) == head
    assert report_content.examples(told, 1)[0].prompt == report_content.examples(build, 1)[0].prompt
    assert report.html(told).count("Triage the ticket.") == 1
    assert report_content.shared_prompt(build) == ""


def test_a_failed_build_is_not_told_to_promote(build):
    """Without a pass the next step is another build."""
    failed = build.model_copy(update={"verdict": build.verdict.model_copy(update={"outcome": "fail"})})
    card = report.model_card(failed)
    assert "tunegate promote" not in card
    assert "tunegate run CONFIG" in card
