from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from support.sample_build import full_build, sample_build

from pipeline.artifacts import Build, PromptResult
from pipeline.report import plots, render


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Build:
    return full_build(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def page_text(build) -> str:
    return render.html(build)


@pytest.fixture(scope="module")
def full_text(full) -> str:
    return render.html(full)


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


def words(text: str) -> str:
    """A page's text in one line."""
    return " ".join(" ".join(Page(text).texts).split())


def test_the_page_is_whole_and_loads_nothing(page_text, full_text):
    """Every tag is closed, there is no script, and every picture is inside the page."""
    for text in (page_text, full_text):
        page = Page(text)
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
    text = words(page_text)
    score = build.evaluations["candidate"].metrics["json_field_match"]
    for part in (
        "gate: pass",
        "Passes: all 9 checks hold.",
        f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})",
        "base (Q4_1 GGUF)",
        build.unit.digest,
        "apache-2.0",
        "4f" * 32,
        "tunegate promote tickets",
        "train 171,000, holdout 28,000",
        "holdout rows near a training row 5",
        "holdout rows inside a training row 0",
        "benchmark documents in training 0 of 14,042",
        "no incumbent yet",
    ):
        assert part in text, part


def test_a_reviewer_reads_it_in_the_order_of_a_decision(full, full_text):
    """Verdict, then the prompts that broke since the champion, then the others, gate, ledger and so on; in Markdown too."""
    order = [
        "Fails: broken prompts", "Broken since the champion", "refund period", "not held before", "another's address", "Gate",
        "Loss ledger", "AWQ lost most: json_field_match -0.087", "Scores as served", "Slices", "lm-eval", "LLM judge", "Load",
        "Answers side by side", "Lost: another system", "Won: better", "Digests", "Next",
    ]  # fmt: skip
    for text in (words(full_text), render.markdown(full)):
        at = 0
        for part in order:
            assert part in text[at:], part
            at = text.index(part, at)


def test_names_from_files_are_never_markup(full):
    """A prompt, a slice's value, a task's name, a judge's, a check's and a waiver's words stand as text, in Markdown as code."""
    evil = "<i>x</i>|`y`[z](http://z)"
    candidate = full.evaluations["candidate"]
    items = tuple(
        row.model_copy(update={"columns": {evil: evil}} if n % 2 else {}) for n, row in enumerate(candidate.items)
    )
    first, *rest = full.verdict.checks
    checks = (first.model_copy(update={"waived": evil, "name": evil, "rule": evil, "why": evil}), *rest)
    build = full.model_copy(
        update={
            "evaluations": {**full.evaluations, "candidate": candidate.model_copy(update={"items": items})},
            "prompts": {"candidate": (PromptResult(id=evil, prompt=evil, answer=evil, broken=(evil,)),)},
            "tasks": {
                role: tuple(task.model_copy(update={"task": evil}) for task in tasks)
                for role, tasks in full.tasks.items()
            },
            "judged": tuple(report.model_copy(update={"model": evil}) for report in full.judged),
            "verdict": full.verdict.model_copy(update={"checks": checks}),
        }
    )
    text = render.html(build)
    assert "<i>" not in text
    assert words(text).count(evil) >= 9
    without_code = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", render.markdown(build))
    assert re.findall(r"(?<!\\)<i>|(?<!\\)`y`|(?<!\\)\[z", without_code) == []


def test_long_texts_are_folded_and_whole(full):
    """The beginning is shown, the rest is a click away; short ones stand as they are."""
    long = "word " * 200 + "end"
    candidate = full.evaluations["candidate"]
    items = tuple(row.model_copy(update={"answer": long}) for row in candidate.items)
    evaluations = {**full.evaluations, "candidate": candidate.model_copy(update={"items": items})}
    page = Page(render.html(full.model_copy(update={"evaluations": evaluations})))
    assert page.tags.count("details") == 1 + 20
    assert sum(long in text for text in page.texts) == 20


