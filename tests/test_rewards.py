"""The reward can't be cheated: adversarial completions and the score that each must get."""
import ast
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards

GOOD = "<reasoning>\nIt fell.\n</reasoning>\n<answer>\nyes\n</answer>"
PROMPT = ("Read the abstract and answer the question with yes or no. First reason, then answer, in this "
          "form:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")


def answer(text):
    return f"<reasoning>\nIt fell.\n</reasoning>\n<answer>\n{text}\n</answer>"


# (what, completion, correctness, format); the truth is "yes"
TABLE = [
    ("as asked", GOOD, 2.0, 0.8),
    ("wrong", answer("no"), 0.0, 0.8),
    ("third class", answer("maybe"), 0.0, 0.8),
    ("upper case", answer("YES"), 2.0, 0.8),
    ("full stop", answer("Yes."), 2.0, 0.8),
    ("one line", "<reasoning>It fell.</reasoning><answer>yes</answer>", 2.0, 0.8),
    ("white space after the answer", GOOD + " \n\n", 2.0, 0.8),
    ("text before the reasoning", "Let me see. " + GOOD, 2.0, 0.8),
    ("empty reasoning", "<reasoning></reasoning><answer>yes</answer>", 2.0, 0.8),
    ("both answers", answer("yes no"), 0.0, 0.8),
    ("both answers, or", answer("yes or no"), 0.0, 0.8),
    ("both answers, slash", answer("yes/no"), 0.0, 0.8),
    ("both answers, lines", answer("yes\nno"), 0.0, 0.8),
    ("the same answer twice", answer("yes yes"), 0.0, 0.8),
    ("not yes", answer("not yes"), 0.0, 0.8),
    ("know", answer("I know"), 0.0, 0.8),
    ("yesterday", answer("yesterday"), 0.0, 0.8),
    ("a sentence", answer("The answer is yes"), 0.0, 0.8),
    ("two full stops", answer("yes.."), 0.0, 0.8),
    ("exclamation", answer("yes!"), 0.0, 0.8),
    ("quoted", answer('"yes"'), 0.0, 0.8),
    ("bold", answer("**yes**"), 0.0, 0.8),
    ("empty answer", answer(""), 0.0, 0.8),
    ("full stop alone", answer("."), 0.0, 0.8),
    ("Cyrillic e", answer("y\u0435s"), 0.0, 0.8),
    ("full width", answer("\uff59\uff45\uff53"), 0.0, 0.8),
    ("long s", answer("ye\u017f"), 0.0, 0.8),
    ("zero-width space inside", answer("y\u200bes"), 0.0, 0.8),
    ("combining accent", answer("yes\u0301"), 0.0, 0.8),
    ("answer in the reasoning only", "<reasoning>\nyes\n</reasoning>\n<answer>\n\n</answer>", 0.0, 0.8),
    ("no tags at all", "yes", 0.0, 0.0),
    ("no answer block", "<reasoning>\nyes\n</reasoning>\nyes", 0.0, 0.4),
    ("answer block alone", "<answer>yes</answer>", 2.0, 0.4),
    ("closing tags alone", "</reasoning>yes</answer>", 0.0, 0.4),
    ("opening tags alone", "<reasoning><answer>yes", 0.0, 0.4),
    ("reasoning unclosed", "<reasoning>It fell.<answer>yes</answer>", 2.0, 0.6),
    ("answer unclosed", "<reasoning>It fell.</reasoning><answer>yes", 0.0, 0.6),
    ("answer unopened", "<reasoning>It fell.</reasoning>yes</answer>", 0.0, 0.6),
    ("text after the answer", GOOD + " I am sure.", 2.0, 0.6),
    ("other answer after the answer", GOOD + "\nno", 2.0, 0.6),
    ("everything twice", GOOD + GOOD, 0.0, 0.0),
    ("two answer blocks", GOOD + "<answer>no</answer>", 0.0, 0.4),
    ("two equal answer blocks", GOOD + "<answer>yes</answer>", 0.0, 0.4),
    ("two reasoning blocks", "<reasoning>a</reasoning>" + GOOD, 2.0, 0.4),
    ("answer first", "<answer>yes</answer><reasoning>It fell.</reasoning>", 0.0, 0.0),
    ("answer nested in reasoning", "<reasoning><answer>yes</answer></reasoning>", 0.0, 0.2),
    ("reasoning nested in answer", "<answer><reasoning>a</reasoning>yes</answer>", 0.0, 0.2),
    ("reversed", "</answer>yes<answer></reasoning>It fell.<reasoning>", 0.0, 0.0),
    ("answer tags reversed", "<reasoning>a</reasoning></answer>yes<answer>", 0.0, 0.4),
    ("answer in answer", "<reasoning>a</reasoning><answer><answer>yes</answer></answer>", 0.0, 0.4),
    ("upper-case tags", GOOD.upper(), 0.0, 0.0),
    ("spaces in tags", GOOD.replace("<answer>", "< answer >"), 0.0, 0.6),
    ("other tags", "<think>a</think><answer>yes</answer>", 2.0, 0.4),
    ("full-width brackets", GOOD.replace("<", "\uff1c"), 0.0, 0.0),
    ("empty", "", 0.0, 0.0),
    ("white space", " \n\t", 0.0, 0.0),
    ("prompt echoed", PROMPT, 0.0, 0.8),
    ("prompt echoed, then answered", PROMPT + GOOD, 0.0, 0.0),
    ("ground truth echoed in attributes", '<answer value="yes"></answer>', 0.0, 0.2),
    ("10,000 tags", "<answer>yes</answer>" * 10_000, 0.0, 0.0),
    ("10,000 opening tags and one answer", "<reasoning>" * 10_000 + "</reasoning><answer>yes</answer>", 2.0,
     0.6),
    ("null byte in the answer", answer("yes\0"), 0.0, 0.8),
    ("HTML entity", answer("y&#101;s"), 0.0, 0.8),
]


