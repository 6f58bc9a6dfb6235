"""Every numeric and path knob of every command with every bad value: a sound result, or one line and exit code 2.

The default part cuts training short once all checks have passed; `-m slow` goes to the end, with one step.
`python tests/test_knobs.py` counts the combinations for tests/README.md.
"""
import argparse
import contextlib
import io
import json
import math
import os
import sys
import traceback
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

import pytest

import data.tiny
import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa
import rewards
import sft
from data import RANGES, InputError, check_knobs, ecg, one_line_errors, prepare

SMALL = ["--model", "tiny", "--data", "builtin", "--limit", "40", "--eval_size", "2", "--max_completion_length", "4"]
GRPO = [*SMALL, "--steps", "1", "--prompts_per_step", "2", "--group_size", "2", "--warmup", "0"]
PATHS = {"model", "models", "adapter", "data", "system_prompt", "encoder", "language_model", "reward_model", "base",
         "tokenizer", "out", "attn_implementation"}
VALUES = ["nan", "inf", "-inf", "-1", "0", "1e30", "1" + "0" * 30, "", "folder", "file", "missing", "missing/path", "x" * 300]
# what a knob needs beside it to be looked at
BESIDE = {"encoder": ["--similarity", "embeddings"], "language_model": [], "reward_model": []}


class Reached(BaseException):
    """All checks have passed, training would begin."""


def script(module):
    return lambda arguments: module.main(module.parse(arguments))


def entry(main, config):
    return lambda arguments: main(evaluation.tyro.cli(config, args=arguments, use_underscores=True))


# command: (its knobs, what it does with arguments, the least that it needs)
COMMANDS = {
    "grpo_pubmedqa.py": (grpo_pubmedqa.Config, script(grpo_pubmedqa), GRPO),
    "grpo_medmcqa.py": (grpo_medmcqa.Config, script(grpo_medmcqa), [*GRPO, "--adapter", "none", "--similarity", "overlap"]),
    "grpo_ecg.py": (grpo_ecg.Config, script(grpo_ecg), [*GRPO, "--adapter", "none", "--similarity", "overlap"]),
    "sft.py": (sft.Config, script(sft), SMALL),
    "eval.py": (evaluation.Config, entry(evaluation.main, evaluation.Config), [*SMALL, "--samples", "1"]),
    "eval.py, ECG": (evaluation.Config, entry(evaluation.main, evaluation.Config), [*SMALL, "--task", "ecg"]),
    "eval.py chat": (evaluation.Chat, entry(evaluation.chat, evaluation.Chat), ["--max_completion_length", "4"]),
    "eval.py merge": (evaluation.Merge, entry(evaluation.merge, evaluation.Merge), ["--model", "tiny", "--out", "merged"]),
    "rewards.py train": (rewards.Train, lambda arguments: rewards.main(["train", *arguments]),
                         ["rows", "--limit", "2", "--eval_size", "2", "--max_length", "16", "--out", "made"]),
    "data.prepare": (prepare.Config, entry(prepare.main, prepare.Config), ["pubmedqa", "builtin", "--limit", "20", "--out", "so"]),
}


def numbers(config):
    """Names of the knobs of a command that are numbers, or hold some."""
    return [f.name for f in fields(config) if {int, float} & {f.type, *get_args(f.type)}]


def combinations():
    """[(command, knob, value)] of the whole fuzz."""
    return [(command, knob, value) for command, (config, *_) in COMMANDS.items()
            for knob in [*numbers(config), *(f.name for f in fields(config) if f.name in PATHS)] for value in VALUES
            if command != "eval.py, ECG" or knob in ("encoder", "language_model", "reward_model")]


def arguments(command, knob, value, folder):
    """The command line of a combination; `folder`: of the test, with what VALUES names in it."""
    base = list(COMMANDS[command][2])
    value = str(folder / value) if value in ("folder", "file", "missing") else value
    if knob == "data" and command in ("rewards.py train", "data.prepare"):  # positional
        base[command == "data.prepare"] = value
        return base
    if knob == "weights":
        value = ["findings", value]
    elif knob == "models":
        value = [f"a={value}"]
    else:
        value = [value]
    return [*base, *BESIDE.get(knob, []), f"--{knob}", *value]


def ended(run, arguments):
    """(exit code, or "reached" where training would begin; stdout; stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with one_line_errors():
                run(arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except Reached:
            code = "reached"
        except Exception:
            code = traceback.format_exc()
    return code, out.getvalue(), err.getvalue()


def unsound(folder):
    """What is wrong with what a command left under `folder`: JSON that is cut or holds NaN or infinity, half a file."""
    def refuse(word):
        raise ValueError(word)

    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            try:
                for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                    json.loads(part, parse_constant=refuse)
            except ValueError as error:
                return f"{path}: {error}"
        if path.suffix == ".new":
            return f"{path} was left"
    return ""


def outcome(command, knob, value, folder, monkeypatch):
    """How a combination ended: "accepted", "refused" (one line), "parser" (tyro's box), or what is wrong with it."""
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "file").write_text("neither a model nor rows\n")
    (folder / "rows").mkdir()
    for side in ("train", "heldout"):
        (folder / "rows" / f"{side}.jsonl").write_text("".join(ROWS))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a P wave?\n/quit\n"))
    line = arguments(command, knob, value, folder)
    code, out, err = ended(COMMANDS[command][1], line)
    if code in (0, "reached"):
        return unsound(folder) or "accepted"
    named = knob in err or value in err or Path(value).name in err
    if code == 2 and named and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"):
        return "refused"
    if code == 2 and named and "Error parsing --" in err or "Missing value for argument" in err:
        return "parser"
    return f"{command} {' '.join(line)}: exit {code}\n{out[-300:]}\n{err[-1500:]}"


ROWS = [json.dumps(row) + "\n" for row in ecg.load_rows("builtin", limit=20)[0][:4]]


@pytest.fixture
def cut(monkeypatch):
    """Training ends where it would begin."""
    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr(evaluation.Run, "open", reached)
    monkeypatch.setattr(rewards, "pairs_of", reached)


def count_outcomes(command, tmp_path, monkeypatch):
    """{outcome: how many} of all combinations of a command; fails where there is another outcome than the three."""
    counts = Counter()
    for i, (_, knob, value) in enumerate(c for c in combinations() if c[0] == command):
        counts[outcome(command, knob, value, tmp_path / str(i), monkeypatch)] += 1
    print(command, {name: count for name, count in counts.items() if len(name) < 10})
    others = [name for name in counts if name not in ("accepted", "refused", "parser")]
    assert not others, "\n====\n".join([*others, f"{len(others)} of {sum(counts.values())}"])
    assert counts["refused"] and counts["accepted"]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_a_knob_ends_in_a_traceback_or_in_nonsense(command, tmp_path, monkeypatch, cut):
    count_outcomes(command, tmp_path, monkeypatch)


@pytest.mark.slow  # to the end
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_accepted_runs_to_its_end(command, tmp_path, monkeypatch):
    count_outcomes(command, tmp_path, monkeypatch)
