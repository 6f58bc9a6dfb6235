"""Sources, rows, splits: real formats in, the same plain rows out."""
import json
from collections import Counter
from pathlib import Path

import pytest

from data import InputError, check_row, prepare, pubmedqa, read_records

SINGLE = [{"question": f"Does {i} help?", "context": f"It did {i}.", "ground_truth": "yes" if i % 3 else "no"} for i in range(40)]
OFFICIAL = {str(1000 + i): {"QUESTION": r["question"], "CONTEXTS": [r["context"], "More."], "LABELS": ["A", "B"], "MESHES": [],
                            "YEAR": "2001", "reasoning_required_pred": "yes", "reasoning_free_pred": "no",
                            "final_decision": r["ground_truth"] if i else "maybe", "LONG_ANSWER": "Because."} for i, r in enumerate(SINGLE)}
HUB = [{"pubid": 1000 + i, "question": r["question"], "context": {"contexts": [r["context"], "More."], "labels": ["A"], "meshes": []},
        "long_answer": "Because.", "final_decision": r["ground_truth"] if i else "maybe"} for i, r in enumerate(SINGLE)]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_three_forms_give_the_same_questions_on_the_same_sides(tmp_path, monkeypatch):
    single = pubmedqa.load_rows(write(tmp_path / "single.json", SINGLE))
    official = pubmedqa.load_rows(write(tmp_path / "official.json", OFFICIAL))
    monkeypatch.setattr(pubmedqa, "read_hub", lambda name, config: [(f"row {i}", r) for i, r in enumerate(HUB)])
    hub = pubmedqa.load_rows("hub")
    for train, heldout, dropped in (official, hub):
        assert [r["extra"]["question"] for r in heldout] == [r["extra"]["question"] for r in single[1] if r["extra"]["question"] != "Does 0 help?"]
        assert dropped == {"dropped: label maybe (--maybe keeps it)": 1}
        assert all("It did" in r["prompt"][1]["content"] and "More." in r["prompt"][1]["content"] for r in train + heldout)
        assert all("Because." in r["target"] for r in train + heldout)
    assert {r["id"] for r in official[0]} == {r["id"] for r in hub[0]}
    for row in single[0] + official[0] + hub[0]:
        check_row(row, "here")


def test_the_hub_form_is_read_through_datasets(tmp_path, monkeypatch):
    """The real load_dataset on a local dataset folder in the hub's file format (parquet), nested context and all."""
    import datasets
    datasets.Dataset.from_list(HUB).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    train, heldout, _ = pubmedqa.load_rows(f"hub:{tmp_path / 'set'}")
    assert len(train) + len(heldout) == 39 and train[0]["id"].startswith("pubmedqa:10")


def test_maybe_is_a_knob(tmp_path):
    path = write(tmp_path / "f.json", OFFICIAL)
    rows = sum(pubmedqa.load_rows(path, maybe=True)[:2], [])
    assert Counter(r["ground_truth"] for r in rows)["maybe"] == 1 and "yes, no or maybe" in rows[0]["prompt"][0]["content"]
    with pytest.raises(InputError, match="yes/no only"):
        pubmedqa.load_rows("builtin", maybe=True)


def official_file(n_others=500):
    """A file in the official form: the 500 test PMIDs with the real label counts, and as many other rows."""
    pmids = json.loads((Path(pubmedqa.__file__).parent / "pubmedqa_test_pmids.json").read_text())
    labels = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55
    rows = {}
    for i in range(n_others):
        rows[str(100 + i)] = {**OFFICIAL["1001"], "QUESTION": f"Does other {i} help?", "final_decision": labels[i]}
        rows[str(pmids[i])] = {**OFFICIAL["1001"], "QUESTION": f"Does tested {i} help?", "final_decision": labels[i]}
    return rows, {f"pubmedqa:{pmid}": label for pmid, label in zip(pmids, labels)}


@pytest.mark.parametrize("maybe", [False, True])
def test_the_official_test_questions_are_held_out_and_nothing_else(tmp_path, maybe):
    content, tested = official_file()
    train, heldout, counts = pubmedqa.load_rows(write(tmp_path / "ori_pqal.json", content), maybe=maybe)
    assert {row["id"] for row in heldout} == {row_id for row_id, label in tested.items() if maybe or label != "maybe"}
    assert len(train) == len(heldout) == (500 if maybe else 445) == counts["held out: questions of the official test set"]
    assert not {row["extra"]["question"] for row in train} & {row["extra"]["question"] for row in heldout}
    order = [row["id"] for row in heldout]
    assert order != sorted(order) and order != list(tested)  # so that --eval_size takes a random sample


def test_a_test_question_under_another_id_is_not_trained_on(tmp_path):
    content, tested = official_file()
    content = {"7": {**OFFICIAL["1001"], "QUESTION": "does tested 0 help"}, **content}
    train, heldout, counts = pubmedqa.load_rows(write(tmp_path / "f.json", content), maybe=True)
    assert {row["id"] for row in heldout} == set(tested) and "pubmedqa:7" not in {row["id"] for row in train}
    assert counts["dropped: question occurs before"] == 1


def test_hub_rows_know_the_official_test_set_too(monkeypatch):
    content, tested = official_file()
    hub = [{**HUB[1], "pubid": int(pmid), "question": row["QUESTION"], "final_decision": row["final_decision"]}
           for pmid, row in content.items()]
    monkeypatch.setattr(pubmedqa, "read_hub", lambda name, config: [(f"row {i}", r) for i, r in enumerate(hub)])
    assert {row["id"] for row in pubmedqa.load_rows("hub", maybe=True)[1]} == set(tested)


