from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support import model_folder, programs

from pipeline.config.schema import FinetuneConfig
from pipeline.digests import digest_folder
from pipeline.errors import ConfigError, ModelError
from pipeline.merge import merge

FINETUNE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PLAIN = {"adapter": "lora", "load_in_4bit": False}
# The loss of both ways on the answers of a file's rows, one row at a time.
LOSS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
def loss(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(folder)
    total = count = 0
    for line in open(sys.argv[2]):
        chat = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + chat[1]["content"] + "<|im_end|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        count += len(ids[0]) - start
    return total / count
print(json.dumps([loss(f"{sys.argv[1]}/{name}/payload") for name in ("sound", "dequantized")]))
"""
# What the stage says when CUDA has no memory left in one of its steps.
FULL = """
import json, sys, torch
from pathlib import Path
from unittest.mock import patch
from pipeline.finetune import loss as finetune_loss
from pipeline.merge import merge
from pipeline.merge import weights as merge_weights
from pipeline import program
from pipeline.errors import TunegateError
def full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
config, inputs = json.loads(sys.argv[1])
said = []
for way, where, name in (("auto", finetune_loss, "mean_loss"), ("dequantized", merge_weights.Nf4, "__call__")):
    asked = program.Request({**config, "merge": {"merge_base": way}}, inputs, Path(sys.argv[2]))
    with patch.object(where, name, full):
        try:
            merge.run(asked)
        except TunegateError as error:
            said.append(error.to_json())
print(json.dumps(said))
"""
ADAPTERS = ("sound", "rslora", "dora", "nan", "untrained", "foreign", "wide", "empty")


def conversation(number):
    """One whose answer a random model finds unlikely, by more or less."""
    question = {"role": "user", "content": f"Is order {number} paid?"}
    return {"id": f"{number:x}", "messages": [question, {"role": "assistant", "content": f"no, {number * 7}"}]}


# On the first the original base is better by 0.9 nats a token, on the second the dequantized one by 0.5.
SPLITS = {"few": range(94, 100), "others": range(20, 26), "none": ()}


def validation(folder, numbers):
    """The part of prepare's artefact that merging reads."""
    (folder / "payload").mkdir(parents=True)
    lines = [json.dumps(conversation(number)) + "\n" for number in numbers]
    (folder / "payload" / "val.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Adapters through the stage: the base, references, and name -> payload and detail or error."""
    root = tmp_path_factory.mktemp("merge")
    programs.tiny(root / "base" / "payload")
    programs.python(programs.TESTS / "support" / "make_adapters.py", root / "base" / "payload", root)
    base = programs.artifact(root / "base", "base", {"eos_token": "<|im_end|>", "licence": "apache-2.0"})
    prepared = {name: programs.artifact(validation(root / name, rows), "prepare", {}) for name, rows in SPLITS.items()}

    def ask(name, adapter, merge_base="original", finetune=FINETUNE, parent=base["digest"], split="few"):
        record = programs.artifact(root / adapter, "finetune", {}, {"base": parent})
        config = {"merge": {"merge_base": merge_base}, "finetune": finetune, "sequence_len": 128}
        return root / "out" / name, config, {"base": base, "finetune": record, "prepare": prepared[split]}

    asked = {name: ask(name, name) for name in ADAPTERS}
    asked["dequantized"] = ask("dequantized", "sound", "dequantized")
    asked["not-4bit"] = ask("not-4bit", "sound", "dequantized", PLAIN)
    asked["auto"] = ask("auto", "sound", "auto")
    asked["auto-other"] = ask("auto-other", "sound", "auto", split="others")
    asked["auto-without"] = ask("auto-without", "sound", "auto", split="none")
    asked["auto-not-4bit"] = ask("auto-not-4bit", "sound", "auto", PLAIN)
    asked["auto-nan"] = ask("auto-nan", "nan", "auto")
    asked["other-base"] = ask("other-base", "sound", parent="0" * 64)
    answers = programs.run_many("pipeline.merge.merge", list(asked.values()), root)
    return root, asked, dict(zip(asked, answers, strict=True))


def tensors_of(root, name):
    return model_folder.tensors(root / "out" / name / "payload" / "model.safetensors")


@pytest.mark.slow
def test_the_original_base_merges_as_peft_does_in_float32(merged):
    """Every tensor is bit for bit peft's merge_and_unload of the float32 base, rounded to bf16."""
    root, _, _ = merged
    assert tensors_of(root, "sound") == model_folder.tensors(root / "reference" / "original.safetensors")


@pytest.mark.slow
def test_too_little_memory_names_the_setting_to_change(merged, tmp_path):
    """While both ways are compared and while one is taken: the key and a way out."""
    _, asked, _ = merged
    comparing, merging = json.loads(programs.python(FULL, json.dumps(asked["sound"][1:]), tmp_path).splitlines()[-1])
    assert comparing["type"] == merging["type"] == "ResourceError"
    assert "comparing both ways to merge ran out of memory" in comparing["problems"][0]["what"]
    assert comparing["problems"][0]["remedy"] == "set merge.merge_base: original, or dequantized"
    assert "merging into the dequantized base ran out of memory" in merging["problems"][0]["what"]
    assert "one layer at a time" in merging["problems"][0]["remedy"]


@pytest.mark.slow
def test_the_dequantized_base_is_what_bitsandbytes_trained_on(merged):
    """Each linear layer is bitsandbytes' own dequantized weight plus the delta; embeddings and norms stay."""
    root, _, answers = merged
    assert tensors_of(root, "dequantized") == model_folder.tensors(root / "reference" / "dequantized.safetensors")
    assert answers["dequantized"]["merge_base"] == "dequantized"
    assert tensors_of(root, "dequantized") != tensors_of(root, "sound")


@pytest.mark.slow
def test_the_stage_program_gives_the_same_digest_and_tells_what_changed(merged, tmp_path):
    """Another process makes the same bytes; the rest of the base is copied as it is, the head stays tied."""
    root, asked, answers = merged
    _, config, inputs = asked["sound"]
    detail, events = programs.run("pipeline.merge.merge", tmp_path, config, inputs)
    assert digest_folder(tmp_path / "payload") == digest_folder(root / "out" / "sound" / "payload")
    for path in (root / "base" / "payload").iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "payload" / path.name).read_bytes() == path.read_bytes()
    assert detail == answers["sound"]
    assert (detail["layers"], detail["scaling"], detail["eos_token"]) == (14, 2.0, "<|im_end|>")
    assert 0 < detail["max_abs_delta"] < 1
    assert 0.5 < detail["moved_share"] <= 1
    assert "lm_head.weight" not in tensors_of(root, "sound")
    assert events[-1]["done"] == events[-1]["total"]


@pytest.mark.slow
def test_rank_stabilized_adapters_have_their_own_scaling(merged):
    """use_rslora divides by the root of the rank."""
    assert merged[2]["rslora"]["scaling"] == 8 / math.sqrt(4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dora", "use_dora: True can't be merged"),
        ("nan", "model.layers.1.mlp.up_proj.weight: holds NaN"),
        ("untrained", "changes no weight"),
        ("foreign", "layers.7.self_attn.q_proj.lora_A.weight: fits no layer"),
        ("wide", "fits no layer"),
        ("empty", "the adapter is empty"),
        ("other-base", "was trained on base 000000000000"),
    ],
)
def test_an_adapter_that_would_not_be_applied_rightly_is_refused(merged, name, said):
    """Another base, layers or shapes, nothing trained, NaN, other arithmetic: an error, no silent base."""
    error = merged[2][name]
    assert isinstance(error, ModelError)
    assert said in str(error)
    assert all(problem.remedy for problem in error.problems)


