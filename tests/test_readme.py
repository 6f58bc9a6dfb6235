"""The READMEs say what is there: every command parses, every path exists, the worked example runs."""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import real_models
import tyro
from conftest import ROOT
from test_cli import QUICK, command

import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa
import sft
from data import prepare

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = [README, *((ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("data", "tests"))]
SHELL = [block for text in PROSE for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)]
CONFIGS = {("grpo_pubmedqa.py",): grpo_pubmedqa.Config, ("grpo_medmcqa.py",): grpo_medmcqa.Config,
           ("grpo_ecg.py",): grpo_ecg.Config,
           ("sft.py",): sft.Config, ("eval.py",): evaluation.Config, ("eval.py", "chat"): evaluation.Chat,
           ("eval.py", "merge"): evaluation.Merge,
           ("sft.py", "reward_model"): sft.RewardModel, ("-m", "data.prepare"): prepare.Config,
           ("tests/real_models.py",): real_models.Config}
FOREIGN = ("python3", "pip", "accelerate", "vllm", "lm_eval", "hf", "torchrun", "ruff")


def commands():
    """The arguments of every call of python in the READMEs' shell blocks, as bash expands them."""
    stubs = "python() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
    stubs += "".join(f"{name}() {{ :; }}\n" for name in FOREIGN)
    found = []
    for block in SHELL:
        block = re.sub(r"\S*\bbin/(python|pip|ruff)\b", r"\1", block)
        done = subprocess.run(["bash", "-ec", stubs + block], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and not done.stderr, (block, done.stderr)
        found += [line.rstrip("\0").split("\0") for line in done.stdout.split("\n") if line]
    return found


COMMANDS = commands()


def test_there_are_commands():
    assert len(COMMANDS) > 25
    assert {arguments[0] for arguments in COMMANDS} >= {"grpo_pubmedqa.py", "grpo_medmcqa.py", "grpo_ecg.py",
                                                        "sft.py", "eval.py"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments)[:90])
def test_every_command_names_a_script_and_flags_that_exist(arguments, capsys):
    key = next((key for key in sorted(CONFIGS, key=len, reverse=True) if tuple(arguments[:len(key)]) == key),
               None)
    if key and "--help" not in arguments:
        # exits on an unknown flag or value
        tyro.cli(CONFIGS[key], args=arguments[len(key):], use_underscores=True)
    elif arguments[0] == "-m" and not arguments[1].startswith("data."):
        assert arguments[1] in ("pytest", "venv", "verl.trainer.main_ppo")
    elif not key:
        script = ROOT / (arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0])
        known = set(re.findall(r"add_argument\(\s*\"(--\w+)\"", script.read_text()))
        assert {argument for argument in arguments if re.match(r"--\w", argument)} - {"--help"} <= known


def test_every_path_exists():
    named = set(re.findall(r"`((?:data|tests)/[\w./-]+)`", "".join(PROSE)))
    for folder, text in zip(("", "data", "tests"), PROSE):
        named |= {os.path.normpath(os.path.join(folder, link))
                  for link in re.findall(r"\]\((?!http|#)([^)\s]+)\)", text)}
    made = ("data/processed",)
    assert not [path for path in named if not path.startswith(made)
                and not (ROOT / path.partition("#")[0]).exists()]
    assert len(named) > 8
    for path, _, heading in (link.partition("#") for link in named if "#" in link):
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.M)
        assert heading in [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings]


def test_every_picture_is_shown_and_every_shown_one_exists():
    there = {path.name for path in (ROOT / "data" / "pictures").iterdir()}
    assert there == {Path(path).name for path in re.findall(r"!\[.*?\]\((\S+?)\)", README)}


def test_every_formula_stands_in_the_script():
    script = (ROOT / "grpo_pubmedqa.py").read_text()
    lines = re.findall(r"^\|[^|]+\|[^|]*(?:\\\|[^|]*)*\| `([^`]+)` \|$", README, re.M)
    assert len(lines) >= 11
    for line in lines:
        assert all(part in script for part in line.split("...")), line


def test_the_worked_example_runs_as_it_stands(tmp_path):
    [example] = re.findall(r"^```python\n(.*?)^```", PROSE[1], re.M | re.S)
    assert len(example.strip().splitlines()) <= 20
    with open(tmp_path / "my_questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "text", "label", "why"])
        writer.writerows([f"Does drug {i} help?", f"In trial {i} the drug, \"new\", was given.", "yes"
                          if i % 2 else "no", "It was."] for i in range(40))
    (tmp_path / "my_data.py").write_text(example)
    done = subprocess.run([sys.executable, "my_data.py"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "training and" in done.stdout, done.stderr
    rows = [json.loads(line) for side in ("train", "heldout")
            for line in (tmp_path / "data/processed/mine" / f"{side}.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    run = command("grpo_pubmedqa.py", *QUICK, "--steps", 1, "--eval_size", 4, "--model", "tiny", "--data",
                  "data/processed/mine", "--out", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
