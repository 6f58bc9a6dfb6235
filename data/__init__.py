"""Datasets of the collection: one module each, and what all of them need to read and split a source.

Every module turns its source into the same plain row, which is all that training and evaluation read:

    {"id": str, "data_source": str,
     "prompt": [{"role": "system", "content": str}, {"role": "user", "content": str}],
     "ground_truth": str,      # what the reward compares with
     "target": str,            # a gold completion for SFT, "" where there is none
     "extra": {"question": str, ...}}
"""
import hashlib
import inspect
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

TINY = Path(__file__).parent / "tiny"  # the built-in model and its tokenizer
SPLIT_SEED = 0  # a constant: every run of every dataset holds out the same questions
ROW_FIELDS = {"id": str, "data_source": str, "prompt": list, "ground_truth": str, "target": str,
              "extra": dict}
EXTRA_TEXTS = ("disease", "subject", "explanation", "verdict", "choice_type")  # in `extra`: text, or missing
WRITTEN = {  # by a command of ours into its folder: what it is then
    "summary.json": "another result", "eval.jsonl": "another result", "results.jsonl": "another result",
    "report.html": "another result", "config.json": "another run, or a model", "metrics.jsonl": "another run",
    "checkpoint": "another run", "eval_before.jsonl": "another run", "state.pt": "a checkpoint",
    "adapter_config.json": "an adapter", "tokenizer_config.json": "a tokenizer",
    "model.safetensors": "a model",
    "train.jsonl": "prepared rows", "heldout.jsonl": "prepared rows", "train.parquet": "prepared rows",
    "val.parquet": "prepared rows"}


# What a number among the knobs may be, (least, most), by the knob's name, which means the same in all
# commands. A new knob needs its place here (tests/test_knobs.py). The upper ends lie beyond any use.
RANGES = {
    # model
    "lora_r": (1, 4096),
    "lora_alpha": (1, 10**6),
    # data
    "limit": (0, 10**9),
    "max_prompt_length": (1, 2**20),
    "max_seq_length": (1, 2**20),
    "max_length": (1, 2**20),
    # rollout
    "steps": (1, 10**9),
    "prompts_per_step": (1, 10**5),
    "group_size": (2, 10**4),
    "max_completion_length": (1, 2**20),
    "temperature": (0.01, 100),
    "resample_zero_std": (0, 1000),
    "samples": (0, 10**4),
    # reward
    "correct_weight": (0, 1000),
    "similarity_weight": (0, 1000),
    "tag_weight": (0, 1000),
    "weights": (1e-6, 1000),
    "learned_weight": (0, 1000),
    # loss
    "mu": (1, 1000),
    "beta": (0, 100),
    "ref_every": (0, 10**9),
    "epsilon": (0, 1000),
    "epsilon_high": (0, 10**6),
    "importance_cap": (0, 10**6),
    # optimiser
    "num_epochs": (1, 10**6),
    "batch_size": (1, 10**6),
    "gradient_accumulation_steps": (1, 10**6),
    "learning_rate": (1e-12, 10),
    "warmup": (0, 1),
    "max_grad_norm": (1e-6, 1e9),
    "completions_per_forward": (0, 10**4),
    # evaluation
    "eval_size": (1, 10**9),
    "eval_every": (0, 10**9),
    "eval_batch_size": (1, 10**5),
    # run
    "save_every": (0, 10**9),
    "seed": (0, 2**63 - 1),
    # the built-in model (data/tiny.py)
    "hidden": (8, 4096),
    "layers": (1, 100),
}


class InputError(Exception):
    """Bad input from the user: the message is one line that says what is wrong, where, and what to do."""


def check_knobs(config, *or_zero):
    """Raises InputError for a number among a command's knobs that RANGES rules out, as NaN and infinity are.

    config: a dataclass or another object with knobs as attributes; of a dict of numbers each is looked at.
    or_zero: names of knobs that may be 0 as well, which turns them off or means all.
    """
    for name, given in vars(config).items():
        for key, value in given.items() if isinstance(given, dict) else [("", given)]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least, most = RANGES[name]
            if not (least <= value <= most or value == 0 and name in or_zero):
                knob = f"--{name} {key} {value}" if key else f"--{name} {value}"
                zero = ", or 0" if name in or_zero else ""
                raise InputError(f"{knob}: at least {least:,} and at most {most:,} is needed{zero}")


