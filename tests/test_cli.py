"""The scripts as a user runs them: files they leave, bad input in one line, kill and resume."""
import errno
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import ROOT, save_family
from safetensors.torch import load_file
from test_data import SINGLE

import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa as grpo
import sft
from data import ecg, one_line_errors, prepare, printable

QUICK = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "3", "--eval_size", "6",
         "--max_completion_length", "24", "--limit", "200"]
CONTRACT = ["config.json", "metrics.jsonl", "samples.jsonl", "eval_before.jsonl", "eval_after.jsonl",
            "summary.json", "curves.png", "checkpoint", "model"]
METRICS = ("step reward reward_correctness reward_format reward_std zero_std_groups accuracy kl "
           "clip_fraction entropy completion_length truncated grad_norm learning_rate num_tokens "
           "generate_seconds update_seconds peak_memory_gb").split()


def command(*arguments, env=None, **options):
    """A script as a subprocess, from an empty folder, so that nothing hangs on where it is started."""
    return subprocess.run([sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])],
                          capture_output=True, text=True,
                          env={**os.environ, **(env or {})}, timeout=300, **options)


def in_process(*arguments):
    """The script's main without a new process; returns the exit code."""
    try:
        with one_line_errors():
            grpo.main(grpo.parse(list(map(str, arguments))))
    except SystemExit as end:
        return end.code
    return 0


