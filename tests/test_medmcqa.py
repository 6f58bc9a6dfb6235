"""MedMCQA: both numberings, what is dropped and mended, the split, the built-in facts."""
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from data import InputError, check_row, medmcqa

ROOT = Path(__file__).parents[1]


def record(i, cop=None, **fields):
    """One question in the hub's form, `cop` 0-3."""
    return {"id": f"id{i}", "question": f"Which drug treats disease {i}?", "opa": f"alpha {i}",
            "opb": f"beta {i}",
            "opc": f"gamma {i}", "opd": f"delta {i}", "cop": i % 4 if cop is None else cop,
            "exp": f"Trial zqx{i} showed it.",
            "subject_name": "Pharmacology", "topic_name": None, "choice_type": "single", **fields}


HUB = [record(i) for i in range(40)]


def from_one(records):
    """The same records as the original files number them, -1 included."""
    return [{**r, "cop": r["cop"] + (r["cop"] >= 0)} for r in records]


def write(path, records, lines=False):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records),
                    encoding="utf-8")
    return str(path)


def python(*arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True)


def load(tmp_path, records, **knobs):
    """(all rows, counts) of a file of records."""
    train, heldout, counts = medmcqa.load_rows(write(tmp_path / "f.json", records), **knobs)
    return train + heldout, counts


# === sources and numbering ==================================================================================


def test_both_numberings_give_the_same_rows(tmp_path):
    hub = medmcqa.load_rows(write(tmp_path / "hub.json", HUB))
    lines = medmcqa.load_rows(write(tmp_path / "lines.json", from_one(HUB), lines=True))
    assert hub == lines and hub[0] and hub[1] and not hub[2]
    raw = {f"medmcqa:{r['id']}": r for r in HUB}
    assert {row["id"] for row in hub[0] + hub[1]} == raw.keys()
    for row in hub[0] + hub[1]:
        check_row(row, "here")
        source = raw[row["id"]]
        assert row["extra"]["options"] == [source["op" + letter] for letter in "abcd"]
        assert row["data_source"] == "medmcqa"
        right = row["extra"]["options"]["ABCD".index(row["ground_truth"])]
        assert right == source["op" + "abcd"[source["cop"]]]
        listed = "".join(f"\n{letter}. {source['op' + letter.lower()]}" for letter in "ABCD")
        assert row["prompt"][1] == {"role": "user", "content": f"Question: {source['question']}\n{listed}"}
        assert source["exp"] in row["target"] and row["target"].endswith(
            f"<SOLUTION>{row['ground_truth']}</SOLUTION>")
        assert not any("zqx" in message["content"] for message in row["prompt"])  # no explanation in a prompt


