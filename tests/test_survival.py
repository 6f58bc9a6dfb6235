"""Runs that survive: killed at any moment, starved of memory and disk, fed NaN, cut-off files and any text at
all.
"""
import gc
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import metrics, same_but_for_clocks

import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa
import rewards
import sft
from data import ecg, load_task, one_line_errors, printable, pubmedqa
from data.run import Run, collapse_warnings, not_finite

GRPO = ["--model", "tiny", "--data", "builtin", "--steps", "6", "--prompts_per_step", "2", "--group_size",
        "4", "--eval_size", "4", "--warmup", "0",
        "--max_completion_length", "24", "--save_every", "2", "--eval_every", "3", "--ref_every", "3",
        "--beta", "0.01", "--limit", "200"]
SFT = ["--model", "tiny", "--data", "builtin", "--task", "medmcqa", "--limit", "48", "--num_epochs", "2",
       "--eval_size", "4", "--batch_size", "16",
       "--max_completion_length", "24", "--eval_every", "3", "--save_every", "2"]
RUNS = {grpo_pubmedqa: GRPO,
        grpo_medmcqa: [*GRPO, "--adapter", "none", "--resample_zero_std", "0", "--no_mask_truncated"],
        grpo_ecg: [*GRPO, "--adapter", "none", "--resample_zero_std", "0", "--no_mask_truncated"], sft: SFT}
scripts = pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
grpo_scripts = pytest.mark.parametrize("script", list(RUNS)[:3], ids=lambda script: script.__name__)


def launch(script, *arguments):
    """A script's main in this process; returns the exit code. What a dead process leaves to the kernel is
    given back here.
    """
    try:
        with one_line_errors():
            script.main(script.parse(list(map(str, arguments))))
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.collect()
    return 0


