"""ECG-Expert-QA: free-text answers to questions about electrocardiograms.

Sources, told apart by their fields:
  * ECG-Expert-QA as it is cloned (it is not on the hub): a folder or a file of JSON lists, whose rows have
  the fields
    {Q, A}, {Disease, Q, A}, {medical_advice, Q, A} or {Question, Answer}
  * your own JSON list or JSON lines, fields named by question_field and answer_field
  * rows prepared by `python -m data.prepare ecg` (a file, or a folder with train.jsonl and heldout.jsonl)
  * built-in: measurements and their textbook reading, made by rule below
The split is by disease where a row has one, so that held-out diseases are new, and by question elsewhere.
"""
import codecs
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from data import (
    InputError,
    hub_name,
    is_prepared,
    keep_sides,
    normalized,
    prepared_row,
    question_hash,
    read_records,
    read_sides,
    text_field,
)

BASE_MODEL = "meta-llama/Llama-3.2-3B-Instruct"  # that its scripts train with a GPU
SYSTEM_PROMPT = """Answer the ECG question (a yes/no question with Yes or No first) in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""
ASKING = "is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must|cannot"
# a sentence that opens with a verb, or with a phrase of its own and a comma ("After surgery, can I ...?", not
# "What is ..., and is it ...?")
YES_NO = re.compile(r"(?:^|[.?!:;]\s)\W*(?!(?:what|which|how|why|when|where|who|whom|whose)\b)"
                    rf"(?:[^.?!,;]*,\s*)?(?:and |or )?(?:{ASKING})(?:n['’]t)?\b", re.I)
VARIANTS = {frozenset(fields): fields[-2:]  # question and answer stand last
            for fields in (("Q", "A"), ("Disease", "Q", "A"), ("medical_advice", "Q", "A"),
                           ("Question", "Answer"))}


def load_rows(data="builtin", *, question_field="", answer_field="", system_prompt="", limit=0):
    """Loads and splits a source.

    data: "builtin", a file, a folder of JSON files (searched in depth), or a folder that data.prepare wrote.
    question_field, answer_field: fields of your own file ("" = those of ECG-Expert-QA). system_prompt:
    replaces SYSTEM_PROMPT. limit: keep only so many rows (0 = all), of a prepared folder so many of each
    side.
    Returns (train, heldout, counts): two lists of rows and a Counter of what was dropped, mended or marked.
    Held out are only questions with one answer, and of a file's yes/no questions as many of each; a prepared
    folder stays as it is.
    Raises InputError.
    """
    if data == "builtin":
        return *builtin_rows(limit or 6000, system_prompt), Counter()
    if hub_name(data):
        raise InputError("ECG-Expert-QA is not on the hub: clone it and name its folder with --data PATH, or "
                         "use --data builtin")
    counts, rows = Counter(), []
    answers = defaultdict(dict)  # of a question

    def convert(file, records):
        """Yields (where, row) of a file's (where, record); row: None where it is dropped, which is counted.
        """
        variant = records[0][1].keys() if records else ()
        for index, (where, record) in enumerate(records):
            if is_prepared(record):
                yield where, prepared_row(record, where, "ecg_expert_qa", system_prompt)
            elif not (question_field or answer_field) and record.keys() != variant:
                raise InputError(f"{where}: fields {', '.join(map(repr, record)) or 'none'} where the first "
                                 f"row has {', '.join(map(repr, variant))}")
            else:
                yield where, _row(record, where, f"{file.stem}-{index}", file.stem, question_field,
                                  answer_field, system_prompt, counts)

    files, sides = [Path(data)], read_sides(data)
    if sides:
        names = (Path("train"), Path("heldout"))
        kept = ([pair for pair in convert(name, side) if pair[1]] for name, side in zip(names, sides))
        return *keep_sides(*kept, limit), +counts
    if files[0].is_dir():
        files = sorted(path for path in files[0].rglob("*.json*") if path.suffix in (".json", ".jsonl")
                       and not any(part.startswith(".") for part in path.relative_to(data).parts))
        if not files:
            raise InputError(f"{data}: the folder holds no .json or .jsonl file")
        for file in files:
            if file.name == "heldout.jsonl":
                raise InputError(f"{data} holds rows that are split already, in {file.parent}: name that "
                                 "folder")
    for file in files:
        for where, row in convert(file, read_records(file)):
            if row:
                its_answers = answers[normalized(row["extra"]["question"])]
                if normalized(row["ground_truth"]) in its_answers:
                    counts["merged: the same question and answer again"] += 1
                else:
                    its_answers[normalized(row["ground_truth"])] = row
                    rows.append(row)
        if limit and len(rows) >= limit:
            break
    rows = rows[:limit or None]
    shares = [question_hash(row["extra"].get("disease") or row["extra"]["question"])
              for row in rows]
    places = sorted((share, i) for i, share in enumerate(shares) if share < 0.5)
    heldout = [rows[i] for _, i in places]
    questions = {normalized(row["extra"]["question"]) for row in heldout}
    train = [row for row, share in zip(rows, shares) if share >= 0.5
             and normalized(row["extra"]["question"]) not in questions]
    dropped = len(rows) - len(heldout) - len(train)
    counts["dropped from training: the question is held out under another disease"] += dropped
    certain = [row for row in heldout if len(answers[normalized(row["extra"]["question"])]) == 1]
    counts["kept apart from evaluation: the question has several answers"] += len(heldout) - len(certain)
    heldout = _balanced(certain)
    too_many = len(certain) - len(heldout)
    counts["kept apart from evaluation: more yes than no, or the other way round"] += too_many
    counts["are yes/no questions"] += sum("verdict" in row["extra"] for row in train + heldout)
    return train, heldout, +counts


def _balanced(rows):
    """Rows without those yes/no questions of a file that are too many for as many of each; always yes scores
    a half then.
    """
    there = Counter((row["extra"].get("subject"), row["extra"].get("verdict")) for row in rows)
    kept, used = [], Counter()
    for row in rows:
        subject, verdict = row["extra"].get("subject"), row["extra"].get("verdict")
        used[subject, verdict] += 1
        if not verdict or used[subject, verdict] <= min(there[subject, "yes"], there[subject, "no"]):
            kept.append(row)
    return kept


def _row(record, where, source_id, subject, question_field, answer_field, system_prompt, counts):
    """The row of a record of a known variant, or None if it is dropped, which is counted."""
    if question_field or answer_field:
        fields = question_field or "question", answer_field or "answer"
    elif frozenset(record) in VARIANTS:
        fields = VARIANTS[frozenset(record)]
    else:
        raise InputError(f"{where}: fields {', '.join(map(repr, record)) or 'none'} are no known form of "
                         "ECG-Expert-QA (Q, A; Disease, Q, A; medical_advice, Q, A; Question, Answer): name "
                         "yours with --question_field and --answer_field")
    texts = [text_field(record, field, where) for field in fields]
    whole = [repaired(text) for text in texts]
    if None in whole:
        counts["dropped: garbled text that lost a byte"] += 1
        return None
    counts["mended: UTF-8 that had been read as GBK"] += whole != texts
    disease = text_field(record, "Disease", where) if "Disease" in record else ""
    extra = {"subject": subject} | ({"disease": disease} if disease else {})
    return make_row(source_id, *whole, system_prompt=system_prompt, extra=extra)


def repaired(text):
    """Text whose UTF-8 had been read as GBK, set right ("patient鈥檚" is "patient’s"); None where a byte is
    lost for good. Chinese text stays as it is: in GBK it is no UTF-8.
    """
    parts, lost = re.split("([\u4e00-\u9fff]+)", text), False
    for i in range(1, len(parts), 2):  # every other one is such a run
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            parts[i] = decoder.decode(parts[i].encode("gbk"))
        except UnicodeError:
            return text
        lost = lost or bool(decoder.getstate()[0])  # it ends in the middle of a character
    return None if lost else "".join(parts)


def make_row(source_id, question, answer, target_text=None, system_prompt="", extra=None):
    """One row of the collection. An answer that begins with Yes or No to a question that asks for it gets a
    `verdict` in its extra ("No specific changes." answers another question). Without a reasoning, the SFT
    target's block for it stays empty.
    """
    first = answer.split(maxsplit=1)[0].strip(",.;:!").lower()
    verdict = {"verdict": first} if first in ("yes", "no") and YES_NO.search(question) else {}
    return {"id": f"ecg_expert_qa:{source_id}", "data_source": "ecg_expert_qa",
            "prompt": [{"role": "system", "content": system_prompt or SYSTEM_PROMPT},
                       {"role": "user", "content": question}],
            "ground_truth": answer, "target": target_text or target("", answer),
            "extra": {"question": question, **verdict, **(extra or {})}}


def target(reasoning, answer):
    """A completion in the task's tags."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