def test_the_json_says_what_the_page_says(full, build):
    """Read by a program: verdict, broken prompts, checks, ledger and costs with intervals; no value that JSON hasn't."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads(render.to_json(full), parse_constant=refuse)
    assert (report["name"], report["outcome"], report["unit"]) == ("tickets", "fail", full.unit.digest)
    assert report["why"] in words(render.html(full))
    assert [prompt["id"] for prompt in report["prompts"]["lost"]] == ["refund period"]
    assert {check["name"] for check in report["checks"]} == {check.name for check in full.verdict.checks}
    assert report["checks"][0]["outcome"] == "fail"
    assert report["ledger"]["said"].startswith("AWQ lost most")
    assert set(report["ledger"]["steps"][1]["change"]) == {"value", "low", "high"}
    assert [cost["objective"] for cost in report["costs"]] == [True, False]
    bare = json.loads(render.to_json(build.model_copy(update={"evaluations": {}, "loadtests": {}, "verdict": None})))
    assert (bare["outcome"], bare["prompts"], bare["ledger"], bare["examples"]) == ("not judged", None, None, [])


def test_a_waived_check_is_shown_with_its_reason_and_decides_nothing(build):
    """It stands last, greyed, and the sentence counts it apart."""
    waiver = build.verdict.checks[2].model_copy(update={"outcome": "fail", "waived": "allowed: an old habit"})
    checks = (*build.verdict.checks[:2], waiver, *build.verdict.checks[3:])
    passing = build.model_copy(update={"verdict": build.verdict.model_copy(update={"checks": checks})})
    text = words(render.html(passing))
    assert f"Passes: all {len(checks) - 1} checks hold (1 more not counted)." in text
    assert "fail, not counted" in text
    assert "; allowed: an old habit" in text
    last = render.gate_table(passing.verdict).splitlines()[-1]
    assert "❌ fail, not counted" in last
    assert "`allowed: an old habit`" in last


def test_the_plots_are_svg_and_the_same_every_time(build, page_text):
    """Pictures in the page depend on the build alone."""
    assert render.html(build) == page_text
    svg = base64.b64decode(re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page_text)[0])
    assert svg.lstrip().startswith(b"<?xml")


def test_a_build_that_measured_nothing_is_still_rendered(build, tmp_path):
    """No evaluation, load test or verdict: a card, a page, an empty table and no plots, without an error."""
    bare = build.model_copy(update={"evaluations": {}, "loadtests": {}, "verdict": None, "artifacts": {}})
    assert "Nothing was evaluated." in render.model_card(bare)
    assert "Nothing was evaluated." in render.html(bare)
    assert render.scores_table(bare) == [["metric"], ["items"]]
    assert plots.save_plots(bare, tmp_path) == []


def test_the_scores_table_is_metrics_by_systems(build):
    """One row a metric, one column a system in the order in which they come to be, plain text."""
    head, *rows = render.scores_table(build)
    assert head == ["metric", "base (Q4_1 GGUF)", "merged (before AWQ)", "candidate (AWQ, groups of 64)"]
    assert [row[0] for row in rows][:3] == ["json_valid", "json_field_match", "json_field_match/category"]
    assert rows[-1] == ["items", *["200, 0 failed"] * 3]
    assert all(
        re.fullmatch(r"[01]\.\d{3} \([01]\.\d{3} to [01]\.\d{3}\)", cell) for row in rows[:-1] for cell in row[1:]
    )


def test_the_gate_table_is_a_markdown_table(build):
    """One line a check, with outcome, rule, measured interval and why; a cell can't break the table."""
    lines = render.gate_table(build.verdict).splitlines()
    assert lines[0].startswith("**✅ pass** for the served unit")
    table = lines[2:]
    assert len(table) == 2 + len(build.verdict.checks)
    assert {line.count(" | ") for line in table} == {4}
    assert render.markdown_table(["a"], [["x | y\nz"]]).splitlines()[2] == "| x \\| y z |"


def test_the_card_fits_mlflows_note(build, full):
    """However long answers and lists are, the card keeps verdict, broken prompts, gate and what to do, within the limit."""
    items = [
        item.model_copy(update={"answer": "blah " * 400, "prompt": "why " * 400, "expected": "x " * 200})
        for item in build.evaluations["candidate"].items
    ]
    candidate = build.evaluations["candidate"].model_copy(update={"items": tuple(items)})
    long = build.model_copy(update={"evaluations": {**build.evaluations, "candidate": candidate}})
    prompts = tuple(
        PromptResult(id=f"{n} {'x' * 90}", prompt="?" * 900, answer="", broken=("contains " + "y" * 300,) * 3)
        for n in range(50)
    )
    many = full.model_copy(update={"prompts": {"candidate": prompts}, "evaluations": long.evaluations})
    cards = [render.model_card(record) for record in (build, long, full, many)]
    assert "tunegate approve tickets" in cards[1]
    assert "## Must-pass prompts" in cards[2]
    assert "and 45 more" in cards[3]
    for card in cards:
        assert len(card) <= render.CARD_LIMIT
        assert "## Gate" in card
        assert "tunegate " in card
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
    assert render.code(text, 20) == want


def test_a_failed_build_is_not_told_to_promote(build):
    """Without a pass the next step is another build."""
    failure = build.model_copy(update={"verdict": build.verdict.model_copy(update={"outcome": "fail"})})
    card = render.model_card(failure)
    assert "tunegate promote" not in card
    assert "tunegate run CONFIG" in card