def scored(*arguments):
    """eval.py without a new process; returns the exit code."""
    try:
        with one_line_errors():
            arguments = list(map(str, arguments))
            evaluation.main(evaluation.tyro.cli(evaluation.Config, args=arguments, use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_but_for_clocks(records):
    return [{k: v for k, v in r.items() if not k.endswith("_seconds") and k != "peak_memory_gb"}
            for r in records]


def test_a_run_as_a_user_would_run_it(tmp_path):
    done = command("grpo_pubmedqa.py", *QUICK, "--model", "tiny", "--data", "builtin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert "tiny" in lines[0]  # announced in the first line
    assert any(line.startswith("data: builtin") for line in lines)
    assert any(line.startswith("model: tiny") for line in lines)
    assert any(line.startswith("before: accuracy") for line in lines) and "McNemar" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(CONTRACT)
    assert not (tmp_path / "wandb").exists()
    records = metrics(folder)
    assert [record["step"] for record in records] == [1, 2] and all(key in records[0] for key in METRICS)
    assert all(torch.tensor(float(value)).isfinite() for record in records for value in record.values())
    summary = json.loads((folder / "summary.json").read_text())
    for side in ("before", "after"):
        assert {"accuracy", "accuracy_ci95", "n", "majority_accuracy", "macro_f1", "format_rate",
                "mean_length"} <= set(summary[side])
    assert summary["before"]["n"] == 6 and {"p_value", "better"} <= set(summary["paired"])
    assert {"seconds", "seed", "versions"} <= set(summary)
    before, after = ([json.loads(line)["id"]
                      for line in (folder / f"eval_{side}.jsonl").read_text().splitlines()]
                     for side in ("before", "after"))
    assert before == after and len(before) == 6
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["completions"]) == len(sample["rewards"]) == 3
    assert sample["prompt"][0]["role"] == "system"
    scored = command("eval.py", "--model", folder / "model", "--eval_size", 8, "--samples", 2, "--out",
                     tmp_path / "e")
    assert scored.returncode == 0, scored.stderr  # what was saved loads and scores
    assert {"accuracy", "pass_at_1"} <= set(json.loads((tmp_path / "e" / "summary.json").read_text()))
    assert len((tmp_path / "e" / "eval.jsonl").read_text().splitlines()) == 8
    again = command("eval.py", "--model", "tiny", "--out", folder)  # would overwrite the summary of the run
    assert again.returncode == 2 and "holds another result" in again.stderr
    assert summary == json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("script, config",
                         [("grpo_pubmedqa.py", grpo.Config), ("eval.py", evaluation.Config)])
def test_help_lists_every_knob_with_its_meaning(script, config):
    text = command(script, "--help").stdout
    source = (ROOT / script).read_text()
    for field in fields(config):
        assert f"--{field.name}" in text
        meaning = re.search(rf"^    {field.name}: .*?  # (\S+ \S+)", source, re.M)  # or above it
        meaning = meaning or re.search(rf"^    # (\S+ \S+).*\n    {field.name}: ", source, re.M)
        assert meaning.group(1) in " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("file", ["pubmedqa_yesno.json", "pubmedqa_ori_pqal_500.json"])
def test_real_abstracts(file, real_data, tmp_path):
    assert in_process(*QUICK, "--limit", 0, "--model", "tiny", "--data", real_data / file, "--out",
                      tmp_path / "run") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(CONTRACT)


def test_a_hub_like_model_folder_with_a_real_vocabulary(tmp_path):
    save_family("qwen2", tmp_path / "model", vocab_size=151_936)
    assert in_process(*QUICK, "--model", tmp_path / "model", "--data", "builtin", "--out", tmp_path / "run",
                      "--beta", 0.1) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(CONTRACT)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["model.embed_tokens.weight"].shape[
        0] == 151_936


def test_every_family_trains(family, family_folder, tmp_path):
    assert in_process(*QUICK, "--model", family_folder(family), "--data", "builtin", "--out",
                      tmp_path / "run", "--learning_rate", 1e-2) == 0


def test_a_step_moves_every_parameter_and_clips_from_the_second_epoch_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--model", "tiny", "--data", "builtin", "--steps", 4, "--prompts_per_step", 4, "--group_size", 4,
             "--eval_size", 4,
             "--learning_rate", 3e-3, "--warmup", 0, "--ref_every", 2]
    assert in_process(*flags, "--out", one) == 0
    before, after = (load_file(ROOT / "data" / "tiny" / "model.safetensors"),
                     load_file(one / "model" / "model.safetensors"))
    assert before.keys() == after.keys()
    assert all((before[name].float() != after[name]).any() for name in before)
    records = metrics(one)
    assert all(record["clip_fraction"] == 0 for record in records)  # mu 1: the ratio is 1
    # renewed before steps 1 and 3
    assert [record["kl"] > 1e-6 for record in records] == [False, True, False, True]
    assert records[0]["kl"] == records[2]["kl"] == 0
    assert all(record["sampler_gap"] < 1e-5 for record in records)
    assert in_process(*flags, "--out", two, "--mu", 2) == 0
    assert metrics(two)[0]["clip_fraction"] > 0


def test_all_the_knobs_of_the_loss_run(tmp_path):
    for i, flags in enumerate((["--loss_type", "dapo", "--epsilon_high", 0.28, "--beta", 0,
                                "--mask_truncated", "--resample_zero_std", 2],
                               ["--loss_type", "dr_grpo", "--scale_rewards", "none", "--importance_level",
                                "sequence", "--mu", 2],
                               ["--dtype", "bf16", "--importance_cap", 2, "--scale_rewards", "batch",
                                "--completions_per_forward", 2],
                               ["--dtype", "fp16"])):
        assert in_process(*QUICK, "--model", "tiny", "--data", "builtin", "--out", tmp_path / str(i),
                          *flags) == 0
    resampled = metrics(tmp_path / "0")
    assert all(record["extra_batches"] <= 2 for record in resampled)


def test_wandb_offline_leaves_a_run_folder(tmp_path):
    assert in_process(*QUICK, "--model", "tiny", "--data", "builtin", "--out", tmp_path / "run", "--wandb",
                      "offline") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.json"], ["nowhere.json", "no such file"]),
    (["--data", "{bad}"], ["bad.json", "row 5", "`context`"]),
    (["--data", "{few}", "--eval_size", "200"], ["--eval_size 200", "held-out"]),
    (["--data", "{few}", "--prompts_per_step", "500", "--eval_size", "2"], ["--prompts_per_step 500"]),
    (["--group_size", "1"], ["--group_size 1", "at least 2"]),
    (["--loss_type", "cispo"], ["--epsilon_high 0.2", "cap of the ratio", "--epsilon_high 5"]),
    (["--steps", "-3"], ["--steps -3"]),
    (["--learning_rate", "0"], ["--learning_rate"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--beta", "nan"], ["--beta nan"]),
    (["--model", "./nowhere"], ["./nowhere", "no such model folder"]),
    (["--model", "runs/x/model"], ["runs/x/model", "no such model folder"]),
    (["--model", "{empty}"], ["config.json"]),
    (["--model", "{half}"], ["could not be loaded"]),
    (["--model", "Qwen/Qwen2.5-0.5B-Instruct"], ["Qwen/Qwen2.5-0.5B-Instruct", "--model tiny"]),
    (["--data", "hub"], ["qiaojin/PubMedQA", "--data builtin"]),
    (["--data", "hub:nobody/nothing:config"], ["nobody/nothing", "--data builtin"]),
    (["--system_prompt", "nowhere.txt"], ["nowhere.txt"]),
    (["--resume"], ["--resume needs --out"]),
    (["--out", "{file}"], ["is a file"]),
    (["--max_prompt_length", "5"], ["--max_prompt_length 5"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"bad": [*SINGLE[:5], {"question": "a", "ground_truth": "yes"}], "few": SINGLE}
    for name, rows in names.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "qwen2"')
    places = {"bad": "bad.json", "few": "few.json", "file": "file", "empty": "./empty", "half": "./half"}
    arguments = [argument.format(**places) for argument in arguments]
    defaults = [] if "--model" in arguments else ["--model", "tiny"]
    defaults += [] if "--data" in arguments else ["--data", "builtin", "--limit", "600"]
    assert in_process(*defaults, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


def test_unknown_flag_and_no_traceback_in_a_real_process(tmp_path):
    done = command("grpo_pubmedqa.py", "--group_sze", "4", cwd=tmp_path)
    assert done.returncode == 2 and "group_sze" in done.stderr and "Traceback" not in done.stderr
    done = command("grpo_pubmedqa.py", "--model", "tiny", "--data", "nowhere.json", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["grpo_pubmedqa.py", "eval.py"])
def test_help_into_a_pipe_that_closes(script):
    done = subprocess.run(f"{sys.executable} {ROOT / script} --help | head -1; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", "141")
    assert done.stdout.startswith("usage")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request as for a gated repository."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message",
                         "Access to model meta/llama is restricted and you are not in the authorized list.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815  (names of http.server)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("flags",
                         [["--model", "meta/llama", "--data", "builtin"],
                          ["--model", "tiny", "--data", "hub:meta/rows"]])
def test_a_gated_repository_says_to_log_in(flags, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
           "HF_HOME": str(tmp_path / "cache")}
    done = command("grpo_pubmedqa.py", *QUICK, *flags, env=env, cwd=tmp_path)
    server.shutdown()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "gated" in done.stderr and "hf auth login" in done.stderr


@pytest.mark.slow  # the hub client tries again for up to a minute before it gives up
@pytest.mark.parametrize("flags",
                         [["--model", "meta/llama", "--data", "builtin"],
                          ["--model", "tiny", "--data", "hub"]])
def test_an_unreachable_hub_says_how_to_run_without(flags, tmp_path):
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = command("grpo_pubmedqa.py", *QUICK, *flags, env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count(
        "error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert ("--model tiny" if "meta/llama" in flags else "--data builtin") in done.stderr


def test_4bit_without_bitsandbytes_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit) as end, one_line_errors():
        evaluation.main(evaluation.Config(load_in_4bit=True, out=str(tmp_path / "e")))
    assert end.value.code == 2 and "pip install bitsandbytes" in capsys.readouterr().err


# --- the folder of a run, kill and resume -------------------------------------------------------------------

LONGER = ["--model", "tiny", "--data", "builtin", "--steps", "6", "--prompts_per_step", "2", "--group_size",
          "4", "--eval_size", "6",
          "--max_completion_length", "40", "--save_every", "2", "--eval_every", "3", "--ref_every", "3",
          "--limit", "200"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("grpo_pubmedqa.py", *LONGER, "--out", folder).returncode == 0
    return folder


def check_same_run(folder, other):
    one, two = (load_file(f / "model" / "model.safetensors") for f in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert same_but_for_clocks(metrics(folder)) == same_but_for_clocks(metrics(other))
    for name in ("samples.jsonl", "eval_before.jsonl", "eval_after.jsonl"):
        assert (folder / name).read_text() == (other / name).read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed_is_the_same_run_bit_by_bit(number, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "grpo_pubmedqa.py"), *LONGER, "--out",
                                str(folder)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 3):
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and f"--out {folder} --resume" in out
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "summary.json").exists()
    done = command("grpo_pubmedqa.py", *LONGER, "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed: .* after step [2-5]", done.stdout)
    check_same_run(folder, uninterrupted)


def test_a_finished_run_is_left_alone_and_another_is_refused(uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert in_process(*LONGER, "--out", uninterrupted, "--resume") == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert in_process(*LONGER, "--out", uninterrupted) == 2
    assert "holds another run" in capsys.readouterr().err
    assert in_process(*LONGER, "--out", uninterrupted, "--resume", "--learning_rate", "0.5") == 2
    assert "--learning_rate" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_resume_without_a_checkpoint_starts_fresh(uninterrupted, tmp_path):
    assert in_process(*LONGER, "--out", tmp_path / "run", "--resume") == 0
    check_same_run(tmp_path / "run", uninterrupted)


# --- evaluation ---------------------------------------------------------------------------------------------


def test_statistics_against_known_values():
    # statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson")
    low, high = evaluation.wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert evaluation.wilson_interval(0, 20)[0] == 0 and evaluation.wilson_interval(20, 20)[1] == 1
    # discordant pairs 2 and 9: scipy.stats.binomtest(2, 11).pvalue
    before, after = [1] * 2 + [0] * 9 + [1] * 5, [0] * 2 + [1] * 9 + [1] * 5
    assert evaluation.mcnemar(before, after) == {"only_before": 2, "only_after": 9,
                                                 "p_value": pytest.approx(0.0654297, abs=1e-6)}
    assert evaluation.mcnemar([1, 0], [1, 0])["p_value"] == 1
    # by hand: yes has precision 2/3 and recall 1, so F1 0.8; no has neither
    assert evaluation.macro_f1(["yes", "yes", "no", "no"],
                               ["yes", "yes", "yes", ""]) == pytest.approx((0.8 + 0) / 2)


def test_mcnemar_is_exact_and_sums_no_big_integers(monkeypatch):
    for n in (1, 2, 3, 11, 40, 333, 1000):
        for k in {0, 1, n // 7, n // 3, n // 2 - 1, n // 2} & set(range(n // 2 + 1)):
            wanted = min(1, Fraction(2 * sum(math.comb(n, i) for i in range(k + 1)), 2**n))
            got = evaluation.mcnemar([1] * k + [0] * (n - k), [0] * k + [1] * (n - k))
            assert (got["only_before"], got["only_after"]) == (k, n - k)
            assert got["p_value"] == pytest.approx(float(wanted), rel=1e-12)
    comb, called = math.comb, []
    monkeypatch.setattr(math, "comb", lambda n, k: called.append(k) or comb(n, k))
    test = evaluation.mcnemar([1] * 9900 + [0] * 10100, [0] * 9900 + [1] * 10100)
    assert called == [9900]  # once: a sum of 9,900 integers of up to 20,000 bits took 34 s
    # by the normal approximation with continuity correction: z = 199 / sqrt(20000)
    assert test["p_value"] == pytest.approx(math.erfc(199 / math.sqrt(20_000) / math.sqrt(2)), rel=1e-3)
    assert evaluation.mcnemar([1] * 3000, [0] * 3000)["p_value"] == 0  # 2**-2999, which no float holds


def test_the_bootstrap_of_many_rows_takes_little_memory_and_the_same_resamples():
    values = numpy.random.default_rng(1).random(700)
    places = numpy.random.default_rng(0).integers(0, 700, (2000, 700))  # all at once, as it was
    whole = values[places].mean(axis=1)
    assert evaluation.bootstrap_interval(values) == numpy.percentile(whole, [2.5, 97.5]).tolist()
    tracemalloc.start()
    low, high = evaluation.bootstrap_interval([0.0, 1.0] * 22_500, 400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # 290 MB at once, and five times that with its 2,000 resamples
    assert 0.494 < low < 0.497 and 0.503 < high < 0.506  # 0.5 -+ 1.96 * sqrt(0.25 / 45,000)


def test_the_sign_test_counts_differences_of_0_01_not_rounded_scores():
    before = [0.014, 0.016, 0.05, 0.504, 0.30, 0.70]
    after = [0.016, 0.014, 0.06, 0.496, 0.31, 0.30]  # +0.002, -0.002, +0.01, -0.008, +0.01, -0.4
    records = [[{"id": i, "rule": s, "score": s} for i, s in enumerate(scores)] for scores in (before, after)]
    test = evaluation.paired_test(*records)
    assert (test["only_after"], test["only_before"], test["ties"]) == (2, 1, 3)


def shares(probabilities, tokens):
    """How much of (0, 1] gives each of these tokens, by bisection: what is drawn rises with the number."""
    edges = []
    for some in torch.as_tensor(tokens).split(64):
        row = probabilities.expand(2 * len(some), -1)
        at_least = torch.cat([some, some + 1])[:, None]  # the edge below each token, and the one above
        low = torch.zeros(len(at_least), 1, dtype=torch.double)
        high = torch.ones_like(low)
        for _ in range(55):
            middle = (low + high) / 2
            above = evaluation.draw(row, middle) >= at_least
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        edges.append((high[len(some):] - high[:len(some)])[:, 0])
    return torch.cat(edges)


@pytest.mark.parametrize("vocabulary, peak, tail, wanted", [
    (151_936, 8_152, 4.5e-4, 128), (3_000, 300, 1e-5, 3_000), (1_500, 0, 1e-7, 1_500),
    (4_096, 4_095, 1e-4, 600)])
def test_every_token_behind_a_peaked_one_can_be_drawn_as_often_as_it_should(vocabulary, peak, tail, wanted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocabulary, generator=generator)
    logits[0, peak] = 0
    others = logits.double().exp().sum() - 1
    logits[0, peak] = (others * (1 - tail) / tail).log()  # the others share the mass `tail`
    probabilities = logits.softmax(dim=1)
    if vocabulary > 100_000:  # a running sum in fp32 stands still on most of what comes behind the peak
        assert (probabilities.cumsum(dim=1).diff()[0, peak:] == 0).sum() > 50_000
    tokens = torch.randperm(vocabulary, generator=generator)[:wanted]
    exact = probabilities[0].double() / probabilities.double().sum()
    assert (exact[tokens] > 1e-12).all()
    assert shares(probabilities, tokens).tolist() == pytest.approx(exact[tokens].tolist(), rel=1e-6)
    assert shares(probabilities, [peak]).tolist() == pytest.approx([exact[peak].item()], rel=1e-6)


@pytest.mark.parametrize("vocabulary", [1_000, 5_000])
def test_what_is_drawn_follows_the_softmax(vocabulary):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(1, vocabulary, generator=generator).mul(1.5).softmax(dim=1)
    counts, n = torch.zeros(vocabulary, dtype=torch.double), 60_000
    for _ in range(n // 1_000):
        uniform = 1 - torch.rand(1_000, 1, generator=generator, dtype=torch.double)
        token = evaluation.draw(probabilities.expand(1_000, -1), uniform)
        counts += token[:, 0].bincount(minlength=vocabulary)
    expected = probabilities[0].double() * n
    rare = expected < 5  # in one class, as Pearson's test asks for
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("vocabulary", [1, 3, 2_048, 2_049, 4_096, 5_000, 151_936])
def test_no_token_beyond_the_vocabulary_or_of_probability_0_is_drawn(vocabulary):
    uniform = torch.tensor([[2.0**-53], [1e-9], [0.3], [0.5], [1 - 2.0**-53], [1.0]], dtype=torch.double)
    drawn = evaluation.draw(torch.full((6, vocabulary), torch.nan), uniform)
    assert drawn.shape == (6, 1) and (0 <= drawn).all() and (drawn < vocabulary).all()
    for token in {0, vocabulary // 2, vocabulary - 1}:
        alone = torch.zeros(6, vocabulary)
        alone[:, token] = 1e-30  # need not add up to 1
        assert evaluation.draw(alone, uniform).flatten().tolist() == [token] * 6


def test_likelihoods_that_are_not_numbers_are_refused(broken_model, tmp_path, capsys):
    for mode in ("loglikelihood", "generated"):
        capsys.readouterr()
        assert scored("--task", "medmcqa", "--mode", mode, "--model", broken_model, "--eval_size", 3,
                      "--out", tmp_path / "e") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model: the model's probabilities are not numbers (NaN)")
        assert error.count("\n") == 1
    assert not list((tmp_path / "e").iterdir())


def test_a_full_disk_leaves_no_summary_that_blocks_the_folder(tmp_path, monkeypatch, capsys):
    usual = Path.write_text

    def full(path, text, **options):
        if "summary.json" in path.name:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return usual(path, text, **options)

    for flags in (["--model", "tiny"], ["--models", "a=tiny", "b=tiny"]):
        out = tmp_path / flags[0]
        arguments = [*flags, "--eval_size", 4, "--max_completion_length", 8, "--out", out]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            capsys.readouterr()
            assert scored(*arguments) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and "No space left on device" in error
            assert error.count("\n") == 1
        assert not list(out.iterdir())  # half a result would keep the next one out
        assert scored(*arguments) == 0
        assert json.loads((out / "summary.json").read_text())["config"]["eval_size"] == 4


def test_a_folder_that_cannot_be_written_is_found_out_before_scoring(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluation, "load_model", lambda *a, **o: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("x")
    for out in ("/proc/self", tmp_path / "file", tmp_path / "file" / "e", tmp_path / ("x" * 300)):
        assert scored("--model", "tiny", "--eval_size", 4, "--out", out) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(out) in error and error.count("\n") == 1


def test_evaluation_does_not_hang_on_batches_and_answers_only_generated_text():
    model, tokenizer, compute = evaluation.load_model("tiny")
    rows = evaluation.encode_rows(tokenizer, grpo.pubmedqa.load_rows()[1][:12], 2048, "held-out")
    one, two = (evaluation.evaluate(model, tokenizer, rows, compute, max_completion_length=48,
                                    batch_size=size) for size in (1, 12))
    assert one == two
    assert all("Abstract:" not in record["completion"] and "<|im_end|>" not in record["completion"]
               for record in one)
    assert [record["id"] for record in one] == [row["id"] for row, _ in rows]


def test_templates_that_refuse_a_system_role_and_models_without_a_template(family_folder, tmp_path, capsys):
    _, gemma, _ = evaluation.load_model(family_folder("gemma3"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = gemma.decode(evaluation.encode_prompt(gemma, messages))
    assert "<start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>" in text
    folder = save_family("llama", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    model, plain, _ = evaluation.load_model(str(folder))
    assert "no chat template" in capsys.readouterr().out
    text = plain.decode(evaluation.encode_prompt(plain, messages))
    assert text.endswith("Be brief.\n\nUser: Why?\n\nAssistant: ")
    assert evaluation.stop_ids(model, plain)


def test_stop_ids_hold_the_templates_end_of_turn(family, family_folder):
    model, tokenizer, _ = evaluation.load_model(family_folder(family))
    turn = {"llama": "<|eot_id|>", "phi3": "<|end|>", "gemma3": "<end_of_turn>"}.get(family, "<|im_end|>")
    ids = evaluation.stop_ids(model, tokenizer)
    assert tokenizer.convert_tokens_to_ids(turn) in ids and tokenizer.eos_token_id in ids
    eos = model.generation_config.eos_token_id
    assert set(eos if isinstance(eos, list) else [eos]) <= set(ids) and len(ids) <= 3


def test_prompts_do_not_hang_on_the_day_or_think(family_folder):
    for family, inside, outside in (("llama", "26 Jul 2024", None), ("qwen3", "<think>\n\n</think>", None),
                                    ("qwen2", "<|im_start|>user", "Alibaba")):
        tokenizer = evaluation.load_model(family_folder(family))[1]
        text = tokenizer.decode(evaluation.encode_prompt(tokenizer,
                                                         [{"role": "system", "content": "S"},
                                                          {"role": "user", "content": "U"}]))
        assert inside in text and (not outside or outside not in text)


def test_an_adapter_folder_loads_with_its_base(family_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    base, tokenizer, _ = evaluation.load_model(family_folder("qwen2"))
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _, _ = evaluation.load_model(str(tmp_path / "adapter"))
    ids = torch.arange(10, 20)[None]
    assert torch.allclose(loaded(ids).logits, adapted(ids).logits, atol=1e-6)
    out, _, _ = evaluation.generate(loaded, [[5, 6, 7]], 2, max_new_tokens=4, stop_ids=[])
    assert out.shape == (2, 4)


def test_escape_codes_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\x07\nc") == "a\ufffd[31mb\ufffd\nc"


# --- chat, merge, the reward model's training -----------------------------------------------------------


def talk(monkeypatch, lines, *arguments):
    """eval.py chat in this process, fed with bytes; returns the exit code."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    try:
        with one_line_errors():
            arguments = ["--max_completion_length", "3", *arguments]
            evaluation.chat(evaluation.tyro.cli(evaluation.Chat, args=arguments, use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


def test_save_leaves_other_files_alone_and_chat_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a year of work")
    (tmp_path / "other.json").write_text('{"system": ""}')
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ["notes.txt", "other.json", "empty", "folder", "pipe", "/dev/null"]
    names += ["nowhere/x.json", "x" * 300, "a\0b"]
    lines = "".join(f"/save {name}\n" for name in names)
    lines += "Hello\n/save mine.json\nAgain\n/save mine.json\n/quit\n"
    assert talk(monkeypatch, lines.encode()) == 0
    said = capsys.readouterr().out
    assert said.count("is there already and no saved chat") == 6 and said.count("cannot be written") == 3
    assert "null byte" in said and said.count("saved: mine.json") == 2
    assert (tmp_path / "notes.txt").read_text() == "a year of work"
    assert (tmp_path / "other.json").read_text() == '{"system": ""}' and not (tmp_path / "empty").read_bytes()
    assert len(json.loads((tmp_path / "mine.json").read_text())["heads"]["tiny"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty", "folder", "mine.json", "notes.txt", "other.json", "pipe"]


def test_a_full_disk_keeps_the_last_saved_chat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert talk(monkeypatch, b"Hello\n/save\n") == 0
    before = (tmp_path / "chat.json").read_bytes()

    def full(path, text, **_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert talk(monkeypatch, b"/save\nHello\n") == 0
    assert "chat.json: cannot be written (No space left on device)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    assert (tmp_path / "chat.json").read_bytes() == before


def test_chat_leaves_out_a_line_that_is_no_utf8(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "talk.json")
    lines = b"one\nbroken \xff\xfe here\n/save x\xff.json\ntwo \0 bytes\n/save " + file.encode() + b"\n"
    assert talk(monkeypatch, lines) == 0
    assert capsys.readouterr().out.count("a line that is no UTF-8 was left out") == 2
    history = json.loads(Path(file).read_text())["heads"]["tiny"]
    assert [m["content"] for m in history if m["role"] == "user"] == ["one", "two \0 bytes"]


@pytest.fixture
def broken_model(family_folder, tmp_path):
    """A model folder with one weight that is NaN."""
    model, tokenizer, _ = evaluation.load_model(family_folder("qwen2"))
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    return str(tmp_path / "nan")


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_chat_says_that_logits_are_nan_and_goes_on(temperature, broken_model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.json"
    assert talk(monkeypatch, f"Hello\nAgain\n/save {file}\n".encode(), "--temperature", temperature,
                "--models", f"bad={broken_model}", "good=tiny") == 0
    said = capsys.readouterr().out
    assert said.count("bad: the model's probabilities are not numbers (NaN)") == 2
    heads = json.loads(file.read_text())["heads"]
    assert heads["bad"] == [] and len(heads["good"]) == 4  # a question without an answer is not remembered


def test_chat_without_heads_is_one_line(monkeypatch, capsys):
    assert talk(monkeypatch, b"", "--models") == 2
    assert capsys.readouterr().err.startswith("error: --models names no head")


def merged(*arguments):
    """eval.py merge in this process; returns the exit code."""
    try:
        with one_line_errors():
            arguments = list(map(str, arguments))
            evaluation.merge(evaluation.tyro.cli(evaluation.Merge, args=arguments, use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("name, text", [
    ("config.json", "[1, 2]"), ("config.json", "null"),
    ("config.json", '{"architectures": ["X"], "model": 3}'),
    ("config.json", '{"group_size": 4}'), ("config.json", None),
    ("summary.json", "[]"), ("summary.json", '{"before": 1, "after": {}}'), ("summary.json", None),
    ("summary.json", '{"before": {"accuracy": "x", "accuracy_ci95": 3}, "after": {"accuracy": null}}'),
    ("summary.json", '{"versions": 7, "seconds": "long"}'),
    ("eval_after.jsonl", "[3]\n"), ("eval_after.jsonl", "{}\n"), ("eval_after.jsonl", '{"id": 5}\n')])
def test_merge_beside_foreign_files_writes_a_card_that_knows_nothing(name, text, family_folder, tmp_path):
    folder = tmp_path / "run" / "model"
    shutil.copytree(family_folder("qwen2"), folder)
    (tmp_path / "run" / name).mkdir() if text is None else (tmp_path / "run" / name).write_text(text)
    assert merged("--model", folder, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a run that is not known" in card and "not known | | |" in card
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_merge_refuses_a_model_with_nan_and_leaves_nothing(broken_model, tmp_path, capsys):
    assert merged("--model", broken_model, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "model.norm.weight holds NaN or infinity" in error and error.count("\n") == 1
    assert merged("--model", "tiny", "--out", "") == 2
    assert "--out is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_a_merge_that_failed_does_not_block_the_next(tmp_path, monkeypatch, capsys):
    usual = transformers.PreTrainedTokenizerFast.save_pretrained

    def full(self, folder, *rest, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    (tmp_path / "out").mkdir()  # an empty one is taken
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    assert merged("--model", "tiny", "--out", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "out"]
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", usual)
    assert merged("--model", "tiny", "--out", tmp_path / "out") == 0
    assert {"README.md", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}


def trained(*arguments):
    """sft.py reward_model in this process; returns the exit code."""
    try:
        with one_line_errors():
            flags = list(map(str, arguments))
            sft.train_reward_model(evaluation.tyro.cli(sft.RewardModel, args=flags, use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def answers(tmp_path):
    """A prepared folder with a few free-text rows."""
    (tmp_path / "rows").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ecg.load_rows("builtin", limit=20)[0][:4])
    for side in ("train", "heldout"):
        (tmp_path / "rows" / f"{side}.jsonl").write_text(text)
    return tmp_path / "rows"


def test_reward_training_finds_out_about_its_folder_before_it_trains(answers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "pairs_of", lambda *_: pytest.fail("training has begun"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")  # of a stopped run
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "run", "/proc/out", "", "x" * 300):
        assert trained("--data", answers, "--out", out) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(out) in error and error.count("\n") == 1, error
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_reward_training_that_fails_is_one_line_and_leaves_nothing(answers, tmp_path, monkeypatch, capsys):
    usual = transformers.PreTrainedTokenizerFast.save_pretrained
    little = ["--data", answers, "--out", tmp_path / "out", "--max_length", 16, "--batch_size", 2]

    def failing(error):
        def save(*_, **__):
            raise error
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)

    for error, words in [(OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full"),
                         (RuntimeError("Error(Io, StorageFull, os error 28)"), "the disk is full"),
                         (RuntimeError("CUDA out of memory"), "lower --batch_size")]:
        failing(error)
        capsys.readouterr()
        assert trained(*little) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and words in last
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        trained(*little)
    failing(KeyboardInterrupt())
    assert trained(*little) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", usual)
    assert trained(*little) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.json", "normalisation.json", "model.safetensors"} <= written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows"]


@pytest.mark.parametrize("change, words", [
    ({"ground_truth": 3}, "`ground_truth`: str needed"),
    ({"extra": {"question": ["?"]}}, "`question`: list where text is needed"),
    ({"extra": []}, "`extra`: dict needed"), ({"data_source": ["ecg"]}, "`data_source`: str needed")])
def test_reward_training_refuses_rows_of_another_kind(change, words, answers, tmp_path, capsys):
    row = json.loads((answers / "train.jsonl").read_text().splitlines()[0])
    (answers / "train.jsonl").write_text(json.dumps(row | change) + "\n")
    assert trained("--data", answers, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert f"{answers / 'train.jsonl'}, line 1" in error and "data.prepare" in error


def test_a_reward_model_whose_scores_are_nan_is_not_written(answers, tmp_path, monkeypatch, capsys):
    usual = torch.nn.functional.logsigmoid
    monkeypatch.setattr(torch.nn.functional, "logsigmoid", lambda x: usual(x) * torch.nan)
    assert trained("--data", answers, "--out", tmp_path / "out", "--max_length", 16) == 2
    assert "scores are NaN, nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, flags", [
    ("eval.py", ["--temperature", "-1"]), ("eval.py", ["--temperature", "nan"]),
    ("grpo_pubmedqa.py", ["--correct_weight", "nan"]), ("grpo_pubmedqa.py", ["--tag_weight", "-inf"]),
    ("grpo_pubmedqa.py", ["--beta", "inf"]), ("grpo_pubmedqa.py", ["--warmup", "inf"]),
    ("grpo_ecg.py", ["--learned_weight", "nan"]), ("grpo_ecg.py", ["--learned_weight", "-5"]),
    ("grpo_medmcqa.py", ["--lora_alpha", "0"]), ("grpo_medmcqa.py", ["--lora_r", "0"]),
    ("grpo_pubmedqa.py", ["--seed", "99999999999999999999"]),
    ("grpo_pubmedqa.py", ["--max_completion_length", "99999999999999"]),
    ("data/prepare.py", ["--limit", "-1"]), ("sft.py", ["--learning_rate", "inf"])])
def test_numbers_that_make_no_sense_are_refused_by_name(script, flags, tmp_path, monkeypatch, capsys):
    """Each as the sceptic gave it; tests/test_knobs.py holds the rule for all of them."""
    monkeypatch.chdir(tmp_path)
    cli = evaluation.tyro.cli
    if script == "eval.py":
        code = scored(*flags)
    elif script == "sft.py":
        code = trained("--data", "nowhere", *flags)
    else:
        with pytest.raises(SystemExit) as end, one_line_errors():
            if script == "data/prepare.py":
                prepare.main(cli(prepare.Config, args=["pubmedqa", "builtin", *flags], use_underscores=True))
            else:
                module = next(m for m in (grpo, grpo_medmcqa, grpo_ecg) if m.__name__ == script[:-3])
                module.main(module.parse(["--model", "tiny", *flags]))
        code = end.value.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"error: {flags[0]} ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