@pytest.mark.parametrize("what, completion, correctness, format", TABLE, ids=[row[0] for row in TABLE])
def test_adversarial_completions(what, completion, correctness, format):
    result = rewards.compute_score("pubmedqa", completion, "yes")
    assert result["correctness"] == pytest.approx(correctness)
    assert result["format"] == pytest.approx(format)
    assert result["score"] == pytest.approx(correctness + format)
    assert result["accuracy"] == (correctness > 0) and result["format_ok"] == (format == pytest.approx(0.8))


def test_nothing_beats_the_right_answer_in_the_right_form():
    scores = {what: rewards.compute_score("pubmedqa", text, "yes")["score"] for what, text, *_ in TABLE}
    assert max(scores.values()) == scores["as asked"] == pytest.approx(2.8)


def test_the_weights_are_knobs_and_the_keys_are_constant():
    result = rewards.compute_score("pubmedqa", GOOD, "yes", {"any": 1}, correct_weight=1.0, tag_weight=0.5)
    assert result["score"] == pytest.approx(3.0)
    keys = {tuple(rewards.compute_score("pubmedqa", text, "no")) for _, text, *_ in TABLE}
    assert len(keys) == 1 and "score" in keys.pop()


def test_an_unknown_data_source_is_named():
    with pytest.raises(ValueError, match="sudoku"):
        rewards.compute_score("sudoku", GOOD, "yes")


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20),
                          st.sampled_from([*rewards.TAGS["pubmedqa"], "yes", "no", "\n"])), max_size=12))
def test_any_text_gets_a_bounded_score_and_only_one_truth_is_right(pieces):
    text = "".join(pieces)
    results = [rewards.compute_score("pubmedqa", text, truth) for truth in ("yes", "no", "maybe")]
    assert all(0 <= result["score"] <= 2.8 + 1e-9 for result in results)
    assert sum(result["accuracy"] for result in results) <= 1
    assert results == [rewards.compute_score("pubmedqa", text, truth) for truth in ("yes", "no", "maybe")]


def test_a_megabyte_is_scored_at_once():
    for text in ("<answer>" * 125_000, "a" * 1_000_000, "<" * 1_000_000, GOOD + " " * 1_000_000):
        rewards.compute_score("pubmedqa", text, "yes")  # a quadratic parser would not come back


def test_the_file_stands_alone():
    """Other engines load rewards.py by path: no import of the project, no dataclass with postponed
    annotations.
    """
    path = Path(rewards.__file__)
    imported = {name.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)
                for name in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"data", "eval", "sft", "__future__"}
    spec = importlib.util.spec_from_file_location("custom_module", path)  # as verl does, without sys.modules
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.compute_score("pubmedqa", GOOD, "yes")["score"] == pytest.approx(2.8)
