"""Sources, rows, splits: real formats in, the same plain rows out."""
import errno
import json
import os
import resource
from collections import Counter
from pathlib import Path

import pytest
from interop import MEDICAL_O1

from data import (
    InputError,
    check_row,
    ecg,
    medical_o1,
    medmcqa,
    one_line_errors,
    prepare,
    pubmedqa,
    read_records,
)

SINGLE = [{"question": f"Does {i} help?", "context": f"It did {i}.", "ground_truth": "yes" if i % 3 else "no"}
          for i in range(40)]
OFFICIAL = {str(1000 + i): {"QUESTION": r["question"], "CONTEXTS": [r["context"], "More."],
                            "LABELS": ["A", "B"], "MESHES": [],
                            "YEAR": "2001", "reasoning_required_pred": "yes", "reasoning_free_pred": "no",
                            "final_decision": r["ground_truth"] if i else "maybe", "LONG_ANSWER": "Because."}
            for i, r in enumerate(SINGLE)}
HUB = [{"pubid": 1000 + i, "question": r["question"],
        "context": {"contexts": [r["context"], "More."], "labels": ["A"], "meshes": []},
        "long_answer": "Because.", "final_decision": r["ground_truth"] if i else "maybe"}
       for i, r in enumerate(SINGLE)]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_three_forms_give_the_same_questions_on_the_same_sides(tmp_path, monkeypatch):
    single = pubmedqa.load_rows(write(tmp_path / "single.json", SINGLE))
    official = pubmedqa.load_rows(write(tmp_path / "official.json", OFFICIAL))
    monkeypatch.setattr(pubmedqa, "read_hub", lambda name,
                        config: [(f"row {i}", r) for i, r in enumerate(HUB)])
    hub = pubmedqa.load_rows("hub")
    for train, heldout, dropped in (official, hub):
        assert [r["extra"]["question"] for r in heldout] == [r["extra"]["question"] for r in single[1]
                                                             if r["extra"]["question"] != "Does 0 help?"]
        assert dropped == {"dropped: label maybe (--maybe keeps it)": 1}
        assert all("It did" in r["prompt"][1]["content"] and "More." in r["prompt"][1]["content"]
                   for r in train + heldout)
        assert all("Because." in r["target"] for r in train + heldout)
    assert {r["id"] for r in official[0]} == {r["id"] for r in hub[0]}
    for row in single[0] + official[0] + hub[0]:
        check_row(row, "here")


def test_the_hub_form_is_read_through_datasets(tmp_path, monkeypatch):
    """The real load_dataset on a local dataset folder in the hub's file format (parquet), nested context and
    all.
    """
    import datasets
    datasets.Dataset.from_list(HUB).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    train, heldout, _ = pubmedqa.load_rows(f"hub:{tmp_path / 'set'}")
    assert len(train) + len(heldout) == 39 and train[0]["id"].startswith("pubmedqa:10")


def test_maybe_is_a_knob(tmp_path):
    path = write(tmp_path / "f.json", OFFICIAL)
    rows = sum(pubmedqa.load_rows(path, maybe=True)[:2], [])
    assert Counter(r["ground_truth"]
                   for r in rows)["maybe"] == 1 and "yes, no or maybe" in rows[0]["prompt"][0]["content"]
    with pytest.raises(InputError, match="yes/no only"):
        pubmedqa.load_rows("builtin", maybe=True)


def official_file(n_others=500):
    """A file in the official form: the 500 test PMIDs with the real label counts, and as many other rows."""
    pmids = json.loads((Path(pubmedqa.__file__).parent / "pubmedqa_test_pmids.json").read_text())
    labels = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55
    rows = {}
    for i in range(n_others):
        rows[str(100 + i)] = {**OFFICIAL["1001"], "QUESTION": f"Does other {i} help?",
                              "final_decision": labels[i]}
        rows[str(pmids[i])] = {**OFFICIAL["1001"], "QUESTION": f"Does tested {i} help?",
                               "final_decision": labels[i]}
    return rows, {f"pubmedqa:{pmid}": label for pmid, label in zip(pmids, labels)}


