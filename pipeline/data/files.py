"""Data files as rows with line numbers: JSON Lines, a JSON list, CSV, Parquet, lines of text; one row in memory at a time.

Bytes that aren't UTF-8 pass through parsing as surrogates. So the error can name their row, and reading goes on.
Memory is bounded by MAX_ROW (JSON, CSV) or by BATCH rows and a page a column (Parquet).
Limits: CSV means commas and double quotes; a JSON list must be the whole file.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.defects import Defect

MAX_ROW = 16 * 2**20
CHUNK = 64 * 2**10
BATCH = 512
NOT_UTF8 = re.compile("[\udc80-\udcff]")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NAMES = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
# The marks that decide where a list's element ends; \\. steps over an escape.
JSON_MARKS = re.compile(r'\\.|["{}\[\],\n]', re.DOTALL)


@dataclass(frozen=True)
class FileRow:
    """A row of a file at its line (in Parquet: its number), or the defects there.

    A row with `defects` is lost. `is_row` is false for a defect of the file as a whole.
    """

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    defects: tuple[Defect, ...] = ()
    is_row: bool = True


class _Broken(ValueError):
    """A row's JSON is wrong; `kind` is the kind of defect."""

    def __init__(self, kind: str, mistake: str) -> None:
        super().__init__(mistake)
        self.kind = kind


def read(path: Path) -> Iterator[FileRow]:
    """The rows of a data file in order; the format follows from the suffix, and `[` makes .json a list."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix != ".parquet":
        if start.startswith(UTF16):
            yield _whole("utf16", "is UTF-16, not UTF-8", 1)
            return
        if start.startswith(codecs.BOM_UTF8):
            yield _whole("bom", "begins with a byte order mark", 1)
    is_empty = True
    for row in READERS[path.suffix](path):
        is_empty = False
        yield row
    if is_empty:
        yield _whole("empty_file", "is empty: it must hold at least one row")


def about_how_many(path: Path) -> int:
    """An estimate of a file's rows: its line ends, or of Parquet the number in its metadata (0 if unreadable)."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError):
            return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK), b""))


def _whole(kind: str, mistake: str, line: int | None = None) -> FileRow:
    """A defect of the file as a whole."""
    return FileRow(line or 1, defects=(Defect(kind, mistake, line),), is_row=False)


def _bad(kind: str, mistake: str, line: int) -> FileRow:
    """A row that is lost."""
    return FileRow(line, defects=(Defect(kind, mistake, line),))


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, without a byte order mark; bytes that aren't UTF-8 become surrogates."""
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        while raw := file.readline(MAX_ROW + 1):
            yield raw.decode("utf-8", "surrogateescape")


def _json_lines(path: Path) -> Iterator[FileRow]:
    for line, text in enumerate(_lines(path), 1):
        if len(text) > MAX_ROW:
            yield _whole("row_too_big", f"the line is longer than {MAX_ROW >> 20} MiB", line)
            return
        if text.strip():
            yield _parsed(text.rstrip(), line)


def _text_lines(path: Path) -> Iterator[FileRow]:
    """Each line that isn't empty, as the column `text`."""
    for line, text in enumerate(_lines(path), 1):
        if len(text) > MAX_ROW:
            yield _whole("row_too_big", f"the line is longer than {MAX_ROW >> 20} MiB", line)
            return
        if bad_byte := NOT_UTF8.search(text):
            yield _bad("bad_utf8", f"byte 0x{ord(bad_byte[0]) - 0xDC00:02X} isn't UTF-8", line)
        elif text.strip():
            yield FileRow(line, {"text": text.strip()})


def _json(path: Path) -> Iterator[FileRow]:
    """A .json file: a list, or else JSON Lines."""
    first = next((text for text in _lines(path) if text.strip()), "").strip()
    if first.startswith("["):
        yield from _json_list(path)
    elif first.startswith("{") and not first.endswith("}"):
        yield _whole("not_a_list", "holds one object that spans lines, not a list of rows", 1)
    else:
        yield from _json_lines(path)


def _parsed(text: str, line: int) -> FileRow:
    """One JSON object that begins on `line`."""
    bad_byte = NOT_UTF8.search(text)
    if bad_byte:
        byte, before = ord(bad_byte[0]) - 0xDC00, text[: bad_byte.start()]
        column = len(before) - before.rfind("\n")
        return _bad("bad_utf8", f"byte 0x{byte:02X} in column {column} isn't UTF-8", line + before.count("\n"))
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _Broken as error:
        return _bad(error.kind, str(error), line)
    except json.JSONDecodeError as error:
        kind = "control_character" if error.msg.startswith("Invalid control character") else "broken_json"
        return _bad(kind, f"{error.msg} (column {error.colno})", line + error.lineno - 1)
    except (ValueError, RecursionError) as error:
        return _bad("broken_json", f"can't be parsed: {error}", line)
    if not isinstance(row, dict):
        return _bad("not_an_object", f"is {NAMES.get(type(row), 'a number')}, not an object with keys", line)
    return FileRow(line, row)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Broken("duplicate_key", f"the key {twice!r} occurs more than once in one object")
    return entries


def _refuse_constant(name: str) -> Any:
    raise _Broken("nan", f"{name} isn't a JSON value")


