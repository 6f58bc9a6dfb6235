"""Free-text rewards: right answers in other words earn more than negated, numerically wrong, shuffled,
stuffed or copied ones.
"""
import math
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_ecg
import rewards

OPEN, CLOSE = "<reasoning>\nlook\n</reasoning>\n<answer>\n", "\n</answer>"
EVERY_FINDING = ", ".join(rewards.FINDINGS)
BOTH_WAYS = ", ".join(f"{finding}, no {finding}" for finding in rewards.FINDINGS)
# (question, gold answer, tiers of answers): every answer of a tier must score more than every answer of the
# next
TABLE = [
    ("ECG of a man of 50: rate 48, PR 240 ms, QRS 96 ms. What does it show?",
     "Sinus bradycardia, first-degree AV block, no ST elevation.", [
        ["Sinus bradycardia, first-degree AV block, no ST elevation.",
         "sinus bradycardia, first degree AV block, no ST elevation",
         "First-degree AV block, sinus bradycardia, no ST elevation.",
         "Sinus bradycardia with a prolonged PR interval, without ST-segment elevation.",
         "There is sinus bradycardia and first-degree heart block. ST elevation is absent.",
         "Slow sinus rhythm, PR prolongation; ST elevation is not seen."],
        ["Sinus bradycardia, first-degree AV block.", "Sinus bradycardia, no ST elevation."],
        ["Sinus bradycardia, no first-degree AV block, ST elevation.",
         "Sinus tachycardia, complete heart block, ST elevation.",
         "No sinus bradycardia, no first-degree AV block, ST elevation.",
         "elevation block ST AV degree no bradycardia sinus first",
         "Sinus rhythm.", "Atrial fibrillation.", "An ECG.", EVERY_FINDING, BOTH_WAYS,
         "ECG of a man of 50: rate 48, PR 240 ms, QRS 96 ms. What does it show?",
         "Left bundle branch block and left axis deviation.", "Sinus bradycardia " * 2500], [""]]),
    ("What is the upper limit of the normal PR interval?", "The upper limit is 0.2 s.", [
        ["The upper limit is 0.2 s.", "200 ms", "It is 200 milliseconds.", "0.20 seconds", "0.2 sec."],
        ["It is 300 ms.", "It is 0.12 s.", "The upper limit is 200 s.",
         "The upper limit of the normal PR interval", "It is not 0.2 s.",
         "It is 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200, 210, 220, 230, 240, 250 or 260 ms."],
         [""]]),
    ("How long is anticoagulation continued after pulmonary embolism?",
     "For 3 to 6 months with regular review.", [
        ["For 3 to 6 months with regular review.", "3-6 months, with regular review.",
         "With regular review, for three to six months."],
        ["For 3 months with regular review.", "For 6 months with regular review."],
        ["For 3 to 6 weeks.", "For 12 to 24 years.", "After pulmonary embolism anticoagulation is continued.",
         "months review regular", ""]]),
    ("Can I refuse an ECG?", "Yes, you can refuse it, but your doctor should explain the risks.", [
        ["Yes, you can refuse it, but your doctor should explain the risks.",
         "Yes, you may refuse; your doctor should explain the risks."],
        ["No, you can refuse it, but your doctor should explain the risks.", "No.",
         "You can refuse it, but your doctor should explain the risks.",
         "Yes and no.", "Can I refuse an ECG?", "risks the explain should doctor your but it refuse can you"],
         [""]]),
    ("What does ST elevation in II, III and aVF suggest?",
     "An acute inferior myocardial infarction, usually of the right coronary artery.", [
        ["An acute inferior myocardial infarction, usually of the right coronary artery.",
         "Acute inferior myocardial infarction, most often from the right coronary artery.",
         "An inferior heart attack of the right coronary artery."],
        ["A myocardial infarction."],
        ["Not a myocardial infarction.", "Pericarditis.", "ST elevation in II, III and aVF",
         "No acute inferior myocardial infarction.",
         "artery the infarction of acute usually right inferior an",
         "A posterior stroke of the left vertebral artery."], [""]]),
    ("How does hyperkalaemia show?", "Tall peaked T waves and a wide QRS.", [
        ["Tall peaked T waves and a wide QRS.", "Peaked T waves with QRS widening.",
         "A broad QRS and tall T waves.", "Tented T-waves, widened QRS complexes."],
        ["Peaked T waves.", "A wide QRS."],
        ["Inverted T waves and a narrow complex.", "Neither peaked T waves nor a wide QRS.", "Hyperkalaemia.",
         EVERY_FINDING, "U waves."], [""]]),
]


