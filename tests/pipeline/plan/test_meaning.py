"""A module's digest is of its meaning: what changes it, what doesn't, and which modules it reaches."""

from __future__ import annotations

import pytest

from pipeline.plan import meaning


def digest(text: str) -> str:
    """The digest of a text's meaning."""
    return meaning.read(text)[0]


def reaches(text: str) -> list[str]:
    """The dotted names that a text reaches."""
    return meaning.read(text)[1]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Old."""\nx = 1\n', '"""New, and\n\nlonger."""\nx = 1\n'),
        ('"""Old."""\nx = 1\n', "x = 1\n"),
        ('class A:\n    """Old."""\n\n    x = 1\n', 'class A:\n    """New."""\n\n    x = 1\n'),
        ('def f():\n    """Old."""\n    return 1\n', "def f():\n    return 1\n"),
        ('async def f():\n    """Old."""\n    return 1\n', 'async def f():\n    """New."""\n    return 1\n'),
        ('class A:\n    x: int\n    """Of x."""\n', 'class A:\n    x: int\n    """Of x, in words."""\n'),
        ("x = 1  # old\n", "# new\n\n\nx = 1\n"),
        ("x = f(1, 2)\n", "x = (\n    f(\n        1,\n        2,\n    )\n)\n"),
        ("x = 'a'\n", 'x = "a"\n'),
        ("x = 'ab'\n", "x = 'a' 'b'\n"),
        ("x = 1000\n", "x = 1_000\n"),
    ],
)
def test_docstrings_comments_and_layout_have_no_meaning(text, same):
    """In a module, a class, a function; quotes, brackets and line breaks neither."""
    assert digest(text) == digest(same)


@pytest.mark.parametrize(
    "line",
    [
        'program.message("old")',
        'program.message(f"old {x}")',
        'program.progress("old", done=1)',
        'program.metric("old", 1.0)',
        'raise ValueError("old")',
        'raise ValueError(f"{x}: old") from error',
        'raise ConfigError(Problem("is wrong", key="old"))',
        'raise Busy(", ".join(f"{name} old" for name in x))',
        'yield Problem("is wrong", remedy="old")',
        'problems = [Problem(f"{x} old", allowed="a" if x else "old")]',
    ],
)
def test_what_is_told_has_no_meaning(line):
    """Progress, and every text in a raise and in a Problem, however deep."""
    text = f"def f(x, error):\n    {line}\n"
    assert digest(text) == digest(text.replace("old", "new"))


@pytest.mark.parametrize(
    ("text", "different"),
    [
        ("x = 1\n", "x = 2\n"),
        ("x = 1\n", "x = True\n"),
        ("x = 1\n", "x = 1.0\n"),
        ("x = 'old'\n", "x = 'new'\n"),
        ("x = None\n", "x = ''\n"),
        ("x = 1\n", "y = 1\n"),
        ("x = 1\ny = 2\n", "y = 2\nx = 1\n"),
        ("f(a, b)\n", "f(b, a)\n"),
        ("f(a=1)\n", "f(b=1)\n"),
        ("x: int = 1\n", "x: float = 1\n"),
        ("def f(x):\n    return x\n", "async def f(x):\n    return x\n"),
        ("def f(x=1):\n    return x\n", "def f(*, x=1):\n    return x\n"),
        ("@cache\ndef f():\n    return 1\n", "def f():\n    return 1\n"),
        ("x = '''old'''\n", "x = '''new'''\n"),
        ("raise ValueError('a')\n", "raise TypeError('a')\n"),
        ("raise SystemExit(1)\n", "raise SystemExit(2)\n"),
        ("raise ValueError(f'{x}')\n", "raise ValueError(f'{y}')\n"),
        ("if x:\n    raise E('a')\n", "if y:\n    raise E('a')\n"),
        ("Problem('a', line=1)\n", "Problem('a', line=2)\n"),
        ("x = [Problem('a'), 'old']\n", "x = [Problem('a'), 'new']\n"),
        ("def f():\n    raise E('a')\nx = 'old'\n", "def f():\n    raise E('a')\nx = 'new'\n"),
    ],
)
def test_what_computes_has_meaning(text, different):
    """Values with their types, names, order, defaults, decorators; an error's kind and number, and texts beside an error."""
    assert digest(text) != digest(different)


