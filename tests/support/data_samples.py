"""Sample conversations, written in every format that the data stage reads, and configs for them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from support import programs

from pipeline.config.schema import DataConfig, DatasetSource
from pipeline.data.splits import SPLITS


def settings(
    *train: Path, test: tuple[Path, ...] = (), kind: str = "auto", template: dict | None = None, **more
) -> dict:
    def sources(paths: tuple[Path, ...]) -> tuple[DatasetSource, ...]:
        return tuple(DatasetSource(path=str(path), type=kind, template=template) for path in paths)

    config = DataConfig(datasets=sources(train), test_datasets=sources(test), **more)
    return {"data": config.model_dump(mode="json"), "seed": 7}


def conversation(number: int, prompt: str = "") -> dict:
    words = ("refund", "invoice", "login", "password", "crash", "update", "order", "phone", "price", "plan")
    first, second, third = (words[number // 10**n % 10] for n in range(3))
    prompt = prompt or f"Case {number}: the {first} {second} and {third} of {number * 7} went wrong twice?"
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"{first} {second}"},
        ]
    }


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def as_json_list(file: Path, rows: list[dict]) -> Path:
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return file


def as_csv(file: Path, rows: list[dict]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["number", "question", "label"])
        table.writerows([n, *(message["content"] for message in row["messages"])] for n, row in enumerate(rows))
    return file


def as_parquet(file: Path, rows: list[dict]) -> Path:
    jsonl = write(file.with_suffix(".jsonl"), rows)
    programs.python(
        "import sys, pyarrow.json as j, pyarrow.parquet as p;"
        "p.write_table(j.read_json(sys.argv[1]), sys.argv[2])",
        jsonl, file,
    )  # fmt: skip
    return file


def as_alpaca(row: dict) -> dict:
    question, answer = (message["content"] for message in row["messages"])
    return {"instruction": question, "input": "", "output": answer}


def as_sharegpt(row: dict) -> dict:
    question, answer = (message["content"] for message in row["messages"])
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def as_prompt(row: dict) -> dict:
    question, answer = (message["content"] for message in row["messages"])
    return {"prompt": question, "completion": answer}


def payload(folder: Path) -> dict[str, list[dict]]:
    files = {split: folder / "payload" / f"{split}.jsonl" for split in SPLITS}
    return {split: [json.loads(line) for line in file.open(encoding="utf-8")] for split, file in files.items()}