def done(answer):
    return f"{OPEN}{answer}{CLOSE}"


def score(answer, question, gold, **knobs):
    return rewards.compute_score("ecg_expert_qa", done(answer), gold,
                                 {"question": question, **knobs.pop("extra", {})}, **knobs)


@pytest.mark.parametrize("question, gold, tiers", TABLE)
def test_the_order_of_answers(question, gold, tiers):
    extra = {"verdict": "yes"} if gold.startswith("Yes") else {}
    scores = [{answer[:80]: score(answer, question, gold, extra=extra)["score"] for answer in tier}
              for tier in tiers]
    for better, worse in zip(scores, scores[1:]):
        assert min(better.values()) > max(worse.values()), (better, worse)
    assert scores[0][gold] == max(scores[0].values()) > 0.99


def test_a_verdict_that_is_taken_back_is_none():
    assert [rewards.verdict(text)
            for text in ("Yes", "yes, you can.", "No. You have none.", "Yes, no fee is due.",
                         " NO! ")] == ["yes", "yes", "no", "yes", "no"]
    assert [rewards.verdict(text)
            for text in ("Yes and no.", "No or yes", "Yes. No.", "Yes.\nNo, you can't", "", "You can. Yes.",
                         "yesterday")] == [""] * 7


def test_the_table_is_long_enough():
    assert sum(len(tier) for _, _, tiers in TABLE for tier in tiers) >= 60


@pytest.mark.parametrize("a, b, same", [
    ("no ST elevation", "ST elevation", False), ("0.12 s", "120 ms", True), ("120 ms", "120 mm", False),
    ("1,000 ms", "1 s", True), ("2 cm", "20 mm", True),
    ("60 to 100 bpm", "60-100 beats per minute", True), ("3 to 6 months", "3 months", False),
    ("axis -30 degrees", "axis 30 degrees", False),
    ("ST elevation is absent", "no ST elevation", True),
    ("without T wave inversion", "no inverted T waves", True), ("AF", "atrial fibrillation", True),
    ("no ST elevation, no AF", "no ST elevation or AF", True),
    ("not only AF but also LBBB", "AF and LBBB", True), ("no AF, but LBBB", "LBBB; no AF", True),
    ("It doesn't show AF", "no AF", True), ("QTc > 450 ms", "QTc < 450 ms", False)])
def test_findings(a, b, same):
    assert (rewards.key_findings(a) == rewards.key_findings(b)) == same
    assert (rewards.findings_f1(a, b) == 1) == same


def test_comparisons_are_part_of_a_number():
    assert rewards.token_f1("QTc > 450 ms",
                            "QTc above 450 ms") == 1 > rewards.token_f1("QTc < 450 ms", "QTc above 450 ms")


def test_findings_of_the_question_earn_nothing():
    question = "Does ST elevation with AF suggest pericarditis?"
    assert rewards.findings_f1("ST elevation, AF", "Pericarditis is not suggested.", question) == 0
    assert rewards.findings_f1("It is no pericarditis.", "Pericarditis is not suggested.", question) == 1
    assert rewards.findings_f1("anything", "Keep calm.", question) is None


