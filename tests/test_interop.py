"""What other engines get from us, without them: verl's parquet, TRL's columns, the harness's task files."""
import importlib.util
import json
import subprocess
import sys

import jinja2
import pytest
import yaml
from conftest import ROOT
from datasets import load_dataset
from interop import MEDICAL_O1, attempts
from pyarrow import parquet

import rewards
from data import InputError, prepare

TASKS = ["pubmedqa", "medmcqa", "ecg", "medical_o1"]
FIELDS = {"data_source", "prompt", "ability", "reward_model", "extra_info"}
EXTRA = {"index", "split", "id", "question", "options", "explanation", "verdict", "subject"}


@pytest.fixture(scope="module", params=TASKS)
def prepared(request, tmp_path_factory):
    """(folder written by data.prepare --export verl, its rows of both sides) of a task."""
    folder, source = tmp_path_factory.mktemp(request.param), "builtin"
    if request.param == "medical_o1":  # has no built-in rows
        source = folder / "source.json"
        source.write_text(json.dumps(MEDICAL_O1))
    prepare.main(prepare.Config(task=request.param, data=str(source), out=str(folder / "rows"), limit=400,
                                export="verl"))
    sides = {side: [json.loads(line) for line in (folder / "rows" / f"{side}.jsonl").read_text().splitlines()]
             for side in ("train", "heldout")}
    assert len(sides["train"]) > 20 < len(sides["heldout"])
    return folder / "rows", sides


def score(module, row, text):
    """As verl's naive reward manager calls the function."""
    return module.compute_score(data_source=row["data_source"], solution_str=text,
                                ground_truth=row["reward_model"]["ground_truth"],
                                extra_info=row["extra_info"])


def test_parquet_has_verls_schema_and_all_rows(prepared):
    folder, sides = prepared
    tables = {split: parquet.read_table(folder / f"{split}.parquet") for split in ("train", "val")}
    assert tables["train"].schema == tables["val"].schema and set(tables["train"].column_names) == FIELDS
    for split, rows in (("train", sides["train"]), ("val", sides["heldout"])):
        read = tables[split].to_pylist()
        assert [r["prompt"] for r in read] == [row["prompt"] for row in rows]
        assert [r["reward_model"] for r in read] == [{"style": "rule", "ground_truth": row["ground_truth"]}
                                                     for row in rows]
        assert [r["data_source"] for r in read] == [row["data_source"] for row in rows]
        for i, (r, row) in enumerate(zip(read, rows)):
            assert set(r["extra_info"]) == EXTRA and (r["extra_info"]["index"],
                                                      r["extra_info"]["split"]) == (i, split)
            assert all(r["extra_info"][field] == row["extra"].get(field)
                       for field in EXTRA - {"index", "split", "id"})
    assert not {r["extra_info"]["question"]
                for r in tables["train"].to_pylist()} & {r["extra_info"]["question"]
                                                         for r in tables["val"].to_pylist()}


def test_all_tasks_share_one_schema(tmp_path):
    rows = [{"data_source": "x", "prompt": [{"role": "user", "content": "q"}], "ground_truth": "a",
             "id": "x:0", "extra": {"question": "q", **extra}}
            for extra in ({"options": ["a", "b"]}, {"verdict": "yes", "findings": [1]})]
    for i, row in enumerate(rows):
        prepare.export_verl([row], "train", tmp_path / f"{i}.parquet")
    one, two = (parquet.read_schema(tmp_path / f"{i}.parquet") for i in range(2))
    assert one == two  # or verl could not join them
    prepare.export_verl([], "val", tmp_path / "none.parquet")
    assert parquet.read_schema(tmp_path / "none.parquet") == one


def test_a_row_that_does_not_fit_is_one_line(tmp_path):
    row = {"data_source": "x", "prompt": [], "ground_truth": "a", "id": "x:0", "target": "",
           "extra": {"question": "q", "explanation": [3]}}
    with pytest.raises(InputError, match="--export verl: .*explanation.*another kind"):
        prepare.export_verl([row], "train", tmp_path / "f.parquet")


@pytest.mark.parametrize("reader", ["pyarrow", "pandas", "datasets"])
def test_scores_through_parquet_are_ours(prepared, reader, tmp_path, monkeypatch):
    """pandas gives lists as numpy arrays; the reward file is loaded by its path, as verl does."""
    folder, sides = prepared
    path = str(folder / "val.parquet")
    if reader == "pyarrow":
        read = parquet.read_table(path).to_pylist()
    elif reader == "pandas":
        read = parquet.read_table(path).to_pandas().to_dict("records")
    else:
        read = list(load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path)))
    spec = importlib.util.spec_from_file_location("custom_module", rewards.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = sides["heldout"]
    texts = attempts(rows)
    ours = [rewards.compute_score(row["data_source"], text, row["ground_truth"], row["extra"])
            for row, text in zip(rows, texts)]
    assert [score(module, row, text) for row, text in zip(read, texts)] == ours
    assert len({round(one["score"], 6) for one in ours}) > 3  # of several kinds
    assert all(one.keys() == ours[0].keys() for one in ours)  # verl makes a column of each key


def test_prepared_rows_are_trls_conversational_dataset(prepared, tmp_path):
    folder, sides = prepared
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train",
                        cache_dir=str(tmp_path))
    assert {"prompt", "ground_truth", "data_source", "extra"} <= set(rows.column_names)
    assert rows[0]["prompt"] == sides["train"][0]["prompt"]
    texts = attempts(sides["train"])
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    talked = rewards.trl_reward(prompts=rows["prompt"],
                                completions=[[{"role": "assistant", "content": text}] for text in texts],
                                completion_ids=None, trainer_state=None, **columns)
    plain = rewards.trl_reward(prompts=rows["prompt"], completions=texts, **columns)
    ours = [rewards.compute_score(row["data_source"], text, row["ground_truth"], row["extra"])["score"]
            for row, text in zip(sides["train"], texts)]
    assert talked == plain == ours and len(set(ours)) > 3
    # of a folder with both forms datasets takes the parquet
    both = load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert rewards.trl_reward(completions=texts,
                              **{name: both[name] for name in both.column_names if name != "prompt"}) == ours


ASKED = {  # by the harness's own tasks medmcqa and pubmedqa
    "medmcqa": "Question: {question}\nChoices:\n"
               "A. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}\nAnswer:",
    "pubmedqa": "Abstract: {context}\nQuestion: {question}\nAnswer:"}


@pytest.mark.parametrize("file", sorted((ROOT / "data" / "lm_eval").glob("*.yaml")),
                         ids=lambda file: file.stem)
def test_task_files_ask_of_prepared_rows_what_the_harness_and_eval_ask(file, tmp_path):
    task = file.stem.removesuffix("_prepared")
    prepare.main(prepare.Config(task=task, data="builtin", out=str(tmp_path), limit=40))
    row = json.loads((tmp_path / "heldout.jsonl").read_text().splitlines()[0])
    config = yaml.safe_load(file.read_text())
    data_files = {"test": f"data/processed/{task}/heldout.jsonl"}
    assert config["task"] == file.stem and config["dataset_kwargs"]["data_files"] == data_files
    assert row[config["doc_to_target"]] in config["doc_to_choice"]
    # the harness's own rules for templates
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(config["doc_to_text"]).render(**row)
    assert text == ASKED[task].format(**row["extra"])
    assert prepare.TASKS[task].harness_prompt(row) == (text, tuple(config["doc_to_choice"]))


def test_interop_says_what_it_needs(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "interop.py", "verl"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 2 and "pip install" in done.stderr and len(
        done.stderr.strip().splitlines()) == 1