def test_own_fields_and_system_prompt(tmp_path):
    path = write(tmp_path / "f.jsonl", "".join(json.dumps({"q": r["question"], "c": r["context"], "a": "YES"}) + "\n" for r in SINGLE))
    train, heldout, _ = pubmedqa.load_rows(path, question_field="q", context_field="c", answer_field="a", system_prompt="Be brief.")
    assert len(train) + len(heldout) == 40 and train[0]["ground_truth"] == "yes" and train[0]["prompt"][0]["content"] == "Be brief."


def test_duplicates_are_dropped_and_counted(tmp_path):
    twice = SINGLE + [{**SINGLE[1], "question": " does 1  HELP "}, {**SINGLE[1], "ground_truth": "no"}]
    train, heldout, dropped = pubmedqa.load_rows(write(tmp_path / "f.json", twice))
    assert len(train) + len(heldout) == 40
    assert dropped == {"dropped: question occurs before": 1, "dropped: question occurs before, with another answer": 1}


def test_builtin_questions_follow_their_rule():
    train, heldout, _ = pubmedqa.load_rows()
    questions = [{r["extra"]["question"] for r in side} for side in (train, heldout)]
    assert len(questions[0]) == len(train) and len(questions[1]) == len(heldout) and not questions[0] & questions[1]
    assert len(heldout) >= 1000
    for row in train + heldout:
        trial = row["extra"]["trial"]
        assert (row["ground_truth"] == "yes") == (trial["drug_rate"] < trial["control_rate"] and float(trial["p"]) < 0.05)
        text = row["prompt"][1]["content"]
        assert f"{trial['drug_rate']}%" in text and f"{trial['control_rate']}%" in text and f"p = {trial['p']}" in text
    careless = sum(pubmedqa.careless_label(r["extra"]["trial"]) == r["ground_truth"] for r in heldout) / len(heldout)
    assert 0.66 < careless < 0.74  # the honest gap that GRPO can close
    assert 0.45 < sum(r["ground_truth"] == "yes" for r in heldout) / len(heldout) < 0.55
    assert pubmedqa.load_rows()[0] == train  # the same for everybody


BAD = [
    ("no such file", None, ["no such file"]),
    ("broken", '[{"question": "a",\n "context": }]', ["line 2", "broken JSON"]),
    ("broken line", json.dumps(SINGLE[0]) + "\n{bad}\n", ["line 2", "broken JSON"]),
    ("empty file", " \n", ["is empty"]),
    ("empty list", [], ["no rows"]),
    ("a number", "3", ["list of rows"]),
    ("a list of texts", ["a"], ["row 0", "str"]),
    ("no context", SINGLE[:3] + [{"question": "a", "ground_truth": "yes"}], ["row 3", "`context`", "missing"]),
    ("empty question", [{**SINGLE[0], "question": " "}], ["row 0", "`question`", "empty"]),
    ("context no text", [{**SINGLE[0], "context": 3}], ["row 0", "`context`", "int"]),
    ("strange label", SINGLE[:2] + [{**SINGLE[2], "ground_truth": "perhaps"}], ["row 2", "'perhaps'", "yes, no, maybe"]),
    ("official, contexts no list", {"77": {**OFFICIAL["1001"], "CONTEXTS": "text"}}, ["key 77", "`CONTEXTS`"]),
    ("official, no decision", {"77": {k: v for k, v in OFFICIAL["1001"].items() if k != "final_decision"}}, ["key 77", "missing"]),
    ("not UTF-8", b"[\xff\xfe]", ["UTF-8"]),
    ("deep", "[" * 200_000, ["JSON"]),
    ("prepared, target missing", [{"id": "a", "data_source": "pubmedqa", "prompt": [], "ground_truth": "yes"}], ["row 0", "`target`"]),
]


@pytest.mark.parametrize("content, words", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_named_with_row_and_field(tmp_path, content, words):
    path = tmp_path / "file.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content)
    with pytest.raises(InputError) as error:
        pubmedqa.load_rows(str(path))
    assert all(word in str(error.value) for word in [*words, "file.json"])


def test_json_lines_may_hold_line_separators(tmp_path):
    path = write(tmp_path / "f.jsonl", '{"question": "a\u2028b"}\n\n{"question": "c"}\r\n')
    assert [where.rpartition(", ")[2] for where, _ in read_records(path)] == ["line 1", "line 3"]


def test_prepare_writes_rows_that_load_to_the_same_sides(tmp_path, capsys):
    path, out = write(tmp_path / "f.json", OFFICIAL), tmp_path / "out"
    prepare.main(prepare.Config(task="pubmedqa", data=path, out=str(out)))
    printed = capsys.readouterr().out
    assert "1 dropped: label maybe" in printed and "yes" in printed and "tokens" in printed
    direct, again = pubmedqa.load_rows(path), pubmedqa.load_rows(str(out))
    assert direct[:2] == again[:2]
    assert pubmedqa.load_rows(str(out / "heldout.jsonl"))[:2] == ([], direct[1])


def test_real_files(real_data):
    """Counts of the real files, counted here independently."""
    official = json.loads((real_data / "pubmedqa_ori_pqal_500.json").read_text())
    train, heldout, dropped = pubmedqa.load_rows(str(real_data / "pubmedqa_ori_pqal_500.json"))
    counts = Counter(r["final_decision"] for r in official.values())
    assert Counter(r["ground_truth"] for r in train + heldout) == {"yes": counts["yes"], "no": counts["no"]}
    assert dropped == {"dropped: label maybe (--maybe keeps it)": counts["maybe"]}
    single = pubmedqa.load_rows(str(real_data / "pubmedqa_yesno.json"))
    assert len(single[0]) + len(single[1]) == len(json.loads((real_data / "pubmedqa_yesno.json").read_text())) == 445
    assert {r["extra"]["question"] for r in single[1]} == {r["extra"]["question"] for r in heldout}  # one split for all files