def one_line(error):
    """The line that begins with "error: "; there must be no other and no traceback."""
    assert error.count("error: ") == 1 and "Traceback" not in error, error
    return error[error.index("error: "):]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Function from a script to the folder of its uninterrupted run."""
    made = {}

    def folder(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script.__name__) / "run"
            assert launch(script, *RUNS[script], "--out", made[script]) == 0
        return made[script]

    return folder


def crash_in_step(monkeypatch, script, step, error=KeyboardInterrupt):
    """Makes the script raise an error in a step, as a crash would, once."""
    name, calls = ("completion_nll" if script is sft else "rollout"), []
    usual = getattr(script, name)

    def crashing(*arguments):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == step and calls[-1]:  # sft's validation loss is computed without gradient
            raise error
        return usual(*arguments)

    monkeypatch.setattr(script, name, crashing)


def unfinished(monkeypatch, script, folder, step=4):
    """A run that died in a step, with a checkpoint of an earlier one."""
    with monkeypatch.context() as context:
        crash_in_step(context, script, step)
        assert launch(script, *RUNS[script], "--out", folder) == 130
    assert (folder / "checkpoint" / "state.pt").exists() and not (folder / "summary.json").exists()
    return folder


def check_same(script, one, two):
    """Weights, metrics, samples and evaluations of two runs are the same to the bit."""
    file = "model.safetensors" if script is grpo_pubmedqa else "adapter_model.safetensors"
    weights = [load_file(folder / "model" / file) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert same_but_for_clocks(metrics(one)) == same_but_for_clocks(metrics(two))
    for name in ("eval_before.jsonl", "eval_after.jsonl", *(["samples.jsonl"] if script is not sft else [])):
        assert (one / name).read_text() == (two / name).read_text()


# === killed =================================================================================================


def start(script, folder, *more):
    return subprocess.Popen([sys.executable, str(ROOT / f"{script.__name__}.py"), *RUNS[script],
                             "--save_every", "1", "--out", str(folder), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_and_resume(script, folder, kills, generator):
    """Kills a run with SIGKILL again and again, every third time inside a checkpoint write, resumes it each
    time, and lets it end.

    Returns (kills, of these inside a checkpoint write).
    """
    def writing():
        """Whether the process is writing, or was, a checkpoint; not what an earlier kill left."""
        try:
            return (folder / "checkpoint.new").stat().st_mtime > begin
        except FileNotFoundError:
            return False

    begun, killed, inside = 0.0, 0, 0
    while killed < kills:
        begin = time.time()
        process = start(script, folder, "--resume")
        if killed % 3 == 1:  # as soon as the new checkpoint is being written
            while process.poll() is None and not writing():
                time.sleep(0.0002)
        else:  # the first seconds are imports: most kills come after them, in evaluations, steps and between
            moment = generator.uniform(0, 2) if generator.random() < 0.2 else generator.uniform(0, 6)
            while process.poll() is None and time.time() - begin < begun + moment:
                time.sleep(0.001)
                if not begun and (folder / "config.json").exists():
                    begun = time.time() - begin
        process.kill()
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
        if process.returncode == 0:  # it was too quick for this kill: another run
            check_same(script, folder, folder.parent / "whole")
            shutil.rmtree(folder)
            continue
        killed += 1
        inside += writing()
    process = start(script, folder, "--resume")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    check_same(script, folder, folder.parent / "whole")
    assert not [path for path in folder.iterdir() if path.name.endswith((".new", ".old"))]
    return killed, inside


def test_killed_at_random_and_inside_a_checkpoint_write(whole, tmp_path):
    (tmp_path / "whole").symlink_to(whole(grpo_pubmedqa))
    assert kill_and_resume(grpo_pubmedqa, tmp_path / "run", 3, random.Random(0)) >= (3, 1)


@pytest.mark.slow  # minutes
@scripts
def test_killed_many_times(script, tmp_path):
    process = start(script, tmp_path / "whole")
    assert process.communicate() and process.returncode == 0
    killed, inside = kill_and_resume(script, tmp_path / "run", 7, random.Random(script.__name__))
    assert killed == 7 and inside >= 1
    print(f"{script.__name__}: {killed} kills, {inside} inside a checkpoint write, weights the same to the "
          "bit")


@scripts
def test_a_run_that_died_goes_on_to_the_same_end(script, whole, tmp_path, monkeypatch, capsys):
    folder = unfinished(monkeypatch, script, tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # half a last line
    (folder / "eval_before.jsonl.new").write_text('{"id": "half')  # and half a file that was being written
    (folder / "checkpoint.new").mkdir()
    assert launch(script, *RUNS[script], "--out", folder, "--resume") == 0
    assert "after step 2" in capsys.readouterr().out
    check_same(script, folder, whole(script))


def test_killed_before_anything_was_saved(whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()  # killed right after it was made
    (tmp_path / "run" / "eval_before.jsonl.new").write_text('{"id": "half')
    assert launch(grpo_pubmedqa, *GRPO, "--out", tmp_path / "run") == 0
    check_same(grpo_pubmedqa, tmp_path / "run", whole(grpo_pubmedqa))
    assert not (tmp_path / "run" / "eval_before.jsonl.new").exists()


def test_killed_between_the_two_renames(whole, tmp_path, monkeypatch):
    folder = unfinished(monkeypatch, grpo_pubmedqa, tmp_path / "run")
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    kept = []  # the old one must be there until the new one is
    usual = torch.save
    monkeypatch.setattr(torch, "save",
                        lambda *a: (kept.append((folder / "checkpoint.old" / "state.pt").exists()
                                                or (folder / "checkpoint").exists()), usual(*a)))
    assert launch(grpo_pubmedqa, *GRPO, "--out", folder, "--resume") == 0
    assert len(kept) == 2 and all(kept)
    check_same(grpo_pubmedqa, folder, whole(grpo_pubmedqa))


def test_a_truncated_checkpoint(whole, tmp_path, monkeypatch, capsys):
    folder = unfinished(monkeypatch, grpo_pubmedqa, tmp_path / "run")
    state = (folder / "checkpoint" / "state.pt").read_bytes()
    for length in (0, 1000, len(state) - 1000):
        (folder / "checkpoint" / "state.pt").write_bytes(state[:length])
        assert launch(grpo_pubmedqa, *GRPO, "--out", folder, "--resume") == 2
        error = one_line(capsys.readouterr().err)
        assert "checkpoint/state.pt cannot be read" in error and "delete" in error
    (folder / "checkpoint.old").mkdir()
    (folder / "checkpoint.old" / "state.pt").write_bytes(state)
    assert launch(grpo_pubmedqa, *GRPO, "--out", folder, "--resume") == 0
    assert "cut short or damaged" in capsys.readouterr().out
    check_same(grpo_pubmedqa, folder, whole(grpo_pubmedqa))


@pytest.mark.parametrize("title", ["before", "after"])
@pytest.mark.parametrize("script", [grpo_pubmedqa, sft], ids=lambda script: script.__name__)
def test_sigterm_in_an_evaluation_ends_the_run_at_once(script, title, whole, tmp_path, monkeypatch, capsys):
    usual = evaluation.evaluate

    def killing(*arguments, **options):
        if options["title"] == title:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            raise AssertionError("still here")
        return usual(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(evaluation, "evaluate", killing)
        assert launch(script, *RUNS[script], "--out", tmp_path / "run") == 128 + signal.SIGTERM
    assert f"--out {tmp_path / 'run'} --resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / f"eval_{title}.jsonl").exists()
    assert launch(script, *RUNS[script], "--out", tmp_path / "run", "--resume") == 0
    check_same(script, tmp_path / "run", whole(script))


def test_two_runs_at_once_and_no_lock_stuck_after_a_kill(tmp_path, capsys):
    process = start(grpo_pubmedqa, tmp_path / "run", "--steps", "500")
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    for flags in ([], ["--resume"]):
        assert launch(grpo_pubmedqa, *GRPO, "--out", tmp_path / "run", *flags) == 2
        assert "another run is at work in it" in one_line(capsys.readouterr().err)
    assert process.poll() is None
    process.kill()
    process.communicate()
    Run("grpo_pubmedqa", grpo_pubmedqa.parse([*GRPO, "--out", str(tmp_path / "run"), "--resume"]))
    with pytest.raises(evaluation.InputError, match="holds a run of grpo_pubmedqa.py"):
        Run("grpo_ecg", grpo_ecg.parse([*RUNS[grpo_ecg], "--out", str(tmp_path / "run"), "--resume"]))


def test_what_may_change_on_resume(whole, tmp_path, monkeypatch, capsys):
    folder = unfinished(monkeypatch, grpo_pubmedqa, tmp_path / "run")
    for flags in (["--group_size", "3"], ["--learning_rate", "0.5"], ["--seed", "3"],
                  ["--max_completion_length", "25"]):
        assert launch(grpo_pubmedqa, *GRPO, *flags, "--out", folder, "--resume") == 2
        assert flags[0] in one_line(capsys.readouterr().err)
    assert launch(grpo_pubmedqa, *GRPO, "--completions_per_forward", "2", "--eval_batch_size", "2", "--out",
                  folder, "--resume") == 0
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["completions_per_forward"] == 2


# === resumed with something else ============================================================================


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Function from a script to a fresh copy of the folder of a run that died after a checkpoint."""
    made = {}

    def folder(script, to):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("stopped") / script.__name__
            patch = pytest.MonkeyPatch()
            unfinished(patch, script, made[script])
        shutil.copytree(made[script], to)
        return to

    return folder