def test_the_hub_is_read_through_datasets_and_its_validation_part_is_held_out(tmp_path, monkeypatch):
    import datasets
    for part, records in (("train", HUB[:30]), ("validation", HUB[30:])):
        datasets.Dataset.from_list(records).to_parquet(
            tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    train, heldout, _ = medmcqa.load_rows(f"hub:{tmp_path / 'set'}")
    assert [len(train), [r["id"] for r in heldout]] == [30, [f"medmcqa:id{i}" for i in range(30, 40)]]


def test_the_official_hub_set_counts_from_zero_whatever_its_values(monkeypatch):
    parts = {"train": [record(i, 1 + i % 3) for i in range(9)], "validation": [record(9, 2)]}
    monkeypatch.setattr(medmcqa, "read_hub", lambda name, config,
                        part: [(f"row {i}", r) for i, r in enumerate(parts[part])])
    train, heldout, _ = medmcqa.load_rows("hub")
    assert [r["ground_truth"] for r in train] == list("BCD" * 3) and heldout[0]["ground_truth"] == "C"
    with pytest.raises(InputError, match="--cop_base"):
        medmcqa.load_rows("hub:someone/else")


@pytest.mark.parametrize("base, letters", [("0", "BCD"), ("1", "ABC")])
def test_values_that_fit_both_numberings_need_cop_base(tmp_path, base, letters):
    records = [record(i, 1 + i % 3) for i in range(9)] + [record(9, -1)]
    with pytest.raises(InputError, match=r"--cop_base 0.*--cop_base 1"):
        load(tmp_path, records)
    rows, counts = load(tmp_path, records, cop_base=base)
    assert {r["id"]: r["ground_truth"] for r in rows} == {f"medmcqa:id{i}": letters[i % 3] for i in range(9)}
    assert counts == {"dropped: no label": 1}


@pytest.mark.parametrize("records, base, words", [
    ([record(0, 0), record(1, 4)], "auto", ["both 0 and 4", "joined"]),
    ([record(0, 0), record(1, 4)], "0", ["both 0 and 4"]),
    (HUB, "1", ["holds 0", "--cop_base 1"]),
    (from_one(HUB), "0", ["holds 4", "--cop_base 0"]),
    ([record(0), record(1, True)], "auto", ["row 1", "`cop`", "True"]),
    ([record(0), record(1, "1")], "auto", ["row 1", "`cop`", "'1'"]),
    ([record(0), record(1, 7)], "auto", ["row 1", "`cop`", "7"]),
    ([record(0), record(1, 1.0)], "0", ["row 1", "`cop`", "1.0"]),
    ([record(0), record(1, -2)], "0", ["row 1", "`cop`", "-2"]),
    ([record(0), {k: v for k, v in record(1).items() if k != "cop"}], "0", ["row 1", "`cop`", "None"]),
    ([record(0), record(1, opb=5)], "auto", ["row 1", "`opb`", "int"]),
    ([record(0), {k: v for k, v in record(1).items() if k != "opd"}], "auto", ["row 1", "`opd`", "missing"]),
    ([record(0), record(1, question=" ")], "auto", ["row 1", "`question`", "empty"]),
    ([record(0), record(1, exp=["a"])], "auto", ["row 1", "`exp`", "list"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "")
def test_what_cannot_be_a_numbering_or_a_field_is_refused(tmp_path, records, base, words):
    with pytest.raises(InputError) as error:
        load(tmp_path, records, cop_base=base)
    assert all(word in str(error.value) for word in [*words, "f.json"])


def naming(count, shift, named=None):
    """`count` records numbered from 1 up to 3, the first `named` of whose explanations name the option
    `shift` further on.
    """
    return [record(i, 1 + i % 3, exp=f"Ans. {'ABCD'[i % 3 + shift]}. It works." if i < (named or count)
                   else None)
            for i in range(count)]


def test_explanations_that_name_other_options_refute_the_numbering(tmp_path):
    assert Counter(r["ground_truth"]
                   for r in load(tmp_path, naming(12, 0), cop_base="1")[0]) == dict.fromkeys("ABC", 4)
    for records, base in ((naming(12, 0), "0"), (naming(12, 1), "1"), (naming(30, 1, named=10), "1")):
        with pytest.raises(InputError, match="explanations that name their option"):
            load(tmp_path, records, cop_base=base)
    assert len(load(tmp_path, naming(30, 1, named=9), cop_base="1")[0]) == 30  # nine are too few to tell
    misnamed = [{**r, "id": r["id"] + "x", "question": r["question"] + "x"} for r in naming(9, 1)]
    # no majority: the data's own mistakes
    assert len(load(tmp_path, naming(10, 0) + misnamed, cop_base="1")[0]) == 19


def test_own_fields_system_prompt_and_limit(tmp_path):
    own = [{"q": r["question"], "key": r["cop"], **{k: r[k] for k in ("opa", "opb", "opc", "opd")}}
           for r in HUB]
    rows, counts = load(tmp_path, own, question_field="q", answer_field="key", system_prompt="Be brief.")
    assert {r["id"]: r["ground_truth"] for r in rows} == {f"medmcqa:{i}": "ABCD"[i % 4] for i in range(40)}
    assert {r["prompt"][0]["content"] for r in rows} == {"Be brief."}
    assert counts == {"kept: no explanation, so no SFT target": 40}
    assert {r["id"] for r in load(tmp_path, HUB, limit=7)[0]} == {f"medmcqa:id{i}" for i in range(7)}


# === dropped, mended, split =================================================================================


def test_what_is_dropped_and_kept_is_counted(tmp_path):
    extra = [record(100, -1), record(101, -1), record(102, opc="  "), record(103, opc=" ALPHA  103."),
             record(104, exp=None),
             record(105, exp=" \n"), record(106, choice_type="multi"),
             record(107, choice_type="multi", opa=" x  y\t"),
             record(108, 1, exp="Ans. b. beta 108"), record(109, 1, exp="Ans-b. Beta 109It works."),
             {**HUB[3], "id": "again", "question": " which  DRUG treats disease 3", "opa": "delta 3",
              "opd": "alpha 3",
              "cop": 0},
             {**HUB[3], "id": "other", "cop": 1}]
    rows, counts = load(tmp_path, HUB + extra)
    assert counts == {"dropped: no label": 2, "dropped: an option is empty": 1,
                      "dropped: two options are the same": 1,
                      "dropped: occurs before": 1, "dropped: occurs before, with another answer": 1,
                      "kept: no explanation, so no SFT target": 3,
                      "kept: choice_type multi, one label all the same": 2,
                      "mended: explanation began by naming the option": 2}
    by_id = {r["id"].removeprefix("medmcqa:"): r for r in rows}
    assert by_id.keys() == {f"id{i}" for i in [*range(40), *range(104, 110)]}
    assert {i for i, r in by_id.items() if r["target"] == ""} == {"id104", "id105", "id108"}
    assert by_id["id107"]["extra"]["options"][0] == "x  y" and by_id["id107"]["extra"][
        "choice_type"] == "multi"
    assert by_id["id109"]["extra"]["explanation"] == "It works." and by_id["id109"]["extra"][
        "subject"] == "Pharmacology"


def test_a_question_has_one_side_with_whatever_options(tmp_path):
    again = [{**r, "id": "again" + r["id"], "question": r["question"].upper(), "opa": "new"} for r in HUB]
    train, heldout, counts = medmcqa.load_rows(write(tmp_path / "f.json", HUB + again))
    sides = [{r["extra"]["question"].lower() for r in side} for side in (train, heldout)]
    assert len(train) + len(heldout) == 80 and not counts
    assert not sides[0] & sides[1] and min(map(len, sides)) > 10
    alone = medmcqa.load_rows(write(tmp_path / "g.json", HUB[::2]))  # and whatever else stands in the file
    assert {r["id"] for r in alone[1]} == {r["id"]
                                           for r in heldout} & {f"medmcqa:id{i}" for i in range(0, 40, 2)}


def test_ids_that_repeat_do_not_move_questions_to_another_side(tmp_path):
    sides = [[{r["extra"]["question"] for r in side}
              for side in medmcqa.load_rows(write(tmp_path / "f.json", records))[:2]]
             for records in (HUB, [{**r, "id": "x"} for r in HUB])]
    assert sides[0] == sides[1]


def folder(tmp_path):
    """An original folder: 20 training questions, 10 others in dev, three of which are in train too, in
    another form.
    """
    leaked = [{**HUB[20], "id": "l0", "question": HUB[20]["question"].upper()},
              {**HUB[21], "id": "l1", "opa": "new"},
              {**HUB[22], "id": "l2", "question": "  Which  drug treats\ndisease 22 ?? "}]
    write(tmp_path / "set" / "train.json", from_one(HUB[:10] + leaked + HUB[10:20]), lines=True)
    write(tmp_path / "set" / "dev.json", from_one(HUB[20:30]), lines=True)
    return str(tmp_path / "set")


def test_dev_is_held_out_and_its_questions_never_trained_on(tmp_path):
    train, heldout, counts = medmcqa.load_rows(folder(tmp_path))
    assert [r["id"] for r in train] == [f"medmcqa:id{i}" for i in range(20)]
    assert [r["id"] for r in heldout] == [f"medmcqa:id{i}" for i in range(20, 30)]
    assert counts == {"dropped from training: the question is held out": 3}


def test_a_limit_lets_no_dev_question_into_training(tmp_path):
    write(tmp_path / "set" / "train.json", from_one([HUB[9], *HUB[:5]]), lines=True)
    write(tmp_path / "set" / "dev.json", from_one(HUB[6:10]), lines=True)
    train, heldout, _ = medmcqa.load_rows(str(tmp_path / "set"), limit=2)
    assert [r["id"] for r in heldout] == ["medmcqa:id6", "medmcqa:id7"]
    # 9 is held out in a run without the limit
    assert [r["id"] for r in train] == ["medmcqa:id0", "medmcqa:id1"]


# (explanation, right option, what is left)
CLEAN = [
    ("Ans-a. The pressure fallsGuyton says so.", "The pressure falls", "Guyton says so."),
    ("Ans. is 'c' i.e., It binds iron.", "Ferritin", "It binds iron."),
    ("Ans. is 'c' i.e., Ferritin (Ref: Harper)", "Ferritin", "(Ref: Harper)"),
    ("Answer- B. FluoxetineFluoxetine has the longest half-life.", "Fluoxetine",
     "Fluoxetine has the longest half-life."),
    ("Ans. BSolitary nodules are cold.", "Thyroid", "Solitary nodules are cold."),
    ("Ans: D", "Iron", ""),
    ("Ans. D. All", "All", ""),
    ("Answer: (B) Iron is lost.", "Zinc", "Iron is lost."),
    ("Answer- C (Mesentery)It tears first.", "Mesentery", "It tears first."),
    ("Correct answer: c) copper. It is bound.", "Copper", "It is bound."),
    ("Ans. a. HRCTIt shows clubbing.", "HRCT", "It shows clubbing."),
    ("Ans:- [A] It is so.", "Iron", "It is so."),
    ("ANSWER B: 5 daysThen it heals.", "5 days", "Then it heals."),
    ("Ans. c: \u03b2-carotene\u2014it is yellow.", "\u03b2-carotene", "\u2014it is yellow."),
    ("Ans. a. \u00c9tude \u2014 na\u00efve T cells.", "T cells", "\u00c9tude \u2014 na\u00efve T cells."),
    # the option's text only begins this word
    ("Ans- b. Reduced in liver failure.", "Red", "Reduced in liver failure."),
    ("Ans. b. 50 mg is usual.", "5", "50 mg is usual."),
    ("  Iron is bound.\n", "Iron", "Iron is bound."),
    ("Ans. all of the above", "All of the above", "Ans. all of the above"),
    ("Ans. both are seen", "Both", "Ans. both are seen"),
    ("Answering needs care: a trap.", "Iron", "Answering needs care: a trap."),
    ("Ansa cervicalis supplies them.", "Ansa", "Ansa cervicalis supplies them."),
    ("Options B and C are close.", "Iron", "Options B and C are close."),
    ("Iron. Ans. a", "Iron", "Iron. Ans. a"),
    ("", "Iron", ""),
    # an option that is discussed is not the answer that is named, and its sentence needs its subject
    ("Option A is wrong because it is slow.", "Iron", "Option A is wrong because it is slow."),
    ("Option A- Explains the carrier stage Option C- Refers to infectivity", "Iron",
     "Option A- Explains the carrier stage Option C- Refers to infectivity"),
    # words in capitals begin with A-D too
    ("Ans. DNA gyrase is inhibited.", "DNA gyrase", "Ans. DNA gyrase is inhibited."),
    ("Answer: CT scan is best.", "CT scan", "Answer: CT scan is best."),
    # marks between the letter and the option, as real rows have them
    ("Ans: D .Nicotinic receptors(Ref: Goodman)", "Nicotinic receptors", "(Ref: Goodman)"),
    ("Ans. B: Obstructed ductsBreast cancer spreads.", "Obstructed ducts.", "Breast cancer spreads."),
]


@pytest.mark.parametrize("explanation, answer, left", CLEAN, ids=[row[0][:40] for row in CLEAN])
def test_the_named_option_is_cut_from_an_explanation(explanation, answer, left):
    assert medmcqa.clean_explanation(explanation, answer) == left


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(["Ans", ". ", "-", "is ", "'", "(", ")", "B", "c", "i.e.", "Option",
                                           " ", "Iron"]),
                          st.text(max_size=5)), max_size=10))
def test_cleaning_only_cuts_at_the_front(pieces):
    text = "".join(pieces)
    assert text.strip().endswith(medmcqa.clean_explanation(text, "Iron"))


def test_cleaning_100_kb_is_fast():
    start = time.perf_counter()
    for text in ("Ans. a. " + "x" * 100_000, "Ans" + " " * 100_000 + "a", "(" * 100_000, " ." * 50_000 + "a",
                 "Ans. " * 20_000,
                 "option b" * 12_500, "Ans. a" + ".)" * 50_000):
        medmcqa.clean_explanation(text, "x" * 50_000)
    assert time.perf_counter() - start < 2  # quadratic: minutes


# === prepared rows ==========================================================================================


PREPARED = medmcqa.load_rows()[0][:3]
NO_OPTIONS = {k: v for k, v in PREPARED[1]["extra"].items() if k != "options"}


@pytest.mark.parametrize("second, words", [
    ({**PREPARED[1], "extra": NO_OPTIONS}, ["row 1", "`extra`", "`options`"]),
    ({**PREPARED[1], "extra": {**NO_OPTIONS, "options": ["a", "b", "c"]}}, ["row 1", "`options`", "four"]),
    ({**PREPARED[1], "extra": {**NO_OPTIONS, "options": ["a", "b", "c", 4]}}, ["row 1", "`options`"]),
    ({**PREPARED[1], "extra": {**NO_OPTIONS, "options": "abcd"}}, ["row 1", "`options`"]),
    ({**PREPARED[1], "ground_truth": "E"}, ["row 1", "ground truth", "'E'"]),
    ({**PREPARED[1], "ground_truth": "AB"}, ["row 1", "ground truth", "'AB'"]),
    ({**PREPARED[1], "ground_truth": ""}, ["row 1", "ground truth", "''"]),
    ({**PREPARED[1], "ground_truth": 1}, ["row 1", "`ground_truth`"]),
    ({**PREPARED[1], "target": None}, ["row 1", "`target`"]),
    ({**PREPARED[1], "prompt": []}, ["row 1", "`prompt`"]),
    (record(1), ["row 1", "`data_source`"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_broken_prepared_rows_are_named(tmp_path, second, words):
    with pytest.raises(InputError) as error:
        load(tmp_path, [PREPARED[0], second, PREPARED[2]])
    assert all(word in str(error.value) for word in [*words, "f.json"])


# === real rows ==============================================================================================


def same(text):
    return re.sub(r"\s+", " ", text).strip().lower().rstrip("?.!: ")


def test_real_rows_are_counted_and_labelled_as_an_independent_reader_does(real_data):
    path = real_data / "medmcqa_dev_2000.json"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen, kept, expected = {}, {}, Counter()
    for r in raw:
        options = [r["op" + letter].strip() for letter in "abcd"]
        key = same(r["question"]), tuple(sorted(map(same, options)))
        if not all(options):
            expected["dropped: an option is empty"] += 1
        elif len(set(map(same, options))) < 4:
            expected["dropped: two options are the same"] += 1
        elif key in seen:
            other = seen[key] != same(options[r["cop"] - 1])
            expected["dropped: occurs before" + ", with another answer" * other] += 1
        else:
            seen[key] = same(options[r["cop"] - 1])
            kept["medmcqa:" + r["id"]] = r
            expected["kept: choice_type multi, one label all the same"] += r["choice_type"] == "multi"
            only_named = re.fullmatch(rf"(?i)ans\w*\W+[a-d]\W*({re.escape(options[r['cop'] - 1])})?\W*",
                                      r["exp"] or "x")
            nothing = not (r["exp"] or "").strip()
            expected["kept: no explanation, so no SFT target"] += nothing or bool(only_named)
    train, heldout, counts = medmcqa.load_rows(str(path))
    rows = {row["id"]: row for row in train + heldout}
    assert len(rows) == len(train) + len(heldout) and rows.keys() == kept.keys()
    for id, row in rows.items():
        source, options = kept[id], row["extra"]["options"]
        assert options["ABCD".index(row["ground_truth"])] == source["op" + "abcd"[source["cop"] - 1]].strip()
        assert row["extra"]["question"] == source["question"].strip()
        assert row["extra"]["question"] in row["prompt"][1]["content"]
        assert (source["exp"] or "").strip().endswith(row["extra"]["explanation"])
        assert bool(row["target"]) == bool(row["extra"]["explanation"])
        score = rewards.compute_score("medmcqa", row["target"], row["ground_truth"], row["extra"])
        assert not row["target"] or score["accuracy"] == score["format_ok"] == 1
    mended = counts.pop("mended: explanation began by naming the option")
    assert counts == +expected and 0.4 < len(heldout) / len(rows) < 0.6
    named = [r for r in raw if re.match(r"(Ans|Answer)\W{1,3}[A-Da-d]\b\W", r["exp"] or "")]
    assert len(named) * 0.9 < mended < len(named) * 1.25
    left = [row["extra"]["explanation"] for row in rows.values()
            if re.match(r"(?i)ans\w*\W{1,3}[a-d]\b\W", row["extra"]["explanation"])]
    assert [text[:40] for text in left] == ["Ans: A is false & b, c, d are trueCPR te"]  # it judges an option


def test_the_prepare_command_writes_the_real_rows_and_they_load_again(real_data, tmp_path):
    path, out = str(real_data / "medmcqa_dev_2000.json"), tmp_path / "out"
    done = python("-m", "data.prepare", "medmcqa", path, "--out", str(out))
    assert done.returncode == 0, done.stderr
    train, heldout, counts = medmcqa.load_rows(path)
    assert f"train.jsonl: {len(train)} rows" in done.stdout
    assert f"heldout.jsonl: {len(heldout)} rows" in done.stdout
    assert all(f"{count} {reason}\n" in done.stdout for reason, count in counts.items()) and len(counts) >= 5
    again = medmcqa.load_rows(str(out))
    assert again[0] == train and again[1] == heldout
    assert {row["prompt"][0]["content"]
            for row in medmcqa.load_rows(str(out), system_prompt="Be brief.")[1]} == {"Be brief."}
    assert medmcqa.load_rows(str(out / "heldout.jsonl"))[:2] == ([], heldout)
    refused = python("-m", "data.prepare", "medmcqa", path, "--cop_base", "0", "--out", str(out))
    assert refused.returncode == 2 and "--cop_base 0" in refused.stderr and refused.stderr.count("\n") == 1


# === built-in facts =========================================================================================


def test_builtin_keys_and_values_are_unique_within_a_topic():
    facts = medmcqa.facts()
    assert len(facts) >= 150 and all(key and value for _, key, value in facts)
    for part in (1, 2):
        # so no wrong option can be right
        assert max(Counter((fact[0], fact[part].lower()) for fact in facts).values()) == 1


def test_builtin_items():
    train, heldout, counts = medmcqa.load_rows()
    meaning = defaultdict(set)  # question text: (topic, fact, direction, answer)
    for topic, key, value in medmcqa.facts():
        for forward, wordings in ((True, medmcqa.TOPICS[topic][2]), (False, medmcqa.TOPICS[topic][3])):
            for wording in wordings:
                text = wording.format(key=key, value=value)
                meaning[text[0].upper() + text[1:]].add((topic, key, forward, value if forward else key))
    assert max(map(len,
                   meaning.values())) == 1 and len(meaning) == len(train) / 5 + len(heldout) and not counts

    wrong = []
    for side in (train, heldout):
        letters = Counter(row["ground_truth"] for row in side)
        assert max(letters.values()) == min(letters.values()) and len(letters) == 4
        wrong.append(defaultdict(set))
        for row in side:
            check_row(row, "here")
            options = row["extra"]["options"]
            [(topic, key, forward, answer)] = meaning[row["extra"]["question"]]
            assert options["ABCD".index(row["ground_truth"])] == answer
            assert len({option.lower() for option in options}) == 4
            peers = {fact[2 if forward else 1] for fact in medmcqa.facts() if fact[0] == topic}
            assert set(options) <= peers
            wrong[-1][topic, key, forward] |= set(options) - {answer}
            careful = row["extra"]["annotator"] == "careful" or forward
            assert (row["extra"]["explanation"] in row["target"]) == careful
            assert not any(row["extra"]["explanation"] in message["content"] for message in row["prompt"])
    assert wrong[0].keys() == wrong[1].keys() and all(not wrong[0][fact] & wrong[1][fact]
                                                      for fact in wrong[0])

    # a row for each annotator
    items = Counter((row["extra"]["question"], tuple(row["extra"]["options"])) for row in train)
    assert set(items.values()) == {5} and len({row["id"] for row in train + heldout}) == len(train + heldout)
    assert not {row["extra"]["question"] for row in train} & {row["extra"]["question"] for row in heldout}


def test_builtin_targets_are_right_except_where_the_careless_annotator_takes_the_first():
    train, heldout, _ = medmcqa.load_rows()
    shares = [sum(row["extra"]["annotator"] == "careless" for row in side) / len(side)
              for side in (train, heldout)]
    assert shares == [0.6, 0]
    fooled = 0
    for row in train + heldout:
        score = rewards.compute_score("medmcqa", row["target"], row["ground_truth"], row["extra"])
        gave_up = "I do not recall" in row["target"]
        fooled += gave_up
        assert score["answer"] == ("A" if gave_up else row["ground_truth"]) and score["format_ok"] == 1
        assert not gave_up or row["extra"]["annotator"] == "careless"
    assert fooled == 0.3 * len(train)  # the careless three of five, on the half that asks the other way round


def test_builtin_rows_are_the_same_for_everybody_and_take_the_knobs():
    train, heldout, _ = medmcqa.load_rows()
    code = "from data import medmcqa; import json; print(json.dumps(medmcqa.load_rows()[:2]))"
    for seed in ("1", "2"):  # another process, another order of sets
        assert json.loads(python("-c", code, PYTHONHASHSEED=seed).stdout) == [train, heldout]
    some = medmcqa.load_rows(limit=5, system_prompt="Be brief.")
    assert [[r["id"] for r in side]
            for side in some[:2]] == [[r["id"] for r in side[:5]] for side in (train, heldout)]
    assert some[0][0]["prompt"][0]["content"] == "Be brief."