@pytest.mark.slow
def test_auto_writes_the_way_of_the_lower_validation_loss(merged):
    """On some rows the one way, on others the other; both losses are recorded, and they are transformers' own."""
    root, _, answers = merged
    ways = {"original": ("auto", "sound"), "dequantized": ("auto-other", "dequantized")}
    for way, (name, same) in ways.items():
        detail = answers[name]
        losses = {way: detail[f"val_loss/{way}"] for way in ways}
        assert detail["merge_base"] == way == min(losses, key=losses.get)
        assert detail["val_rows"] == 6
        assert digest_folder(root / "out" / name / "payload") == digest_folder(root / "out" / same / "payload")
    expected = json.loads(programs.python(LOSS, root / "out", root / "few" / "payload" / "val.jsonl"))
    assert [answers["auto"][f"val_loss/{way}"] for way in ways] == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto-without", "auto-not-4bit"])
def test_auto_is_the_original_where_there_is_no_choice(merged, name):
    """Without validation rows, or after training in 16 bits; nothing was measured, and nothing is said to be."""
    root, _, answers = merged
    assert answers[name]["merge_base"] == "original"
    assert not [key for key in answers[name] if key.startswith("val_")]
    assert tensors_of(root, name) == tensors_of(root, "sound")


@pytest.mark.slow
def test_a_loss_that_is_no_number_chooses_nothing(merged):
    """An adapter with NaN is refused by its tensor, as without a choice."""
    assert isinstance(merged[2]["auto-nan"], ModelError)
    assert "up_proj.weight: holds NaN" in str(merged[2]["auto-nan"])


@pytest.mark.slow
def test_dequantized_needs_four_bit_training(merged):
    """Training in 16 bits never saw a quantized base."""
    error = merged[2]["not-4bit"]
    assert isinstance(error, ConfigError)
    assert error.problems[0].key == "merge.merge_base"


def test_both_ways_are_compared_on_one_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """However many processes trained: a split model would wait for the others."""
    seen = []

    class Seen(Exception):
        pass

    def load(_base: Path, settings: FinetuneConfig, _length: int) -> None:
        seen.append(settings)
        raise Seen

    monkeypatch.setattr(merge.finetune_model, "load", load)
    trained = FinetuneConfig(num_processes=2, fsdp_version=2)
    with pytest.raises(Seen):
        merge._losses(tmp_path, None, trained, 64, [])
    (settings,) = seen
    assert (settings.num_processes, settings.fsdp_version, settings.load_in_4bit) == (1, None, False)