@pytest.mark.parametrize("maybe", [False, True])
def test_the_official_test_questions_are_held_out_and_nothing_else(tmp_path, maybe):
    content, tested = official_file()
    train, heldout, counts = pubmedqa.load_rows(write(tmp_path / "ori_pqal.json", content), maybe=maybe)
    wanted = {row_id for row_id, label in tested.items() if maybe or label != "maybe"}
    assert {row["id"] for row in heldout} == wanted
    assert len(train) == len(heldout) == (500 if maybe else 445)
    assert counts["held out: questions of the official test set"] == len(heldout)
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
    hub = [{**HUB[1], "pubid": int(pmid), "question": row["QUESTION"],
            "final_decision": row["final_decision"]}
           for pmid, row in content.items()]
    monkeypatch.setattr(pubmedqa, "read_hub", lambda name,
                        config: [(f"row {i}", r) for i, r in enumerate(hub)])
    assert {row["id"] for row in pubmedqa.load_rows("hub", maybe=True)[1]} == set(tested)


def test_own_fields_and_system_prompt(tmp_path):
    path = write(tmp_path / "f.jsonl",
                 "".join(json.dumps({"q": r["question"], "c": r["context"], "a": "YES"}) + "\n"
                         for r in SINGLE))
    train, heldout, _ = pubmedqa.load_rows(path, question_field="q", context_field="c", answer_field="a",
                                           system_prompt="Be brief.")
    assert len(train) + len(heldout) == 40 and train[0]["ground_truth"] == "yes" and train[0]["prompt"][0][
        "content"] == "Be brief."


def test_duplicates_are_dropped_and_counted(tmp_path):
    twice = SINGLE + [{**SINGLE[1], "question": " does 1  HELP "}, {**SINGLE[1], "ground_truth": "no"}]
    train, heldout, dropped = pubmedqa.load_rows(write(tmp_path / "f.json", twice))
    assert len(train) + len(heldout) == 40
    assert dropped == {"dropped: question occurs before": 1,
                       "dropped: question occurs before, with another answer": 1}


def test_builtin_questions_follow_their_rule():
    train, heldout, _ = pubmedqa.load_rows()
    questions = [{r["extra"]["question"] for r in side} for side in (train, heldout)]
    assert len(questions[0]) == len(train) and len(questions[1]) == len(heldout) and not questions[
        0] & questions[1]
    assert len(heldout) >= 1000
    for row in train + heldout:
        trial = row["extra"]["trial"]
        assert (row["ground_truth"] == "yes") == (trial["drug_rate"] < trial["control_rate"]
                                                  and float(trial["p"]) < 0.05)
        text = row["prompt"][1]["content"]
        assert f"{trial['drug_rate']}%" in text and f"{trial['control_rate']}%" in text
        assert f"p = {trial['p']}" in text
    careless = sum(pubmedqa.careless_label(r["extra"]["trial"]) == r["ground_truth"]
                   for r in heldout) / len(heldout)
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
    ("no context", SINGLE[:3] + [{"question": "a", "ground_truth": "yes"}],
     ["row 3", "`context`", "missing"]),
    ("empty question", [{**SINGLE[0], "question": " "}], ["row 0", "`question`", "empty"]),
    ("context no text", [{**SINGLE[0], "context": 3}], ["row 0", "`context`", "int"]),
    ("strange label", SINGLE[:2] + [{**SINGLE[2], "ground_truth": "perhaps"}],
     ["row 2", "'perhaps'", "yes, no, maybe"]),
    ("official, contexts no list", {"77": {**OFFICIAL["1001"], "CONTEXTS": "text"}},
     ["key 77", "`CONTEXTS`"]),
    ("official, no decision", {"77": {k: v for k, v in OFFICIAL["1001"].items() if k != "final_decision"}},
     ["key 77", "missing"]),
    ("not UTF-8", b"[\xff\xfe]", ["UTF-8"]),
    ("deep", "[" * 200_000, ["JSON"]),
    ("prepared, target missing",
     [{"id": "a", "data_source": "pubmedqa", "prompt": [], "ground_truth": "yes"}], ["row 0", "`target`"]),
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
    assert len(single[0]) + len(single[1]) == len(
        json.loads((real_data / "pubmedqa_yesno.json").read_text())) == 445
    # one split for all files
    assert {r["extra"]["question"] for r in single[1]} == {r["extra"]["question"] for r in heldout}


# === prepared folders =======================================================================================