def test_weights_stand_once_and_are_those_of_script_and_compute_score(monkeypatch):
    assert all(sum(mix.values()) == pytest.approx(1) for mix in rewards.WEIGHTS.values())
    question, gold, _ = TABLE[0]
    monkeypatch.setitem(rewards.WEIGHTS, "hybrid", {"format": 1.0, "brevity": 3.0})
    row = {"data_source": "ecg_expert_qa", "ground_truth": gold, "extra": {"question": question}}
    text = done("wrong ") + " and more"
    [own] = grpo_ecg.score([text], [row], grpo_ecg.Config(language_model="", encoder=""))
    assert own == rewards.compute_score("ecg_expert_qa", text, gold, row["extra"])
    assert own["score"] == pytest.approx((own["format"] + 3 * own["brevity"]) / 4) and own["format"] == 0.75


def test_score_is_the_weighted_mean_of_its_parts_and_minus_one_without_an_answer():
    question, gold, tiers = TABLE[0]
    for answer in (answer for tier in tiers for answer in tier if answer):
        result = score(answer, question, gold)
        # no language model
        mix = {part: weight for part, weight in rewards.WEIGHTS["hybrid"].items() if part != "fluency"}
        assert result["score"] == pytest.approx(sum(weight * result[part]
                                                    for part, weight in mix.items()) / sum(mix.values()))
        own = score(answer, question, gold, weights={"findings": 3, "format": 1})
        assert own["score"] == pytest.approx((3 * result["findings"] + result["format"]) / 4)
    for text in ("", gold, done(""), done("x") + done("x"), f"<answer>{gold}", f"</answer>{gold}<answer>",
                 done(gold).replace("</answer>", "")):
        assert rewards.compute_score("ecg_expert_qa", text, gold, {"question": question})["score"] == -1
        assert rewards.compute_score("medical_o1", text, gold, {"question": question})["score"] == -1
    for knobs in ({}, {"method": "reasoning"}):
        assert score(gold, question, gold, **knobs)["score"] == pytest.approx(1)


def test_text_after_the_answer_costs_format():
    question, gold, _ = TABLE[0]
    late = rewards.compute_score("ecg_expert_qa", done(gold) + " and more", gold, {"question": question})
    assert late["format_ok"] == 0 and late["score"] < score(gold, question, gold)["score"]


def test_length_guard():
    gold = "word " * 40
    assert rewards.length_guard("word " * 80, gold) == 1 and rewards.length_guard("word " * 160, gold) == 0
    assert 0 < rewards.length_guard("word " * 100, gold) < 1 and rewards.length_guard("short", "gold") == 1


# === negation: NegEx and ConText ============================================================================


@pytest.mark.parametrize("text, found", [
    ("Atrial fibrillation with absent P waves.", {"atrial fibrillation": "affirmed"}),
    ("Non-sustained ventricular tachycardia.", {"ventricular tachycardia": "affirmed"}),
    ("Non-ST-elevation myocardial infarction.", {"nstemi": "affirmed"}),
    ("One cannot rule out AF.", {"atrial fibrillation": "possible"}),
    ("MI cannot be ruled out.", {"myocardial infarction": "possible"}),
    ("Possible AF.", {"atrial fibrillation": "possible"}),
    ("AF is unlikely.", {"atrial fibrillation": "negated"}),
    ("AF was ruled out.", {"atrial fibrillation": "negated"}),
    ("AF is no longer present.", {"atrial fibrillation": "negated"}),
    ("It no longer shows ST elevation.", {"st elevation": "negated"}),
    ("Negative for pericarditis.", {"pericarditis": "negated"}),
    ("No AF, LBBB and ST elevation.",
     {"atrial fibrillation": "negated", "left bundle branch block": "negated", "st elevation": "negated"}),
    ("Neither AF nor LBBB is seen.",
     {"atrial fibrillation": "negated", "left bundle branch block": "negated"}),
    ("No AF, but LBBB.", {"atrial fibrillation": "negated", "left bundle branch block": "affirmed"}),
    ("Not only AF but also LBBB.",
     {"atrial fibrillation": "affirmed", "left bundle branch block": "affirmed"}),
    ("No AF is seen and the rhythm is atrial flutter.",
     {"atrial fibrillation": "negated", "atrial flutter": "affirmed"}),
    ("No P waves and an irregularly irregular rhythm.", {"atrial fibrillation": "affirmed"}),
    ("In the absence of ischemia, ST elevation suggests pericarditis.",
     {"ischaemia": "negated", "st elevation": "affirmed", "pericarditis": "affirmed"}),
    ("Without treatment, AF persists.", {"atrial fibrillation": "affirmed"}),
    ("No increase in ST elevation.", {"st elevation": "affirmed"}),
    ("Ruled out: AF. LBBB.", {"atrial fibrillation": "negated", "left bundle branch block": "negated"}),
    ("No, AF is present.", {"atrial fibrillation": "affirmed"}),
    ("It is not without AF.", {"atrial fibrillation": "affirmed"}),
    ("AF. No AF.", {"atrial fibrillation": None}),
])
def test_negation_of_findings(text, found):
    assert {item[0]: status for item, status in rewards.key_findings(text).items()} == found


