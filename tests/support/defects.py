"""Each file of broken_data: its line, what is wrong, and the remedy."""

from __future__ import annotations

DEFECTS = {
    "answer_cut_off.jsonl": (2, "all of the answer would be cut off", "raise data.sequence_len"),
    "bad_utf8.jsonl": (3, "byte 0xE9 in column 58 isn't UTF-8", "iconv -f WINDOWS-1252 -t UTF-8"),
    "bom.csv": (1, "begins with a byte order mark", r"sed -i '1s/^\xEF\xBB\xBF//'"),
    "broken_json.jsonl": (2, "Expecting ',' delimiter", "correct the line"),
    "control_character.jsonl": (
        2,
        "message 1 (user): the text holds the control character U+0000",
        "remove it",
    ),
    "cut_off.parquet": (None, "is cut off", "export or download the file again"),
    "cut_off_list.json": (3, "isn't closed in its place", "export the file again"),
    "duplicate_column.csv": (1, "two columns are named 'prompt'", "rename or remove one of the two columns"),
    "duplicate_key.jsonl": (2, "the key 'content' occurs more than once", "keep one of the two values"),
    "empty.jsonl": (None, "is empty", "export the data again"),
    "empty_answer.jsonl": (2, "message 2 (assistant): the answer is empty", "write the answer"),
    "empty_question.jsonl": (2, "message 1 (user): is empty", "write the content"),
    "half_a_character.jsonl": (2, "half a character, U+D83D", "write the character whole"),
    "missing_column.csv": (
        None,
        "lacks the column completion; its columns are prompt, answer",
        "add the column",
    ),
    "missing_role.jsonl": (2, "messages[0]: lacks a role", "give every message a role and a content"),
    "mixed_formats.jsonl": (2, "is in alpaca format among rows in messages format", "in different files"),
    "nan.jsonl": (4, "NaN isn't a JSON value", "write null"),
    "no_answer.jsonl": (2, "does not end with the assistant", "end the conversation with"),
    "no_data": (None, "must hold at least one data file", "put .jsonl, .json, .csv or .parquet files there"),
    "no_header.csv": (1, "lacks the column prompt, completion", "add a first line that names the columns"),
    "not_an_object.jsonl": (2, "is a list, not an object", "write each row as one object"),
    "not_parquet.parquet": (None, "doesn't begin with PAR1", "export or download the file again"),
    "not_text.jsonl": (2, "messages[0].content: is a list, not text", "write the value as a string"),
    "not_there.jsonl": (None, "the file or folder doesn't exist", "correct the path"),
    "notes.txt": (None, ".txt is not supported", "convert it to .jsonl"),
    "one_object.json": (1, "holds one object that spans lines", "write the rows as a list"),
    "packed.jsonl.gz": (None, ".gz is not supported", "unpack it first"),
    "quote_inside.csv": (3, "quotes are wrong", "double each quote inside a quoted field"),
    "ragged.csv": (3, "has 3 fields where the header has 2", "in double quotes"),
    "special_token.jsonl": (2, "the special token <|im_end|>", "remove it or put a space into it"),
    "system_in_middle.jsonl": (
        2,
        "message 2 is a system message",
        "move the system message to the beginning",
    ),
    "unclosed_quote.csv": (3, "a quote that opens in this row is never closed", "export the file again"),
    "unknown_format.jsonl": (None, "has the columns question, reply", "type: columns with a template"),
    "unknown_role.jsonl": (1, "messages[1]: has the role 'bot'", "rename the role"),
    "utf16.csv": (1, "is UTF-16", "iconv -f UTF-16 -t UTF-8"),
    "wrong_role_order.jsonl": (3, "two user messages in a row", "take turns"),
}


TYPES = {"missing_column.csv": "prompt_completion", "no_header.csv": "prompt_completion"}
