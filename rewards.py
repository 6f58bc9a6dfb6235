"""Reward functions of the collection: what a completion earns, and `compute_score`, for other engines too.

The file stands alone (it imports nothing of the project), so that verl and others can load it by path. Every
function takes plain text and is strict: an answer is parsed from its one block, never searched in the text.
Whoever hedges, repeats tags or writes the answer elsewhere earns nothing for it. Time is linear in the
completion's length.
"""
import functools
import json
import math
import re
import unicodedata
from collections import Counter
from itertools import accumulate
from pathlib import Path

REASONED = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
TAGS = {"pubmedqa": REASONED, "ecg_expert_qa": REASONED, "medical_o1": REASONED,
        "medmcqa": ("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>")}
LABELS = {"pubmedqa": ("yes", "no", "maybe"), "medmcqa": ("A", "B", "C", "D")}
CORRECT_WEIGHT = {"pubmedqa": 2.0, "medmcqa": 1.0}  # for the right answer
TAG_WEIGHT = {"pubmedqa": 0.2, "medmcqa": 0.05}  # for each tag in its place
SIMILARITY_WEIGHT = {"pubmedqa": 0.0, "medmcqa": 0.4}  # for reasoning that says what the explanation says


def tags_in_place(text, tags):
    """How many of `tags` stand in `text` exactly once and in their place, 0 to len(tags).

    In its place: after every occurrence of the tags before it and before every occurrence of the tags behind
    it; the last tag also needs the end of the text behind it (white space aside), so full marks mean that
    nothing follows the answer.
    """
    first, last = [text.find(tag) for tag in tags], [text.rfind(tag) for tag in tags]

    def in_place(i):
        return (first[i] == last[i] >= 0 and all(position < first[i] for position in last[:i])
                and all(position < 0 or position > first[i] for position in first[i + 1:])
                and (i < len(tags) - 1 or not text[first[i] + len(tags[i]):].strip()))

    return sum(map(in_place, range(len(tags))))


def answer_block(text, tags):
    """What stands between tags[-2] and tags[-1], stripped, or None where it is not the one answer block of
    `text`: each of the two must occur exactly once, in this order, with no other tag between or behind them.
    """
    opening, closing = tags[-2:]
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.find(opening) + len(opening), text.find(closing)
    if end < start or any(text.rfind(tag) >= start for tag in tags[:-2]):
        return None
    return text[start:end].strip()


def parse_answer(text, tags, labels):
    """The label in the one answer block of `text`, or "" where there is none.

    The block must hold one of `labels` and nothing else (case, white space around it and one full stop aside;
    ASCII only, so no look-alike passes).
    """
    answer = (answer_block(text, tags) or "").removesuffix(".").rstrip()
    return answer.lower() if answer.isascii() and answer.lower() in labels else ""


def parse_option(text, tags, options):
    """The letter of the one option that the answer block of `text` names, or "".

    Accepted: the letter ("B", "b.", "(B)", "B)"), the letter with the option's own text ("B. aspirin", "(b)
    Aspirin."), and the full text of exactly one option. Anything else, two letters say, names no option.
    options: texts of A, B, C, ...
    """
    answer = plain(answer_block(text, tags) or "")
    texts = [plain(option) for option in options]
    letters = "abcdefghijklmnopqrstuvwxyz"[:len(options)]
    bare = answer[1:] if answer[:1] == "(" else answer
    if bare[:1] and bare[0] in letters:
        marked = bare[1:2] in (".", ")", ":", "") and (answer[0] != "(" or bare[1:2] == ")")
        rest = bare[2:].lstrip(".: ") if marked else None
        if rest == "" or rest and rest == texts[letters.index(bare[0])]:
            return bare[0].upper()
    return letters[texts.index(answer)].upper() if texts.count(answer) == 1 and answer else ""


def plain(text):
    """Text for comparison: lower case (ASCII letters alone), single spaces, no full stop at the end."""
    return " ".join(text.split()).translate(LOWER).removesuffix(".").rstrip()


LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}  # casefold would let look-alikes pass


# === reasoning against the explanation ======================================================================

COMMON = frozenset(("a an and are as at be by for from has have in is it its of on or that the this to was "
                    "were which with").split())


def reasoning_block(text, tags):
    """What stands between the first two tags, stripped; "" unless both occur exactly once, in this order."""
    if text.count(tags[0]) != 1 or text.count(tags[1]) != 1:
        return ""
    return text[text.find(tags[0]) + len(tags[0]):max(text.find(tags[1]), 0)].strip()


def words(text):
    """Set of the words of a text that carry meaning: runs of letters and digits, lower case, without the
    commonest.
    """
    spaced = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text[:20_000]).lower())
    return frozenset(spaced.split()) - COMMON


def overlap(reasoning, explanation, question):
    """F1, 0 to 1, between the sets of words of the reasoning and of the explanation, those of the question
    left out. So what the question says earns nothing, nor does listing everything, which precision punishes.
    """
    said, wanted = words(reasoning) - words(question), words(explanation) - words(question)
    both = len(said & wanted)
    return 2 * both / (len(said) + len(wanted)) if both else 0.0


def similarity(reasoning, explanation, question, encoder=""):
    """How much of the explanation the reasoning says, 0 to 1.

    By `overlap`, or, with the name of an encoder, by cosines of embeddings: how far the reasoning closes the
    gap between the question and the explanation, (cos(r, e) - cos(q, e)) / (1 - cos(q, e)), so that the
    question alone, or padded, earns nothing. 0 where either is empty, or where fewer than a fifth of the
    reasoning's words are not the question's.
    """
    said = words(reasoning)
    if not said or not words(explanation) or len(said - words(question)) < len(said) / 5:
        return 0.0
    if not encoder:
        return overlap(reasoning, explanation, question)
    close, start = closeness([(reasoning, explanation), (question, explanation)], encoder)
    start = start if question.strip() else 0.0
    return min(1.0, max(0.0, (close - start) / (1 - start))) if start < 0.9999 else 0.0


# === models that score: loaded once a process, asked in batches, answers remembered =========================

SCORED = {}  # (measure, name of the model, text) to what was measured: many texts of a rollout recur


