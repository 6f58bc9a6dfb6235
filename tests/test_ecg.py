"""ECG-Expert-QA and open medical questions: data, the script, the reward model, evaluation of free text,
chat.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest
import torch
import tyro
from conftest import ROOT
from safetensors.torch import load_file
from test_cli import CONTRACT, METRICS, command, metrics, same_but_for_clocks
from test_lora import in_process

import eval as evaluation
import grpo_ecg
import rewards
import sft
from data import InputError, ecg, medical_o1, one_line_errors
from data.run import Run, gaming_warnings

QUICK = ["--model", "tiny", "--adapter", "none", "--steps", "2", "--prompts_per_step", "2", "--group_size",
         "3", "--eval_size", "6",
         "--max_completion_length", "24", "--eval_every", "0", "--limit", "200"]
FILES = ["Complex diagnosis (analysis of difficult diseases).json", "ECG Knowledge (Basic Q&A).json",
         "Patient's right to know.json"]


def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


# === data ===================================================================================================


def same(text):
    return re.sub(r"\s+", " ", text).strip().lower().rstrip("?.!: ")


@pytest.mark.parametrize("name", FILES)
def test_real_files_convert_with_the_counts_of_an_independent_reader(real_data, name):
    raw = json.loads((real_data / name).read_text(encoding="utf-8"))
    question, answer = ("Question", "Answer") if "Question" in raw[0] else ("Q", "A")
    lost = [r for r in raw if re.search("鈮", r[question] + r[answer])]
    mended = [r for r in raw if r not in lost and re.search("鈥|掳", r[question] + r[answer])]
    answers = defaultdict(set)
    for r in raw:
        if r not in lost:
            answers[same(r[question])].add(same(r[answer].replace("鈥檚", "’s").replace("掳", "°")))
    train, heldout, counts = ecg.load_rows(str(real_data / name))
    assert counts["dropped: garbled text that lost a byte"] == len(lost)
    assert counts["mended: UTF-8 that had been read as GBK"] == len(mended)
    distinct = sum(map(len, answers.values()))
    assert counts["merged: the same question and answer again"] == len(raw) - len(lost) - distinct
    apart = sum(count for reason, count in counts.items()
                if reason.startswith(("kept apart", "dropped from training")))
    assert len(train) + len(heldout) + apart == distinct
    sides = [{same(row["extra"]["question"]) for row in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and all(len(answers[q]) == 1 for q in sides[1])
    if "Disease" in raw[0]:
        assert not {row["extra"]["disease"] for row in train} & {row["extra"]["disease"] for row in heldout}
    verdicts = Counter(row["extra"].get("verdict") for row in heldout)
    assert verdicts["yes"] == verdicts["no"] and (verdicts["yes"] > 50) == ("right to know" in name)
    starts = Counter(m[1].lower() for row in train + heldout
                     if (m := re.match(r"(yes|no)\b", row["ground_truth"], re.I)))
    assert counts["are yes/no questions"] == sum(starts.values())
    assert not any("\u4e00" <= c <= "\u9fff" for row in train + heldout for c in row["ground_truth"]
                   + row["extra"]["question"])
    for row in train + heldout:
        result = rewards.compute_score("ecg_expert_qa", row["target"], row["ground_truth"], row["extra"])
        assert result["accuracy"] == result["format_ok"] == 1 and result["score"] == pytest.approx(1)


def test_the_folder_as_it_is_cloned(real_data, tmp_path):
    (tmp_path / "dataset" / "deep [er]").mkdir(parents=True)
    (tmp_path / "README.md").write_text("not data")
    for name in FILES:
        os.symlink(real_data / name, tmp_path / "dataset" / "deep [er]" / name)
    train, heldout, _ = ecg.load_rows(str(tmp_path))
    assert {row["extra"]["subject"] for row in train} == {name.removesuffix(".json") for name in FILES}
    assert not {same(row["extra"]["question"])
                for row in train} & {same(row["extra"]["question"]) for row in heldout}
    assert len({row["id"] for row in train + heldout}) == len(train) + len(heldout)


def test_upstream_variants_are_recognised_and_others_refused_by_name(tmp_path):
    qa = [{"Q": f"What is finding {i}?", "A": f"It is sign {i}."} for i in range(30)]
    advice = [{"medical_advice": "rest", **{"Q": f"What to do in case {i}?", "A": f"Rest for {i} days."}}
              for i in range(30)]
    write(tmp_path / "a (b).json", qa)
    write(tmp_path / "c's.json", advice)
    train, heldout, _ = ecg.load_rows(str(tmp_path))
    assert len(train) + len(heldout) == 60
    assert {row["extra"]["subject"] for row in train + heldout} == {"a (b)", "c's"}
    write(tmp_path / "d.json", [{"Prompt": "q", "Completion": "a"}])
    with pytest.raises(InputError, match=r"d\.json, row 0: fields 'Prompt', 'Completion' are no known "
                                         r"form.*--question_field"):
        ecg.load_rows(str(tmp_path))
    write(tmp_path / "d.json", [*qa[:2], {"Q": "q", "Answer": "a"}])
    with pytest.raises(InputError, match=r"d\.json, row 2: fields 'Q', 'Answer' where the first row has 'Q', "
                                         r"'A'"):
        ecg.load_rows(str(tmp_path))
    write(tmp_path / "d.json", [{"Q": "only", "A": " "}])
    with pytest.raises(InputError, match=r"d\.json, row 0, field `A` is empty"):
        ecg.load_rows(str(tmp_path))
    own = write(tmp_path / "own.json", [{"ask": f"q {i}", "say": f"a {i}", "more": i} for i in range(9)])
    train, heldout, _ = ecg.load_rows(str(own), question_field="ask", answer_field="say")
    assert len(train) + len(heldout) == 9


def test_mojibake():
    assert ecg.repaired("the patient鈥檚 axis is -45掳") == "the patient’s axis is -45°"
    assert ecg.repaired("R 鈮7 mm") is None and ecg.repaired("plain β ≥ °") == "plain β ≥ °"


def test_contradictions_stay_out_of_evaluation_and_duplicates_are_merged(tmp_path):
    rows = [{"Q": f"q {i}", "A": "one."}
            for i in range(60)] + [{"Q": f"Q {i}? ", "A": "One"}
                                   for i in range(20)] + [{"Q": f"q {i}", "A": "two"} for i in range(40, 60)]
    train, heldout, counts = ecg.load_rows(str(write(tmp_path / "x.json", rows)))
    assert counts["merged: the same question and answer again"] == 20
    asked = Counter(row["extra"]["question"] for row in train)
    assert all(int(row["extra"]["question"][2:]) < 40 for row in heldout)
    assert {asked[f"q {i}"] for i in range(40, 60)} == {0, 2}
    assert set(asked[f"q {i}"] for i in range(40)) <= {0, 1}


def test_builtin_readings_follow_the_textbook():
    train, heldout, _ = ecg.load_rows()
    assert min(len(train), len(heldout)) > 2500
    assert not {r["extra"]["question"] for r in train} & {r["extra"]["question"] for r in heldout}
    for row in train[:400] + heldout[:400]:
        question, said = row["extra"]["question"], row["ground_truth"].lower()
        numbers = {name: int(m[1]) for name in ("rate", "PR", "QRS", "QTc", "axis")
                   if (m := re.search(rf"\b{name} (-?\d+)", question))}
        fibrillation = "no P waves" in question
        assert ("atrial fibrillation" in said) == fibrillation
        assert ("bradycardia" in said) == (numbers["rate"] < 60 and not fibrillation)
        assert ("tachycardia" in said) == (numbers["rate"] > 100 and not fibrillation)
        assert ("first-degree" in said) == (numbers.get("PR", 0) > 200)
        assert ("bundle branch" in said) == (numbers["QRS"] >= 120)
        # clear of both sexes' limits
        assert ("prolonged qt" in said) == (numbers["QTc"] >= 460) and not 445 < numbers["QTc"] < 465
        assert ("left axis" in said) == (numbers["axis"] < -30)
        assert ("right axis" in said) == (numbers["axis"] > 90)
        assert rewards.compute_score("ecg_expert_qa", ecg.target("x", row["ground_truth"]),
                                     row["ground_truth"], row["extra"])["score"] == pytest.approx(1)
        assert all(rewards.key_findings(finding) for finding in row["extra"]["findings"])
    # 55% of those where it shows
    assert 0.3 < sum(row["extra"]["annotator"] == "careless" for row in train) / len(train) < 0.5


def test_medical_o1_forms(tmp_path):
    reasoned = [{"Question": f"Why {i}?", "Complex_CoT": f"Because {i}.", "Response": f"It is {i}."}
                for i in range(20)]
    train, heldout, _ = medical_o1.load_rows(str(write(tmp_path / "a.json", reasoned)))
    assert len(train) + len(heldout) == 20 and train[0]["target"].startswith("<reasoning>\nBecause")
    assert train[0]["data_source"] == "medical_o1"
    verifiable = [{"Open-ended Verifiable Question": f"Why {i}?", "Ground-True Answer": f"{i} mg"}
                  for i in range(20)] * 2
    train, heldout, counts = medical_o1.load_rows(str(write(tmp_path / "b.json", verifiable)))
    assert len(train) + len(heldout) == 20 and counts == {"dropped: question occurs before": 20}
    own = write(tmp_path / "c.json", [{"ask": f"q {i}", "say": "a"} for i in range(8)])
    with pytest.raises(InputError, match="row 0: fields 'ask', 'say': name the question's and the answer's "
                                         "with --question_field"):
        medical_o1.load_rows(str(own))
    assert sum(map(len, medical_o1.load_rows(str(own), question_field="ask", answer_field="say")[:2])) == 8


def test_prepared_rows_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-m", "data.prepare", "ecg", "builtin", "--limit", "200", "--out",
                           str(tmp_path / "p")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "free-text answers" in done.stdout, done.stderr
    fresh, again = ecg.load_rows("builtin", limit=200), ecg.load_rows(str(tmp_path / "p"))
    assert fresh[:2] == again[:2] and not again[2]


# === the script =============================================================================================


def test_a_run_as_a_user_would_run_it(tmp_path, family_folder):
    done = command("grpo_ecg.py", *QUICK, "--language_model", family_folder("qwen2"), "--normalize_rewards",
                   "--weights", "findings", "0.6", "format", "0.3",
                   "fluency", "0.1", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "tiny" in done.stdout.splitlines()[0]
    assert "reward: 0.6 findings, 0.3 format, 0.1 fluency" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(CONTRACT)
    records = metrics(folder)
    assert all(key in records[0] for key in METRICS if key != "reward_correctness")
    assert all(f"reward_{part}" in records[0]
               for part in ("rule", "findings", "tokens", "similarity", "fluency", "format", "brevity"))
    summary = json.loads((folder / "summary.json").read_text())
    assert {"score", "score_ci95", "parts", "accuracy", "format_rate"} <= set(summary["after"])
    assert {"ties", "difference_ci95", "better"} <= set(summary["paired"])


@pytest.mark.parametrize("method", ["hybrid", "reasoning"])
def test_rewards_are_normalised_without_a_language_model_too(tmp_path, method, capsys):
    assert in_process(grpo_ecg, *QUICK, "--method", method, "--normalize_rewards", "--out",
                      tmp_path / "run") == 0
    assert "fluency" not in capsys.readouterr().out and len(metrics(tmp_path / "run")) == 2


def test_each_task_trains_on_its_own_mix_unless_another_is_named():
    def mix(*flags):
        return grpo_ecg.settled(grpo_ecg.parse(["--model", "tiny", *flags]))

    for flags, method in (
        ([], "hybrid"),
        (["--task", "medical_o1"], "reasoning"),
        (["--task", "ecg"], "hybrid"),
        (["--task", "medical_o1", "--method", "hybrid"], "hybrid"),
        (["--method", "reasoning"], "reasoning"),
    ):
        config = mix(*flags)
        assert config.method == method == mix(*flags, "--method", config.method).method
        usual = {part: weight for part, weight in rewards.WEIGHTS[method].items() if part != "fluency"}
        assert config.weights == usual == grpo_ecg.mix(config)  # no language model
    assert mix("--language_model", "x").weights == rewards.WEIGHTS["hybrid"]
    assert mix("--reward_model", "x", "--learned_weight", "2").weights["learned"] == 2


SAID = ecg.target("x", "Normal sinus rhythm" + ", left axis deviation" * 3) + " And more."


@pytest.fixture
def everybody_says(monkeypatch):
    """Makes every model say one text: what is tried is how it is scored."""
    monkeypatch.setattr(evaluation, "decode", lambda tokenizer, ids, mask, stop_strings=(): [SAID] * len(ids))


def evaluated(*arguments):
    """eval.py's main without a new process; returns the exit code."""
    flags = ["--task", "ecg", "--eval_size", 6, "--max_completion_length", 4, "--similarity", "overlap"]
    try:
        with one_line_errors():
            flags = list(map(str, [*flags, *arguments]))
            evaluation.main(tyro.cli(evaluation.Config, args=flags, use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def two_mixes(tmp_path, everybody_says):
    """Folders of two runs: one on a mix that was edited in rewards.py, one on weights of its own."""
    flags = [*QUICK, "--steps", 1, "--max_completion_length", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rewards.WEIGHTS, "hybrid", {"format": 0.5, "brevity": 0.5})
        assert in_process(grpo_ecg, *flags, "--out", tmp_path / "edited") == 0
    assert in_process(grpo_ecg, *flags, "--weights", "format", 2, "--out", tmp_path / "own") == 0
    return tmp_path / "edited" / "model", tmp_path / "own" / "model"


def test_an_evaluation_scores_what_the_run_trained_on(two_mixes, tmp_path, capsys):
    edited, own = two_mixes
    known = json.loads((edited.parent / "config.json").read_text())
    assert known["weights"] == {"format": 0.5, "brevity": 0.5} and known["method"] == "hybrid"

    def check(file, *parts):
        for record in map(json.loads, file.read_text().splitlines()):
            assert record["answer"]
            assert record["score"] == pytest.approx(sum(map(record.get, parts)) / len(parts))

    for name in ("eval_before", "eval_after"):  # the run's own
        check(edited.parent / f"{name}.jsonl", "format", "brevity")
    later = {  # flags of eval.py: what it says, the parts that count
        ("--model", edited): (
            f"what {edited} was trained on: 0.5 format, 0.5 brevity",
            ["format", "brevity"],
        ),
        ("--model", own): (f"what {own} was trained on: 2 format", ["format"]),
        ("--model", edited, "--weights", "tokens", 1): ("--weights: 1 tokens", ["tokens"]),
    }
    for number, (flags, (words, parts)) in enumerate(later.items()):
        assert evaluated(*flags, "--out", tmp_path / f"e{number}") == 0
        assert f"reward: scored by {words}\n" in capsys.readouterr().out
        check(tmp_path / f"e{number}" / "eval.jsonl", *parts)
    summary = json.loads((tmp_path / "e0" / "summary.json").read_text())
    assert summary["config"]["weights"] == {"format": 0.5, "brevity": 0.5}
    for number, (flags, words) in enumerate(
        [
            (["--model", "tiny"], "the usual mix, hybrid: 0.4 findings"),
            (["--model", edited, "--method", "hybrid"], "--method hybrid: 0.4 findings"),
            (["--models", "base=tiny", f"own=tiny+{own}"], f"what {own} was trained on: 2 format\n"),
        ]
    ):
        assert evaluated(*flags, "--out", tmp_path / f"f{number}") == 0
        assert f"reward: scored by {words}" in capsys.readouterr().out


def test_runs_on_two_mixes_are_not_scored_by_one_of_them(two_mixes, tmp_path, capsys):
    heads = ["--models", f"a={two_mixes[0]}", f"b={two_mixes[1]}"]
    assert evaluated(*heads, "--out", tmp_path / "e") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(
        word in error for word in ("edited/model", "own/model", "2 format", "--method", "--weights")
    )
    assert evaluated(*heads, "--method", "hybrid", "--out", tmp_path / "e") == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--weights", "finding", "1"], ["--weights finding"]),
        (["--weights", "tokens", "nan"], ["--weights tokens nan"]),
        (["--weights", "fluency", "1"], ["--weights", "1 fluency", "--language_model"]),
    ],
)
def test_weights_of_an_evaluation_that_make_no_sense(arguments, words, tmp_path, capsys):
    assert evaluated(*arguments, "--out", tmp_path / "e") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


