"""Reward functions of the collection: what a completion earns, and `compute_score`, which other engines call too.

The file stands alone (it imports nothing of the project), so that verl and others can load it by path. Every function takes
plain text and is strict: an answer is parsed from its one block, never searched in the text. Whoever hedges, repeats
tags or writes the answer elsewhere earns nothing for it. No regular expressions: time is linear in the completion's length.
"""
import functools
import unicodedata

TAGS = {"pubmedqa": ("<reasoning>", "</reasoning>", "<answer>", "</answer>"),
        "medmcqa": ("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>")}
LABELS = {"pubmedqa": ("yes", "no", "maybe"), "medmcqa": ("A", "B", "C", "D")}
CORRECT_WEIGHT = {"pubmedqa": 2.0, "medmcqa": 1.0}  # for the right answer
TAG_WEIGHT = {"pubmedqa": 0.2, "medmcqa": 0.05}  # for each tag in its place
SIMILARITY_WEIGHT = {"pubmedqa": 0.0, "medmcqa": 0.4}  # for reasoning that says what the explanation says


def tags_in_place(text, tags):
    """How many of `tags` stand in `text` exactly once and in their place, 0 to len(tags).

    In its place: after every occurrence of the tags before it and before every occurrence of the tags behind it; the last
    tag also needs the end of the text behind it (white space aside), so full marks mean that nothing follows the answer.
    """
    first, last = [text.find(tag) for tag in tags], [text.rfind(tag) for tag in tags]
    in_place = 0
    for i, tag in enumerate(tags):
        once = first[i] >= 0 and first[i] == last[i]
        ordered = (all(position < first[i] for position in last[:i])
                   and all(position < 0 or position > first[i] for position in first[i + 1:]))
        closed = i < len(tags) - 1 or not text[first[i] + len(tag):].strip()
        in_place += once and ordered and closed
    return in_place


def answer_block(text, tags):
    """What stands between tags[-2] and tags[-1], stripped, or None where it is not the one answer block of `text`.

    Each of the two must occur exactly once, in this order, with no other tag between or behind them.
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

    The block must hold one of `labels` and nothing else (case, white space around it and one full stop aside; ASCII only, so
    no look-alike passes).
    """
    answer = (answer_block(text, tags) or "").removesuffix(".").rstrip()
    return answer.lower() if answer.isascii() and answer.lower() in labels else ""


def parse_option(text, tags, options):
    """The letter of the one option that the answer block of `text` names, or "".

    Accepted: the letter ("B", "b.", "(B)", "B)"), the letter with the option's own text ("B. aspirin", "(b) Aspirin."), and
    the full text of exactly one option. Anything else, two letters say, names no option. options: texts of A, B, C, ...
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


# === reasoning against the explanation ================================================================================

COMMON = frozenset("a an and are as at be by for from has have in is it its of on or that the this to was were which with".split())


def reasoning_block(text, tags):
    """What stands between the first two tags, stripped; "" unless both occur exactly once, in this order."""
    if text.count(tags[0]) != 1 or text.count(tags[1]) != 1:
        return ""
    return text[text.find(tags[0]) + len(tags[0]):max(text.find(tags[1]), 0)].strip()


def words(text):
    """Set of the words of a text that carry meaning: runs of letters and digits, lower case, without the commonest."""
    spaced = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text[:20_000]).lower())
    return frozenset(spaced.split()) - COMMON


def overlap(reasoning, explanation, question):
    """F1, 0 to 1, between the sets of words of the reasoning and of the explanation, those of the question left out.

    So what the question says earns nothing, and neither does listing everything, which precision punishes.
    """
    known = words(question)
    said, wanted = words(reasoning) - known, words(explanation) - known
    both = len(said & wanted)
    return 2 * both / (len(said) + len(wanted)) if both else 0.0


@functools.cache
def load_encoder(name):
    """(tokenizer, model) of a sentence encoder, "sentence-transformers/all-MiniLM-L6-v2" say; loaded once a process.

    Raises what transformers raises where it cannot be had (OSError, mostly).
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()


@functools.lru_cache(maxsize=4096)
def embed(text, name):
    """Unit vector of a text: mean of the encoder's last hidden states over its tokens, up to 256, as all-MiniLM-L6-v2's card
    (huggingface.co/sentence-transformers/all-MiniLM-L6-v2) has it. One text at a time, so that no batch can change it.
    """
    import torch
    tokenizer, model = load_encoder(name)
    inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        return torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(dim=0).float(), dim=0)


def similarity(reasoning, explanation, question, encoder=""):
    """How much of the explanation the reasoning says, 0 to 1.

    By `overlap`, or, with the name of an encoder, by cosines of embeddings: how far the reasoning closes the gap between the
    question and the explanation, (cos(r, e) - cos(q, e)) / (1 - cos(q, e)), so that the question alone, or padded, earns
    nothing. 0 where either is empty, or where fewer than a fifth of the reasoning's words are not the question's.
    """
    said = words(reasoning)
    if not said or not words(explanation) or len(said - words(question)) < len(said) / 5:
        return 0.0
    if not encoder:
        return overlap(reasoning, explanation, question)
    r, e, q = (embed(text[:20_000], encoder) for text in (reasoning, explanation, question))
    close, start = float(r @ e), float(q @ e) if question.strip() else 0.0
    return min(1.0, max(0.0, (close - start) / (1 - start))) if start < 0.9999 else 0.0


# === the score ========================================================================================================


def compute_score(data_source, solution_str, ground_truth, extra_info=None, *, correct_weight=None, tag_weight=None,
                  similarity_weight=None, encoder=""):
    """Scores one completion.

    data_source: a key of TAGS. solution_str: generated text only, without the prompt. ground_truth: the right label.
    extra_info: the row's `extra` (MedMCQA needs its options, and takes question and explanation where they are). The weights
    are those of the data source (CORRECT_WEIGHT, TAG_WEIGHT, SIMILARITY_WEIGHT) unless given. encoder: name of a sentence
    encoder for the similarity, "" for word overlap.
    Returns a dict with the same keys for every input of a data source: score, the sum of its weighted parts correctness,
    format and (MedMCQA) similarity; accuracy (1.0 or 0.0, the answer is right), format_ok (1.0 or 0.0, all tags in place)
    and answer (the parsed label, "" if there is none). PubMedQA: 0 to 2.8; MedMCQA: 0 to 1.6.
    Raises ValueError for an unknown data_source.
    """
    if data_source not in TAGS:
        raise ValueError(f"unknown data_source {data_source!r}, known: {', '.join(TAGS)}")
    correct_weight, tag_weight, similarity_weight = (
        given if given is not None else usual[data_source] for given, usual in
        ((correct_weight, CORRECT_WEIGHT), (tag_weight, TAG_WEIGHT), (similarity_weight, SIMILARITY_WEIGHT)))
    tags = TAGS[data_source]
    if data_source == "medmcqa":
        answer = parse_option(solution_str, tags, extra_info["options"])
    else:
        answer = parse_answer(solution_str, tags, LABELS[data_source])
    accuracy = float(answer != "" and answer == ground_truth)
    in_place = tags_in_place(solution_str, tags)
    parts = {"correctness": correct_weight * accuracy, "format": tag_weight * in_place}
    if data_source == "medmcqa":
        parts["similarity"] = similarity_weight * similarity(
            reasoning_block(solution_str, tags), extra_info.get("explanation") or "", extra_info.get("question") or "", encoder)
    return {"score": sum(parts.values()), **parts, "accuracy": accuracy, "format_ok": float(in_place == len(tags)), "answer": answer}