@contextmanager
def one_line_errors():
    """Around a script's main: an InputError, a path that the system refuses, a full disk or memory running
    out is printed as one line and ends the process with exit code 2, Ctrl-C with 130, a closed pipe with 141.
    Whatever else is raised is a bug and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who read the output, `head` say, has left; as if SIGPIPE had ended the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(141)
    except Exception as error:
        text = str(error)
        if "No space left on device" in text or "os error 28" in text:  # the latter is safetensors'
            text = f"the disk is full ({text}): make room; what was saved before is whole"
        elif out_of_memory(error) and not isinstance(error, InputError):
            text = f"out of memory ({text[:200]}): take a smaller --model or smaller batches"
        elif isinstance(error, OSError) and error.filename is not None:  # a name too long, say, or no access
            text = f"{error.filename}: {error.strerror}"
        elif not isinstance(error, InputError):
            raise
        print("error: " + printable(" ".join(text.split())), file=sys.stderr)
        sys.exit(2)


def printable(text):
    """Text of a file or a model for the terminal: control characters (escape codes) replaced, line ends kept.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def out_of_memory(error):
    """Whether an exception of torch or Python says that memory ran out, on the GPU or on CPU."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def synced(path):
    """The path, once what it holds is on the disk itself: then it outlives a power cut too. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def write_whole(path, text):
    """Writes a file aside and renames it: `path` is the old one or the whole new one. Raises OSError."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        synced(new).rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def load_task(module, config):
    """module.load_rows with those fields of `config` (a dataclass of knobs) that it takes; --system_prompt is
    read from its file.

    Returns (train, heldout, counts), see the module. Raises InputError.
    """
    knobs = {name: getattr(config, name) for name in inspect.signature(module.load_rows).parameters
             if hasattr(config, name)}
    path = knobs.get("system_prompt")
    if path:
        try:
            knobs["system_prompt"] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--system_prompt {path}: cannot be read ({error})") from None
    return module.load_rows(**knobs)


def check_out(folder, may_hold=()):
    """Raises InputError where `folder`, an --out, is a file or holds what another command wrote, or is
    writing: neither would be whole afterwards. may_hold: names that the caller may find there.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--out {folder} is a file, a folder is needed")
    for name, what in WRITTEN.items():
        if name not in may_hold and os.path.lexists(folder / name):
            raise InputError(f"--out {folder} holds {what} ({name}): take another folder")


def described(counts):
    """The counts of load_rows for the console, "; 3 dropped: ..." each."""
    return "".join(f"; {count} {reason}" for reason, count in counts.items())


