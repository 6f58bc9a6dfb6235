"""Downloads or converts a dataset into data/processed/ and says what is in it:

    python -m data.prepare pubmedqa                       the hub's labelled set
    python -m data.prepare pubmedqa my_rows.json          your own file
    python -m data.prepare pubmedqa builtin --out DIR     the built-in questions
    python -m data.prepare medmcqa FILE --cop_base 1      a file whose numbering of the options cannot be told
    python -m data.prepare ecg builtin --export verl      also for verl: train.parquet and val.parquet

writes DIR/train.jsonl and DIR/heldout.jsonl (a row a line, see data/__init__.py), which every --data flag
accepts as DIR. DIR is one state: it is written aside and takes the place of what an earlier call had made of
it, all at once.
"""
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tyro
from transformers import AutoTokenizer
from tyro.conf import Positional

from data import (
    TINY,
    InputError,
    check_knobs,
    check_out,
    ecg,
    hub_message,
    load_task,
    medical_o1,
    medmcqa,
    one_line_errors,
    pubmedqa,
    synced,
)

TASKS = {"pubmedqa": pubmedqa, "medmcqa": medmcqa, "ecg": ecg, "medical_o1": medical_o1}
OWN = ("train.jsonl", "heldout.jsonl", "train.parquet", "val.parquet")  # what this command writes


@dataclass
class Config:
    """Downloads or converts a dataset into rows of the collection."""

    task: Positional[Literal["pubmedqa", "medmcqa", "ecg", "medical_o1"]]  # which dataset
    data: Positional[str] = "hub"  # builtin, hub, hub:ORG/NAME[:CONFIG], or a file
    out: str = ""  # folder to write, or to replace (default: data/processed/TASK)
    maybe: bool = False  # PubMedQA: keep the third class
    # MedMCQA: the number of option A in `cop` (auto: told from the values)
    cop_base: Literal["auto", "0", "1"] = "auto"
    question_field: str = ""  # field of your own file that holds the question
    context_field: str = ""  # ... the context
    answer_field: str = ""  # ... the answer
    limit: int = 0  # read only so many rows (0 = all)
    tokenizer: str = "tiny"  # whose tokens to count: tiny, a model folder, or a hub id
    # also write train.parquet and val.parquet (the held-out rows) in verl's schema
    export: Literal["none", "verl"] = "none"


def verl_row(row, split, index):
    """A row in verl's schema (verl/utils/dataset/rl_dataset.py). extra_info holds what rewards.compute_score
    reads, always the same fields: files of one schema can be joined.
    """
    extra = {field: row["extra"].get(field)
             for field in ("question", "options", "explanation", "verdict", "subject")}
    return {"data_source": row["data_source"], "prompt": row["prompt"], "ability": "medicine",
            "reward_model": {"style": "rule", "ground_truth": row["ground_truth"]},
            "extra_info": {"index": index, "split": split, "id": row["id"], **extra}}


def export_verl(rows, split, path):
    """Writes rows as a parquet file for verl."""
    import pyarrow  # comes with datasets; a moment to import
    from pyarrow import parquet
    text = pyarrow.string()
    extra = {"index": pyarrow.int64(), "split": text, "id": text, "question": text,
             "options": pyarrow.list_(text),
             "explanation": text, "verdict": text, "subject": text}
    # written down, not guessed from the rows: a field that is empty in all of them keeps its type
    schema = pyarrow.schema({
        "data_source": text, "prompt": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
        "ability": text,
        "reward_model": pyarrow.struct({"style": text, "ground_truth": text}),
        "extra_info": pyarrow.struct(extra)})
    try:
        table = pyarrow.Table.from_pylist([verl_row(row, split, i) for i, row in enumerate(rows)],
                                          schema=schema)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise InputError(f"--export verl: a field of a row's `extra` ({', '.join(list(extra)[3:])}) is of "
                         f"another kind than text: {error}") from None
    parquet.write_table(table, path)


def check_place(folder, source):
    """Raises InputError where `folder` is the source, holds it or lies in it, or holds what is not this
    command's.
    """
    place, read = folder.resolve(), Path(source.removeprefix("hub:")).resolve()
    overlap = place == read or place in read.parents or read in place.parents
    if source not in ("builtin", "hub") and read.exists() and overlap:
        raise InputError(f"--out {folder} would be written over its own source {source}: take another folder")
    check_out(folder, OWN)
    others = sorted(path.name for path in folder.iterdir() if path.name not in OWN) if folder.exists() else []
    why = f"holds other things ({others[0]})" if others else "is the working folder"
    if others or place == Path.cwd() or place in Path.cwd().parents:
        raise InputError(f"--out {folder} {why}, and it is replaced as a whole: take a folder of its own")


def write(folder, train, heldout, verl):
    """Replaces `folder` by one with these rows: whenever this fails or is killed, it is the old one or the
    new one.

    For a moment between two renames it is neither; the old one is beside it then, as .NAME.old. Raises
    OSError or InputError.
    """
    place = folder.resolve()
    new, old = (place.with_name(f".{place.name}.{age}") for age in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)  # of a call that was killed
    if old.exists() and not place.exists():  # of one that was killed between the two renames
        old.rename(place)
    try:
        new.mkdir(parents=True)
        for side, rows in (("train", train), ("heldout", heldout)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (new / f"{side}.jsonl").write_text(text, encoding="utf-8")
        if verl:
            export_verl(train, "train", new / "train.parquet")
            export_verl(heldout, "val", new / "val.parquet")
        for path in new.iterdir():  # a full disk may only say so now
            synced(path)
        there = place.exists()
        if there:
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        try:
            new.rename(place)
        except OSError:
            if there:
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(config):
    """Writes train.jsonl and heldout.jsonl (and parquet files where asked for), and prints what they hold.
    Raises InputError.
    """
    check_knobs(config)
    folder = Path(config.out or f"data/processed/{config.task}")
    check_place(folder, config.data)
    train, heldout, counts = load_task(TASKS[config.task], config)
    name = TINY if config.tokenizer == "tiny" else config.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # many types, one thing to the user: no tokenizer
        raise InputError(hub_message(f"tokenizer {name}", error, "--tokenizer tiny")) from error
    replaced = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    try:
        write(folder, train, heldout, config.export == "verl")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {folder}: cannot be written ({reason}); it is as it was") from None
    if replaced:
        print(f"{folder}: replaced what was there ({', '.join(replaced)})")
    for side, rows in (("train", train), ("heldout", heldout)):
        classes = Counter(row["ground_truth"] for row in rows)
        balance = ", ".join(f"{label} {count} ({count / len(rows):.1%})"
                            for label, count in classes.most_common())
        balance = balance if len(classes) < 10 else "free-text answers"
        lengths = sorted(len(tokenizer("\n".join(m["content"] for m in row["prompt"])).input_ids)
                         for row in rows) or [0]
        print(f"{folder}/{side}.jsonl: {len(rows)} rows; {balance}; prompts of {lengths[0]} to {lengths[-1]} "
              f"tokens ({config.tokenizer}), median {lengths[len(lengths) // 2]}")
    if config.export == "verl":
        print(f"{folder}/train.parquet, val.parquet: the same rows for verl")
    for reason, count in counts.items():
        print(f"{count} {reason}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Config, use_underscores=True, description=__doc__))