@pytest.mark.parametrize(
    "line",
    [
        'message("old")',
        'logger.message("old")',
        'self.program.message("old")',
        'program.result("old")',
        'text = program.message("old")',
        'print("old")',
        'errors.Issue("old")',
        "log(program.message, 'old')",
    ],
)
def test_only_a_programs_told_lines_are_silent(line):
    """Another object's, another call's, and one whose outcome is read count in full."""
    assert digest(line) != digest(line.replace("old", "new"))


def test_a_told_line_is_as_good_as_pass():
    """A branch that only tells something does nothing."""
    assert digest('if x:\n    program.message("a")\n') == digest("if x:\n    pass\n")
    assert digest('if x:\n    program.message("a")\n') != digest("pass\n")


def test_a_digest_is_hex_and_stays_from_call_to_call():
    """Reading changes nothing that a second reading sees."""
    text = 'def f():\n    """A."""\n    raise ValueError("a")\n'
    first = digest(text)
    assert digest(text) == first
    assert len(bytes.fromhex(first)) == 32


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import os\nfrom pathlib import Path\nimport torch.pipeline\n", []),
        ("import pipeline.store\n", ["pipeline.store"]),
        ("import pipeline.store as s, json\n", ["pipeline.store"]),
        ("from pipeline import store\n", ["pipeline", "pipeline.store"]),
        ("from pipeline.data.rows import Row as R\n", ["pipeline.data.rows", "pipeline.data.rows.Row"]),
        ("import pipelines.a\nfrom pipeline_tools import b\n", []),
        ("def f():\n    if x:\n        import pipeline.store\n", ["pipeline.store"]),
        ("if TYPE_CHECKING:\n    import pipeline.store\n", ["pipeline.store"]),
        ("import pipeline.b\nimport pipeline.a\nimport pipeline.b\n", ["pipeline.a", "pipeline.b"]),
    ],
)
def test_imports_from_the_package_are_reached(text, names):
    """Sorted, each once, at any depth; another package's are not."""
    assert reaches(text) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('run([python, "-m", "pipeline.finetune.rank"])\n', ["pipeline.finetune.rank"]),
        ('PROGRAMS = {"rank": "pipeline.finetune.rank"}\n', ["pipeline.finetune.rank"]),
        ('raise ValueError("pipeline.finetune.rank")\n', ["pipeline.finetune.rank"]),
        ('x = "in pipeline.finetune.rank"\ny = "pipeline"\nz = "pipelines.a"\n', []),
        ("x = b'pipeline.finetune.rank'\n# pipeline.store\n", []),
    ],
)
def test_a_string_that_names_a_module_reaches_it(text, names):
    """A program that is started by its name; a sentence that mentions a module isn't one."""
    assert reaches(text) == names


def test_what_only_shows_is_not_reached():
    """Neither by its import nor by its name in the list; its neighbours are."""
    text = "from pipeline.finetune import loss, plots\nSHOWN_WITH = ('pipeline.finetune.plots',)\n"
    assert reaches(text) == ["pipeline.finetune", "pipeline.finetune.loss"]


@pytest.mark.parametrize(
    "constant",
    [
        "SHOWN = ('pipeline.plots',)",
        "x = SHOWN_WITH = ('pipeline.plots',)",
        "def f():\n    SHOWN_WITH = ('pipeline.plots',)",
        "class A:\n    SHOWN_WITH = ('pipeline.plots',)",
        "module.SHOWN_WITH = ('pipeline.plots',)",
    ],
)
def test_only_the_modules_own_constant_lists_what_shows(constant):
    """The same words anywhere else leave nothing out."""
    assert reaches(f"import pipeline.plots\n{constant}\n") == ["pipeline.plots"]


def test_what_shows_must_be_written_out():
    """A list that is computed can't be read without running the module."""
    with pytest.raises(ValueError, match="malformed"):
        meaning.read("SHOWN_WITH = names()\n")


def test_a_text_that_is_no_python_is_refused():
    """It has no meaning that a digest could be of."""
    with pytest.raises(SyntaxError):
        meaning.read("def f(:\n")


@pytest.mark.parametrize(("number", "text"), [("1.0", '"1.0"'), ("b'a'", "\"b'a'\""), ("...", '"Ellipsis"')])
def test_a_constant_is_not_the_text_of_itself(number, text):
    """1.0 and "1.0" mean two things."""
    assert meaning.read(f"x = {number}\n")[0] != meaning.read(f"x = {text}\n")[0]
