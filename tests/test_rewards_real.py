"""Free-text rewards on real gold answers: each against itself and against wrong answers made from it, by
kind.

    GRPO_TEST_DATA=... python tests/test_rewards_real.py [dev|kept|all]   prints the table of tests/README.md

The rules were written while looking at the half "dev"; "kept" is the other half. Which half a row is in is
drawn from its question. Nothing here uses the tables of rewards.py: what is negated, swapped or changed is
found by the words below.
"""
import os
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewards
from data import ecg, normalized, question_hash, read_records

FILES = ("Complex diagnosis (analysis of difficult diseases).json", "ECG Knowledge (Basic Q&A).json",
         "Patient's right to know.json")
FINDING = re.compile(
    r"\b(?:(?:diffuse |acute |marked )?ST[- ](?:segment )?(?:elevations?|depressions?)|T[- ]waves? "
    r"(?:inversions?|flattening)|"
    r"(?:inverted|peaked|tall|flattened) T[- ]waves?|atrial (?:fibrillation|flutter)|ventricular "
    r"(?:tachycardia|fibrillation)|"
    r"(?:sinus )?(?:tachycardia|bradycardia)|(?:left|right) (?:bundle branch block|ventricular "
    r"hypertrophy|axis deviation|"
    r"atrial enlargement)|(?:complete |first-degree |second-degree )?(?:AV|heart) block|(?:low|reduced) "
    r"voltage|"
    r"prolonged (?:QTc?|PR)(?: intervals?)?|QTc?(?: interval)? prolongation|(?:pathological |deep )?Q[- "
    r"]waves?|U[- ]waves?|"
    r"delta waves?|P[- ]waves?|arrhythmias?|myocardial (?:infarction|ischemia)|pericarditis|electrical "
    r"alternans|"
    r"(?:wide|widened|narrow) QRS(?: complex(?:es)?)?|hyperkalemia|hypokalemia|heart failure|syncope)\b",
    re.I)
ANTONYMS = [pair.split("/") for pair in (
    "increase/decrease increases/decreases increased/decreased increasing/decreasing left/right high/low "
    "higher/lower prolonged/shortened prolongation/shortening widened/narrowed wide/narrow "
    "widening/narrowing elevation/depression elevated/depressed elevations/depressions raised/lowered "
    "normal/abnormal regular/irregular fast/slow rapid/slow early/late upright/inverted positive/negative "
    "anterior/posterior superior/inferior tachycardia/bradycardia large/small more/less before/after "
    "acute/chronic improve/worsen improved/worsened severe/mild common/rare always/never first/last "
    "same/different hyperkalemia/hypokalemia hypercalcemia/hypocalcemia sufficient/insufficient "
    "complete/incomplete stable/unstable typical/atypical necessary/unnecessary reversible/irreversible "
    "long/short longer/shorter upper/lower proximal/distal atrial/ventricular systolic/diastolic "
    "activation/inhibition depolarization/repolarization significant/insignificant allow/forbid "
    "accept/refuse include/exclude").split()]
OPPOSITE = {}
for one, two in ANTONYMS:
    OPPOSITE.setdefault(one, two)
    OPPOSITE.setdefault(two, one)
WORD = re.compile(r"\b(?:" + "|".join(sorted(OPPOSITE, key=len, reverse=True)) + r")\b", re.I)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)")
NAMED = re.compile(r"\b([A-Z]+)(\d)\b")  # V1, T3
AUXILIARY = (
    re.compile(r"\b(is|are|was|were|can|could|may|might|should|must|will|would|does|do|has|have)\b(?! not)"))
TAKEN_BACK = ("{} All of this is wrong.", "{} Disregard the above.", "{} The opposite is true.",
              "{} None of this is true.",
              "{} That is false.", "The following is wrong: {}",
              "{} Actually, everything I said is incorrect.",
              "Ignore what comes next, it is a lie. {}", "{} This answer is not correct.",
              "{} I made that up; it is not true.")


def cased(word, like):
    return word.capitalize() if like[:1].isupper() else word


def negate_finding(gold, draw):
    """A finding's status turned: "no" before it, or "is ruled out" and the like behind it; or its own "no"
    taken away.
    """
    place = draw.choice(list(FINDING.finditer(gold)))
    before, behind = gold[:place.start()], gold[place.end():]
    if re.search(r"\b(?:no|absent|without)\s+$", before, re.I):
        return re.sub(r"\b(?:no|absent|without)\s+$", "", before, flags=re.I) + place[0] + behind
    way = draw.choice(("no {}", "no {}", "no evidence of {}", "an absence of {}", "no signs of {}"))
    return before + way.format(place[0]) + behind


def deny_statement(gold, draw):
    place = draw.choice(list(AUXILIARY.finditer(gold)))
    return gold[:place.end()] + " not" + gold[place.end():]


def swap_antonym(gold, draw):
    place = draw.choice(list(WORD.finditer(gold)))
    return gold[:place.start()] + cased(OPPOSITE[place[0].lower()], place[0]) + gold[place.end():]


def swap_all(gold, draw):
    return WORD.sub(lambda place: cased(OPPOSITE[place[0].lower()], place[0]), gold)


def change_number(gold, draw):
    place = draw.choice(list(NUMBER.finditer(gold)))
    digits = len(place[0].partition(".")[2])
    value = float(place[0]) * draw.choice((0.5, 2, 3,
                                           10)) + (draw.choice((1, 2)) if float(place[0]) < 4 else 0)
    text = f"{value:.{digits}f}"
    return gold[:place.start()] + (text if float(text) != float(place[0])
                                   else f"{float(place[0]) + 1:.{digits}f}") + gold[place.end():]


