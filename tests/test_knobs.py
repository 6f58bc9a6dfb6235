"""Every numeric and path knob of every command with bad values: a sound result, or one line and exit code 2.

The default part takes a share of the combinations, and cuts training short once all checks have passed;
`-m slow` takes all of them and goes to the end, with one step.
"""

import contextlib
import io
import json
import math
import runpy
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
import sft
from data import RANGES, ecg, one_line_errors, prepare, run

SMALL = "--model tiny --data builtin --limit 40 --eval_size 2 --max_completion_length 4".split()
GRPO = [*SMALL, *"--steps 1 --prompts_per_step 2 --group_size 2 --warmup 0".split()]
LORA = [*GRPO, *"--adapter none --similarity overlap".split()]
PATHS = set("model models adapter data system_prompt encoder language_model reward_model tokenizer out "
            "attn_implementation".split())
VALUES = ["nan", "inf", "-inf", "-1", "0", "1e30", "1" + "0" * 30, "", "folder", "file", "missing",
          "missing/path", "x" * 300]
SHARE = 11  # the default part takes every eleventh combination
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
    "grpo_medmcqa.py": (grpo_medmcqa.Config, script(grpo_medmcqa), LORA),
    "grpo_ecg.py": (grpo_ecg.Config, script(grpo_ecg), LORA),
    "sft.py": (sft.Config, script(sft), SMALL),
    "eval.py": (evaluation.Config, entry(evaluation.main, evaluation.Config), [*SMALL, "--samples", "1"]),
    "eval.py, ECG": (evaluation.Config, entry(evaluation.main, evaluation.Config), [*SMALL, "--task", "ecg"]),
    "eval.py chat": (evaluation.Chat, entry(evaluation.chat, evaluation.Chat),
                     "--max_completion_length 4".split()),
    "eval.py merge": (evaluation.Merge, entry(evaluation.merge, evaluation.Merge),
                      "--model tiny --out m".split()),
    "sft.py reward_model": (sft.RewardModel, entry(sft.train_reward_model, sft.RewardModel),
                            "--data rows --limit 2 --eval_size 2 --max_length 16 --out made".split()),
    "data.prepare": (prepare.Config, entry(prepare.main, prepare.Config),
                     "pubmedqa builtin --limit 20 --out so".split()),
}


def numbers(config):
    """Names of the knobs of a command that are numbers, or hold some."""
    return [f.name for f in fields(config) if {int, float} & {f.type, *get_args(f.type)}]


def combinations():
    """[(command, knob, value)] of the whole fuzz."""
    return [
        (command, knob, value)
        for command, (config, *_) in COMMANDS.items()
        for knob in [*numbers(config), *(f.name for f in fields(config) if f.name in PATHS)]
        for value in VALUES
        if command != "eval.py, ECG" or knob in ("encoder", "language_model", "reward_model")
    ]


def arguments(command, knob, value, folder):
    """The command line of a combination; `folder`: of the test, with what VALUES names in it."""
    base = list(COMMANDS[command][2])
    value = str(folder / value) if value in ("folder", "file", "missing") else value
    if knob == "data" and command == "data.prepare":  # positional
        base[1] = value
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
    """What is wrong with what a command left under `folder`: JSON that is cut or holds NaN, half a file."""

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
    """How a combination ended: "accepted", "refused" (one line), "parser" (tyro's box), or what is wrong."""
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

    monkeypatch.setattr(run.Run, "open", reached)
    monkeypatch.setattr(sft, "pairs_of", reached)


def count_outcomes(chosen, tmp_path, monkeypatch):
    """{outcome: how many} of these combinations; fails where there is another outcome than the three."""
    counts = Counter(
        outcome(*combination, tmp_path / str(i), monkeypatch) for i, combination in enumerate(chosen)
    )
    others = [name for name in counts if name not in ("accepted", "refused", "parser")]
    assert not others, "\n====\n".join([*others, f"{len(others)} of {len(chosen)}"])
    print(chosen[0][0], dict(counts))
    return counts


