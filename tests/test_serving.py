"""What the scripts leave is served elsewhere: loaded by plain transformers and peft in a new process, merged,
with a card.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import peft
import pytest
import torch
import transformers
from conftest import ROOT, save_family
from huggingface_hub import ModelCard
from safetensors import safe_open

import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa
import sft
from data import one_line_errors

TINY = str(ROOT / "data" / "tiny")
QUICK = ["--model", "tiny", "--data", "builtin", "--eval_size", "4", "--max_completion_length", "64",
         "--eval_every", "0", "--learning_rate", "1e-3"]
GRPO = [*QUICK, "--steps", "1", "--prompts_per_step", "4", "--group_size", "6", "--limit", "60"]
RUNS = {"grpo_pubmedqa": (grpo_pubmedqa, GRPO), "grpo_medmcqa": (grpo_medmcqa, [*GRPO, "--adapter", "none"]),
        "grpo_ecg": (grpo_ecg, [*GRPO, "--adapter", "none"]),
        "sft": (sft, [*QUICK, "--task", "medmcqa", "--limit", "60", "--num_epochs", "1"])}
IDS = torch.arange(40).view(2, 20) * 37 % 2000 + 4
ELSEWHERE = """
import json, sys
import numpy, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ours = ("eval", "rewards", "data")
assert not any("grpo" in name or name in ours for name in sys.modules)
torch.set_num_threads(int(sys.argv[2]))
ids, logits = torch.tensor(json.loads(sys.argv[3])), {}
for name, folder, base in json.loads(sys.argv[4]):
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder) if base else model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "?"}]
    assert "<|im_start|>user" in tokenizer.apply_chat_template(question, tokenize=False)
    with torch.no_grad():
        logits[name] = model.eval()(ids).logits.numpy()
numpy.savez(sys.argv[1], **logits)
"""


def merged(*arguments):
    """eval.py merge without a new process; returns the exit code."""
    try:
        with one_line_errors():
            evaluation.merge(evaluation.tyro.cli(evaluation.Merge, args=list(map(str, arguments)),
                                                 use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the runs, logits of each model in memory when it was saved): a short run of every script."""
    folder, logits = tmp_path_factory.mktemp("runs"), {}
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    for kind in (peft.PeftModel, transformers.PreTrainedModel):
        def save(self, where, *rest, _save=kind.save_pretrained, **options):
            if Path(where).name == "model":
                with torch.no_grad():
                    logits.setdefault(Path(where).parent.name, self.eval()(IDS).logits.numpy())
            return _save(self, where, *rest, **options)
        patch.setattr(kind, "save_pretrained", save)
    for name, (script, arguments) in RUNS.items():
        script.main(script.parse([*arguments, "--out", str(folder / name)]))
    patch.undo()
    for name in RUNS:
        adapter = [] if name == "grpo_pubmedqa" else ["--adapter", folder / name / "model"]
        assert merged("--model", "tiny" if adapter else folder / name / "model", *adapter, "--out",
                      folder / f"{name}-merged") == 0
    return folder, logits


def test_a_new_process_gets_the_same_logits(runs, tmp_path):
    folder, logits = runs
    assert set(logits) == set(RUNS)
    wanted = [(name, str(folder / name / "model"), "" if name == "grpo_pubmedqa" else TINY) for name in RUNS]
    wanted += [(f"{name}-merged", str(folder / f"{name}-merged"), "") for name in RUNS]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path / "logits.npz",
                           str(torch.get_num_threads()), json.dumps(IDS.tolist()),
                           json.dumps(wanted)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    read = numpy.load(tmp_path / "logits.npz")
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(TINY,
                                                                 dtype=torch.float32)(IDS).logits.numpy()
    for name in RUNS:
        assert numpy.abs(logits[name] - base).max() > 1e-3, name  # something was learned
        assert numpy.array_equal(read[name], logits[name]), name
        # 8e-6 of 10.5 was measured
        assert numpy.abs(read[f"{name}-merged"] - logits[name]).max() < 2e-6 * numpy.abs(base).max(), name