# === numbers ================================================================================================


@pytest.mark.parametrize("text, found", [
    ("One of the leads of a 12-lead ECG.", set()),
    ("Type 2 second-degree AV block.", {("second-degree av block", "finding")}),
    ("PR 240", {(240.0, "ms", "")}), ("PR 0.24", {(240.0, "ms", "")}),
    ("a heart rate of 48", {(48.0, "bpm", "")}),
    ("QTc > 450 ms", {(450.0, "ms", "above")}), ("at least 120 ms", {(120.0, "ms", "above")}),
    ("120 ms or more", {(120.0, "ms", "above")}),
    ("longer than 0.12 s", {(120.0, "ms", "above")}), ("under 3 mm", {(3.0, "mm", "below")}),
    ("60 minutes", {(3_600_000.0, "ms", "")}),
    ("1 hour", {(3_600_000.0, "ms", "")}), ("72 per minute", {(72.0, "bpm", "")}),
    ("500 micrograms", {(0.5, "mg", "")})])
def test_numbers_count_with_a_unit_or_behind_a_measurement(text, found):
    assert set(rewards.key_findings(text)) == found


# === contradictions =========================================================================================

LONG = ("Hyperkalemia increases the risk of arrhythmia: peaked T waves in V2 come first, then a prolonged PR "
        "interval of more than 200 ms and a widened QRS complex. Left bundle branch block may follow, and "
        "treatment should not wait.")


@pytest.mark.parametrize("old, new", [
    ("increases", "decreases"), ("Hyperkalemia", "Hypokalemia"), ("Left", "Right"),
    ("prolonged", "shortened"), ("widened", "narrow"),
    ("200", "400"), ("more than", "less than"), ("V2", "V5"), ("peaked", "no peaked"),
    ("should not", "should"), ("may follow", "may not follow"),
    ("prolonged PR", "normal PR")])
def test_a_contradiction_in_a_long_answer_costs_a_clear_step(old, new):
    assert score(LONG, "What happens?", LONG)["score"] == pytest.approx(1)
    changed = score(LONG.replace(old, new), "What happens?", LONG)
    if new == "normal PR":  # no contradiction by any table: a fraction only
        assert changed["score"] < 1
    else:
        assert changed["score"] < 0.7 and changed["tokens"] <= 0.5
    hedged = score(LONG + " " + LONG.replace(old, new), "What happens?", LONG)
    assert hedged["score"] < (1 if new == "normal PR" else 0.7)  # both ways is no way out


@pytest.mark.parametrize("text",
                         ["{} All of this is wrong.", "{} Disregard the above.", "{} The opposite is true.",
                          "{} None of this is correct.",
                          "{} That isn't true.", "{} I was lying.", "The following is false: {}",
                          "{} I take it all back.",
                          "{} Just kidding!", "{} Scratch that.", "{} But everything I said is incorrect.",
                          "{} Do not believe this."])
def test_an_answer_that_takes_itself_back_has_no_content(text):
    result = score(text.format(LONG), "What happens?", LONG)
    assert result["findings"] == result["tokens"] == result["similarity"] == result["accuracy"] == 0
    assert result["score"] < 0.2