def change_name(gold, draw):
    place = draw.choice(list(NAMED.finditer(gold)))
    return f"{gold[:place.start()]}{place[1]}{int(place[2]) % 9 + 1}{gold[place.end():]}"


KINDS = {"a finding negated": (FINDING, negate_finding), "a statement denied": (AUXILIARY, deny_statement),
         "an antonym swapped": (WORD, swap_antonym), "all antonyms swapped": (WORD, swap_all),
         "a number changed": (NUMBER, change_number), "a lead changed": (NAMED, change_name)}
# else 0.3
LEAST_DROP = {"an antonym swapped": 0.2, "all antonyms swapped": 0.2, "a number changed": 0.2,
              "a lead changed": 0.2}


def real_rows(part, folder):
    """Prepared rows of the three files, or of the half `part` ("dev" or "kept") of them."""
    rows = [row for name in FILES for side in ecg.load_rows(str(Path(folder) / name))[:2] for row in side]
    return [row for row in rows if part == "all"
            or (question_hash(row["extra"]["question"], 1) < 0.5) == (part == "dev")]


def wrong_answers(rows, seed=0):
    """[(kind, row, wrong answer)], of every kind that can be made of a row."""
    draw, made = random.Random(seed), []
    for row in rows:
        gold = row["ground_truth"]
        answers = {kind: make(gold, draw) for kind, (needed, make) in KINDS.items() if needed.search(gold)}
        answers |= {"taken back": draw.choice(TAKEN_BACK).format(gold),
                    "another question's answer": draw.choice(rows)["ground_truth"],
                    "Yes": "Yes", "1": "1", ".": ".", "Ruled out: gold": f"Ruled out: {gold}"}
        made += [(kind, row, answer) for kind, answer in answers.items()
                 if rewards.plain(answer) != rewards.plain(gold)]
    return made


def score(answer, row):
    return rewards.compute_score("ecg_expert_qa", ecg.target("look", answer), row["ground_truth"],
                                 row["extra"])


def table(rows):
    """{kind: [(gold answer's score - wrong answer's score, accuracy, row, answer)]}."""
    drops = defaultdict(list)
    for kind, row, answer in wrong_answers(rows):
        result = score(answer, row)
        drops[kind].append((1.0 - result["score"], result["accuracy"], row, answer))
    return drops


def second_answers(folder):
    """Scores of the other gold answers of questions that have several, where no key finding and no verdict
    decides.
    """
    answers = defaultdict(dict)
    for name in FILES:
        for _, record in read_records(Path(folder) / name):
            question, answer = (record[field] for field in ecg.VARIANTS[frozenset(record)])
            if None not in (ecg.repaired(question), ecg.repaired(answer)):
                answers[normalized(question)][normalized(answer)] = ecg.make_row("x", question, answer)
    return [score(other["ground_truth"], row) for rows in answers.values() for row in rows.values()
            for other in rows.values()
            if row is not other and undecided(row)]


def undecided(row):
    """Whether accuracy goes by rewards.ENOUGH."""
    question = row["extra"]["question"]
    return "verdict" not in row["extra"] and rewards.findings_f1("", row["ground_truth"], question) is None


@pytest.fixture
def rows(real_data):
    return real_rows("all", real_data)


def test_every_real_gold_answer_scores_one_and_is_accurate(rows):
    for row in rows:
        result = score(row["ground_truth"], row)
        assert result["score"] == pytest.approx(1) and result["accuracy"] == 1, row


def test_real_wrong_answers_score_clearly_less(rows):
    """Every row's kinds on a sixth of the rows here; all rows by the command above."""
    for kind, drops in table(random.Random(0).sample(rows, len(rows) // 6)).items():
        assert fmean(drop > 1e-9 for drop, *_ in drops) >= 0.98, kind
        assert fmean(drop for drop, *_ in drops) >= LEAST_DROP.get(kind, 0.3), kind


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else "kept"
    chosen = real_rows(part, os.environ["GRPO_TEST_DATA"])
    golds = [score(row["ground_truth"], row) for row in chosen]
    print(f"{part}: {len(chosen)} gold answers, lowest score {min(g['score'] for g in golds):.3f}\n")
    print("| kind | pairs | lower | mean drop | smallest | all right, by ENOUGH |\n|---|---|---|---|---|---|")
    found = table(chosen)
    for kind, drops in found.items():
        drops.sort(key=lambda entry: entry[0])
        right = [accuracy for _, accuracy, row, _ in drops if undecided(row)]
        print(f"| {kind} | {len(drops)} | {fmean(d > 1e-9 for d, *_ in drops):.1%} | "
              f"{fmean(d for d, *_ in drops):.2f} | {drops[0][0]:.2f} | {sum(right):.0f} of {len(right)} |")
    second = second_answers(os.environ["GRPO_TEST_DATA"])
    print(f"\nsecond answers to the same question: {sum(r['accuracy'] for r in second):.0f} of {len(second)} "
          "all right, by ENOUGH")
    for kind, drops in found.items() if "-v" in sys.argv else ():
        for drop, _, row, answer in drops[:8]:
            if drop < 0.25:
                print(f"\n{kind} {drop:.3f}\n  Q {row['extra']['question']}\n  G "
                      f"{row['ground_truth'][:600]}\n  A {answer[:600]}")
