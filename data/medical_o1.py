"""Open-ended medical reasoning: a question, a free-text answer, and often the reasoning that leads to it.

Sources, told apart by their fields:
  * hub FreedomIntelligence/medical-o1-reasoning-SFT     {Question, Complex_CoT, Response}, config en
  * hub FreedomIntelligence/medical-o1-verifiable-problem {Open-ended Verifiable Question, Ground-True Answer}
  * any other hub set or local JSON list or JSON lines, fields named by question_field and answer_field
  * rows prepared by `python -m data.prepare medical_o1` (a file, or a folder with train.jsonl and
  heldout.jsonl)
Chen et al. 2024, "HuatuoGPT-o1, Towards Medical Complex Reasoning with LLMs", arXiv:2412.18925.
"""
from collections import Counter

from data import (
    InputError,
    hub_name,
    is_prepared,
    keep_sides,
    normalized,
    prepared_row,
    read_hub,
    read_records,
    read_sides,
    split_by_question,
    text_field,
)
from data.ecg import target

HUB = "FreedomIntelligence/medical-o1-reasoning-SFT:en"
BASE_MODEL = "meta-llama/Llama-3.2-3B-Instruct"  # that its scripts train with a GPU
SYSTEM_PROMPT = """Answer the medical question. First reason, then answer, in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""
FORMS = (("Question", "Complex_CoT", "Response"),
         ("Open-ended Verifiable Question", "", "Ground-True Answer"),
         ("question", "", "answer"))  # question, reasoning, answer


def load_rows(data="hub", *, question_field="", answer_field="", system_prompt="", limit=0):
    """Loads and splits a source.

    data: "hub", "hub:ORG/NAME[:CONFIG]", a file, or a folder that data.prepare wrote. question_field,
    answer_field: fields of your own set ("" = those of FORMS). system_prompt: replaces SYSTEM_PROMPT. limit:
    read only so many rows (0 = all), of a prepared folder so many of each side. Returns (train, heldout,
    counts): two lists of rows, split by the question's hash, of a prepared folder as they are, and a Counter
    of what was dropped. Raises InputError.
    """
    if data == "builtin":
        raise InputError("--task medical_o1 has no built-in items: give --data hub, --data hub:ORG/NAME or "
                         "--data PATH, or take --task ecg")
    on_hub = hub_name(data, HUB)
    if on_hub:
        sides = [read_hub(*on_hub)]
    else:
        sides = read_sides(data) or [read_records(data)]
    knobs, counts = (question_field, answer_field, system_prompt), Counter()
    if len(sides) == 2:
        train, heldout = sides
        both = _rows(train, 0, 0, knobs, counts), _rows(heldout, len(train), 0, knobs, counts)
        return *keep_sides(*both, limit), counts
    return *split_by_question([row for _, row in _rows(*sides, 0, limit, knobs, counts)]), counts


def _rows(records, first, limit, knobs, counts):
    """[(where, row)] of [(where, record)], each question once; counts what is dropped. first: the first
    record's index. knobs: load_rows' others, for _row.
    """
    rows, seen = [], {}
    for index, (where, record) in enumerate(records, first):
        if is_prepared(record):
            row = prepared_row(record, where, "medical_o1", knobs[-1])
        else:
            row = _row(record, where, index, *knobs)
        key = normalized(row["extra"]["question"])
        if key in seen:
            same = seen[key] == normalized(row["ground_truth"])
            counts["dropped: question occurs before" + ("" if same else ", with another answer")] += 1
            continue
        seen[key] = normalized(row["ground_truth"])
        rows.append((where, row))
        if len(rows) == limit:
            break
    return rows


def _row(record, where, index, question_field, answer_field, system_prompt):
    form = next((form for form in FORMS if form[0] in record and form[2] in record), None)
    if not form and not (question_field and answer_field):
        raise InputError(f"{where}: fields {', '.join(map(repr, record)) or 'none'}: name the question's and "
                         "the answer's with --question_field and --answer_field")
    question_name, reasoning_name, answer_name = form or ("", "", "")
    question, answer = (text_field(record, given or usual, where)
                        for given, usual in ((question_field, question_name), (answer_field, answer_name)))
    reasoning = text_field(record, reasoning_name, where, empty_ok=True) if reasoning_name in record else ""
    return {"id": f"medical_o1:{record.get('id', index)}", "data_source": "medical_o1",
            "prompt": [{"role": "system", "content": system_prompt or SYSTEM_PROMPT},
                       {"role": "user", "content": question}],
            "ground_truth": answer, "target": target(reasoning, answer),
            "extra": {"question": question, "explanation": reasoning}}