def refused(capsys, script, *arguments):
    """The one line with which a launch is refused."""
    capsys.readouterr()
    assert launch(script, *arguments) == 2
    return one_line(capsys.readouterr().err)


def state_of(folder):
    """{path: bytes} of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@scripts
def test_resume_with_other_rows_is_refused(script, tmp_path, monkeypatch, capsys):
    from data import ecg, medmcqa, pubmedqa

    task = {grpo_medmcqa: medmcqa, sft: medmcqa, grpo_pubmedqa: pubmedqa, grpo_ecg: ecg}[script]
    rows = task.load_rows("builtin", limit=120)[0][:30]
    flags = [*RUNS[script], "--data", tmp_path / "rows", "--out", tmp_path / "run"]

    def write(train, heldout):
        (tmp_path / "rows").mkdir(exist_ok=True)
        for side, own in (("train", train), ("heldout", heldout)):
            (tmp_path / "rows" / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

    write(rows[:20], rows[20:])
    with monkeypatch.context() as context:
        crash_in_step(context, script, 2 if script is sft else 4)
        assert launch(script, *flags, "--save_every", "1" if script is sft else "2") == 130
    known = json.loads((tmp_path / "run" / "config.json").read_text())["rows"]
    assert (known["training"]["n"], known["held-out"]["n"]) == (20, 4)  # those that are used: --eval_size 4
    before = state_of(tmp_path / "run")
    prompt = json.loads(json.dumps(rows[0]))
    prompt["prompt"][-1]["content"] += "?"
    flags += ["--save_every", "1" if script is sft else "2", "--resume"]
    others = [
        (rows[1:20], rows[21:], "other training and held-out rows"),
        (rows[:20], rows[21:], "other held-out rows"),
        ([*rows[1:20], rows[0]], rows[20:], "other training rows"),
        ([prompt, *rows[1:20]], rows[20:], "other training rows"),
        ([{**rows[0], "id": "x"}, *rows[1:20]], rows[20:], "other training rows"),
        ([{**rows[0], "target": "x"}, *rows[1:20]], rows[20:], "other training rows"),
    ]
    for train, heldout, words in others if script is grpo_pubmedqa else others[:1]:
        write(train, heldout)
        assert words in refused(capsys, script, *flags)
        assert state_of(tmp_path / "run") == before
    if script is grpo_pubmedqa:
        write(rows[:20], rows[20:29])  # a held-out row that is never looked at
        assert launch(script, *flags) == 0


def test_compare_and_paired_tests_check_ids():
    def records(*ids):
        return [{"id": one, "ground_truth": "yes", "answer": "yes", "accuracy": 1.0} for one in ids]

    assert evaluation.paired_test(records("a", "b"), records("a", "b"))["p_value"] == 1
    for other in (records("a", "c"), records("b", "a"), records("a"), records("a", "b", "c")):
        for test in (evaluation.paired_test, evaluation.compare):
            with pytest.raises(evaluation.InputError, match="the same questions"):
                test(records("a", "b"), other)


QUESTIONS = [{"id": str(i), "prompt": [], "target": ""} for i in range(3)]


def opened(folder, rows=QUESTIONS, resume=True, **knobs):
    """The Run of a script that has looked at its input and begins, or goes on."""
    run = Run("x", grpo_pubmedqa.Config(model="tiny", out=str(folder), resume=resume, **knobs))
    run.open(rows, rows)
    return run


def begun(folder, step=2, **knobs):
    """The folder of a run that was stopped after a step."""
    run = opened(folder, resume=False, **knobs)
    wrong = {"ground_truth": "yes", "answer": "no", "accuracy": 0.0}
    run.write_records("eval_before", [{"id": row["id"], **wrong} for row in QUESTIONS])
    for i in range(step):
        run.log("metrics", {"step": i + 1})
    run.save_checkpoint({"step": step, "completions_per_forward": 0})
    run.close()
    return folder


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_text(""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\n"),
    "no records": lambda file: file.write_text("[]\n3\n"),
    "no evaluation": lambda file: file.write_text('{"id": "x"}\n'),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "another order": lambda file: file.write_text("\n".join(file.read_text().splitlines()[::-1])),
    "a row less": lambda file: file.write_text("\n".join(file.read_text().splitlines()[:-1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_missing_or_damaged_eval_before(damage, tmp_path):
    run = opened(begun(tmp_path / "run"))
    held_out = [(row, [1, 2]) for row in QUESTIONS]
    assert run.load_checkpoint()["step"] == 2 and len(run.read_before(held_out, evaluation.summarize)[0]) == 3
    DAMAGES[damage](run.folder / "eval_before.jsonl")
    words = {"missing": "is missing", "another order": "other questions", "a row less": "other questions"}
    words = words.get(damage, "is damaged")
    with pytest.raises(evaluation.InputError, match=f"{words}.*delete .*run/checkpoint"):
        run.read_before(held_out, evaluation.summarize)
    run.close()


def test_a_signal_while_a_checkpoint_is_read_leaves_it_whole(tmp_path, monkeypatch):
    folder = begun(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves it
    usual, before = torch.load, state_of(folder)

    def killed(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments, **options)

    run = opened(folder)
    monkeypatch.setattr(torch, "load", killed)
    with pytest.raises(SystemExit) as end:
        run.load_checkpoint()
    assert end.value.code == 128 + signal.SIGTERM and state_of(folder) == before


def test_after_a_missing_eval_before_what_the_line_says_works(stopped, whole, tmp_path, capsys):
    folder = stopped(grpo_pubmedqa, tmp_path / "run")
    (folder / "eval_before.jsonl").unlink()
    assert "is missing" in refused(capsys, grpo_pubmedqa, *GRPO, "--out", folder, "--resume")
    shutil.rmtree(folder / "checkpoint")
    assert launch(grpo_pubmedqa, *GRPO, "--out", folder, "--resume") == 0
    check_same(grpo_pubmedqa, folder, whole(grpo_pubmedqa))


def test_a_foreign_checkpoint(stopped, tmp_path, capsys):
    folder, other = begun(tmp_path / "run"), begun(tmp_path / "other", seed=7)
    file = folder / "checkpoint" / "state.pt"
    own = torch.load(file, weights_only=True)
    reseeded = torch.load(other / "checkpoint" / "state.pt", weights_only=True)  # else it is the same run
    for content in (reseeded, {}, {"step": 2}, [1, 2], torch.ones(3), 0, {**own, "run": "x"}):
        torch.save(content, file)
        run = opened(folder)
        with pytest.raises(evaluation.InputError, match="state.pt is no checkpoint of this run: .*delete"):
            run.load_checkpoint()
        run.close()
    torch.save(own, file)
    run = opened(folder)
    assert run.load_checkpoint() == own
    run.close()
    folder = stopped(grpo_pubmedqa, tmp_path / "real")  # and as a user sees it
    torch.save(own, folder / "checkpoint" / "state.pt")
    before = state_of(folder)
    assert "is no checkpoint of" in refused(capsys, grpo_pubmedqa, *GRPO, "--out", folder, "--resume")
    assert state_of(folder) == before


def test_a_run_from_before_there_were_fingerprints_goes_on(tmp_path):
    folder = begun(tmp_path / "run")
    known = json.loads((folder / "config.json").read_text())
    del known["rows"]
    (folder / "config.json").write_text(json.dumps(known))
    torch.save({"step": 2, "completions_per_forward": 0}, folder / "checkpoint" / "state.pt")
    run = opened(folder)
    assert run.load_checkpoint()["step"] == 2
    run.close()


@pytest.mark.parametrize(
    "content", ["[1, 2]", "3", '"text"', "null", "{", "{}", '{"model_type": "qwen2"}', b"\xff\xfe", None]
)
def test_a_config_json_that_is_no_runs(content, stopped, tmp_path, capsys):
    folder = stopped(grpo_pubmedqa, tmp_path / "run")
    (folder / "config.json").unlink()
    if content is None:
        (folder / "config.json").mkdir()
    else:
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = state_of(folder)
    for flags in ([], ["--resume"]):
        error = refused(capsys, grpo_pubmedqa, *GRPO, "--out", folder, *flags)
        assert "config.json" in error and "take another" in error
        assert state_of(folder) == before


def test_lines_of_metrics_that_are_none_are_cut_off(tmp_path):
    for line in ("3", "[]", '{"step": null}', '{"step": 1', '"x"'):
        folder = begun(tmp_path / f"{len(line)}")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(f'{line}\n{{"step": 2, "again": 1}}\n')
        run = opened(folder)
        run.load_checkpoint()
        assert run.read_records("metrics") == [{"step": 1}, {"step": 2}]
        run.close()


# === a folder that is another's =============================================================================


def evaluated(*arguments):
    """eval.py's main in this process; returns the exit code."""
    try:
        with one_line_errors():
            evaluation.main(
                evaluation.tyro.cli(evaluation.Config, args=list(map(str, arguments)), use_underscores=True)
            )
    except SystemExit as end:
        return end.code
    return 0


