"""A tiny random Llama that learns rows by heart, its config, and the commands that take it through the chain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

TESTS = Path(__file__).parents[1]
# So small a model gains nothing by more, and other tests run beside this one.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "ivory", "jade")


CONFIG = """
name: tiny
base_model: {folder}/model
data:
  datasets: [{{path: train.jsonl}}]
  test_datasets: [{{path: holdout.jsonl}}]
  sequence_len: 128
  val_set_size: 2
  calibration_set_size: 4
  max_near_duplicate_rate: 1.0
finetune: {{micro_batch_size: 2, num_epochs: 60, learning_rate: 1e-2, save_steps: 20, eval_steps: 20}}
quantize: {{num_calibration_samples: 4, max_calibration_tokens: 64}}
serve: {{enforce_eager: true, max_model_len: 128, max_num_seqs: 4, kv_cache_memory: 128MiB}}
evaluate:
  max_tokens: 16
  compare: [base]
  prompts: prompts.yaml
  tasks: [{{task: ./words.yaml}}]
  judges: [{{against: base, base_url: "{judge}", model: a-judge, max_items: 10}}]
loadtest: {{max_concurrency: [2], num_prompts: 8, max_tokens: 8}}
gate:
  min_items: 10
  metrics:
    - {{metric: exact_match, min: 0.4}}
    - {{metric: exact_match, against: base, margin: -0.3}}
    - {{metric: words/acc, min: 0.2}}
  judges: [{{against: base, min: 0.2}}]
promote: {{port: {port}}}
"""

PROMPTS = """
- description: no item is a zebra
  prompt: Say the code of item 3
  assert: [{type: not-contains, value: zebra}]
"""

# A task for lm-eval: choose, of two words, the learned one.
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
"""


def row(verb: str, item: int) -> str:
    """One conversation that can be learned by heart."""
    messages = [
        {"role": "user", "content": f"{verb} code of item {item}"},
        {"role": "assistant", "content": WORDS[item]},
    ]
    return json.dumps({"messages": messages}) + "\n"


def choice(item: int) -> str:
    """One document of the task."""
    other = WORDS[(item + 5) % 10]
    question = f"Tell me the code of item {item}"
    return json.dumps({"question": question, "choices": [other, WORDS[item]], "label": 1}) + "\n"


def knows_the_words(first: str, second: str) -> str:
    """A judge that prefers one of our words to anything else."""
    known = [answer in WORDS for answer in (first, second)]
    return json.dumps({"reason": "", "winner": "tie" if known[0] == known[1] else "A" if known[0] else "B"})


@dataclass
class House:
    """A folder with a config, its data and its store; `said` is what the build that went through printed."""

    folder: Path
    port: int
    said: str = ""

    def command(self, *arguments: str) -> list[str]:
        """A tunegate command line."""
        return [sys.executable, "-m", "flows.cli", *arguments]

    @property
    def environ(self) -> dict[str, str]:
        """The environment of every command here."""
        return {
            **os.environ,
            "TUNEGATE_HOME": str(self.folder / "mlruns"),
            "PYTHONPATH": str(TESTS.parent),
            "HF_HUB_OFFLINE": "1",
            **ONE_THREAD,
        }

    def tunegate(self, *arguments: str, code: int = 0) -> str:
        """Run a command to its end; returns all that it printed."""
        ended = subprocess.run(
            self.command(*arguments),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stdout
        return ended.stdout

    @property
    def config(self) -> str:
        """The config file."""
        return str(self.folder / "tiny.yaml")

    def only(self, pattern: str) -> Path:
        """The one path in the store that fits."""
        (found,) = (self.folder / "mlruns" / "work").glob(pattern)
        return found


def children(pid: int) -> list[int]:
    """All processes below one."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def ask(house: House, path: str = "/v1/chat/completions") -> httpx.Response:
    """Ask the proxy for the word of item 3."""
    body = {
        "model": "tiny",
        "messages": json.loads(row("Say the", 3))["messages"][:1],
        "temperature": 0,
        "max_tokens": 16,
    }
    return httpx.post(f"http://127.0.0.1:{house.port}{path}", json=body, timeout=60)