def read_records(path):
    """Reads a JSON list, a JSON object or a file of JSON lines.

    Returns [(where, record)]: `where` names the record in error messages ("f.json, row 3", counted from 0;
    "f.json, key 123"; "f.jsonl, line 4", counted from 1, as editors do). Raises InputError for a file that is
    missing, unreadable, empty or no JSON, and for a record that is no object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, a .json or .jsonl file is needed") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    try:
        content = json.loads(text)
        if isinstance(content, dict) and isinstance(next(iter(content.values()), None), dict):
            records = [(f"{path}, key {key}", value) for key, value in content.items()]
        elif isinstance(content, dict):  # a JSON-lines file of one line
            records = [(f"{path}, line 1", content)] if content else []
        elif isinstance(content, list):
            records = [(f"{path}, row {index}", value) for index, value in enumerate(content)]
        else:
            raise InputError(f"{path} holds a single {type(content).__name__}, a list of rows is needed")
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or text.lstrip()[0] == "[":
            raise InputError(
                f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno})") from None
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})") from None
                except ValueError:
                    raise _too_long(path, text) from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply to be a data file") from None
    except ValueError:
        raise _too_long(path, text) from None
    if not records:
        raise InputError(f"{path} holds no rows")
    surrogates = "\\ud" in text.lower()  # half a surrogate pair is JSON, but no text
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(
                f"{where}: a {type(record).__name__} where an object with named fields is needed")
        if surrogates:
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{where}: holds half a character ({error.object[error.start]!r}); mend or "
                                 "drop the row") from None
    return records


def _too_long(path, text):
    """The InputError for what is no broken JSON, but has an integer of more digits than Python reads."""
    most = sys.get_int_max_str_digits()
    digits = re.search(rf"\d{{{most + 1},}}", text)
    number = text.count("\n", 0, digits.start()) + 1
    return InputError(f"{path}, line {number}: a number of {len(digits[0]):,} digits, at most {most:,} can "
                      "be read: mend or drop the row")


def hub_name(data, default=""):
    """(ORG/NAME, CONFIG or None) of a --data that names a set on the hub, else None.

    data: hub:ORG/NAME[:CONFIG], or hub for the default, ORG/NAME[:CONFIG].
    """
    if data != "hub" and not data.startswith("hub:"):
        return None
    name, _, config = (default if data == "hub" else data.removeprefix("hub:")).partition(":")
    return name, config or None


def read_hub(name, config, split="train"):
    """Rows of a Hugging Face dataset, [(where, record)]; raises InputError when it cannot be had."""
    from datasets import load_dataset  # seconds to import, and only needed here

    where = f"{name}, config {config}" if config else name
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises a dozen types for what is one thing to the user: no data
        raise InputError(hub_message(f"dataset {where}", error,
                                     "--data builtin, or --data PATH to a local file")) from error
    return [(f"{where}, row {index}", record) for index, record in enumerate(dataset)]


def hub_message(what, error, instead):
    """One line for a failed download: gated, unknown or unreachable, and what to do. `instead`: what works
    offline.
    """
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names, text = {type(cause).__name__ for cause in chain}, " ".join(str(cause) for cause in chain)
    if "GatedRepoError" in names or " gated " in text:
        return (f"{what} is gated: accept its licence on its page at huggingface.co, run `hf auth login`, "
                "and try again")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} and "offline" not in text.lower():
        return f"{what} is not on the hub, or is private: check the spelling, or run `hf auth login`"
    reason = (str(error).splitlines() or [""])[0][:200]
    return (f"{what} could not be loaded ({type(error).__name__}: {reason}); if the hub is out of reach and "
            f"nothing is cached, run without it: {instead}")


def text_field(record, field, where, empty_ok=False):
    """record[field] as stripped text; raises InputError when it is missing, no text, or empty."""
    if field not in record:
        raise InputError(f"{where}: field `{field}` is missing (the row has "
                         f"{', '.join(map(repr, record)) or 'no fields'})")
    if not isinstance(record[field], str):
        raise InputError(f"{where}, field `{field}`: {type(record[field]).__name__} where text is needed")
    if not record[field].strip() and not empty_ok:
        raise InputError(f"{where}, field `{field}` is empty")
    return record[field].strip()


def is_prepared(record):
    """Whether a record is a row of the collection already (see the head of this file), at first sight."""
    return {"data_source", "prompt"} <= record.keys()


def check_row(row, where, source=""):
    """Raises InputError unless `row` is a prepared row (see the head of this file) of the data_source
    `source` ("" = any).
    """
    for field, kind in ROW_FIELDS.items():
        if not isinstance(row.get(field), kind):
            raise InputError(f"{where}, field `{field}`: {kind.__name__} needed in a prepared row; remake "
                             "the file with python -m data.prepare")
    if source and row["data_source"] != source:
        raise InputError(f"{where}, field `data_source`: {row['data_source']!r} where {source!r} is needed: "
                         "this is a row of another task")
    for message in row["prompt"]:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)):
            raise InputError(f"{where}, field `prompt`: every message needs a text `role` and `content`")
    if not row["prompt"]:
        raise InputError(f"{where}, field `prompt` is empty")
    text_field(row["extra"], "question", f"{where}, field `extra`")
    for field in EXTRA_TEXTS:
        value = row["extra"].get(field)
        if not isinstance(value, str | None):
            raise InputError(f"{where}, field `extra`, field `{field}`: {type(value).__name__} where text is "
                             "needed")


def prepared_row(record, where, source, system_prompt=""):
    """A record that is_prepared as the row that it is, with `system_prompt` instead of its own ("" = its
    own). Raises InputError where it is no such row, or one of another task than the data_source `source`.
    """
    check_row(record, where, source)
    if system_prompt:
        rest = [message for message in record["prompt"] if message["role"] != "system"]
        record["prompt"] = [{"role": "system", "content": system_prompt}, *rest]
    return record


def read_sides(data):
    """[(where, record)] of train.jsonl and of heldout.jsonl where `data` is a folder with either, else None.

    One of the files may be empty (of no bytes), not both. Raises InputError as read_records does.
    """
    files = [Path(data) / f"{side}.jsonl" for side in ("train", "heldout")]
    if not any(file.exists() for file in files):
        return None
    sides = [[] if file.is_file() and not file.stat().st_size else read_records(file) for file in files]
    if not any(sides):
        raise InputError(f"{data} holds no rows: train.jsonl and heldout.jsonl are empty")
    return sides


def keep_sides(train, heldout, limit=0):
    """(train, heldout): the rows of two lists of (where, row). Whoever wrote two files has decided the split.

    limit: rows to keep of each (0 = all). Raises InputError where a question stands in both.
    """
    places = {normalized(row["extra"]["question"]): where for where, row in heldout}
    for where, row in train:
        question = row["extra"]["question"]
        if normalized(question) in places:
            raise InputError(f"{where}: the question {question[:80]!r} is held out too, "
                             f"{places[normalized(question)]}: take it out of one of the two files")
    return tuple([row for _, row in side][:limit or None] for side in (train, heldout))


def normalized(question):
    """Question text for comparison: lower case, single spaces, no closing punctuation."""
    return " ".join(question.casefold().split()).rstrip("?.!: ")


def question_hash(question, seed=SPLIT_SEED):
    """Uniform number in [0, 1) that depends on the normalised question and the dataset's split seed alone."""
    digest = hashlib.sha256(f"{seed}:{normalized(question)}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_question(rows, seed=SPLIT_SEED, heldout_fraction=0.5):
    """(train, heldout): the side hangs on the question's hash, so a question has one side in every file of a
    dataset.

    Training rows keep their order; held-out rows stand in hash order, so that the first n are a random
    sample.
    """
    shares = [question_hash(row["extra"]["question"], seed) for row in rows]
    train = [row for row, share in zip(rows, shares) if share >= heldout_fraction]
    heldout = sorted(((share, i) for i, share in enumerate(shares) if share < heldout_fraction))
    return train, [rows[i] for _, i in heldout]