# === built-in items: measurements and their reading =========================================================
# Textbook limits: rate 60 to 100 a minute, PR 120 to 200 ms, QRS below 120 ms, axis -30 to +90 degrees
# (Surawicz et al. 2009, doi:10.1161/CIRCULATIONAHA.108.191095); QTc below 450 ms in men and 460 in women
# (Rautaharju et al. 2009, doi:10.1161/CIRCULATIONAHA.108.191096). Measurements stand clear of the limits.


def builtin_ecg(generator):
    """One invented ECG as a dict of its measurements, drawn with a random.Random. Each measurement is
    abnormal in a third.
    """
    def pick(normal, *abnormal):
        low, high, step = normal if generator.random() < 2 / 3 else generator.choice(abnormal)
        return generator.randrange(low, high, step)
    fibrillation, qrs = generator.random() < 0.15, pick((76, 110, 2), (124, 170, 2))
    return {"fibrillation": fibrillation, "rate": pick((62, 98, 1), (38, 58, 1), (104, 150, 1)),
            "pr": None if fibrillation else pick((124, 196, 4), (212, 320, 4)),
            "qrs": qrs, "block": generator.choice(("right", "left")) if qrs >= 120 else "",
            "qtc": pick((382, 440, 2), (470, 560, 2)), "axis": pick((0, 84, 2), (-80, -34, 2), (100, 150, 2)),
            "st": generator.choices(("", "inferior", "anterior", "depression"), (6, 1, 1, 1))[0],
            "t": generator.choices(("", "inverted", "peaked"), (4, 1, 1))[0]}