def scored(answer="x", **parts):
    """A score dict as rewards.compute_scores makes it, with the hybrid mix's score."""
    whole = dict.fromkeys(("findings", "tokens", "similarity", "format", "brevity"), 0.0) | parts
    mix = {part: rewards.WEIGHTS["hybrid"][part] for part in whole}
    score = sum(mix[part] * whole[part] for part in mix) / sum(mix.values()) if answer else -1.0
    return {"score": score, "rule": score, **whole, "accuracy": 0.0, "format_ok": 0.0, "answer": answer}


def test_normalized_rewards_keep_the_minus_one_of_an_empty_answer():
    config = grpo_ecg.Config(normalize_rewards=True, language_model="")
    for group in (
        [scored(), scored(), scored(), scored("")],  # all parts are 0: the answer is all that differs
        [scored(findings=0.2, format=1.0), scored(findings=0.2, format=1.0), scored("", format=1.0)],
    ):
        rewarded = grpo_ecg.group_rewards(group, config)
        advantages = grpo_ecg.group_advantages(rewarded[None], "group")[0]
        assert (
            advantages[-1] < -1 and (advantages[:-1] > 0.3).all() and len(set(advantages[:-1].tolist())) == 1
        )
    best = grpo_ecg.group_rewards(
        [scored(findings=1.0), scored(findings=0.5), scored("", format=1.0)], config
    )
    assert best[0] > best[1] > best[2]
    assert set(grpo_ecg.group_rewards([scored(""), scored("", format=1.0)], config).tolist()) == {0.0}


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_std_looks_at_what_the_advantages_are_made_of(normalize, monkeypatch):
    model, tokenizer, compute = evaluation.load_model("tiny")
    config = grpo_ecg.Config(
        model="tiny",
        normalize_rewards=normalize,
        language_model="",
        prompts_per_step=2,
        group_size=4,
        max_completion_length=4,
    )
    rows = evaluation.encode_rows(tokenizer, ecg.load_rows("builtin", limit=20)[0][:4], 4096, "training")
    # the same weighted mean, but other parts: tokens and similarity weigh 0.2 each, findings 0.4
    groups = [
        [scored(findings=0.5), scored(tokens=1.0), scored(similarity=1.0), scored(findings=0.5)],
        [scored(), scored(), scored(), scored("")],
    ]
    monkeypatch.setattr(grpo_ecg, "score", lambda *_: groups[0] + groups[1])
    made = grpo_ecg.rollout(
        model,
        tokenizer,
        grpo_ecg.question_stream(rows, 0, 0),
        config,
        compute,
        evaluation.stop_ids(model, tokenizer),
        torch.Generator().manual_seed(0),
    )
    assert [group["zero_std"] for group in made] == [not normalize, False]
    assert [group["scores"] for group in made] == groups  # as they are, in the logs
    for group in made:
        advantages = grpo_ecg.group_advantages(group["rewards"][None], "group")
        assert group["zero_std"] == (advantages.abs().max() < 1e-9)