def test_what_only_sounds_like_a_retraction_is_none():
    for text in ("On the contrary, the rate is high.", "The wrong lead was used.",
                 "Ignore isolated beats in athletes with a normal heart.",
                 "This is not a sign of heart failure.", "A false positive is common.",
                 "The opposite axis deviation is seen in children."):
        assert rewards.retractions(text) == 0, text


@pytest.mark.parametrize("answer, gold", [
    ("NSTEMI", "Non-ST-elevation myocardial infarction"), ("60 minutes", "1 hour"),
    ("the QTc interval is prolonged", "prolonged QT interval"),
    ("AF is ruled out", "no AF"), ("negative for ST elevation", "No ST elevation"),
    ("AF is no longer present", "no AF"),
    ("AF with no P waves", "Atrial fibrillation with absent P waves"),
    ("LVH, not RVH", "left ventricular hypertrophy without right ventricular hypertrophy"),
    ("No LBBB, AF and ST elevation", "no ST elevation; no LBBB; no AF"), ("QTc above 450 ms", "QTc > 450 ms"),
    ("0.5 mg", "500 micrograms"),
    ("MI cannot be ruled out", "possible MI"), ("nonsustained VT", "non-sustained ventricular tachycardia"),
    ("72 per minute", "72 bpm")])
def test_the_same_in_other_words_is_near_gold(answer, gold):
    for one, two in ((answer, gold), (gold, answer)):
        assert score(one, "What does it show?", two)["score"] > 0.9


def test_accuracy_without_a_key_finding_has_a_threshold():
    gold = "The technician explains the procedure, places electrodes on the chest and asks you to lie still."
    right = "The technician explains the procedure, then places electrodes on the chest; you lie still."
    assert score(right, "What happens?", gold)["accuracy"] == 1
    for wrong in ("You lie still.", right.replace("explains", "never explains"), right
                  + " All of this is wrong.", "It hurts."):
        assert score(wrong, "What happens?", gold)["accuracy"] == 0


def test_a_no_that_answers_nothing_is_no_verdict():
    from data import ecg
    for question, answer, wanted in (
            ("What does the ECG show?", "No ST elevation.", None),
            ("Is there ST elevation?", "No ST elevation.", "no"),
            ("After surgery, can I drive?", "No, wait.", "no"),
            ("What is it, and is it bad?", "No idea.", None), ("Can I?", "Yes.", "yes")):
        assert ecg.make_row("x", question, answer)["extra"].get("verdict") == wanted
    assert [rewards.verdict(text)
            for text in ("Yes, but the answer is no.", "Yes, or rather no", "No; well, yes.",
                         "No. I mean yes!")] == [""] * 4
    assert score("No ST elevation is what it shows.", "What does it show?", "No ST elevation.")["score"] > 0.8


