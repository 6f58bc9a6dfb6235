"""Statistics of an evaluation: what several sampled answers show, and the trivial baselines beside every
accuracy.
"""
import itertools
import json

import pytest

import eval as evaluation
import grpo_pubmedqa
from data import pubmedqa


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, correct in [(1, 0), (1, 1), (5, 0), (5, 2), (6, 1), (6, 6), (8, 3)]:
        answers = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(answers, k))
            assert evaluation.pass_at_k(n, correct,
                                        k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_majority_of_samples_with_ties_and_unparsed_answers():
    vote = evaluation.majority_vote
    assert vote(["yes", "yes", "no"], "yes") == 1 and vote(["yes", "yes", "no"], "no") == 0
    assert vote(["yes", "no"], "yes") == vote(["no", "yes"], "yes") == 0.5  # a tie is drawn
    # what could not be parsed does not vote
    assert vote(["A", "B", "C", "", ""], "B") == pytest.approx(1 / 3)
    assert vote(["", ""], "yes") == 0


def test_summary_of_samples_and_the_baselines_beside_it():
    def record(truth, sampled):
        return {"ground_truth": truth, "answer": sampled[0], "accuracy": float(sampled[0] == truth),
                "subject": "S" * (truth == "no"), "sampled_answers": sampled,
                "sampled_accuracy": [float(answer == truth) for answer in sampled]}

    records = [record("yes", ["yes", "no", "", "yes", "no"]), record("yes", ["no"] * 5),
               record("no", ["no", "", "", "", "yes"])]
    summary = evaluation.summarize(records)
    assert summary["majority_class"] == "yes" and summary["majority_accuracy"] == pytest.approx(2 / 3)
    assert summary["by_subject"]["S"]["majority_accuracy"] == 1 and summary["by_subject"]["none"]["n"] == 2
    assert summary["samples"] == 5 and list(summary["pass_at_k"]) == ["1", "2", "4", "5"]
    assert summary["mean_accuracy"] == pytest.approx(3 / 15) == summary["pass_at_k"]["1"]
    assert summary["pass_at_k"]["2"] == pytest.approx((7 / 10 + 0 + 4 / 10) / 3)
    assert summary["pass_at_k"]["5"] == pytest.approx(2 / 3)
    assert summary["maj_at_n"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert summary["guess_pass_at_k"]["4"] == pytest.approx(1 - 0.5**4)
    words = evaluation.describe(summary)
    assert "always 'yes': 0.667" in words and "pass@5 0.667" in words and "maj@5 0.333" in words
    assert "always 'A'" in evaluation.describe(evaluation.summarize([{**records[0], "ground_truth": "A"}]))


def test_the_page_shows_pass_at_k_with_guessing_beside_it():
    summaries = {"base": 2, "sft": 5, "grpo <b>": 8}
    heads = {}
    for name, right in summaries.items():
        records = [{"ground_truth": truth, "answer": truth, "accuracy": 1.0, "sampled_answers": ["yes"] * 8,
                    "sampled_accuracy": [1.0] * right + [0.0] * (8 - right)}
                   for truth in ("yes", "no", "maybe")]
        heads[name] = {"generated": evaluation.summarize(records)}
    page = evaluation.report_html("t", heads, [])
    assert page.count("<svg") == 2 and page.count('class="line line') == 3
    assert page.count('class="majority line"') == 1
    assert "Sampled answers (8 a question)" in page and "pass@4" in page and "maj@8" in page
    assert "<td>62.5%</td>" in page
    assert '<th scope="row">guessing</th><td>33.3%</td>' in page and "always yes" in page
    assert "<b>" not in page


def test_eval_command_reports_pass_at_k_and_majority(tmp_path, capsys):
    out = tmp_path / "e"
    evaluation.main(evaluation.Config(out=str(out), eval_size=4, samples=3, max_completion_length=40))
    summary = json.loads((out / "summary.json").read_text())
    record = json.loads((out / "eval.jsonl").read_text().splitlines()[0])
    assert summary["samples"] == 3 and list(summary["pass_at_k"]) == ["1", "2", "3"]
    assert 0 <= summary["maj_at_n"] <= 1
    assert len(record["sampled_answers"]) == len(record["sampled_accuracy"]) == 3
    printed = capsys.readouterr().out
    assert "3 samples each: mean accuracy" in printed and "maj@3" in printed and "(always '" in printed


def test_samples_of_free_text_have_a_mean_score(tmp_path, capsys):
    out = tmp_path / "e"
    evaluation.main(evaluation.Config(task="ecg", out=str(out), eval_size=3, samples=2, similarity="overlap",
                                      max_completion_length=20))
    summary = json.loads((out / "summary.json").read_text())
    scores = [json.loads(line)["sampled_score"] for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [len(row) for row in scores] == [2, 2, 2]
    assert summary["mean_score"] == pytest.approx(sum(map(sum, scores)) / 6)
    assert f"2 samples each: mean score {summary['mean_score']:.3f}, mean accuracy" in capsys.readouterr().out


# --- what dooms a run is said early -------------------------------------------------------------------------


def run_pubmedqa(tmp_path, capsys, *flags):
    """A run of grpo_pubmedqa.py with the built-in model, a few steps; what it printed, and its folder."""
    small = ["--steps", "3", "--prompts_per_step", "2", "--group_size", "2", "--eval_size", "8",
             "--max_completion_length", "64"]
    grpo_pubmedqa.main(grpo_pubmedqa.parse(["--model", "tiny", *small, "--out", str(tmp_path / "run"),
                                            *flags]))
    return capsys.readouterr(), tmp_path / "run"


def test_a_model_that_does_not_know_the_tags_is_told_so_before_training(tmp_path, capsys, monkeypatch):
    """As SmolLM2-135M-Instruct answers zero-shot: a sentence, never the tags (DESIGN 10), and all of a group
    alike.
    """
    monkeypatch.setattr(evaluation, "decode", lambda tokenizer, ids, mask,
                        stop_strings=(): ["Yes, the study suggests it."] * len(ids))
    (out, error), _ = run_pubmedqa(tmp_path, capsys)
    warning = [line for line in out.splitlines() if "doesn't know the tags" in line]
    assert len(warning) == 1 and warning[0].startswith("WARNING") and "format rate 0.000" in warning[0]
    command = "python sft.py --task pubmedqa --model tiny --data builtin --lora_r 0 --out runs/sft-pubmedqa"
    assert command in warning[0]
    assert out.index("before:") < out.index("doesn't know the tags") < out.index("step    1")
    assert (out + error).count("in the first 3 steps all completions of a group earned the same") == 1
    assert "--group_size 4 --temperature 1.2" in out + error
    assert "were cut at" not in out


def test_a_base_model_that_does_not_stop_is_told_so_and_stopped_by_a_string(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "stop_ids", lambda model, tokenizer: [0])  # it runs on behind its answer
    (out, _), _ = run_pubmedqa(tmp_path / "a", capsys)
    warning = [line for line in out.splitlines() if "were cut at" in line]
    assert len(warning) == 1 and "100% of the answers" in warning[
        0] and "--max_completion_length 128" in warning[0]
    assert "--stop_strings '</answer>'" in warning[0]
    (out, _), folder = run_pubmedqa(tmp_path / "b", capsys, "--stop_strings", "</answer>")
    assert "WARNING" not in out.partition("step    1")[0]
    records = [json.loads(line) for line in (folder / "eval_before.jsonl").read_text().splitlines()]
    assert all(r["completion"].endswith("</answer>") and not r["truncated"] and r["format_ok"]
               for r in records)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(text.count("</answer>") == 1 and text.endswith("</answer>") for s in samples
               for text in s["completions"])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(m["truncated"] == 0 and m["completion_length"] < 64 for m in metrics)
    grpo_pubmedqa.main(grpo_pubmedqa.parse(["--model", "tiny", "--steps", "3", "--prompts_per_step", "2",
                                            "--group_size", "2",
                                            "--eval_size", "8", "--max_completion_length", "64", "--out",
                                            str(folder),
                                            "--stop_strings", "</answer>", "--resume"]))
    assert "is finished" in capsys.readouterr().out  # a tuple comes back from config.json as a list


def test_a_good_start_is_not_warned_about(tmp_path, capsys):
    (out, error), _ = run_pubmedqa(tmp_path, capsys, "--group_size", "8")
    assert "WARNING" not in out + error


@pytest.mark.parametrize("strings", [("</answer>",), ("</reasoning>\n<ans",), ("is", "low"), ("%",)])
def test_stop_strings_end_a_completion_with_the_token_that_completes_them(strings):
    model, tokenizer, _ = evaluation.load_model("tiny", "fp32")
    prompts = [evaluation.encode_prompt(tokenizer, row["prompt"]) for row in pubmedqa.load_rows()[1][:6]]
    options = dict(max_new_tokens=48, stop_ids=[], temperature=0.0)
    free = evaluation.decode(tokenizer, *evaluation.generate(model, prompts, **options)[:2])
    ids, mask, logps = evaluation.generate(model, prompts, **options, stop_strings=strings,
                                           tokenizer=tokenizer)
    texts = evaluation.decode(tokenizer, ids, mask, strings)
    for text, whole, row, on, row_logps in zip(texts, free, ids, mask, logps):
        ends = [whole.find(string) + len(string) for string in strings if string in whole]
        assert ends and text == whole[:min(ends)]
        before_last = tokenizer.decode(row[:int(on.sum()) - 1], skip_special_tokens=True)
        assert not any(string in before_last for string in strings)  # no token behind the end is trained on
        assert (row[~on] == 0).all() and (row_logps[~on] == 0).all()