@pytest.mark.slow  # test_survival.py has the short form
def test_killed_and_resumed_is_the_same_run_bit_by_bit(tmp_path):
    flags = [*QUICK, "--steps", "6", "--save_every", "2"]
    assert command("grpo_ecg.py", *flags, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "grpo_ecg.py"), *flags, "--out",
                                str(tmp_path / "run")], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((tmp_path / "run" / "metrics.jsonl").exists()
                                          and len(metrics(tmp_path / "run")) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert command("grpo_ecg.py", *flags, "--out", tmp_path / "run", "--resume").returncode == 0
    one, two = (load_file(tmp_path / name / "model" / "adapter_model.safetensors")
                for name in ("whole", "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert same_but_for_clocks(metrics(tmp_path / "whole")) == same_but_for_clocks(metrics(tmp_path / "run"))


@pytest.mark.parametrize("name", FILES)
def test_each_real_file_trains_for_ten_steps(real_data, tmp_path, name):
    assert in_process(grpo_ecg, *QUICK, "--limit", 0, "--steps", 10, "--data", real_data / name,
                      "--eval_size", 10, "--out", tmp_path / "run") == 0
    assert len(metrics(tmp_path / "run")) == 10


def test_open_medical_questions_train(tmp_path):
    rows = [{"Question": f"Which drug is number {i}?", "Complex_CoT": "I count.", "Response": f"Drug {i}."}
            for i in range(60)]
    data = write(tmp_path / "o1.json", rows)
    assert in_process(sft, "--model", "tiny", "--task", "medical_o1", "--data", data, "--eval_size", 6,
                      "--batch_size", 8, "--num_epochs", 1, "--out", tmp_path / "sft") == 0
    assert in_process(grpo_ecg, *QUICK, "--task", "medical_o1", "--method", "reasoning", "--data", data,
                      "--adapter", tmp_path / "sft" / "model",
                      "--out", tmp_path / "run") == 0


@pytest.mark.parametrize("arguments, words", [
    (["--data", "hub"], ["not on the hub", "--data PATH"]),
    (["--task", "medical_o1"], ["no built-in items", "--task ecg"]),
    (["--reward_model", "nowhere"], ["--reward_model nowhere", "sft.py reward_model"]),
    (["--language_model", "no/where"], ["--language_model no/where", "--language_model ''"]),
    (["--weights", "findings", "0"], ["--weights findings 0", "at least"]),
    (["--weights", "finding", "1"], ["--weights finding", "findings, tokens"]),
    (["--weights", "fluency", "1"], ["fluency alone", "--language_model"]),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process(grpo_ecg, *QUICK, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


# === the reward model =======================================================================================


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model trained for a moment on built-in items, as a user would."""
    folder = tmp_path_factory.mktemp("reward")
    assert subprocess.run([sys.executable, "-m", "data.prepare", "ecg", "builtin", "--limit", "400", "--out",
                           str(folder / "data")], cwd=ROOT).returncode == 0
    done = command("sft.py", "reward_model", "--data", folder / "data", "--limit", 80, "--eval_size", 40,
                   "--out", folder / "model")
    assert done.returncode == 0 and "another question's answer" in done.stdout, done.stderr
    return folder / "model"


def test_corruptions_are_worse_by_the_rules_too():
    import random
    generator, worse = random.Random(0), Counter()
    _, heldout, _ = ecg.load_rows("builtin", limit=400)
    for row, other in zip(heldout, heldout[1:]):
        made = sft.corruptions(row["ground_truth"], other["ground_truth"], generator)
        gold = rewards.compute_score("ecg_expert_qa", ecg.target("x", row["ground_truth"]),
                                     row["ground_truth"], row["extra"])["score"]
        for kind, text in made.items():
            score = rewards.compute_score("ecg_expert_qa", ecg.target("x", text), row["ground_truth"],
                                          row["extra"])["score"]
            worse[kind] += score < gold
            worse["of " + kind] += 1
    assert all(worse[kind] >= 0.95 * worse["of " + kind] > 50
               for kind in ("another question's answer", "negated", "truncated")), worse
    made = sft.corruptions("No, wait 3 to 6 months, it is not urgent.", "Yes.", generator)
    assert made["negated"] == "wait 3 to 6 months, it is urgent." and re.search(r"\d", made["number"])
    assert "number" in made
    assert sft.corruptions("Yes, you can.", "x", generator)["negated"] == "No, you can."


def test_a_trained_reward_model_is_loaded_normalised_and_watched(reward_model, tmp_path, capsys):
    summary = json.loads((reward_model / "summary.json").read_text())
    assert {"another question's answer", "negated", "truncated"} <= set(summary["by_kind"])
    assert 0 <= summary["accuracy"] <= 1
    _, heldout, _ = ecg.load_rows("builtin", limit=400)
    questions, answers = [row["extra"]["question"]
                          for row in heldout[:40]], [row["ground_truth"] for row in heldout[:40]]
    rewards.SCORED.clear()
    together = rewards.learned_rewards(questions, answers, str(reward_model))
    rewards.SCORED.clear()
    alone = [rewards.learned_rewards([q], [a], str(reward_model))[0] for q, a in zip(questions, answers)]
    assert together == pytest.approx(alone, abs=2e-5) and all(0 < score < 1 for score in together)
    assert len(set(together)) > 20
    assert in_process(grpo_ecg, *QUICK, "--reward_model", reward_model, "--out", tmp_path / "run") == 0
    record = metrics(tmp_path / "run")[0]
    assert {"reward_learned", "reward_rule"} <= set(record) and "0.5 learned" in capsys.readouterr().out


def test_climbing_the_reward_model_alone_is_warned_about_once(tmp_path):
    run = Run("x", grpo_ecg.Config(out=str(tmp_path / "run"), model="tiny"))
    said = []
    bar = type("Bar", (), {"write": staticmethod(said.append)})
    run.folder.mkdir()
    for step in range(80):
        run.log("metrics",
                {"step": step, "reward_learned": 0.01 * step, "reward_rule": 0.5 if step < 40
                 else 0.5 - 0.01 * (step - 40)})
        run.warn_once(bar, step, gaming_warnings(run.read_records("metrics")))
        assert len(said) == (step > 40 and len(said))  # at most once
        assert step >= 39 or not said
    assert len(said) == 1 and "being gamed" in said[0]


@pytest.mark.parametrize("arguments, words",
                         [(["nowhere"], ["nowhere/train.jsonl"]),
                          (["{empty}"], ["train.jsonl", "data.prepare"]),
                          (["{good}", "--model", "nowhere"], ["nowhere: no such model folder"]),
                          (["{good}", "--num_epochs", "0"], ["--num_epochs 0", "at least 1"])])
def test_bad_input_of_reward_training_is_one_line(arguments, words, tmp_path, capsys):
    for name, rows in (("empty", "{}\n"),
                       ("good",
                        "".join(json.dumps(row) + "\n" for row in ecg.load_rows("builtin", limit=20)[0]))):
        (tmp_path / name).mkdir()
        for side in ("train", "heldout"):
            (tmp_path / name / f"{side}.jsonl").write_text(rows)
    done = command("sft.py", "reward_model", "--data",
                   *[a.format(empty=tmp_path / "empty", good=tmp_path / "good") for a in arguments], "--out",
                   tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count(
        "\n") == 1, done.stderr
    assert all(word in done.stderr for word in words) and not (tmp_path / "out").exists()


# === evaluation and chat ====================================================================================


def test_heads_are_compared_by_score(tmp_path):
    done = command("eval.py", "--task", "ecg", "--models", "one=tiny", "two=tiny", "--eval_size", 6,
                   "--max_completion_length", 16, "--similarity", "overlap",
                   "--out", tmp_path / "e")
    assert done.returncode == 0 and "tied on 6" in done.stdout, done.stderr
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert {"score_ci95", "parts"} <= set(summary["heads"]["one"]["generated"])
    assert summary["paired"][0]["ties"] == 6
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Parts of the score" in page and "sign test on scores" in page and '"freeText": true' in page


def test_bootstrap_interval_is_that_of_the_mean():
    low, high = evaluation.bootstrap_interval([0.0] * 50 + [1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
    assert evaluation.bootstrap_interval([0.3] * 10) == pytest.approx([0.3, 0.3])


def talk(text, *arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "chat", *map(str, arguments)], input=text,
                          capture_output=True, text=True, **options)


def test_chat_from_a_pipe(tmp_path):
    file = tmp_path / "talk.json"
    done = talk("What does vitamin C lack cause?\n/system Be brief.\nAnd again?\n/save "
                f"{file}\n/nonsense\n/clear\nHello\n/quit\nnever\n",
                "--models", "base=tiny", "other=tiny", "--max_completion_length", 12, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nbase: ") == done.stdout.count("\nother: ") == 3 and "never" not in done.stdout
    assert "/nonsense is no command" in done.stdout and "cleared" in done.stdout
    saved = json.loads(file.read_text())
    assert saved["system"] == "Be brief." and [len(history) for history in saved["heads"].values()] == [2, 2]
    assert saved["heads"]["base"] == saved["heads"]["other"]  # greedy, the same model


def test_chat_keeps_a_history_for_each_head_and_ends_with_the_pipe(tmp_path):
    done = talk(f"One\nTwo\n/save {tmp_path / 't.json'}\n", "--models", "a=tiny", "b=tiny",
                "--max_completion_length", 8, "--seed", 3)
    assert done.returncode == 0, done.stderr
    heads = json.loads((tmp_path / "t.json").read_text())["heads"]
    assert [m["content"] for m in heads["a"] if m["role"] == "user"] == ["One", "Two"]
    assert heads["a"] != heads["b"]
    bad = talk("x\n", "--models", "a=nowhere")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_streamed_text_is_what_generate_gives(family_folder, family):
    model, tokenizer, compute = evaluation.load_model(family_folder(family))
    prompt = evaluation.encode_prompt(tokenizer, [{"role": "user", "content": "What is a P wave?"}])
    ids, mask, _ = evaluation.generate(model, [prompt], max_new_tokens=20,
                                       stop_ids=evaluation.stop_ids(model, tokenizer), temperature=0.0)
    config = evaluation.Chat(max_completion_length=20, temperature=0.0)
    assert "".join(evaluation.stream(model, tokenizer, prompt, compute, config,
                                     None)) == evaluation.decode(tokenizer, ids, mask)[0]