def load_scorer(name, model_class, **options):
    """(tokenizer, model) of transformers or peft, on the GPU where there is one; no code of theirs is run.
    Raises what these raise where the model cannot be had (OSError, mostly).
    """
    import torch
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masked in every measure below
    model = model_class.from_pretrained(name, trust_remote_code=False, **options)
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def measured(texts, measure, name, loader, max_length, size):
    """[what `measure` makes of each of `texts`, which may be pairs of texts, under the model `name`].

    measure(model, inputs): a list, one for each text of a batch, whatever padding is in it. Those not seen
    before are computed at once, `size` of alike lengths in a batch, cut to max_length tokens.
    """
    import torch
    fresh = [text for text in dict.fromkeys(texts) if (measure, name, text) not in SCORED]
    if len(SCORED) + len(fresh) > 20_000:
        SCORED.clear()
        fresh = list(dict.fromkeys(texts))
    fresh.sort(key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)))
    for first in range(0, len(fresh), size):
        tokenizer, model = loader(name)
        batch = fresh[first:first + size]
        columns = [batch] if isinstance(batch[0], str) else map(list, zip(*batch))
        inputs = tokenizer(*columns, truncation=True, max_length=max_length, padding=True,
                           padding_side="right", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            SCORED.update(zip(((measure, name, text) for text in batch), measure(model, inputs)))
    return [SCORED[measure, name, text] for text in texts]


@functools.cache
def load_encoder(name):
    """(tokenizer, model) of a sentence encoder ("sentence-transformers/all-MiniLM-L6-v2", say) or of a
    cross-encoder with one output ("cross-encoder/stsb-roberta-base"), told apart by the architecture in its
    configuration.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
    kinds = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or ()
    crossed = any("SequenceClassification" in kind for kind in kinds)
    model_class = AutoModelForSequenceClassification if crossed else AutoModel
    return load_scorer(name, model_class, use_safetensors=True)


def embeddings(model, inputs):
    """Unit vectors: mean of the encoder's last hidden states over a text's tokens, as all-MiniLM-L6-v2's card
    (huggingface.co/sentence-transformers/all-MiniLM-L6-v2) has it.
    """
    import torch
    states, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"][:, :, None]
    return list(torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1).cpu())


def agreements(model, inputs):
    """Sigmoids, 0 to 1, of a cross-encoder's output, as cross-encoder/stsb-roberta-base's card has it."""
    return [round(score, 5) for score in model(**inputs).logits[:, 0].float().sigmoid().tolist()]


def closeness(pairs, name):
    """How alike the two texts of each pair are: the cosine of their embeddings, -1 to 1, or, where `name` is
    a cross-encoder with one output, what it says, 0 to 1. Rounded, so that no batch changes it.
    """
    pairs = [tuple(text[:20_000] for text in pair) for pair in pairs]
    if pairs and getattr(load_encoder(name)[1], "num_labels", 0) == 1:
        return measured(pairs, agreements, name, load_encoder, 512, 64)
    vectors = measured([text for pair in pairs for text in pair], embeddings, name, load_encoder, 256, 64)
    return [round(float(a @ b), 5) for a, b in zip(vectors[::2], vectors[1::2])]


@functools.cache
def load_language_model(name):
    """(tokenizer, model) of a causal language model, "microsoft/biogpt" say, for `fluency`."""
    from transformers import AutoModelForCausalLM
    return load_scorer(name, AutoModelForCausalLM)


def log_perplexities(model, inputs):
    """Mean negative log-probability of each text's tokens in nats, None for one of fewer than two tokens.
    Each text by itself: padding is masked. https://huggingface.co/docs/transformers/perplexity
    """
    import torch
    ids, mask = inputs["input_ids"].long(), inputs["attention_mask"][:, 1:].bool()
    if ids.shape[1] < 2:
        return [None] * len(ids)
    logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none") * mask
    return [round(total / count, 5) if count else None
            for total, count in zip(nll.sum(dim=1).tolist(), mask.sum(dim=1).tolist())]


def mean_nll(texts, name):
    """The log perplexity of each text under a causal language model, over its first 512 tokens."""
    return measured([text[:20_000] for text in texts], log_perplexities, name, load_language_model, 512, 16)


def fluency(answers, golds, name):
    """min(1, perplexity of the gold answer / perplexity of the answer) of each, 0 to 1, under a causal
    language model: 1 for an answer that reads at least as easily as the gold one. Bounded, so that smooth
    babble can't win by it.
    """
    nll = mean_nll([*answers, *golds], name)
    return [0.0 if said is None else 1.0 if gold is None else math.exp(min(0.0, gold - said))
            for said, gold in zip(nll[:len(answers)], nll[len(answers):])]


@functools.cache
def load_reward_model(folder):
    """(tokenizer, model) of a folder that `python sft.py reward_model` wrote."""
    scale = json.loads((Path(folder) / "normalisation.json").read_text())
    if (Path(folder) / "adapter_config.json").exists():
        from peft import AutoPeftModelForSequenceClassification
        tokenizer, model = load_scorer(folder, AutoPeftModelForSequenceClassification, num_labels=1)
    else:
        from transformers import AutoModelForSequenceClassification
        tokenizer, model = load_scorer(folder, AutoModelForSequenceClassification, use_safetensors=True)
    model.config.pad_token_id = tokenizer.pad_token_id  # by which the model finds the last token
    model.usual_output = scale["mean"], scale["std"]
    return tokenizer, model


def normalised_outputs(model, inputs):
    """Sigmoids of a reward model's outputs, less the mean and divided by the standard deviation of those on
    its held-out pairs, so that rewards of different models have one scale.
    """
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    mean, std = model.usual_output
    return [round(score, 5) for score in ((logits[:, 0].float() - mean) / std).sigmoid().tolist()]


def learned_rewards(questions, answers, folder):
    """Scores, 0 to 1, of answers by a trained reward model, see `normalised_outputs`."""
    texts = [asked(question, answer[:20_000]) for question, answer in zip(questions, answers)]
    return measured(texts, normalised_outputs, folder, load_reward_model, 1024, 32)


def asked(question, answer):
    """What a reward model reads."""
    return f"Question: {question}\nAnswer: {answer}"


# === free text: what is said, and whether it is affirmed, negated or possible ===============================
# NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029) with ConText's "possible" (Harkema et al. 2009,
# doi:10.1016/j.jbi.2009.05.002): a trigger gives what follows it (pre) or precedes it (post) a status, up to
# a termination (end) or the end of the sentence; a pseudo-trigger gives one to its own words alone. The
# longest trigger counts; {be} is any form of be, {seen} any word of SEEN. To extend a table, add to its text.
# Departures, made because these texts state knowledge where the published rules read patient notes:
#   * "not cause", "not extend", "cause of" are no pseudo-trigger or termination: "not a cause of AF" denies;
#   * a comma, an "and" or a verb ends a scope where a new clause begins there, not in a list (`scope_ends`);
#   * near: adjectives and nouns ("absent P waves and ...") reach to the next comma, "and" or "with";
#   * "may" and "can" are no uncertainty: what a disease may show is how the gold answers state a fact;
#   * a negation of nothing but another negation affirms ("not without AF").

BE = "is are was were be been being".split()
SEEN = ("seen present evident found noted observed visible detected identified demonstrated suggested shown "
        "indicated recorded apparent appreciated confirmed occur exist").split()
TRIGGERS = {
    "pre":
        "no; not; without; never; neither; nor; cannot; denies; denied; deny; denying; no evidence of; no "
        "sign of; no signs of; without evidence of; without any evidence of; negative for; fails to show; "
        "fails to reveal; failed to show; no longer; rules out; ruled out; ruling out; unlikely; unlikely "
        "to; {be} unlikely to; inconsistent with; false that; not true that; untrue that; wrong that; "
        "incorrect that; not the case that; hardly; doubt",
    "near":
        "absent; absence of; lack of; lacking; lacks; lacked; free of; clear of; rather than; instead of",
    "post":
        "{be} absent; {be} ruled out; {be} excluded; {be} unlikely; seems unlikely; appears unlikely; not "
        "likely; {be} denied; not {seen}; not be {seen}; not been {seen}; cannot be {seen}; no longer "
        "{seen}; {be} lacking; {be} resolved; has resolved; have resolved",
    "possible":
        "possible; possibly; probable; suspected; suspicious for; suspicion of; concern for; questionable; "
        "rule out; not rule out; cannot rule out; cannot exclude; not exclude; might be; may represent; "
        "could represent; r o",
    "possible post":
        "{be} possible; {be} suspected; {be} questionable; remains possible; not ruled out; not be ruled "
        "out; not been ruled out; cannot be ruled out; cannot be excluded; not be excluded; not been "
        "excluded; not excluded; may be ruled out; must be ruled out; should be ruled out; could be ruled "
        "out; can be ruled out; to be ruled out",
    "pseudo":
        "not only; not just; not merely; not necessarily; no increase; no change; no significant change; no "
        "definite change; no interval change; no significant interval change; no suspicious change; not "
        "certain if; not certain whether; without difficulty; without further; without any further; no "
        "further; gram negative; free of charge; no doubt",
    "end":
        "but; however; nevertheless; yet; though; although; still; except; aside from; apart from; other "
        "than; secondary to; due to; because; whereas; while; which; who; despite; unless; when; if; "
        "presence of; presence; indicating; suggesting; consistent with; leading to; resulting in; between; "
        "involving; seen in; found in; observed in"}
VERBS = frozenset(
    ("is are was were has have had may can could might must shall should will would does do did show shows "
     "suggest suggests indicate indicates presents reflects reveals demonstrates occurs remains represents "
     "appears persists requires").split())
OPENERS = frozenset(
    ("a an the this these it they there in with during for at on by from as if when after before through "
     "to").split())


def by_first_word(entries):
    """{first word: [(words, what they stand for)]} of such entries, the longest first."""
    index = {}
    for spelled, what in sorted(entries, key=lambda entry: -len(entry[0])):
        index.setdefault(spelled[0], []).append((spelled, what))
    return index


def longest_at(i, spelled, index):
    """(length, what it stands for) of the longest entry of an index that begins at spelled[i], or (1, "")."""
    for entry, what in index.get(spelled[i], ()):
        if spelled[i:i + len(entry)] == entry:
            return len(entry), what
    return 1, ""


@functools.cache
def triggers():
    """All forms of TRIGGERS with their kinds, by_first_word."""
    return by_first_word([(trigger.replace("{be}", be).replace("{seen}", seen).split(), kind)
                          for kind, text in TRIGGERS.items() for trigger in text.split(";")
                          for be in (BE if "{be}" in trigger else [""])
                          for seen in (SEEN if "{seen}" in trigger else [""])])


BEHIND_ABSENT = (",", "and", "but", "in", "on", "with", "during")


def cues_of(sentence):
    """[(start, end, kind)] of the triggers in the tokens of a sentence."""
    cues, i = [], 0
    while i < len(sentence):
        length, kind = longest_at(i, sentence, triggers())
        following = sentence[i + length] if i + length < len(sentence) else ","
        if sentence[i] == "no" and i == 0 and length == 1 and following == ",":
            kind = ""  # "No, ..." answers a question, or is all of the sentence
        elif sentence[i] == "absent" and "or" in (following, *sentence[i - 1:i]):
            kind = ""  # "absent or inverted P waves"
        elif sentence[i] == "absent" and length == 1 and following in BEHIND_ABSENT:
            kind = "post"  # "P waves absent, ..."
        if kind:
            cues.append((i, i + length, kind))
        i += length
    return cues


def scope_ends(sentence):
    """(forward, backward): the places where a comma or "and" ends the scope of a trigger before it, or behind
    it.

    Forward: at a comma or "and" before an article, preposition or pronoun ("no P waves and a wide QRS"), or
    before more than five words (NegEx's window), or where a verb stands on both sides ("no AF is seen and
    the rhythm is regular"). Backward: at a comma unless a list ends here ("A, B and C are absent"), and at
    "and" behind a verb.
    """
    n, start = len(sentence), 0
    verbs = [*accumulate((token in VERBS for token in sentence), initial=0)]  # so many before a place
    joined = [*accumulate((token in ("and", "or", "nor") for token in sentence), initial=0)]
    comma = [n] * (n + 1)  # the next one
    for i in reversed(range(n)):
        comma[i] = i if sentence[i] == "," else comma[i + 1]
    forward, backward = set(), set()
    for i, token in enumerate(sentence):
        if token not in (",", "and"):
            continue
        behind = i + 2 if sentence[i + 1:i + 2] == ["and"] else i + 1
        following = sentence[behind] if behind < n else ""
        if following not in ("or", "nor"):
            new_clause = (verbs[comma[behind]] > verbs[behind]
                          and (verbs[i] > 0 or sentence[0] not in ("no", "neither")))
            if following in OPENERS or comma[behind] - behind > 5 or new_clause:
                forward.add(i)
        clause = verbs[i] > verbs[start]
        if token == ",":
            if i - start > 5 or clause or sentence[start] in OPENERS or joined[n] == joined[i]:
                backward.add(i)
            start = i + 1
        elif clause:
            backward.add(i)
    return forward, backward


def statuses(sentence, usual="affirmed"):
    """Of each token of a sentence: "affirmed", "negated" or "possible"; None where it is a trigger's."""
    result, cues = [usual] * len(sentence), cues_of(sentence)
    forward, backward = scope_ends(sentence)
    doubled = -1  # the cue that a negation right before it undoes
    for number, (start, end, kind) in enumerate(cues):
        if kind == "end":
            continue
        result[start:end] = [None] * (end - start)
        if kind == "pseudo":
            result[start + 1:end] = ["negated"] * (end - start - 1)
            continue
        status = "possible" if kind.startswith("possible") else "negated"
        inside = (number and kind in ("pre", "near") and result[start - 1] == "negated" != usual
                  and sentence[start - 1] not in (",", "and", "or")
                  and sentence[start] not in ("nor", sentence[cues[number - 1][0]]))
        if inside or number == doubled:  # "not caused by an absence of", "not without"
            status = usual

        said = False  # whether a word that says something has got the status
        if "post" in kind:
            for i in range(start - 1, cues[number - 1][1] - 1 if number else -1, -1):
                if i in backward:
                    break
                result[i], said = status, said or sentence[i] not in FILLER
        if said:
            continue
        barriers = (",", "and", "with") if kind == "near" else ()
        if start == 0 and sentence[0] == "without":
            barriers = (",",)
        limit = cues[number + 1][0] if number + 1 < len(cues) else len(sentence)
        i = end
        while (i < limit and i not in forward and sentence[i] not in barriers
               and not (said and sentence[i] in VERBS)):
            result[i], said = status, said or sentence[i] not in FILLER
            i += 1
        if i == limit < len(sentence) and not said:
            doubled = number + 1
            if cues[doubled][2] == "end":  # "not due to": what is denied is the link
                result[limit:cues[doubled][1]] = [status] * (cues[doubled][1] - limit)
    return result


# === free text: words, numbers, findings ====================================================================
# Findings of an ECG and words for them; the longest phrase counts, each place once, FILLER left out.

FINDINGS = {
    "normal sinus rhythm": "normal sinus rhythm; regular sinus rhythm; sinus rhythm",
    "normal ecg": "normal ecg; ecg is normal",
    "sinus bradycardia": "sinus bradycardia; bradycardia; slow sinus rhythm; slow heart rate; slow rate",
    "sinus tachycardia": "sinus tachycardia; fast sinus rhythm; rapid sinus rhythm; fast heart rate",
    "atrial fibrillation": "atrial fibrillation; af; afib; a fib; irregularly irregular rhythm",
    "atrial flutter": "atrial flutter; flutter wave; sawtooth wave",
    "supraventricular tachycardia": "supraventricular tachycardia; svt; psvt",
    "ventricular tachycardia": "ventricular tachycardia; vt",
    "ventricular fibrillation": "ventricular fibrillation; vf; vfib",
    "premature ventricular beats":
        "premature ventricular contraction; premature ventricular complex; premature ventricular beat; "
        "ventricular ectopy; ventricular ectopic; pvc",
    "premature atrial beats":
        "premature atrial contraction; premature atrial complex; premature atrial beat; atrial ectopy; "
        "pac",
    "first-degree av block":
        "first degree av block; first degree atrioventricular block; first degree heart block; prolonged "
        "pr interval; pr prolongation; long pr interval",
    "second-degree av block":
        "second degree av block; second degree atrioventricular block; second degree heart block; mobitz; "
        "wenckebach",
    "complete heart block":
        "complete heart block; complete av block; third degree av block; third degree heart block; "
        "complete atrioventricular block",
    "short pr interval": "short pr; shortened pr; pr short; pr shorten",
    "pre-excitation": "pre excitation; preexcitation; delta wave; wolff parkinson white; wpw",
    "right bundle branch block": "right bundle branch block; rbbb; right bundle block",
    "left bundle branch block": "left bundle branch block; lbbb; left bundle block",
    "left anterior fascicular block": "left anterior fascicular block; left anterior hemiblock; lafb",
    "wide qrs": "wide qrs; qrs widening; prolonged qrs; qrs prolongation",
    "low voltage": "low voltage; reduced voltage; low qrs voltage; reduced qrs amplitude",
    "prolonged qt interval":
        "prolonged qt interval; prolonged qtc interval; qt prolongation; qtc prolongation; long qt; long "
        "qtc; qtc is long; qt is long",
    "short qt interval":
        "short qt; shortened qt; short qtc; shortened qtc; qt short; qtc short; qt shorten; qtc shorten",
    "left axis deviation":
        "left axis deviation; left axis; leftward axis; axis to the left; axis deviation to the left",
    "right axis deviation":
        "right axis deviation; right axis; rightward axis; axis to the right; axis deviation to the right",
    "st elevation": "st elevation; elevation of the st segment; raised st segment",
    "stemi": "stemi; st elevation myocardial infarction; st elevation mi",
    "nstemi": "nstemi; nonst elevation myocardial infarction; nonst elevation mi",
    "st depression": "st depression; depression of the st segment",
    "t wave inversion": "t wave inversion; inverted t wave; t inversion; negative t wave; inverted t",
    "peaked t waves":
        "peaked t wave; tall t wave; hyperacute t wave; pointed t wave; tall peaked t wave; tented t "
        "wave; t wave are peaked; t wave are tall",
    "flat t waves": "flat t wave; t wave flattening",
    "u waves": "u wave; prominent u wave",
    "pathological q waves": "q wave; pathological q wave; pathologic q wave",
    "left ventricular hypertrophy": "left ventricular hypertrophy; lvh",
    "right ventricular hypertrophy": "right ventricular hypertrophy; rvh",
    "left atrial enlargement": "left atrial enlargement; p mitrale",
    "right atrial enlargement": "right atrial enlargement; p pulmonale",
    "electrical alternans": "electrical alternans",
    "myocardial infarction": "myocardial infarction; heart attack; mi",
    "ischaemia": "ischemia; ischemic",
    "pericarditis": "pericarditis",
    "hyperkalaemia": "hyperkalemia; high potassium",
    "hypokalaemia": "hypokalemia; low potassium",
    "inferior": "inferior; ii iii avf",
    "anterior": "anterior",
    "lateral": "lateral",
    "septal": "septal",
    "posterior": "posterior"}
UNITS = {unit: (kind, factor) for kind, units in {  # kind: {unit: how many of the kind's own}
    "ms": {"ms": 1, "msec": 1, "millisecond": 1, "s": 1000, "sec": 1000, "second": 1000, "min": 60_000,
           "minute": 60_000, "h": 3.6e6, "hr": 3.6e6, "hour": 3.6e6, "day": 8.64e7, "week": 6.048e8},
    "month": {"month": 1, "year": 12},
    "mm": {"mm": 1, "millimeter": 1, "millimetre": 1, "cm": 10, "centimeter": 10, "centimetre": 10},
    "mv": {"mv": 1, "millivolt": 1, "\u00b5v": 0.001, "microvolt": 0.001},
    "bpm": {"bpm": 1}, "beat": {"beat": 1}, "%": {"%": 1, "percent": 1},
    "degree": {"°": 1, "degree": 1, "deg": 1},
    "mg": {"mcg": 0.001, "\u00b5g": 0.001, "ug": 0.001, "microgram": 0.001, "mg": 1, "milligram": 1,
           "g": 1000, "gram": 1000, "kg": 1e6, "kilogram": 1e6},
    "ml": {"ml": 1, "milliliter": 1, "millilitre": 1, "l": 1000, "liter": 1000, "litre": 1000},
    "mmhg": {"mmhg": 1}, "mmol": {"mmol": 1}, "meq": {"meq": 1}, "hz": {"hz": 1}, "j": {"j": 1, "joule": 1},
}.items() for unit, factor in units.items()}
MEASURED = {"pr": "ms", "qrs": "ms", "qt": "ms", "qtc": "ms", "rr": "ms", "rate": "bpm", "axis": "degree",
            "ef": "%", "fraction": "%"}
BEFORE_THAN = {"above": "more greater longer higher wider larger".split(),
               "below": "less fewer shorter lower narrower smaller".split()}
COMPARISONS = {word: side for side, spelled in (
    ("above", [*"> ≥ above over exceed exceeds exceeding beyond".split(), *BEFORE_THAN["above"]]),
    ("below", [*"< ≤ below under".split(), *BEFORE_THAN["below"]])) for word in spelled}
LINKS = frozenset("than or equal to of about approximately around a an the is was are at being".split())
NUMBER_WORDS = {word: str(i) for i, word in enumerate(
    "one two three four five six seven eight nine ten eleven twelve".split(), start=1)}
WRITTEN = (("can't", "cannot"), ("can not", "cannot"), ("n't", " not"), ("beats per min", "bpm"),
           ("beats/min", "bpm"), ("bpmute", "bpm"), ("per minute", "bpm"), ("/min", " bpm"),
           ("mm hg", "mmhg"), ("at least", "≥"), ("at most", "≤"), ("up to", "≤"), ("no more than", "≤"),
           ("no less than", "≥"), ("e.g.", "eg"), ("i.e.", "ie"), ("vs.", "vs"), ("aemi", "emi"),
           ("aemor", "emor"), ("first-degree", "1st degree"), ("first degree", "1st degree"),
           ("second-degree", "2nd degree"), ("second degree", "2nd degree"), ("third-degree", "3rd degree"),
           ("third degree", "3rd degree"))  # in this order
FILLER = COMMON | frozenset(
    "interval segment complex seen present evident found noted observed visible there detected".split())
SAME = {"invers": "invert", "widen": "wide", "broad": "wide", "broaden": "wide", "electrocardiogram": "ecg",
        "ekg": "ecg", "lengthen": "prolong", "flatten": "flat",
        ">": "above", "≥": "above", "<": "below", "≤": "below"}
NON = re.compile(r"\bnon[- ](?=[a-z])")
TOKEN = re.compile(  # cannot backtrack
    r"(?<![\w.])[-\u2212](?=\d)|\d+(?:[.,]\d+)*|[^\W\d_]+\d*|[.;:!?,\n<>≤≥%°]")


@functools.lru_cache(100_000)
def stem(word):
    """A word in lower case without its ending (-s, -ed, -ing, -ion, -ly, ...), and one word for a few that
    mean the same.
    """
    if word.endswith("ies") and len(word) > 5:
        word = word[:-3] + "y"
    for ending in ("ation", "ions", "ings", "ion", "ing", "ed", "es", "s", "ly", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4 and not word.endswith(("us", "is", "ss")):
            word = word[:-len(ending)]
            break
    word = word[:-2] if word.endswith("at") and len(word) > 5 else word  # elevat(ed), and elev(ation)
    return SAME.get(word, word)


def number_tokens(raw):
    """Tokens with each number among them as [digits, unit or None, as written]; a range has one unit."""
    tokens, i = [], 0
    while i < len(raw):
        token, sign = raw[i], "-" if i and raw[i - 1] in ("-", "\u2212") else ""
        i += 1
        if token[0].isdigit() or token in NUMBER_WORDS:
            digits = sign + NUMBER_WORDS.get(token, token)
            if len(digits.rpartition(",")[2]) != 3:  # 0,12 as against 1,000
                digits = ".".join(digits.rsplit(",", 1))
            unit = UNITS.get(raw[i], UNITS.get(raw[i].removesuffix("s"))) if i < len(raw) else None
            tokens.append([digits.replace(",", ""), unit, token])
            i = i + 1 if unit else i
        elif token not in ("-", "\u2212"):
            tokens.append(token)
    for k in reversed(range(len(tokens) - 1)):
        if isinstance(tokens[k], list) and not tokens[k][1]:
            following = tokens[k + 2:k + 3] if tokens[k + 1] in ("to", "or", "and") else [tokens[k + 1]]
            if following and isinstance(following[0], list):
                tokens[k][1] = following[0][1]
    return tokens


def take_comparison(tokens):
    """("above", "below" or "", the word before) of the end of `tokens`; takes the comparison off them."""
    last = len(tokens) - 1
    i = last
    while i >= 0 and last - i < 5 and (tokens[i] in LINKS or tokens[i] in ("interval", "duration")):
        i -= 1
    word = tokens[i] if i >= 0 else ""
    compared = COMPARISONS.get(word, "")
    if not compared or word in BEFORE_THAN[compared] and "than" not in tokens[i + 1:]:
        return "", word
    del tokens[i:]
    while tokens and tokens[-1] in LINKS:
        tokens.pop()
    return compared, tokens[-1] if tokens else ""


def with_numbers(raw):
    """Tokens with their numbers as (value, unit, "above", "below" or ""), units brought to one: "0.12 s" is
    (120.0, "ms", "").

    A number counts with a unit or behind a measurement's name ("PR 240"); others stay words. Both numbers of
    "3 to 6 months" are months; "> 120 ms", "120 ms or more" and "longer than 120 ms" are above.
    """
    tokens, result = number_tokens(raw), []
    for k, token in enumerate(tokens):
        if not isinstance(token, list):
            result.append(token)
            continue
        digits, unit, written = token
        compared, before = take_comparison(result)
        try:
            value = float(digits)
        except ValueError:  # 1.2.3, or digits of another script
            value = math.inf
        if not unit and before in MEASURED and written[0].isdigit():
            unit = (MEASURED[before], 1000 if MEASURED[before] == "ms" and abs(value) < 10 else 1)
        if math.isinf(value) or not unit:
            result += [compared] if compared else []
            result.append(written if written == "one" else digits)
            continue
        if tokens[k + 1:k + 2] == ["or"] and k + 2 < len(tokens) and isinstance(tokens[k + 2], str):
            following = COMPARISONS.get(tokens[k + 2])
            if following:  # "or more", which is said with this
                compared, tokens[k + 1:k + 3] = following, ["of", "of"]
        result.append((round(value * unit[1], 6), unit[0], compared))
    return result


@functools.lru_cache(1024)
def read(text):
    """What a text says: of each sentence, [(word, status)]; words are stems or numbers (see `with_numbers`),
    without triggers and FILLER. "Ruled out: ..." negates all that follows. Reads 50,000 characters, in time
    linear in them.
    """
    text = unicodedata.normalize("NFKC", text[:50_000]).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = text.replace("\N{GREEK SMALL LETTER MU}", "\N{MICRO SIGN}").lower()
    for written, meant in WRITTEN:
        text = text.replace(written, meant)
    sentences, sentence = [], []
    usual = "affirmed"
    for token in [*with_numbers(TOKEN.findall(NON.sub("non", text))), "."]:
        if not isinstance(token, str) or token not in ".;:!?\n":
            sentence.append(token)
            continue
        status = statuses(sentence, usual)
        said = [(stem(word) if isinstance(word, str) else word, how) for word, how in zip(sentence, status)
                if how and word not in FILLER and word != ","]
        if token == ":" and None in status and not said:
            usual = "negated"
        if said:
            sentences.append(said)
        sentence = []
    return sentences


@functools.cache
def phrases():
    """All variants of FINDINGS with their findings, by_first_word."""
    return by_first_word([([word for sentence in read(variant) for word, _ in sentence], finding)
                          for finding, variants in FINDINGS.items() for variant in variants.split(";")])


@functools.lru_cache(1024)
def said_in(text):
    """Of each sentence of `read`: [(item, status)], the words of a finding brought together to (finding,
    "finding").
    """
    result = []
    for sentence in read(text):
        spelled, said = [word for word, _ in sentence], []
        i = 0
        while i < len(sentence):
            item, status = sentence[i]
            length, finding = longest_at(i, spelled, phrases())
            if finding:
                item, its_words = (finding, "finding"), {how for _, how in sentence[i:i + length]}
                status = next(how for how in ("negated", "possible", "affirmed") if how in its_words)
            said.append((item, status))
            i += length
        result.append(said)
    return result


def key_findings(text):
    """{(finding, "finding") or (value, unit, comparison): "affirmed", "negated", "possible", or None where
    affirmed and negated} of a text, see FINDINGS and `with_numbers`.
    """
    said = {}
    for sentence in said_in(text):
        for item, status in sentence:
            if isinstance(item, tuple):
                said.setdefault(item, set()).add(status)
    return {item: None if {"affirmed", "negated"} <= how
            else next(status for status in ("affirmed", "negated", "possible") if status in how)
            for item, how in said.items()}


def half_said(number):
    """A number, (value, unit, comparison), without its comparison, or with one where it has none."""
    return [(*number[:2], compared) for compared in ([""] if number[2] else ["above", "below"])]


def findings_f1(answer, gold, question=""):
    """F1, 0 to 1, between the key findings of an answer and of the gold answer, or None where the gold answer
    has none of its own.

    A finding is right if it has the gold answer's status; "no ST elevation" where the gold has ST elevation
    is a miss and an error, and so is saying both; half right is "possible" for affirmed, and a number
    without its comparison. Findings that the question names in the same way count for neither side, and what
    the gold answer does not mention may be denied. The measure is that of CheXbert's label F1 (Smit et al.
    2020, arXiv:2004.09167), with findings of ECGs.
    """
    given, in_gold = key_findings(question), key_findings(gold)
    wanted = {item: status for item, status in in_gold.items() if status and given.get(item) != status}
    if not wanted:
        return None
    torn = {item for item, status in in_gold.items() if not status}
    said = {item: status for item, status in key_findings(answer).items() if given.get(item, "") != status
            and (item in wanted or status != "negated" and item not in torn)}
    right = 0.0
    for item, status in wanted.items():
        halves = [] if item[1] == "finding" else [half for half in half_said(item) if half in said]
        if said.get(item) == status:
            right += 1.0
        elif item in said and {said[item], status} == {"affirmed", "possible"}:
            right += 0.5
        elif item not in said and halves and said[halves[0]] == status:
            right += 0.5
    return 2 * right / (len(wanted) + len(said))


def flat(text):
    """The items of all sentences of a text, with affirmed for possible where they are words."""
    return [(item, status if isinstance(item, tuple) or status == "negated" else "affirmed")
            for sentence in said_in(text) for item, status in sentence]


def token_f1(answer, gold, question=""):
    """F1, 0 to 1, between the words and numbers of an answer and of the gold answer, those of the question
    left out.

    As SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250), but a finding is one word, however it was worded, a
    negated word is another word, findings and numbers count three times, and the F1 is multiplied by 0.2 +
    0.8 times the share of the other words in common that have a neighbour in common: shuffled words say
    nothing.
    """
    given = set(flat(question))
    said, wanted = ([item for item in flat(text) if item not in given] for text in (answer, gold))
    if not wanted:  # the gold answer only repeats the question
        said, wanted = flat(answer), flat(gold)

    def weight(items):
        return sum(3 * count if isinstance(item[0], tuple) else count for item, count in items.items())

    both = Counter(said) & Counter(wanted)
    if not both:
        return float(plain(answer) == plain(gold))
    pairs = set(zip(wanted, wanted[1:]))
    linked = {item for pair in zip(said, said[1:]) if pair in pairs for item in pair}
    loose = [item for item in both if not isinstance(item[0], tuple)]
    order = sum(item in linked for item in loose) / len(loose) if loose and len(wanted) > 1 else 1.0
    return 2 * weight(both) / (weight(Counter(said)) + weight(Counter(wanted))) * (0.2 + 0.8 * order)


def length_guard(answer, gold):
    """1 for an answer of at most twice the gold answer's words, or 30 more; then falling, to 0 at twice."""
    n, limit = len(answer.split()), max(2 * len(gold.split()), len(gold.split()) + 30)
    return min(1.0, max(0.0, 2 - n / limit))


# === free text: contradictions ==============================================================================
# Words of opposite meaning: either side of a "|" is the other's opposite, up to the ";". Inflections need no
# mention (see `stem`).

OPPOSITES = """
    increase elevate rise raise high higher augment upward ascend upslope upsloping grow up | decrease reduce
    reduction lower low fall drop decline depress diminish downward descend downslope downsloping lessen
    down; upper | lower; prolong long longer lengthen | shorten short shorter brief; wide wider widen broad
    broaden | narrow narrower; left leftward | right rightward; fast rapid quick faster accelerate | slow
    slower decelerate; early earlier before precede prior | late later after follow subsequent; upright |
    invert; positive | negative; normal | abnormal; anterior | posterior; superior | inferior; proximal |
    distal; medial | lateral; atrial atrium atria | ventricular ventricle; systole systolic | diastole
    diastolic; tachycardia | bradycardia; tall | small short; large big great | small little; deep | shallow;
    thick thicken | thin; strong stronger | weak weaker; more | less fewer; most majority many | least
    minority few; maximum maximal | minimum minimal; always usual often frequent common commonly | never rare
    rarely uncommon seldom; acute sudden abrupt | chronic gradual; transient temporary | permanent
    persistent; mild minor | severe major; improve better benefit beneficial | worsen worse deteriorate harm
    harmful; benign | malignant; safe | dangerous unsafe; start begin initiate | stop end cease discontinue
    terminate; include | exclude; accept allow permit | refuse forbid prohibit deny reject; cause provoke
    promote trigger | prevent inhibit block; activate | inhibit; depolarize depolarization | repolarize
    repolarization; constrict | dilate dilatation; contract | relax; sympathetic | parasympathetic; artery
    arterial | vein venous; primary | secondary; male man men | female woman women; young younger | old older
    elderly; same similar identical | different distinct; true correct right | false incorrect wrong; above
    over | below under; internal inside inner | external outside outer; diffuse widespread global | local
    localize focal; unilateral | bilateral; simple | complex; concave | convex; lose loss | gain; strengthen
    | weaken; necessary required mandatory | optional unnecessary; public | private; first | last; day
    daytime | night nighttime; open | close; hot warm | cold
"""
PREFIXES = ("non", "un", "in", "im", "ir", "ab", "a", "dis", "de", "hyper", "hypo", "tachy", "brady")
SWAPPED = {"hyper": "hypo", "hypo": "hyper", "tachy": "brady", "brady": "tachy"}
FALSE = frozenset(
    ("wrong false incorrect untrue mistaken inaccurate opposite reverse contrary inverse nonsense "
     "disregard ignore forget retract withdraw invalid lie lying lied error erroneous fabricated fiction "
     "joke joking kidding rubbish scratch strike reject").split())
TRUE = frozenset(
    "true correct right accurate valid so case holds applies hold apply happens really believe trust".split())
DENY = frozenset("not none nothing neither never no".split())
REFER = frozenset(
    ("this that these those it above all everything answer answers statement statements claim claims said "
     "wrote told previous preceding foregoing former following which what i my mine me you please text "
     "sentence sentences information of is are was were be the a an in fact actually just take back "
     "everything anything entire whole entirely completely totally both just about every each word written "
     "stated here before earlier and or but do does did has have been must should can actual reality truth "
     "quite simply instead however s any").split())

@functools.cache
def opposites():
    """{stem: [(line of OPPOSITES, side, 1 or -1)]}."""
    index = {}
    for line, text in enumerate(OPPOSITES.split(";")):
        for side, spelled in zip((1, -1), text.split("|")):
            for word in dict.fromkeys(map(stem, spelled.split())):
                index.setdefault(word, []).append((line, side))
    return index


def retractions(text):
    """How many clauses of a text do nothing but call it false ("All of this is wrong.", "Disregard the
    above", "The opposite is true"): of words that point at the answer, deny or call false; one other word may
    be among them.
    """
    def retracts(clause):
        spelled = re.findall(r"[^\W\d_]+", clause)
        false = not FALSE.isdisjoint(spelled) or {"take", "back"} <= set(spelled)
        denied, true = not DENY.isdisjoint(spelled), not TRUE.isdisjoint(spelled)
        others = sum(word not in pointing for word in spelled)
        return (denied and true or false and not denied) and others <= (1 if len(spelled) > 3 else 0)

    pointing = FALSE | DENY | TRUE | REFER
    clauses = re.split(r"[.;:!?,\n()\u2013\u2014]|\bbut\b|\band\b|\bwhich\b|\bhowever\b",
                       text[:50_000].lower().replace("n't", " not"))
    return sum(map(retracts, clauses))


def opposed(answer, gold):
    """How many words of the answer say the opposite of the gold answer's: beside the same neighbour ("ST
    depression" for "ST elevation"), or instead of it anywhere, or with another prefix ("irregular",
    "hypokalemia"), in the same status.
    """
    vocabulary = {word for text in (gold, answer) for sentence in read(text) for word, _ in sentence
                  if isinstance(word, str)}
    prefixed = {}  # word: its poles, as in `opposites`
    for word in vocabulary:
        for prefix in PREFIXES:
            rest = word.removeprefix(prefix)
            if rest != word and len(rest) > (4 if prefix == "a" else 3):
                for other in ({rest, SWAPPED.get(prefix, prefix) + rest} & vocabulary) - {word}:
                    prefixed.setdefault(word, []).append((prefix + rest, -1))
                    prefixed.setdefault(other, []).append((prefix + rest, 1))

    def occurrences(text):
        """[(poles of a word, its neighbours, how often)]; a pole is (line, side, negated)."""
        places = Counter()  # (word before, word, word behind, negated): a text may repeat itself without end
        for sentence in read(text):
            spelled = [None, *(word for word, _ in sentence), None]
            negated = [status == "negated" for _, status in sentence]
            places.update(zip(spelled, spelled[1:], spelled[2:], negated))
        for (before, word, behind, negated), times in places.items():
            poles = [(*pole, negated) for pole in (*opposites().get(word, ()), *prefixed.get(word, ()))]
            if poles:
                yield poles, {before, behind} - {word, None}, times

    def other(pole):
        return pole[0], -pole[1], pole[2]

    wanted, beside = Counter(), {}  # of each pole in the gold answer: how often, and its neighbours
    for poles, neighbours, times in occurrences(gold):
        for pole in poles:
            wanted[pole] += times
            beside.setdefault(pole, set()).update(neighbours)
    said, there = Counter(), 0
    for poles, neighbours, times in occurrences(answer):
        for pole in poles:
            said[pole] += times
        if any(beside.get(other(pole), set()) & neighbours - beside.get(pole, set()) for pole in poles):
            there += times
    instead = max((min(count - wanted[pole], wanted[other(pole)] - said[other(pole)])
                   for pole, count in said.items()), default=0)
    return max(there, instead)


def numbers_in(text):
    """(Counter of the numbers of a text, {(where, word beside, unit): numbers}); a word that ends in a digit
    is one too ("V2"), its letters are its unit.
    """
    numbers, places = Counter(), {}
    for sentence in read(text):
        for i, (word, _) in enumerate(sentence):
            if isinstance(word, str) and not word[-1].isdigit():
                continue
            number = word if isinstance(word, tuple) else (word, word.rstrip("0123456789.").lstrip("-"), "")
            numbers[number] += 1
            for step in (-1, 1):
                beside = sentence[i + step][0] if 0 <= i + step < len(sentence) else ""
                places.setdefault((step, beside, number[1]), set()).add(number)
    return numbers, places


def numbers_changed(answer, gold, question=""):
    """How many numbers of the answer contradict the gold answer's: another of the same unit (or of the same
    word: "V2") that neither the gold answer nor the question has, instead of one of the gold answer's or
    beside the same word as it; and bare numbers ("type 2") that replace another beside the same word.
    """
    (said, said_at), (wanted, wanted_at) = numbers_in(answer), numbers_in(gold)
    missing, extra = wanted - said, said - wanted
    for number in list(missing):  # half said, but not changed
        for other in half_said(number):
            both = min(missing[number], extra[other])
            missing[number] -= both
            extra[other] -= both
    given, _ = numbers_in(question)
    new = {number for number, count in extra.items()
           if count and number not in wanted and number not in given}
    instead, lost = Counter(), Counter()
    for number, count in extra.items():
        if number in wanted or number in new:
            instead[number[1]] += count
    for number, count in missing.items():
        lost[number[1]] += count
    changed = sum(count for unit, count in (instead & lost).items() if unit)
    bare = 0
    for place, numbers in said_at.items():
        if place in wanted_at and place[2]:
            changed = max(changed, 1 if numbers & new else 0)
        elif place in wanted_at and numbers - wanted_at[place] and wanted_at[place] - numbers:
            bare = 1
    return changed + bare


def neighbours(said):
    """[((item, the next), (whether negated, the next))] of a sentence; a single item stands beside itself."""
    return [((a, b), (one == "negated", two == "negated"))
            for (a, one), (b, two) in zip(said, said[1:] or said)]


def contradictions(answer, gold, question=""):
    """How often an answer says the opposite of the gold answer: sentences that negate a finding, or two
    neighbouring words, which the gold answer affirms (or the other way round), and what `opposed` and
    `numbers_changed` count. What the gold answer says both ways can't be contradicted.
    """
    wanted, pairs = key_findings(gold), {}
    for said in said_in(gold):
        for items, negated in neighbours(said):
            pairs.setdefault(items, set()).add(negated)

    def turned(said):
        return (any({status, wanted.get(item)} == {"affirmed", "negated"} for item, status in said)
                or any(negated not in pairs.get(items, [negated]) for items, negated in neighbours(said)))

    return sum(map(turned, said_in(answer))) + opposed(answer, gold) + numbers_changed(answer, gold, question)


# === the score ==============================================================================================

# Weights of the parts of a free-text score. The parts are 0 to 1; parts whose model is not there leave their
# weight to the others.
WEIGHTS = {"hybrid": {"findings": 0.4, "tokens": 0.2, "similarity": 0.2, "fluency": 0.05, "format": 0.1,
                      "brevity": 0.05},
           "reasoning": {"similarity": 0.5, "fluency": 0.4, "format": 0.1}}
# "All right" where the gold answer has no key finding and no verdict: no answer with a contradiction can
# pass it. On the real rows of tests/README.md, 89 of 117 second answers to a question do, and 23 of 8,772
# wrong ones.
ENOUGH = 0.5
METHOD = {"ecg_expert_qa": "hybrid", "medical_o1": "reasoning"}  # the usual mix of a data source


def weighted(parts, mix):
    """Mean of the parts that `mix`, {part: weight}, names, kept in -1 to 1."""
    mean = sum(weight * parts[name] for name, weight in mix.items()) / sum(mix.values())
    return max(-1.0, min(1.0, mean))


def compute_scores(data_source, solution_strs, ground_truths, extra_infos, *, method="", weights=None,
                   encoder="", language_model="", reward_model=""):
    """Scores free-text completions, so many at once that models see batches; compute_score of each gives the
    same.

    data_source: "ecg_expert_qa" or "medical_o1". The other three: lists of equal length, see compute_score.
    method: a key of WEIGHTS ("" = METHOD's). weights: instead of its weights; "learned", the reward model's,
    is another part, of weight 0 unless given. encoder, language_model, reward_model: names of models, "" for
    none: then similarity is token_f1 of the overlap of words, and fluency and learned are left out.
    Returns a dict each: score, -1 to 1: the weighted mean of the parts, or -1 where there is no answer in the
    one answer block; rule, the same without the reward model; the parts, unweighted, 0 to 1; accuracy (1.0 or
    0.0: the verdict of a yes/no question is right, else every key finding is, or, where the gold answer has
    none, tokens is more than ENOUGH); format_ok; answer. Each contradiction of the gold answer (see
    `contradictions`) halves findings, tokens and similarity; an answer with the wrong verdict, or that takes
    itself back, has none of them.
    """
    tags, mix = TAGS[data_source], weights or WEIGHTS[method or METHOD[data_source]]
    answers = [answer_block(text, tags) or "" for text in solution_strs]
    extra_infos = [extra or {} for extra in extra_infos]
    questions = [extra.get("question") or "" for extra in extra_infos]
    if encoder:  # in batches, for what `similarity` asks below
        closeness([pair for answer, gold, question in zip(answers, ground_truths, questions) if answer
                   for pair in ((answer, gold), (question, gold))], encoder)
    fluent = fluency(answers, ground_truths, language_model) if language_model else []
    learned = learned_rewards(questions, answers, reward_model) if reward_model else []
    results = []
    for i, answer in enumerate(answers):
        gold, question = ground_truths[i], questions[i]
        in_place = tags_in_place(solution_strs[i], tags)
        by_words = similar = token_f1(answer, gold, question) if answer else 0.0
        by_findings = findings_f1(answer, gold, question) if answer else 0.0
        if encoder and answer:
            similar = 1.0 if plain(answer) == plain(gold) else similarity(answer, gold, question, encoder)
        wanted = verdict(gold) if extra_infos[i].get("verdict") else ""
        if retractions(answer) > retractions(gold) or wanted and verdict(answer) != wanted:
            kept = 0.0
        else:
            kept = 0.5 ** contradictions(answer, gold, question)
        parts = {"findings": kept * (by_words if by_findings is None else by_findings),
                 "tokens": kept * by_words, "similarity": kept * similar,
                 "format": in_place / len(tags), "brevity": length_guard(answer, gold) if answer else 0.0}
        if fluent:
            parts["fluency"] = fluent[i]
        if learned:
            parts["learned"] = learned[i] if answer else 0.0
        there = {name: weight for name, weight in mix.items() if name in parts}
        rules = {name: weight for name, weight in there.items() if name != "learned"}
        if wanted:
            right = kept > 0 and verdict(answer) == wanted
        else:
            right = parts["findings"] > ENOUGH if by_findings is None else parts["findings"] == 1
        results.append({"score": weighted(parts, there) if answer else -1.0,
                        "rule": weighted(parts, rules or there) if answer else -1.0, **parts,
                        "accuracy": float(right), "format_ok": float(in_place == len(tags)),
                        "answer": answer})
    return results


def verdict(answer):
    """"yes" or "no" where a free-text answer begins with it and does not say the other anywhere as an answer:
    at the head of a sentence, or before a punctuation mark, "and", "or" or the end ("Yes and no.", "Yes. No
    ...", "Yes, but the answer is no."); else "".
    """
    text = answer.lower()[:50_000]
    first = re.match(r"\W*(yes|no)\b", text)
    if not first:
        return ""
    other = {"yes": "no", "no": "yes"}[first[1]]
    taken_back = re.search(rf"(?:^|[.;!?\n])\W*{other}\b|\b{other}\s*(?:[^\w\s'’]|$|(?:and|or)\b)", text)
    return "" if taken_back else first[1]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, *, correct_weight=None,
                  tag_weight=None, similarity_weight=None, encoder="", reward_router_address=None,
                  reward_model_tokenizer=None, **free_text):
    """Scores one completion. As it stands it is verl's custom reward function too (the two reward_* knobs are
    verl's, unused here).

    data_source: a key of TAGS. solution_str: generated text only, without the prompt. ground_truth: the right
    label. extra_info: the row's `extra` (MedMCQA: without options letters alone count; question and
    explanation where they are). The weights are those of the data source (CORRECT_WEIGHT, TAG_WEIGHT,
    SIMILARITY_WEIGHT) unless given. encoder: name of a sentence encoder for the similarity, "" for word
    overlap.
    Returns a dict with the same keys for every input of a data source: score, the sum of its weighted parts
    correctness, format and (MedMCQA) similarity; accuracy (1.0 or 0.0, the answer is right), format_ok (1.0
    or 0.0, all tags in place) and answer (the parsed label, "" if there is none). PubMedQA: 0 to 2.8;
    MedMCQA: 0 to 1.6. Free text (METHOD's sources) has other knobs and parts, see compute_scores. Raises
    ValueError for an unknown data_source.
    """
    if data_source not in TAGS:
        raise ValueError(f"unknown data_source {data_source!r}, known: {', '.join(TAGS)}")
    if data_source in METHOD:
        return compute_scores(data_source, [solution_str], [ground_truth], [extra_info], encoder=encoder,
                              **free_text)[0]
    tags, extra = TAGS[data_source], extra_info or {}
    if data_source == "medmcqa":
        options = extra.get("options")  # a list, or an array from a parquet file
        lettered = options is None or len(options) == 0
        answer = parse_option(solution_str, tags, [""] * 4 if lettered else options)
    else:
        answer = parse_answer(solution_str, tags, LABELS[data_source])
    accuracy = float(answer != "" and answer == ground_truth)
    in_place = tags_in_place(solution_str, tags)
    correct_weight = CORRECT_WEIGHT[data_source] if correct_weight is None else correct_weight
    tag_weight = TAG_WEIGHT[data_source] if tag_weight is None else tag_weight
    parts = {"correctness": correct_weight * accuracy, "format": tag_weight * in_place}
    if data_source == "medmcqa":
        weight = SIMILARITY_WEIGHT[data_source] if similarity_weight is None else similarity_weight
        explanation, question = extra.get("explanation") or "", extra.get("question") or ""
        reasoning = reasoning_block(solution_str, tags)
        parts["similarity"] = weight * similarity(reasoning, explanation, question, encoder)
    return {"score": sum(parts.values()), **parts, "accuracy": accuracy,
            "format_ok": float(in_place == len(tags)), "answer": answer}


def trl_reward(completions, data_source, ground_truth=(), extra=(), reward_model=(), extra_info=(), **_):
    """The scores as TRL's GRPOTrainer asks for them, of conversational or plain completions. The columns are
    those of prepared rows, or of verl's parquet, which load_dataset takes where a folder has both.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    truths = ground_truth or [one["ground_truth"] for one in reward_model]
    rows = zip(data_source, texts, truths, extra or extra_info, strict=True)
    return [compute_score(*row)["score"] for row in rows]