MODULES = {"pubmedqa": pubmedqa, "medmcqa": medmcqa, "ecg": ecg, "medical_o1": medical_o1}
modules = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def source(module, tmp_path):
    return write(tmp_path / "source.json", MEDICAL_O1) if module is medical_o1 else "builtin"


def write_sides(folder, train, heldout):
    folder.mkdir(exist_ok=True)
    for side, rows in (("train", train), ("heldout", heldout)):
        write(folder / f"{side}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def some_rows(module, tmp_path, n=60):
    """Rows of a task, of both of its own sides, mixed."""
    train, heldout, _ = module.load_rows(source(module, tmp_path))
    return [row for pair in zip(train, heldout) for row in pair][:n]


@modules
def test_a_prepared_folder_is_used_as_it_is_split(module, tmp_path):
    rows = some_rows(module, tmp_path)
    folder = write_sides(tmp_path / "p", rows[:50], rows[50:])
    assert module.load_rows(folder)[:2] == (rows[:50], rows[50:])
    assert module.load_rows(folder, limit=7)[:2] == (rows[:7], rows[50:57])  # of each side
    own = module.load_rows(folder, system_prompt="Be brief.")[1]
    assert {row["prompt"][0]["content"] for row in own} == {"Be brief."}


@modules
def test_one_side_of_a_prepared_folder_may_be_empty(module, tmp_path):
    rows = some_rows(module, tmp_path, 6)
    assert module.load_rows(write_sides(tmp_path / "a", [], rows))[:2] == ([], rows)
    assert module.load_rows(write_sides(tmp_path / "b", rows, []))[:2] == (rows, [])
    with pytest.raises(InputError, match="holds no rows"):
        module.load_rows(write_sides(tmp_path / "c", [], []))
    os.remove(tmp_path / "b" / "heldout.jsonl")
    with pytest.raises(InputError, match=r"heldout\.jsonl: no such file"):
        module.load_rows(str(tmp_path / "b"))


@modules
def test_a_question_on_both_sides_is_refused(module, tmp_path):
    rows = some_rows(module, tmp_path)
    twin = json.loads(json.dumps(rows[3]))
    twin["extra"]["question"] = twin["extra"]["question"].upper() + " ?"
    twin["id"] += "-again"
    with pytest.raises(InputError) as error:
        module.load_rows(write_sides(tmp_path / "p", rows[:20], [*rows[20:30], twin]))
    assert "train.jsonl, line 4" in str(error.value) and "heldout.jsonl, line 11" in str(error.value)
    with pytest.raises(InputError, match="is held out too"):  # --limit does not hide it
        module.load_rows(str(tmp_path / "p"), limit=2)


def test_duplicates_within_a_side_are_counted_as_before(tmp_path):
    rows = some_rows(pubmedqa, tmp_path)
    other = {**rows[0], "ground_truth": "no" if rows[0]["ground_truth"] == "yes" else "yes"}
    train, heldout, counts = pubmedqa.load_rows(
        write_sides(tmp_path / "p", [*rows[:20], other], [*rows[20:30], rows[20]])
    )
    assert (train, heldout) == (rows[:20], rows[20:30])
    assert counts == {
        "dropped: question occurs before": 1,
        "dropped: question occurs before, with another answer": 1,
    }
    items = some_rows(medmcqa, tmp_path)
    train = medmcqa.load_rows(
        write_sides(tmp_path / "m", [*items[:9], {**items[0], "target": "other"}], items[9:20])
    )[0]
    assert len(train) == 10  # of prepared items there may be several targets


def test_two_raw_files_are_used_as_they_are_split_too(tmp_path):
    train, heldout, counts = pubmedqa.load_rows(write_sides(tmp_path / "p", SINGLE[:30], SINGLE[30:]))
    assert [len(train), len(heldout)] == [30, 10] and not counts
    assert len({row["id"] for row in train + heldout}) == 40
    ecgs = [{"Q": f"What is sign {i}?", "A": f"It is {i}."} for i in range(12)]
    assert [len(side) for side in ecg.load_rows(write_sides(tmp_path / "e", ecgs[:10], ecgs[10:]))[:2]] == [
        10,
        2,
    ]


def test_a_prepared_folder_deep_in_a_cloned_one_is_not_split_anew(tmp_path):
    rows = some_rows(ecg, tmp_path)
    (tmp_path / "clone").mkdir()
    write_sides(tmp_path / "clone" / "p", rows[:30], rows[30:])
    with pytest.raises(InputError, match=r"split already, in .*clone/p: name that folder"):
        ecg.load_rows(str(tmp_path / "clone"))


def test_the_recipe_of_the_readme_keeps_its_166_and_34_rows(tmp_path):
    """make_row and a split of one's own, as README's worked example has it."""
    from data import split_by_question

    rows = [
        pubmedqa.make_row(str(i), f"Does drug {i} help?", "It did.", "yes", "It did.") for i in range(200)
    ]
    train, heldout = split_by_question(rows, seed=0, heldout_fraction=0.2)
    assert len(heldout) < 60
    assert pubmedqa.load_rows(write_sides(tmp_path / "p", train, heldout))[:2] == (train, heldout)


@modules
def test_rows_of_another_task_are_refused_by_data_source(module, tmp_path):
    for other in MODULES.values():
        if other is not module:
            rows = some_rows(other, tmp_path, 20)
            file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            for data in (file, write_sides(tmp_path / "p", rows[:10], rows[10:])):
                with pytest.raises(InputError) as error:
                    module.load_rows(data)
                assert all(
                    word in str(error.value) for word in ("line 1", "`data_source`", rows[0]["data_source"])
                )


# === what a loader may meet =================================================================================


@pytest.mark.parametrize(
    "text", ['[{"question": "a"},\n {"question": %s}]', '{"question": "a"}\n{"question": %s}\n']
)
def test_a_number_of_5000_digits_is_one_line(tmp_path, text):
    path = write(tmp_path / "f.json", text % ("9" * 5000))
    with pytest.raises(InputError, match=r"f\.json, line 2: a number of 5,000 digits"):
        read_records(path)


@modules
@pytest.mark.parametrize("field", ["disease", "subject", "explanation", "verdict"])
def test_a_text_of_extra_that_is_none_is_named(module, field, tmp_path):
    rows = some_rows(module, tmp_path, 20)
    rows[2]["extra"][field] = [3]
    for data in (write(tmp_path / "f.json", rows), write_sides(tmp_path / "p", rows[:10], rows[10:])):
        with pytest.raises(InputError) as error:
            module.load_rows(data)
        assert f"`extra`, field `{field}`: list where text is needed" in str(error.value)
        assert "row 2" in str(error.value) or "line 3" in str(error.value)
    raw = write(tmp_path / "raw.json", [{"Disease": 7, "Q": "What?", "A": "That."}])
    with pytest.raises(InputError, match="row 0, field `Disease`: int where text is needed"):
        ecg.load_rows(raw)


def test_genuine_chinese_rows_are_kept_as_they_are(tmp_path):
    pairs = [("心电图显示QRS波增宽,这说明什么?", f"左束支传导阻滞, {i} ms") for i in range(40)]
    rows = [{"Q": f"{i}: {question}", "A": answer} for i, (question, answer) in enumerate(pairs)]
    rows += [{"Q": f"What is sign {i} (心电图)?", "A": f"It is {i}."} for i in range(10)]
    train, heldout, counts = ecg.load_rows(write(tmp_path / "f.json", rows))
    assert len(train) + len(heldout) == 50 and not counts
    assert {(row["extra"]["question"], row["ground_truth"]) for row in train + heldout} == {
        (r["Q"], r["A"]) for r in rows
    }
    assert ecg.repaired("the patient鈥檚 axis is -45掳") == "the patient’s axis is -45°"
    assert ecg.repaired("R 鈮7 mm") is None and ecg.repaired("it is 5鈥") is None


# === data.prepare: one state ================================================================================


def prepared(*arguments, code=0):
    """data.prepare's main in this process."""
    with pytest.raises(SystemExit) as end:
        with one_line_errors():
            prepare.main(
                prepare.tyro.cli(prepare.Config, args=list(map(str, arguments)), use_underscores=True)
            )
        raise SystemExit(0)
    assert end.value.code == code


def state(folder):
    """{name: bytes} of a folder, and that nothing lies beside it."""
    assert not list(folder.parent.glob(".*"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_does_not_overwrite_its_own_source(tmp_path, capsys):
    so = tmp_path / "so"
    prepared("pubmedqa", "builtin", "--limit", 120, "--out", so)
    whole = state(so)
    (tmp_path / "link").symlink_to(so)
    for data, out in (
        (so, so),
        (so / "train.jsonl", so),
        (so, tmp_path / "link"),
        (so, so / "again"),
        (tmp_path, so),
    ):
        capsys.readouterr()
        prepared("pubmedqa", data, "--limit", 5, "--out", out, code=2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "its own source" in error, error
        assert state(so) == whole


def test_prepare_replaces_a_folder_as_one_state_and_says_so(tmp_path, capsys):
    so = tmp_path / "so"
    prepared("pubmedqa", "builtin", "--limit", 60, "--out", so, "--export", "verl")
    assert set(state(so)) == set(prepare.OWN) and "replaced" not in capsys.readouterr().out
    prepared("pubmedqa", "builtin", "--limit", 80, "--out", so)
    assert set(state(so)) == {"train.jsonl", "heldout.jsonl"}  # no old parquet, which TRL's loader would read
    assert (
        "replaced what was there (heldout.jsonl, train.jsonl, train.parquet, val.parquet)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("notes.txt", "other things (notes.txt)"),
        ("config.json", "another run"),
        ("summary.json", "another result"),
        ("model.safetensors", "a model"),
        ("checkpoint", "another run"),
    ],
)
def test_prepare_refuses_a_folder_that_holds_other_things(tmp_path, capsys, name, words):
    (tmp_path / "so").mkdir()
    (tmp_path / "so" / name).write_text("mine")
    prepared("pubmedqa", "builtin", "--limit", 60, "--out", tmp_path / "so", code=2)
    assert words in capsys.readouterr().err and state(tmp_path / "so") == {name: b"mine"}


def test_prepare_refuses_a_file_and_the_working_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out, words in ((tmp_path / "file", "is a file"), (".", "the working folder")):
        prepared("pubmedqa", "builtin", "--limit", 60, "--out", out, code=2)
        assert words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("when", ["first file", "second file", "parquet", "sync", "rename"])
def test_a_full_disk_leaves_the_old_state_whole(tmp_path, capsys, monkeypatch, when):
    so, calls = tmp_path / "so", []
    prepared("pubmedqa", "builtin", "--limit", 60, "--out", so, "--export", "verl")
    whole = state(so)

    def full(usual, on):
        def function(*arguments, **options):
            calls.append(1)
            if len(calls) == on:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(*arguments, **options)

        return function

    name, place = {"parquet": ("export_verl", prepare), "sync": ("fsync", os)}.get(when, ("write_text", Path))
    name = "rename" if when == "rename" else name
    monkeypatch.setattr(place, name, full(getattr(place, name), {"second file": 2, "rename": 2}.get(when, 1)))
    capsys.readouterr()
    prepared("pubmedqa", "builtin", "--limit", 80, "--out", so, "--export", "verl", code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "it is as it was" in error, error
    assert calls and state(so) == whole


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path, capsys):
    """A real write that ends half-way: the limit of a file's size stands for the disk's."""
    so = tmp_path / "so"
    prepared("pubmedqa", "builtin", "--limit", 60, "--out", so)
    whole, limits = state(so), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        prepared("pubmedqa", "builtin", "--limit", 80, "--out", so, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in capsys.readouterr().err and state(so) == whole


def test_prepare_killed_between_its_two_renames(tmp_path, monkeypatch):
    so, usual = tmp_path / "so", Path.rename
    prepared("pubmedqa", "builtin", "--limit", 60, "--out", so)
    whole = state(so)

    def killed(path, target):
        if path.name == ".so.new":
            raise KeyboardInterrupt
        return usual(path, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "rename", killed)
        prepared("pubmedqa", "builtin", "--limit", 80, "--out", so, code=130)
    assert not so.exists() and (tmp_path / ".so.old").exists()
    with monkeypatch.context() as context:  # the next call fails: the old state is back
        context.setattr(Path, "write_text", lambda *a, **k: os.close(-1))
        prepared("pubmedqa", "builtin", "--limit", 80, "--out", so, code=2)
    assert state(so) == whole
    prepared("pubmedqa", "builtin", "--limit", 80, "--out", so)
    assert state(so) != whole