def _json_list(path: Path) -> Iterator[FileRow]:
    for line, text in _elements(path):
        if text is None:
            yield _whole("unclosed", "a bracket or string from here isn't closed in its place", line)
        elif len(text) > MAX_ROW:
            yield _whole("row_too_big", f"the row is longer than {MAX_ROW >> 20} MiB", line)
        elif text.strip():
            yield _parsed(text.lstrip(), line)
        else:
            yield _bad("broken_json", "one comma too many", line)


def _elements(path: Path) -> Iterator[tuple[int, str | None]]:
    """The elements of a JSON list and the lines they begin on; (line, None) when the list doesn't end."""
    scan = _Scan()
    for chunk in _chunks(path):
        yield from scan.feed(chunk)
        if scan.size > MAX_ROW:
            yield scan.start(), "".join(scan.parts)
            return
    if not scan.ended or scan.parts:
        yield scan.start(), None


def _chunks(path: Path) -> Iterator[str]:
    """Pieces of text, none ending inside an escape."""
    half_escape = ""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        while raw := file.read(CHUNK):
            text = half_escape + decoder.decode(raw)
            slashes = len(text) - len(text.rstrip("\\"))
            half_escape = "\\" if slashes % 2 else ""
            yield text[: len(text) - len(half_escape)]


class _Scan:
    """Finds where the elements of a JSON list end, by strings and brackets alone."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0
        self.depth = 0
        self.in_string = self.ended = self.comma = False
        self.line = self.first_line = 1

    def feed(self, chunk: str) -> Iterator[tuple[int, str]]:
        """The elements that end in this chunk."""
        begin = 0
        for match in JSON_MARKS.finditer(chunk):
            mark = match[0]
            if mark == "\n":
                self.line += 1
            elif mark == '"':
                self.in_string = not self.in_string
            elif self.in_string or self.ended:
                continue
            elif mark == "," and self.depth == 1:
                yield self._element(chunk[begin : match.start()])
                begin, self.comma = match.end(), True
            else:
                self.depth += BRACKETS.get(mark, 0)
                if mark == "[" and self.depth == 1:
                    begin, self.parts, self.first_line = match.end(), [], self.line
                elif mark == "]" and self.depth == 0:
                    yield from self._end(chunk[begin : match.start()])
                    begin = match.end()
        if not self.ended or chunk[begin:].strip():
            self.parts.append(chunk[begin:])
            self.size += len(chunk) - begin

    def start(self) -> int:
        """The line on which the element being read begins."""
        text = "".join(self.parts)
        return self.first_line + text[: len(text) - len(text.lstrip())].count("\n")

    def _element(self, text: str) -> tuple[int, str]:
        self.parts.append(text)
        element = self.start(), "".join(self.parts)
        self.parts, self.size, self.first_line = [], 0, self.line
        return element

    def _end(self, text: str) -> Iterator[tuple[int, str]]:
        """The last element, if the list isn't empty."""
        last = self._element(text)
        self.ended = True
        if self.comma or last[1].strip():
            yield last


def _csv(path: Path) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                yield _whole("unclosed", "a quote that opens in this row is never closed", line)
                return
            yield _bad("bad_quotes", f"quotes are wrong: {error}", line)
            continue
        if fields is None:
            return
        if fields and header:
            yield _csv_row(header, fields, line)
        elif fields:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                yield _whole("duplicate_column", f"two columns are named {twice!r}", line)
                return


def _csv_row(header: list[str], fields: list[str], line: int) -> FileRow:
    bad_byte = NOT_UTF8.search("\n".join(fields))
    if bad_byte:
        return _bad("bad_utf8", f"byte 0x{ord(bad_byte[0]) - 0xDC00:02X} isn't UTF-8", line)
    if len(fields) != len(header):
        return _bad("ragged_row", f"has {len(fields)} fields where the header has {len(header)}", line)
    return FileRow(line, dict(zip(header, fields, strict=True)))


def _parquet(path: Path) -> Iterator[FileRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        return
    wrong = _parquet_ends(path)
    if wrong:
        yield _whole("not_parquet", wrong)
        return
    number = 0
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        for batch in file.iter_batches(batch_size=BATCH):
            for row in _batch_rows(batch, number + 1):
                yield row
                number += 1
    except (pa.ArrowException, OSError) as error:
        yield _whole("not_parquet", f"can't be read past row {number}: {error}", number + 1)


def _parquet_ends(path: Path) -> str | None:
    """The mistake in the first or last four bytes of a Parquet file; None when both are PAR1."""
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            return "isn't a Parquet file: it doesn't begin with PAR1"
        file.seek(-4, 2)
        whole = file.read(4) == b"PAR1" and file.tell() > 12
        return None if whole else "is cut off: it doesn't end in PAR1"


def _batch_rows(batch: Any, number: int) -> Iterator[FileRow]:
    """Rows of an Arrow batch; text in Arrow may still hold bytes that aren't UTF-8."""
    try:
        for line, values in enumerate(batch.to_pylist(), number):
            yield FileRow(line, values)
    except UnicodeDecodeError:
        for line in range(number, number + batch.num_rows):
            try:
                yield FileRow(line, batch.slice(line - number, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield _bad("bad_utf8", f"byte 0x{error.object[error.start]:02X} isn't UTF-8", line)


READERS = {".csv": _csv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _text_lines}