def test_no_value_of_a_knob_ends_in_a_traceback_or_in_nonsense(tmp_path, monkeypatch, cut):
    chosen = combinations()[::SHARE]  # every value of some knobs, and some values of every knob
    assert {value for *_, value in chosen} == set(VALUES) and {command for command, *_ in chosen} == set(
        COMMANDS
    )
    counts = count_outcomes(chosen, tmp_path, monkeypatch)
    assert min(counts.values()) > 10 and len(counts) == 3


@pytest.mark.slow  # all of them, and what is accepted goes to its end: 15 minutes
@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_a_knob_ends_badly_when_all_are_run_to_the_end(command, tmp_path, monkeypatch):
    count_outcomes([c for c in combinations() if c[0] == command], tmp_path, monkeypatch)


# --- the rule itself ----------------------------------------------------------------------------------------


OR_ZERO = {
    sft.Config: {"lora_r"},
    evaluation.Config: {"temperature", "eval_size"},
    evaluation.Chat: {"temperature"},
    sft.RewardModel: {"lora_r"},
}
CHECKS = {
    evaluation.Config: evaluation.main,
    evaluation.Chat: evaluation.chat,
    prepare.Config: prepare.main,
    sft.Config: sft.main,
    sft.RewardModel: sft.train_reward_model,
    grpo_pubmedqa.Config: grpo_pubmedqa.main,
    grpo_medmcqa.Config: grpo_medmcqa.main,
    grpo_ecg.Config: grpo_ecg.main,
}


def test_every_number_among_the_knobs_has_a_stated_range():
    used = {"hidden", "layers"}  # of data/tiny.py, which has no dataclass
    for config in {config for config, *_ in COMMANDS.values()}:
        for name in numbers(config):
            assert name in RANGES, f"{config.__module__}: --{name} is a number: add its range to data.RANGES"
            least, most = RANGES[name]
            assert -math.inf < least < most < math.inf
            default = next(f for f in fields(config) if f.name == name).default
            zero = name in OR_ZERO.get(config, ())
            assert default is MISSING or least <= default <= most or zero and default == 0, (config, name)
            used.add(name)
    assert used == set(RANGES)


@pytest.mark.parametrize("config", CHECKS, ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_a_number_outside_of_its_range_is_refused_by_name_before_anything_else(config, monkeypatch, capsys):
    for script in (grpo_pubmedqa, grpo_medmcqa, grpo_ecg, sft):
        monkeypatch.setattr(script, "Run", None)  # what comes right after the checks
    needed = {prepare.Config: {"task": "pubmedqa"}, sft.RewardModel: {"data": "nowhere"}}.get(config, {})
    for name in numbers(config):
        least, most = RANGES[name]
        zero = name in OR_ZERO.get(config, ())
        for value in (
            math.nan,
            math.inf,
            -math.inf,
            -1,
            1e30,
            10**30,
            2 * most,
            *[0] * (least > 0 and not zero),
        ):
            given = config(**needed, **{name: {"findings": value} if name == "weights" else value})
            capsys.readouterr()
            code, _, error = ended(CHECKS[config], given)
            assert code == 2 and error.startswith(f"error: --{name} ") and error.count("\n") == 1, (
                name,
                value,
                error,
            )
            assert str(value) in error and "at least" in error and "at most" in error


def test_numbers_of_the_maker_of_the_built_in_model(monkeypatch, capsys, tmp_path):
    def tiny(*flags):
        monkeypatch.setattr(sys, "argv", ["data/tiny.py", "--out", str(tmp_path / "made"), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(data.tiny.__file__, run_name="__main__")
        assert end.value.code == 2
        return capsys.readouterr().err

    for knob in ("steps", "batch_size", "learning_rate", "hidden", "layers", "seed"):
        error = tiny(f"--{knob}", "-1")
        assert error.startswith(f"error: --{knob} -1") and error.count("\n") == 1
    assert "a multiple of 8 is needed" in tiny("--hidden", "12") and not (tmp_path / "made").exists()