@pytest.mark.parametrize("name", RUNS)
def test_a_merged_folder_is_whole(runs, name):
    folder, run = runs[0] / f"{name}-merged", runs[0] / name
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "README.md"} <= files
    assert not files & {"adapter_config.json"} and not any(file.endswith((".bin", ".pt")) for file in files)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert not any("lora" in key for key in weights.keys())
    assert 2 in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]  # <|im_end|>
    card, summary, config = (folder / "README.md").read_text(), *(
        json.loads((run / f"{file}.json").read_text()) for file in ("summary", "config"))
    head, body = card.split("---\n")[1:3]
    assert "library_name: transformers" in head and "base_model" not in head  # tiny is not on the hub
    value = "score" if name == "grpo_ecg" else "accuracy"
    for side in ("before", "after"):
        low, high = summary[side][f"{value}_ci95"]
        assert f"{summary[side][value]:.3f} [{low:.3f}, {high:.3f}]" in body
    assert "4 held-out questions" in body and "no medical device" in body and "`tiny`" in body
    assert "(builtin)" in body
    assert ("supervised fine-tuning" if name == "sft" else "trained by GRPO") in body
    assert {"grpo_pubmedqa": "on pubmedqa", "grpo_ecg": "on ecg"}.get(name, "on medmcqa") in body
    settings = json.loads(body.split("```json\n")[1].split("\n```")[0])
    assert settings["learning_rate"] == 1e-3 and settings.items() <= config.items()
    prompt = body.split("system prompt:\n\n```\n")[1].split("\n```")[0]
    if name == "sft":  # keeps no samples
        assert "<SOLUTION>" in prompt
    else:
        assert prompt == json.loads((run / "samples.jsonl").read_text().splitlines()[0])["prompt"][0][
            "content"]
    assert summary["versions"]["transformers"] in body and "$" not in body
    [result] = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == (value, summary["after"][value])
    assert result.dataset_args == {"n": 4} and "(builtin)" in result.dataset_name
    assert not any(sign in body for sign in ("{{", "{%", "Undefined"))


def test_a_merged_model_answers_as_the_adapter_does(runs, tmp_path):
    """By our own evaluation, which reads both forms."""
    folder = runs[0]
    for model, out in (("grpo_medmcqa/model", "a"), ("grpo_medmcqa-merged", "b")):
        evaluation.main(evaluation.Config(task="medmcqa", model=str(folder / model), eval_size=6, mode="both",
                                          max_completion_length=24,
                                          out=str(tmp_path / out)))
    a, b = ([json.loads(line) for line in (tmp_path / out / "eval.jsonl").read_text().splitlines()]
            for out in "ab")
    assert [r["completion"] for r in a] == [r["completion"] for r in b]


def test_an_adapter_folder_alone_is_merged_and_one_of_no_run_has_a_card(runs, tmp_path):
    (tmp_path / "alone").mkdir()
    for file in (runs[0] / "grpo_ecg" / "model").iterdir():
        (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    assert merged("--model", tmp_path / "alone", "--out", tmp_path / "out") == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (runs[0] / "grpo_ecg-merged" / "model.safetensors").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not known" in card and "no medical device" in card and "before | after" in card
    assert ModelCard(card).data.eval_results is None and "model-index" not in card


def test_a_template_less_base_gets_one_and_hub_ids_are_named(tmp_path, monkeypatch):
    save_family("llama", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert merged("--model", tmp_path / "plain", "--out", tmp_path / "out", "--dtype", "bf16") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hm?"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text == "User: Hm?\n\nAssistant: "
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "Qwen/Qwen3-4B-Base", "group_size": 8,
                                                              "data": "hub"}))
    card = evaluation.model_card(evaluation.Merge(model="Qwen/Qwen3-4B-Base",
                                                  adapter=str(tmp_path / "run" / "model"), out="x"),
                                 "bfloat16")
    assert "base_model: Qwen/Qwen3-4B-Base\n" in card.split("---\n")[1] and "trained by GRPO" in card


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    folder = runs[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    save_family("llama", tmp_path / "llama")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    lora = folder / "grpo_ecg" / "model"
    for arguments, word in [
            (["--model", "tiny", "--adapter", lora, "--out", tmp_path / "full"], "take another"),
            (["--model", "tiny", "--adapter", lora, "--out", tmp_path / "full" / "a"], "take another"),
            (["--model", "tiny", "--adapter", lora, "--out", tmp_path / "full" / "a" / "b"],
             "cannot be written"),
            (["--model", "tiny", "--adapter", tmp_path / "none", "--out", tmp_path / "o"],
             "is no adapter folder"),
            (["--model", "tiny", "--adapter", broken, "--out", tmp_path / "o"], "is no adapter folder"),
            (["--model", tmp_path / "llama", "--adapter", lora, "--out", tmp_path / "o"],
             "fits its own base only"),
            (["--model", lora, "--adapter", lora, "--out", tmp_path / "o"], "name the base there"),
            (["--model", tmp_path / "nothing", "--adapter", lora, "--out", tmp_path / "o"],
             "no such model folder")]:
        capsys.readouterr()
        assert merged(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and error.count("\n") == 1, error
    assert not (tmp_path / "o").exists()


def test_merge_as_a_user_would_run_it(runs, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "eval.py", "merge", "--model", "tiny", "--adapter",
                           runs[0] / "sft" / "model", "--out", "m"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "written: m/" in done.stdout and (
        tmp_path / "m" / "model.safetensors").exists(), done.stderr