def lines_run(function, *arguments):
    """How many lines of rewards.py a call runs: a count that no busy machine changes."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != rewards.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece",
                         ["x absent ", "no ", "is not seen and ", "ruled out: ", "not only ", "no A, ",
                          "2 ms ", "than 5 or ", "2 ", "v1 ",
                          "left right ", "hypo hyper ", "all of this is wrong. ", "no is ",
                          "ST elevation or ", "yes no "])
def test_time_is_linear_in_any_repetition(piece):
    def run(size):
        for function in (rewards.read, rewards.said_in):
            function.cache_clear()
        return lines_run(score, (piece * size)[:size], "Why?",
                         "Because of ST elevation in V1, no left axis, 20 ms.")
    run(100)  # tables
    assert run(8000) < 5 * run(2000)


# === models =================================================================================================


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory, request):
    """A random RoBERTa with one output, saved in the form of cross-encoder/stsb-roberta-base."""
    from conftest import ROOT
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )
    folder = str(tmp_path_factory.mktemp("cross"))
    tiny = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=tiny.backend_tokenizer, pad_token="<|endoftext|>",
                            sep_token="<|im_end|>").save_pretrained(folder)
    torch.manual_seed(0)
    RobertaForSequenceClassification(RobertaConfig(vocab_size=len(tiny), hidden_size=32, num_hidden_layers=2,
                                                   num_attention_heads=4, num_labels=1,
                                                   intermediate_size=48, max_position_embeddings=600,
                                                   initializer_range=0.3,
                                                   pad_token_id=0)).save_pretrained(folder)
    return folder


TEXTS = ["Sinus bradycardia.",
         "The heart beats slowly, with a rate below sixty, and the PR interval is long.", "x", "No. " * 300]


def test_a_cross_encoder_scores_pairs_the_same_in_any_batch(cross_encoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    rewards.SCORED.clear()
    together = rewards.closeness(pairs, cross_encoder)
    rewards.SCORED.clear()
    assert [rewards.closeness([pair], cross_encoder)[0]
            for pair in pairs] == pytest.approx(together, abs=1e-5)
    tokenizer, model = (AutoTokenizer.from_pretrained(cross_encoder),
                        AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval())
    with torch.no_grad():
        expected = [model(**tokenizer(*pair, return_tensors="pt", truncation=True,
                                      max_length=512)).logits.sigmoid().item() for pair in pairs]
    assert together == pytest.approx(expected, abs=1e-4) and len(set(together)) > 8


def test_fluency_is_that_of_each_row_alone(family_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = family_folder("llama")
    rewards.SCORED.clear()
    together = rewards.mean_nll(TEXTS, folder)
    tokenizer, model = (AutoTokenizer.from_pretrained(folder),
                        AutoModelForCausalLM.from_pretrained(folder).eval())
    for text, value in zip(TEXTS, together):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids
        with torch.no_grad():
            assert value == (pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-4)
                             if ids.shape[1] > 1 else None)
    good, bad = sorted((text for text, value in zip(TEXTS, together) if value),
                       key=lambda text: together[TEXTS.index(text)])[::2]
    assert rewards.fluency([good, bad, good], [good, good, bad], folder) == [1.0, pytest.approx(math.exp(
        together[TEXTS.index(good)] - together[TEXTS.index(bad)])), 1.0]
    assert rewards.fluency([""], [good], folder) == [0.0]


def test_the_reasoning_mix(family_folder, cross_encoder):
    gold, question = TEXTS[1], "How fast?"
    result = rewards.compute_score("medical_o1", done(TEXTS[0]), gold, {"question": question},
                                   encoder=cross_encoder, language_model=family_folder("llama"))
    assert result["score"] == pytest.approx(0.5 * result["similarity"] + 0.4 * result["fluency"]
                                            + 0.1 * result["format"])
    assert 0 < result["fluency"] <= 1
    batch = rewards.compute_scores("medical_o1", [done(text) for text in TEXTS], [gold] * 4,
                                   [{"question": question}] * 4, encoder=cross_encoder,
                                   language_model=family_folder("llama"))
    single = [rewards.compute_score("medical_o1", done(text), gold, {"question": question},
                                    encoder=cross_encoder,
                                    language_model=family_folder("llama")) for text in TEXTS]
    assert batch == single


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300), st.text(max_size=100), st.text(max_size=100),
       st.sampled_from(["ecg_expert_qa", "medical_o1"]))
def test_any_text_gets_a_finite_score_in_range(text, gold, question, source):
    for completion in (text, done(text)):
        result = rewards.compute_score(source, completion, gold, {"question": question})
        assert -1 <= result["score"] <= 1
        assert all(0 <= result[part] <= 1
                   for part in ("findings", "tokens", "similarity", "format", "brevity", "accuracy"))


@pytest.mark.parametrize("text",
                         ["no " * 300_000, "ST elevation, or " * 60_000, "9" * 1_000_000, "-" * 1_000_000,
                          "1," * 500_000, "<answer>" * 120_000,
                          "st segment " * 90_000])
def test_a_megabyte_is_scored_in_under_a_second(text):
    start = time.process_time()  # not the clock's: others' work is none of ours
    score(text, "Why?", "Because of ST elevation.")
    assert time.process_time() - start < 1
