"""Reward functions of the collection: what a completion earns, and `compute_score`, which other engines call too.

The file stands alone (it imports nothing of the project), so that verl and others can load it by path. Every function takes
plain text and is strict: an answer is parsed from its one block, never searched in the text. Whoever hedges, repeats
tags or writes the answer elsewhere earns nothing for it. No regular expressions: time is linear in the completion's length.
"""

TAGS = {"pubmedqa": ("<reasoning>", "</reasoning>", "<answer>", "</answer>")}
LABELS = {"pubmedqa": ("yes", "no", "maybe")}


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


def parse_answer(text, tags, labels):
    """The label in the one answer block of `text`, or "" where there is none.

    The block is what stands between tags[-2] and tags[-1]. Each of the two must occur exactly once, in this order, with no
    other tag between or behind them; the block must hold one of `labels` and nothing else (case, white space around it
    and one full stop aside; ASCII only, so no look-alike passes).
    """
    opening, closing = tags[-2:]
    if text.count(opening) != 1 or text.count(closing) != 1:
        return ""
    start, end = text.find(opening) + len(opening), text.find(closing)
    if end < start or any(text.rfind(tag) >= start for tag in tags[:-2]):
        return ""
    answer = text[start:end].strip().removesuffix(".").rstrip()
    return answer.lower() if answer.isascii() and answer.lower() in labels else ""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, *, correct_weight=2.0, tag_weight=0.2):
    """Scores one completion.

    data_source: a key of TAGS. solution_str: generated text only, without the prompt. ground_truth: the right label.
    extra_info: unused here, part of the signature that verl calls. The weights are the single-card recipe's: 2.0 for the
    right answer and 0.2 a tag.
    Returns a dict with the same keys for every input: score (correctness + format, 0 to 2.8), correctness and format
    (its two weighted parts), accuracy (1.0 or 0.0, the answer is right), format_ok (1.0 or 0.0, all tags in place)
    and answer (the parsed label, "" if there is none). Raises ValueError for an unknown data_source.
    """
    if data_source not in TAGS:
        raise ValueError(f"unknown data_source {data_source!r}, known: {', '.join(TAGS)}")
    tags = TAGS[data_source]
    answer = parse_answer(solution_str, tags, LABELS[data_source])
    accuracy = float(answer != "" and answer == ground_truth)
    in_place = tags_in_place(solution_str, tags)
    correctness, format = correct_weight * accuracy, tag_weight * in_place
    return {"score": correctness + format, "correctness": correctness, "format": format, "accuracy": accuracy,
            "format_ok": float(in_place == len(tags)), "answer": answer}