def test_nobody_writes_into_the_folder_of_a_stopped_run(stopped, tmp_path, capsys, monkeypatch):
    from data import prepare

    folder = stopped(grpo_pubmedqa, tmp_path / "run")
    before = state_of(folder)
    (tmp_path / "rows").mkdir()
    for side, rows in zip(("train", "heldout"), ecg.load_rows("builtin", limit=40)[:2]):
        (tmp_path / "rows" / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train():
        sft.train_reward_model(sft.RewardModel(data=str(tmp_path / "rows"), out=str(folder)))

    def merge():
        evaluation.merge(evaluation.Merge(model="tiny", out=str(folder)))

    def prepared():
        prepare.main(prepare.Config(task="pubmedqa", data="builtin", limit=40, out=str(folder)))

    for command in (train, merge, prepared):
        with pytest.raises(SystemExit) as end, one_line_errors():
            command()
        assert end.value.code == 2 and f"--out {folder}" in one_line(capsys.readouterr().err)
    for flags in (["--model", "tiny"], ["--models", "a=tiny", "b=tiny"]):
        assert evaluated(*flags, "--eval_size", 2, "--out", folder) == 2
        assert f"--out {folder} holds another run" in one_line(capsys.readouterr().err)
    for script in (sft, grpo_ecg, grpo_medmcqa):
        assert "holds" in refused(capsys, script, *RUNS[script], "--out", folder)
    assert state_of(folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "eval.jsonl",
        "results.jsonl",
        "summary.json",
        "train.jsonl",
        "adapter_config.json",
        "model.safetensors",
        "state.pt",
        "metrics.jsonl",
        "checkpoint",
    ],
)
def test_a_script_does_not_start_in_a_folder_that_is_anothers(name, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    for flags in ([], ["--resume"]):
        error = refused(capsys, grpo_pubmedqa, *GRPO, "--out", tmp_path / "run", *flags)
        assert f"({name})" in error and state_of(tmp_path / "run") == {Path(name): b"mine"}
    assert evaluated("--eval_size", 2, "--out", tmp_path / "run") == 2
    assert state_of(tmp_path / "run") == {Path(name): b"mine"}


def test_a_folder_with_a_note_of_ones_own_will_do(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("as tee makes it")
    begun(tmp_path / "run")
    evaluation.check_out(tmp_path)


def test_a_full_disk_under_config_json_does_not_block_the_folder(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[:20])
            raise OSError(28, "No space left on device")

    usual = Run._lock
    with monkeypatch.context() as context:
        context.setattr(
            Run, "_lock", lambda run: (usual(run), setattr(run, "lock", Full(run.lock)))
        )
        with pytest.raises(evaluation.InputError, match="cannot be written .No space left"):
            opened(tmp_path / "run", resume=False)
    begun(tmp_path / "run")


# === fed NaN ================================================================================================


def poisoned(usual, bad):
    """A score function like `usual` whose first score is NaN in the calls for which bad() is true."""
    def score(*arguments):
        result = usual(*arguments)
        if bad():
            (result[0] if isinstance(result, list) else result)["score"] = math.nan
        return result
    return score


def in_steps(folder, *steps):
    """Function: whether a run is in one of these steps, counting from 1."""
    return lambda: (len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0) + 1 in steps


@grpo_scripts
def test_a_reward_that_is_nan(script, tmp_path, monkeypatch, capsys):
    once, often = tmp_path / "once", tmp_path / "often"
    usual = script.score
    monkeypatch.setattr(script, "score", poisoned(usual, in_steps(once, 2, 3, 5)))
    monkeypatch.setattr(grpo_ecg.evaluation, "evaluate", lambda *a, usual_evaluate=evaluation.evaluate,
                        **o: usual_evaluate(*a, **{**o, "score": evaluation.score_completions}))
    assert launch(script, *RUNS[script], "--out", once) == 0  # never three in a row
    assert [record["skipped_updates"] for record in metrics(once)] == [0, 1, 1, 0, 1, 0]
    file = "model.safetensors" if script is grpo_pubmedqa else "adapter_model.safetensors"
    assert all(weight.isfinite().all() for weight in load_file(once / "model" / file).values())
    dump = json.loads((once / "bad_batch_3.json").read_text())
    assert dump["step"] == 3 and "rewards" in dump["not_finite"] and len(dump["batch"]) == 2
    assert len(dump["batch"][0]["texts"]) == 4
    capsys.readouterr()
    monkeypatch.setattr(script, "score", poisoned(usual, in_steps(often, *range(3, 99))))
    assert launch(script, *RUNS[script], "--out", often) == 2
    error = one_line(capsys.readouterr().err)
    assert "step 5: rewards" in error and "reward function" in error
    assert "the checkpoint of step 4 is kept" in error
    assert sorted(path.name
                  for path in often.glob("bad_batch_*")) == ["bad_batch_3.json", "bad_batch_4.json",
                                                             "bad_batch_5.json"]
    assert len(metrics(often)) == 4 and not (often / "summary.json").exists()


@scripts
def test_a_parameter_that_is_infinite(script, tmp_path, monkeypatch, capsys):
    name = "completion_nll" if script is sft else "rollout"
    usual, before = getattr(script, name), in_steps(tmp_path / "run", 1, 2)

    def breaking(model, *arguments):
        if not before():
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.inf
        return usual(model, *arguments)

    monkeypatch.setattr(script, name, breaking)
    assert launch(script, *RUNS[script], "--eval_every", 0, "--out", tmp_path / "run") == 2
    error = one_line(capsys.readouterr().err)
    assert "step 5" in error and "not finite" in error and "--learning_rate" in error
    assert "the checkpoint of step 4 is kept" in error
    assert [record["skipped_updates"] for record in metrics(tmp_path / "run")] == [0, 0, 1, 1]


def test_a_model_that_gives_nan_from_the_start(tmp_path, capsys):
    folder = save_family("qwen2", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.inf
    from safetensors.torch import save_file
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert launch(grpo_pubmedqa, *GRPO, "--model", folder, "--out", tmp_path / "run") == 2
    assert "probabilities are not numbers" in one_line(capsys.readouterr().err)


def guard(run, step, numbers, scaler):
    """What a script does with an update that is not finite."""
    bad = not_finite(numbers, [])
    assert bad
    run.skip_update_or_give_up(step, bad, numbers, [], scaler)


def test_an_infinite_gradient_in_fp16_is_the_scalers_business(tmp_path):
    run = Run("x", grpo_pubmedqa.Config(out=str(tmp_path), model="tiny"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    for step in range(1, 20):
        guard(run, step, {"loss": 0.1, "gradient": math.inf}, scaler)
    assert sum(run.skipped.values()) == 19 and not list(tmp_path.iterdir())
    for step in (20, 21):
        guard(run, step, {"loss": math.nan, "gradient": math.inf}, scaler)
    with pytest.raises(evaluation.InputError, match="step 22: loss and gradient not finite"):
        guard(run, 22, {"loss": math.nan, "gradient": math.inf}, scaler)


def test_collapses_are_warned_about_once(tmp_path):
    def watch(**changes):
        run, said = Run("x", grpo_pubmedqa.Config(out=str(tmp_path), model="tiny", prompts_per_step=4)), []
        bar = type("Bar", (), {"write": staticmethod(said.append)})
        for step in range(1, 61):
            changed = changes if step > 20 else {}
            usual = {"step": step, "kl": 0.01, "entropy": 1.0, "accuracy": 0.5, "zero_std_groups": 1}
            run.history.append(usual | changed)
            run.warn_once(bar, step, collapse_warnings(run.history, run.settings))
        return said

    assert watch() == [] and watch(entropy=0.001, accuracy=0.95) == []
    for changes, words in (({"kl": 3.0}, "--beta"), ({"entropy": 0.001}, "--temperature"),
                           ({"zero_std_groups": 4}, "--group_size")):
        [said] = watch(**changes)
        assert words in said and "WARNING: step" in said


PAGES = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
import eval as evaluation
if {kept}:
    evaluation.keep_freed_memory()
for turn in range(12):
    if turn == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (8, 40, 100):
        torch.ones(megabytes * 2**18).add(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process():
    """New pages that eight turns of additions take, once warm: few, where the C library otherwise takes all
    of them anew.
    """
    faults = [int(subprocess.run([sys.executable, "-c", PAGES.format(root=str(ROOT), kept=kept)],
                                 capture_output=True, text=True,
                                 check=True).stdout) for kept in (False, True)]
    assert faults[0] > 200_000 and faults[1] < faults[0] / 20


# === starved ================================================================================================


def allocate_too_much():
    """What the CPU's allocator says when there is no more, from the allocator itself."""
    torch.empty(1 << 50, dtype=torch.uint8)


def failing(usual, fails):
    def function(*arguments, **options):
        if fails():
            allocate_too_much()
        return usual(*arguments, **options)
    return function


@grpo_scripts
def test_out_of_memory_once_halves_the_forward_pass_and_repeats_the_step(script, whole, tmp_path,
                                                                         monkeypatch, capsys):
    calls = []
    with monkeypatch.context() as context:
        # step 2, second group
        context.setattr(script, "grpo_loss",
                        failing(script.grpo_loss, lambda: calls.append(1) or len(calls) == 4))
        crash_in_step(context, script, 4)
        assert launch(script, *RUNS[script], "--out", tmp_path / "run") == 130
    assert "--completions_per_forward 2" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2 and state["completions_per_forward"] == 2
    parts = []
    monkeypatch.setattr(script, "grpo_loss", failing(script.grpo_loss, lambda: parts.append(1) and False))
    # the same command goes on with 2
    assert launch(script, *RUNS[script], "--out", tmp_path / "run", "--resume") == 0
    assert len(parts) == 4 * 2 * 2
    for one, two in zip(metrics(tmp_path / "run")[:2], metrics(whole(script))[:2]):
        # the gradient was that of one attempt
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_out_of_memory_for_good_names_the_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grpo_medmcqa, "grpo_loss", failing(grpo_medmcqa.grpo_loss, lambda: True))
    assert launch(grpo_medmcqa, *RUNS[grpo_medmcqa], "--out", tmp_path / "run") == 2
    error = one_line(capsys.readouterr().err)
    assert all(word in error
               for word in ("--completions_per_forward 1", "--max_completion_length", "--load_in_4bit",
                            "--beta 0"))


def test_out_of_memory_in_the_reference_pass_and_in_sampling(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(grpo_pubmedqa, "token_logps",
                        failing(grpo_pubmedqa.token_logps, lambda: calls.append(1) or len(calls) == 1))
    assert launch(grpo_pubmedqa, *GRPO, "--steps", 2, "--out", tmp_path / "reference") == 0
    assert "--completions_per_forward 2" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "SharedPromptCache",
                        failing(evaluation.SharedPromptCache, in_steps(tmp_path / "sampling", 2)))
    assert launch(grpo_pubmedqa, *GRPO, "--steps", 2, "--out", tmp_path / "sampling") == 2
    error = one_line(capsys.readouterr().err)
    assert all(word in error for word in ("out of memory in sampling", "--group_size", "--eval_batch_size"))


def test_out_of_memory_in_sft(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "completion_nll", failing(sft.completion_nll, lambda: torch.is_grad_enabled()))
    assert launch(sft, *SFT, "--out", tmp_path / "run") == 2
    error = one_line(capsys.readouterr().err)
    assert all(word in error for word in ("out of memory", "--batch_size", "--gradient_accumulation_steps"))


def test_another_runtime_error_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_pubmedqa, "grpo_loss", lambda *a, **o: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        launch(grpo_pubmedqa, *GRPO, "--out", tmp_path / "run")


@scripts
def test_a_disk_without_room_for_a_checkpoint_keeps_the_last(script, whole, tmp_path, monkeypatch, capsys):
    folder = unfinished(monkeypatch, script, tmp_path / "run")
    state = (folder / "checkpoint" / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(state) // 2, limits[1]))
    try:
        code = launch(script, *RUNS[script], "--out", folder, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = one_line(capsys.readouterr().err)
    assert code == 2 and "checkpoint.new cannot be written" in error, error
    assert "the checkpoint of step 2 is whole" in error, error
    assert (folder / "checkpoint" / "state.pt").read_bytes() == state
    assert not (folder / "checkpoint.new").exists()
    assert launch(script, *RUNS[script], "--out", folder, "--resume") == 0
    check_same(script, folder, whole(script))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_log(tmp_path, monkeypatch, capsys):
    usual, log = grpo_pubmedqa.rollout, tmp_path / "run" / "metrics.jsonl"
    monkeypatch.setattr(grpo_pubmedqa, "rollout", lambda *a: log.exists() or log.symlink_to("/dev/full")
                        or usual(*a))
    assert launch(grpo_pubmedqa, *GRPO, "--out", tmp_path / "run") == 2
    error = one_line(capsys.readouterr().err)
    assert "metrics.jsonl cannot be written (No space left on device)" in error
    assert "no checkpoint yet" in error


def test_an_unreadable_data_file(tmp_path, capsys):
    (tmp_path / "bytes.json").write_bytes(b'[{"question": "\xff\xfe"}]')
    for file, words in (("/proc/self/mem", "cannot be read"), (tmp_path / "bytes.json", "not UTF-8")):
        assert launch(grpo_pubmedqa, *GRPO, "--data", file, "--out", tmp_path / "run") == 2
        assert words in one_line(capsys.readouterr().err) and not (tmp_path / "run").exists()


# === fed rubbish ============================================================================================

ROWS = {"pubmedqa": ("yes", {"question": "Does it help?"}),
        "medmcqa": ("B",
                    {"question": "Which one?", "options": ["aspirin", "iron", "vitamin C", "none of these"],
                     "explanation": "Iron, as in anaemia."}),
        "ecg_expert_qa": ("Sinus bradycardia, no ST elevation, PR 220 ms.",
                          {"question": "Rate 50, PR 220 ms?"}),
        "medical_o1": ("Yes, 3 mg a day for 2 weeks.", {"question": "How much?", "verdict": "yes"})}
RANGES = {"pubmedqa": (0, 2.8), "medmcqa": (0, 1.6), "ecg_expert_qa": (-1, 1), "medical_o1": (-1, 1)}
sources = pytest.mark.parametrize("source", ROWS)
# any text at all, lone surrogates included, mixed with what the parsers look for
anything = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z", "C"]), max_size=40)
pieces = st.sampled_from([*{tag for tags in rewards.TAGS.values() for tag in tags}, "yes", "no", "maybe", "A",
                          "(b).", "iron", "no ST elevation", "PR 220 ms",
                          "1,5", "-3.5 mg", "²", "٣", "İ", "\u0301", "\x1b[31m", "\u2028", "not", ". ", "\n",
                          "ﬁ", "9" * 30])
texts = st.lists(st.one_of(pieces, pieces, anything), max_size=12).map("".join)
PROPERTY = settings(max_examples=2500, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


def check_score(source, result):
    low, high = RANGES[source]
    assert isinstance(result["score"], float) and math.isfinite(result["score"])
    assert low - 1e-9 <= result["score"] <= high + 1e-9
    assert result["accuracy"] in (0.0, 1.0) and result["format_ok"] in (0.0, 1.0)
    assert isinstance(result["answer"], str)
    for part in ("findings", "tokens", "similarity", "format", "brevity", "correctness"):
        assert 0 <= result.get(part, 0) <= (2.0 if part == "correctness" else 1.0) + 1e-9


@sources
@PROPERTY
@given(st.lists(texts, min_size=1, max_size=3))
def test_any_text_has_a_finite_score_that_its_batch_does_not_change(source, batch):
    truth, extra = ROWS[source]
    alone = [rewards.compute_score(source, text, truth, extra) for text in batch]
    for result in alone:
        check_score(source, result)
    row = {"data_source": source, "ground_truth": truth, "extra": extra}
    assert evaluation.score_completions(batch[::-1], [row] * len(batch)) == alone[::-1]


@sources
@PROPERTY
@given(texts, texts, texts)
def test_any_gold_answer_and_question_too(source, inside, gold, question):
    first, last, opening, closing = rewards.TAGS[source]
    extra = {**ROWS[source][1], "question": question, "explanation": gold,
             "options": [gold, question, inside, ""]}
    check_score(source,
                rewards.compute_score(source, f"{first}{question}{last}{opening}{inside}{closing}", gold
                                      or "x", extra))


@settings(PROPERTY, max_examples=4000)
@given(texts, texts, texts)
def test_the_parts_of_the_rewards_take_any_text(one, two, three):
    for tags in rewards.TAGS.values():
        assert 0 <= rewards.tags_in_place(one, tags) <= 4
        assert rewards.parse_answer(one, tags, ("yes", "no")) in ("yes", "no", "")
        assert rewards.parse_option(one, tags, [two, three]) in ("A", "B", "")
        assert isinstance(rewards.reasoning_block(one, tags), str)
    for value in (rewards.overlap(one, two, three), rewards.similarity(one, two, three),
                  rewards.token_f1(one, two, three),
                  rewards.findings_f1(one, two, three), rewards.length_guard(one, two)):
        assert value is None or math.isfinite(value) and -1e-9 <= value <= 1 + 1e-9
    assert rewards.verdict(one) in ("yes", "no", "")
    printed = printable(one)
    assert "\x1b" not in printed and all(c.isprintable() or c == "\n" for c in printed)
    assert len(printed) == len(one)


MEGABYTE = [" ", "\n", "a", "1", "1,", "1.", "-", "-1 ", "é", "\u0301", "no ", "not no ", ". ", "yes. ",
            "ST elevation ", "no ST elevation, PR 220 ms. ", "<",
            "<answer>", "</answer>", "<reasoning>", "</reasoning>", "<SOLUTION>", "(((", "\x00", "𝒜",
            "t wave ", "long pr ", "mg ", "A. ", "word word2 word3 "]


@sources
def test_a_megabyte_is_scored_in_under_a_second(source):
    truth, extra = ROWS[source]
    first, last, opening, closing = rewards.TAGS[source]
    slowest = 0.0
    for piece in MEGABYTE:
        filler = (piece * (1_000_000 // len(piece.encode()) + 1))
        for text in (filler, f"{first}x{last}{opening}{filler}{closing}",
                     f"{first}{filler}{last}{opening}B{closing}"):
            begin = time.process_time()  # a busy machine is no slow function
            check_score(source, rewards.compute_score(source, text, truth, extra))
            spent = time.process_time() - begin
            assert spent < 1, (piece, spent)
            slowest = max(slowest, spent)
    print(f"{source}: {slowest:.2f} s")


# === doctor and dry run =====================================================================================


def dry_run(script, folder, *flags):
    """(peak, estimate) in GB that --dry_run says, from a process of its own."""
    done = subprocess.run([sys.executable, str(ROOT / f"{script.__name__}.py"), "--data", "builtin",
                           *map(str, flags), "--dry_run"], cwd=folder,
                          capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())  # no run folder, and nothing in the temporary one
    assert done.stdout.count("doctor: ") == 1 and "a step with the longest prompts took" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("dry run: memory"))
    return float(line.split()[3]), float(line.split(", ")[1].split()[0])


@scripts
def test_dry_run_leaves_nothing(script, tmp_path):
    flags = [flag for flag in RUNS[script] if flag not in ("--data", "builtin")]
    peak, estimate = dry_run(script, tmp_path, *flags, "--out", tmp_path / "run")
    assert 0.2 < estimate < 2 * peak < 4


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("h, layers, vocabulary", [(256, 2, 8000), (512, 5, 16000)])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(h, layers, vocabulary, tmp_path, monkeypatch):
    import conftest
    from transformers import Qwen2Config
    shape = Qwen2Config(hidden_size=h, intermediate_size=4352, num_hidden_layers=layers,
                        num_attention_heads=h // 64, num_key_value_heads=h // 256,
                        max_position_embeddings=4096, tie_word_embeddings=True)
    monkeypatch.setitem(conftest.FAMILIES, "qwen2",
                        (conftest.FAMILIES["qwen2"][0], shape, *conftest.FAMILIES["qwen2"][2:]))
    model = save_family("qwen2", tmp_path / "model", vocab_size=vocabulary)
    (tmp_path / "empty").mkdir()
    peak, estimate = dry_run(grpo_pubmedqa, tmp_path / "empty", "--model", model, "--prompts_per_step", 1,
                             "--group_size", 16, "--eval_size", 2,
                             "--max_completion_length", 128, "--eval_batch_size", 2)
    print(f"peak {peak}, estimated {estimate}")
    assert abs(estimate / peak - 1) < 0.15


def test_the_doctor_warns_and_takes_no_time(capsys, monkeypatch, tmp_path):
    config = grpo_pubmedqa.Config(model="tiny", data="builtin", out=str(tmp_path / "not" / "yet"))
    train, heldout, _ = load_task(pubmedqa, config)
    evaluation.doctor(config, train, heldout)
    capsys.readouterr()
    begin = time.process_time()
    evaluation.doctor(config, train, heldout)
    assert time.process_time() - begin < 1
    said = capsys.readouterr().out
    assert said.startswith("doctor: about ") and said.count("\n") == 1 and "GB free" in said
    monkeypatch.setattr(evaluation, "free_memory", lambda: 1_000_000)
    monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(evaluation.importlib.metadata, "version", lambda name: "0.1+cpu")
    evaluation.doctor(config, train, heldout)
    said = capsys.readouterr().out
    assert "--completions_per_forward 1" in said and "will probably be full" in said
    assert "torch 0.1 is installed" in said
    assert not list(tmp_path.iterdir())


def test_memory_is_told_without_proc_too(monkeypatch):  # macOS
    exists, read = Path.exists, Path.read_text
    config = grpo_pubmedqa.Config(model="tiny", data="builtin")
    rows = load_task(pubmedqa, config)
    monkeypatch.setattr(Path, "exists", lambda path, **options: not str(path).startswith("/proc")
                        and exists(path, **options))
    monkeypatch.setattr(Path, "read_text", lambda path, *a,
                        **k: read(path if not str(path).startswith("/proc") else Path("/none"), *a, **k))
    assert evaluation.free_memory() > 1e8 and evaluation.peak_memory_gb() > 0.1
    assert evaluation.doctor(config, *rows[:2]) > 1e8


def test_no_code_of_a_model_is_run_and_nobody_is_asked(tmp_path, capsys):
    folder = save_family("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own_code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    own_config = {**config, "model_type": "own", "auto_map": own_code}
    (folder / "config.json").write_text(json.dumps(own_config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert launch(grpo_pubmedqa, *GRPO, "--model", folder, "--out", tmp_path / "run") == 2
    assert "could not be loaded" in one_line(capsys.readouterr().err) and not (tmp_path / "ran").exists()


def test_paths_in_a_data_file_are_not_opened_and_escapes_not_printed(tmp_path, capsys):
    (tmp_path / "bait").write_text("SECRET")
    rows = [{"question": f"{tmp_path / 'bait'} \x1b[31m{i}?", "context": f"file://{tmp_path / 'bait'}",
             "ground_truth": ("yes", "no")[i % 2]} for i in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "bait").chmod(0)
    before = (tmp_path / "bait").stat().st_atime_ns
    assert launch(grpo_pubmedqa, *GRPO, "--data", tmp_path / "rows.json", "--out", tmp_path / "run") == 0
    output = capsys.readouterr()
    assert "\x1b[31m" not in output.out + output.err and str(tmp_path / "bait") in output.out
    assert (tmp_path / "bait").stat().st_atime_ns == before
    assert not any(b"SECRET" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    rows[3] = {"question": "\x1b[2J", "context": "c", "\x1b[31mlabel": "yes"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert launch(grpo_pubmedqa, *GRPO, "--data", tmp_path / "rows.json", "--out", tmp_path / "bad") == 2
    assert "\x1b" not in one_line(capsys.readouterr().err)