def ecg_question(e):
    """The measurements, as the question gives them."""
    st = {"": "isoelectric", "inferior": "2 mm up in II, III, aVF", "anterior": "2 mm up in V1 to V4",
          "depression": "1 mm down in V5, V6"}
    t = {"": "upright", "inverted": "negative in V2 to V5", "peaked": "tall and pointed in V2 to V4"}
    rhythm = "no P waves, irregular" if e["fibrillation"] else f"PR {e['pr']} ms"
    shape = {"": "", "right": ", rSR' in V1", "left": ", broad R in V6"}[e["block"]]
    return (f"ECG: rate {e['rate']}, {rhythm}, QRS {e['qrs']} ms{shape}, QTc {e['qtc']} ms, axis "
            f"{e['axis']}, ST {st[e['st']]}, T {t[e['t']]}. What does it show?")


def ecg_reading(e, careful=True):
    """(reasoning, findings): what an annotator writes, line by line. The careless one takes PR, QTc and axis
    for normal, unread.
    """
    rate = "low" if e["rate"] < 60 else "high" if e["rate"] > 100 else "usual"
    rhythm = {"low": "sinus bradycardia", "high": "sinus tachycardia", "usual": "normal sinus rhythm"}[rate]
    block, st = e["block"], e["st"]
    long_pr = careful and not e["fibrillation"] and e["pr"] > 200
    long_qt = careful and e["qtc"] >= 460
    side = "left" if careful and e["axis"] < -30 else "right" if careful and e["axis"] > 90 else ""
    lines = [("rate", rate, "atrial fibrillation" if e["fibrillation"] else rhythm),
             ("PR", "no" if e["fibrillation"] else "high" if long_pr else "usual",
              "first-degree AV block" if long_pr else ""),
             ("QRS", f"high, {block}" if block else "usual", f"{block} bundle branch block" if block else ""),
             ("QTc", "high" if long_qt else "usual", "prolonged QT interval" if long_qt else ""),
             ("axis", side or "usual", f"{side} axis deviation" if side else ""),
             ("ST", {"": "usual", "depression": "lower"}.get(st, f"higher, {st}"),
              {"": "", "depression": "ST depression"}.get(st, f"{st} ST elevation")),
             ("T", {"": "usual", "inverted": "lower", "peaked": "higher"}[e["t"]],
              {"": "", "inverted": "T wave inversion", "peaked": "peaked T waves"}[e["t"]])]
    reasoning = "\n".join(f"{what}: {verdict}" for what, verdict, _ in lines)
    return reasoning, [finding for *_, finding in lines if finding]


def builtin_rows(n, system_prompt="", seed=0):
    """(train, heldout), half each, of n ECGs. Training targets are by a careless annotator (55%) or a careful
    one; ground truth and held-out targets are the careful reading.
    """
    generator = random.Random(seed)
    sides, seen = ([], []), set()
    while len(seen) < n:
        e = builtin_ecg(generator)
        question, careless = ecg_question(e), generator.random() < 0.55
        if question in seen:
            continue
        seen.add(question)
        heldout = question_hash(question) < 0.5
        reasoning, findings = ecg_reading(e)
        said, named = ecg_reading(e, careful=heldout or not careless)
        sides[heldout].append(make_row(f"builtin-{len(seen) - 1}", question, sentence(findings),
                                       target(said, sentence(named)), system_prompt,
                                       {"findings": findings, "explanation": reasoning,
                                        "annotator": "careless" if said != reasoning else "careful"}))
    return sides


def sentence(findings):
    """The findings of a reading as one sentence."""
    text = ", ".join(findings)
    return f"{text[0].upper()}{text[1:]}."
