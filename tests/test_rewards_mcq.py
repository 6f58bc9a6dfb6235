"""MedMCQA's reward can't be cheated: adversarial completions, options and reasonings, and what each must get.
"""
import importlib.util
import math
import shutil
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards

TAGS = rewards.TAGS["medmcqa"]
START, END, OPEN, CLOSE = TAGS
OPTIONS = ["Aspirin", "Morphine sulfate", "Codeine.", "None of the above"]
QUESTION = "Which drug relieves the severe pain of a patient after major surgery?"
EXPLANATION = "Morphine sulfate binds mu receptors in the spinal cord and blocks transmission."
EXTRA = {"options": OPTIONS, "question": QUESTION, "explanation": EXPLANATION}
REASON = "It binds mu receptors of the cord."


def done(answer, reasoning=REASON):
    return f"{START}\n{reasoning}\n{END}\n{OPEN}{answer}{CLOSE}"


def score(text, truth="B", extra=EXTRA, **knobs):
    return rewards.compute_score("medmcqa", text, truth, extra, **knobs)


GOOD = done("B")
# (what, completion, correctness, format, is similarity above zero); the truth is "B", Morphine sulfate
TABLE = [
    ("as asked", GOOD, 1, 0.2, True),
    ("wrong", done("A"), 0, 0.2, True),
    ("lower case", done("b"), 1, 0.2, True),
    ("full stop", done("B."), 1, 0.2, True),
    ("brackets", done("(B)"), 1, 0.2, True),
    ("closing bracket", done("b)"), 1, 0.2, True),
    ("own lines", done("\n B \n"), 1, 0.2, True),
    ("letter and its text", done("B. Morphine sulfate"), 1, 0.2, True),
    ("letter and its text, other case", done("(b) MORPHINE  Sulfate."), 1, 0.2, True),
    ("letter and another option's text", done("B. Aspirin"), 0, 0.2, True),
    ("another letter and this option's text", done("A. Morphine sulfate"), 0, 0.2, True),
    ("letter and a part of its text", done("B. Morphine"), 0, 0.2, True),
    ("letter, its text and another", done("B. Morphine sulfate or Aspirin"), 0, 0.2, True),
    ("option text", done("Morphine sulfate"), 1, 0.2, True),
    ("option text, upper case", done("MORPHINE SULFATE"), 1, 0.2, True),
    ("option text, full stop", done("Morphine sulfate."), 1, 0.2, True),
    ("option text, broken line", done("Morphine\n sulfate"), 1, 0.2, True),
    ("another option's text", done("Aspirin"), 0, 0.2, True),
    ("a part of the option text", done("Morphine"), 0, 0.2, True),
    ("more than the option text", done("Morphine sulfate tablets"), 0, 0.2, True),
    ("texts of two options", done("Aspirin Morphine sulfate"), 0, 0.2, True),
    ("texts of two options, or", done("Morphine sulfate or Aspirin"), 0, 0.2, True),
    ("text of an option, then the letter", done("Aspirin B"), 0, 0.2, True),
    ("A or B or C", done("A or B or C"), 0, 0.2, True),
    ("A, B", done("A, B"), 0, 0.2, True),
    ("B or A", done("B or A"), 0, 0.2, True),
    ("B/A", done("B/A"), 0, 0.2, True),
    ("BA", done("BA"), 0, 0.2, True),
    ("letters on lines", done("B\nA"), 0, 0.2, True),
    ("the letter twice", done("B B"), 0, 0.2, True),
    ("two letters in brackets", done("(A)(B)"), 0, 0.2, True),
    ("two marked letters", done("B. A"), 0, 0.2, True),
    ("marked letter twice", done("B) B)"), 0, 0.2, True),
    ("A ... final answer B", done("A? No: the final answer is B"), 0, 0.2, True),
    ("not B", done("not B"), 0, 0.2, True),
    ("every option listed", done("\n".join(f"{a}. {b}" for a, b in zip("ABCD", OPTIONS))), 0, 0.2, True),
    ("letter inside a word", done("Because"), 0, 0.2, True),
    ("letter that begins a word", done("BIS"), 0, 0.2, True),
    ("a sentence", done("The answer is B"), 0, 0.2, True),
    ("open bracket alone", done("(B"), 0, 0.2, True),
    ("bracket and stop", done("(B."), 0, 0.2, True),
    ("two brackets", done("((B))"), 0, 0.2, True),
    ("bold", done("**B**"), 0, 0.2, True),
    ("quoted", done("'B'"), 0, 0.2, True),
    ("boxed", done("\\boxed{B}"), 0, 0.2, True),
    ("question mark", done("B?"), 0, 0.2, True),
    ("letter of no option", done("E"), 0, 0.2, True),
    ("number of the option", done("2"), 0, 0.2, True),
    ("empty", done(""), 0, 0.2, True),
    ("blank", done(" \n\t "), 0, 0.2, True),
    ("full stop alone", done("."), 0, 0.2, True),
    ("brackets alone", done("()"), 0, 0.2, True),
    ("Cyrillic letter", done("\u0412"), 0, 0.2, True),
    ("full-width letter", done("\uff22"), 0, 0.2, True),
    ("Greek letter", done("\u0392"), 0, 0.2, True),
    ("bold mathematical letter", done("\U0001d401"), 0, 0.2, True),
    ("circled letter", done("\u24b7"), 0, 0.2, True),
    ("letter with an accent", done("B\u0301"), 0, 0.2, True),
    ("option text with a long s", done("Morphine \u017fulfate"), 0, 0.2, True),
    ("option text with a Cyrillic o", done("M\u043erphine sulfate"), 0, 0.2, True),
    ("null byte", done("B\0"), 0, 0.2, True),
    ("zero-width space", done("B\u200b"), 0, 0.2, True),
    ("right-to-left mark", done("\u202eB"), 0, 0.2, True),
    ("no-break space, which is white space", done("\u00a0B\u00a0"), 1, 0.2, True),
    ("HTML entity", done("&#66;"), 0, 0.2, True),
    ("two solution blocks", GOOD + f"{OPEN}A{CLOSE}", 0, 0.1, True),
    ("two equal solution blocks", GOOD + f"{OPEN}B{CLOSE}", 0, 0.1, True),
    ("solution before reasoning", f"{OPEN}B{CLOSE}{START}{REASON}{END}", 0, 0, True),
    ("solution in the reasoning", f"{START}{REASON}{OPEN}B{CLOSE}{END}", 0, 0.05, True),
    ("solution in the reasoning and after it", f"{START}{REASON}{OPEN}A{CLOSE}{END}{OPEN}B{CLOSE}", 0, 0.05,
     True),
    ("reasoning in the solution", f"{OPEN}{START}{REASON}{END}B{CLOSE}", 0, 0.05, True),
    ("a tag in the answer", done(f"{START}B"), 0, 0.05, False),
    ("solution in solution", done(f"{OPEN}B{CLOSE}"), 0, 0.1, True),
    ("two reasonings", f"{START}{REASON}{END}" + GOOD, 1, 0.1, False),
    ("reasoning tags reversed", f"{END}{REASON}{START}{OPEN}B{CLOSE}", 1, 0.1, False),
    ("reasoning unclosed", f"{START}{REASON}{OPEN}B{CLOSE}", 1, 0.15, False),
    ("reasoning unopened", f"{REASON}{END}{OPEN}B{CLOSE}", 1, 0.15, False),
    ("solution unclosed", f"{START}{REASON}{END}{OPEN}B", 0, 0.15, True),
    ("solution alone", f"{OPEN}B{CLOSE}", 1, 0.1, False),
    ("reasoning alone", f"{START}{REASON} B{END}", 0, 0.1, True),
    ("text after the solution", GOOD + " I am sure.", 1, 0.15, True),
    ("another answer after the solution", GOOD + "\nA", 1, 0.15, True),
    ("everything twice", GOOD + GOOD, 0, 0, False),
    ("tags in lower case", GOOD.replace("SOLUTION", "solution"), 0, 0.1, True),
    ("PubMedQA's tags", "<reasoning>a</reasoning><answer>B</answer>", 0, 0, False),
    ("no tags", "B", 0, 0, False),
    ("nothing", "", 0, 0, False),
    ("empty reasoning", done("B", ""), 1, 0.2, False),
    ("blank reasoning", done("B", " \n\u00a0"), 1, 0.2, False),
    ("reasoning without words", done("B", "... !? -- \u2014 \0\x07\x1b"), 1, 0.2, False),
    ("reasoning of common words", done("B", "It is that which was in the"), 1, 0.2, False),
    ("reasoning about something else", done("B", "Coral reefs bleach when oceans warm"), 1, 0.2, False),
    ("question copied", done("B", QUESTION), 1, 0.2, False),
    ("question in another order", done("B", " ".join(reversed(QUESTION.upper().split()))), 1, 0.2, False),
    ("question with repeated words", done("B", (QUESTION + " pain, pain; drug! ") * 9), 1, 0.2, False),
    ("question in full-width letters", done("B", QUESTION.translate({c: c + 0xfee0 for c in range(33, 127)})),
     1, 0.2, False),
    ("question and one word of the explanation", done("B", QUESTION + " receptors"), 1, 0.2, False),
    ("control characters in the reasoning", done("B", "It\0binds\x07mu\x1breceptors\u202e"), 1, 0.2, True),
    ("10,000 tags", f"{OPEN}B{CLOSE}" * 10_000, 0, 0, False),
]


@pytest.mark.parametrize("what, completion, correctness, format, similar", TABLE,
                         ids=[row[0] for row in TABLE])
def test_adversarial_completions(what, completion, correctness, format, similar):
    result = score(completion)
    assert result["correctness"] == correctness and result["accuracy"] == correctness
    assert result["format"] == pytest.approx(format) and result["format_ok"] == (format == 0.2)
    assert (0 < result["similarity"] <= 0.4) if similar else result["similarity"] == 0
    assert result["score"] == pytest.approx(correctness + format + result["similarity"])


# (options, answer, the letter that it names)
PARSED = [
    (["B", "C", "D", "A"], "B", "B"),  # a letter is a letter, even where a text is the same
    (["B", "C", "D", "A"], "A. B", "A"),
    (["B", "C", "D", "A"], "B. B", ""),
    (["B", "C", "D", "A"], "(B) C", "B"),
    (["C. difficile", "E. coli", "B. cereus", "A. baumannii"], "C. difficile", "A"),
    (["C. difficile", "E. coli", "B. cereus", "A. baumannii"], "B. cereus", "C"),
    (["C. difficile", "E. coli", "B. cereus", "A. baumannii"], "C. B. cereus", "C"),
    (["C. difficile", "E. coli", "B. cereus", "A. baumannii"], "B. E. coli", "B"),
    (["C. difficile", "E. coli", "B. cereus", "A. baumannii"], "C. coli", ""),
    (["A and B", "B and C", "A only", "All of the above"], "A and B", "A"),
    (["A and B", "B and C", "A only", "All of the above"], "A only", "C"),
    (["A and B", "B and C", "A only", "All of the above"], "A", "A"),
    (["A and B", "B and C", "A only", "All of the above"], "A or B", ""),
    (["A and B", "B and C", "A only", "All of the above"], "All of the above.", "D"),
    (["x", "x", "y", "z"], "x", ""),  # names two
    (["x", "x", "y", "z"], "B. x", "B"),
    (["", "b c", "y", "z"], "", ""),
    (["+", "++", "+++", "-"], "++", "B"),
    (["1", "2", "3", "4"], "1", "A"),
    (["1", "2", "3", "4"], "D. 4", "D"),
    (["1", "2", "3", "4"], "D. 1", ""),
    (["1.5", "1.", "15", "5"], "1", "B"),
    (["1.5", "1.", "15", "5"], "1.5", "A"),
    (["\u03b2-carotene", "\u212a+", "k+", "\u0130"], "\u03b2-carotene", "A"),
    (["\u03b2-carotene", "\u212a+", "k+", "\u0130"], "K+", "C"),  # not the Kelvin sign
    (["\u03b2-carotene", "\u212a+", "k+", "\u0130"], "i", ""),
    (["a) b", "b) c", "c) d", "d) a"], "b) c", "B"),
    (["a) b", "b) c", "c) d", "d) a"], "B. b) c", "B"),
    (["yes", "no"], "C", ""),
    (["yes", "no"], "b", "B"),
    (OPTIONS, "None of the above", "D"),
    (OPTIONS, "codeine", "C"),
    (OPTIONS, "Codeine..", ""),
    (OPTIONS, "C: codeine", "C"),
]


@pytest.mark.parametrize("options, answer, letter", PARSED)
def test_which_option_an_answer_names(options, answer, letter):
    assert rewards.parse_option(done(answer), TAGS, options) == letter
    # as parquet readers return lists
    result = score(done(answer), letter, {"options": np.array(options, dtype=object)})
    assert result["answer"] == letter and result["accuracy"] == (letter != "")


def test_the_keys_are_constant_and_nothing_beats_the_right_answer_with_the_explanation():
    keys = {tuple(score(text)) for _, text, *_ in TABLE} | {tuple(score(GOOD, extra={"options": OPTIONS}))}
    assert keys == {("score", "correctness", "format", "similarity", "accuracy", "format_ok", "answer")}
    best = score(done("B", EXPLANATION))["score"]
    assert best == pytest.approx(1.6) and best > max(score(text)["score"] for _, text, *_ in TABLE) + 0.1


@pytest.mark.parametrize("extra", [{}, None, {"question": "Which?"}, {"options": None}, {"options": []},
                                   {"options": np.array([], dtype=object), "explanation": None}])
def test_without_options_letters_alone_count(extra):
    right, wrong = ("B", "b.", "(B)"), ("A", "B. iron", "iron", "", "A B", "E")
    for answer, accuracy in [(text, 1) for text in right] + [(text, 0) for text in wrong]:
        result = rewards.compute_score("medmcqa", done(answer), "B", extra)
        assert result["accuracy"] == accuracy and result["format_ok"] == 1, answer
    options = np.array(["tin", "iron", "zinc", "lead"])
    known = rewards.compute_score("medmcqa", done("iron"), "B", {"options": options})
    assert known["accuracy"] == 1  # as a parquet file gives them


def test_the_weights_are_knobs():
    best = done("B", EXPLANATION)
    assert score(best, correct_weight=3.0, tag_weight=0.5,
                 similarity_weight=2.0)["score"] == pytest.approx(7.0)
    assert score(best, similarity_weight=0.0)["score"] == pytest.approx(1.2)
    assert score(best, correct_weight=0, tag_weight=0)["score"] == pytest.approx(0.4)


# === reasoning ==============================================================================================


@pytest.mark.parametrize("reasoning", [EXPLANATION, EXPLANATION.upper(), f"{EXPLANATION} {EXPLANATION}",
                                       " ".join(EXPLANATION.split()[::-1]), "The "
                                       + EXPLANATION.replace(" ", ", ")])
def test_the_explanation_word_for_word_earns_all_of_the_similarity(reasoning):
    assert score(done("A", reasoning))["similarity"] == pytest.approx(0.4)


def test_similarity_is_the_f1_of_the_words_that_the_question_lacks():
    assert rewards.overlap("red green blue", "red green gold iron", "") == pytest.approx(2 * 2 / (3 + 4))
    assert rewards.overlap("the pain of RED green", "pain: red, gold",
                           "Is it pain?") == pytest.approx(2 * 1 / (2 + 2))
    for nothing in (("", "red", ""), ("red", "", ""), ("red", "red", "Red!"), ("blue", "red", "")):
        assert rewards.overlap(*nothing) == 0 == rewards.similarity(*nothing)
    assert rewards.similarity("q1 q2 q3 q4 red", "red", "q1 q2 q3 q4") == 1  # a fifth of its words is its own
    assert rewards.similarity("q1 q2 q3 q4 q5 red", "red", "q1 q2 q3 q4 q5") == 0


def test_listing_and_stuffing_earn_less_than_reasoning():
    honest = score(done("B", REASON))["similarity"]
    listed = score(done("B", "\n".join(f"{a}. {b}" for a, b in zip("ABCD", OPTIONS))))["similarity"]
    stuffed = score(done("B", EXPLANATION + " " + " ".join(f"w{i}" for i in range(1000))))["similarity"]
    assert 0 < listed < honest / 2 and 0 < stuffed < 0.01 < honest


def test_without_an_explanation_or_question_reasoning_earns_nothing_or_its_overlap():
    for explanation in (None, "", " \n", "..."):
        assert score(done("B", QUESTION), extra={**EXTRA, "explanation": explanation})["similarity"] == 0
    assert score(GOOD, extra={"options": OPTIONS})["score"] == pytest.approx(1.2)
    assert score(done("B", EXPLANATION),
                 extra={**EXTRA, "question": None})["similarity"] == pytest.approx(0.4)


@pytest.mark.parametrize("text, block", [
    (GOOD, REASON), (done("B", "  a\nb "), "a\nb"), (f"{START}{END}", ""), (f"{END}a{START}", ""),
    (f"{END}a{START}b", ""),
    (f"{START}a", ""), (f"a{END}", ""), (f"{START}a{START}b{END}", ""), (f"{START}a{END}b{END}", ""),
    ("", ""),
    (f"x{START}a{OPEN}b{END}y", f"a{OPEN}b"),
])
def test_the_reasoning_is_what_stands_between_its_two_tags(text, block):
    assert rewards.reasoning_block(text, TAGS) == block


def test_a_megabyte_is_scored_in_a_second():
    words = " ".join(f"w{i}" for i in range(130_000))
    for text in (done("B", words), done("B", "\ufdfa" * 300_000), done("B", "a" * 1_000_000),
                 done("B " * 500_000),
                 done("B", " ".join([EXPLANATION] * 12_000)), "<" * 1_000_000, done("(" * 1_000_000),
                 START * 50_000,
                 GOOD + " " * 1_000_000):
        begin = time.perf_counter()
        result = score(text)
        assert 0 <= result["score"] <= 1.6 + 1e-9 and time.perf_counter() - begin < 1
    begin = time.perf_counter()
    score(GOOD, extra={**EXTRA, "explanation": words, "question": words, "options": [words] * 4})
    assert time.perf_counter() - begin < 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20),
                          st.sampled_from([*TAGS, "A", "B", "c", "(", ")", ". ", " or ", "\n", *OPTIONS,
                                          QUESTION, EXPLANATION])), max_size=12),
       st.sampled_from([EXTRA, {"options": ["B", "A. x", "", "b"], "question": "", "explanation": "a b c"}]))
def test_any_text_gets_a_bounded_score_and_only_one_truth_is_right(pieces, extra):
    for text in ("".join(pieces), done("".join(pieces)), done("B", "".join(pieces))):
        results = [score(text, truth, extra) for truth in "ABCD"]
        for result in results:
            assert 0 <= result["score"] <= 1.6 + 1e-9
            assert all(math.isfinite(v) for k, v in result.items() if k != "answer")
            assert result["score"] == pytest.approx(result["correctness"] + result["format"]
                                                    + result["similarity"])
        assert results[0]["answer"] in ("", *"ABCD")
        assert sum(result["accuracy"] for result in results) == (results[0]["answer"] != "")


# === reasoning by embeddings ================================================================================


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of two layers with a WordPiece tokenizer, saved as the hub's are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    folder = str(tmp_path_factory.mktemp("encoder"))
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", *letters, *("##" + letter for letter in letters)]
    pieces += sorted({word for word in f"{QUESTION} {EXPLANATION} {REASON}".lower().replace(".", "").split()
                      if len(word) > 1})
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (normalizers.BertNormalizer(),
                                                     pre_tokenizers.BertPreTokenizer())
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                                         cls_token="[CLS]",
                                         sep_token="[SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2,
                                     num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=256, initializer_range=0.5)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def cosine(folder, one, two):
    """Mean pooling of a padded batch under its attention mask, as the card of all-MiniLM-L6-v2 writes it."""
    tokenizer, model = (transformers.AutoTokenizer.from_pretrained(folder),
                        transformers.BertModel.from_pretrained(folder).eval())
    inputs = tokenizer([one, two], padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0))


@pytest.mark.parametrize("reasoning",
                         [REASON, "Receptors.", "Coral reefs bleach when oceans warm", "It binds mu " * 200])
def test_the_encoder_s_similarity_is_what_the_cosine_gains_on_the_question(encoder, reasoning):
    near, start = cosine(encoder, reasoning.strip(), EXPLANATION), cosine(encoder, QUESTION, EXPLANATION)
    assert near < 0.999 and start < 0.999
    expected = max(0, (near - start) / (1 - start))
    assert rewards.similarity(reasoning.strip(), EXPLANATION, QUESTION,
                              encoder) == pytest.approx(expected, abs=1e-3)
    assert score(done("B", reasoning),
                 encoder=encoder)["similarity"] == pytest.approx(0.4 * expected, abs=1e-3)
    assert rewards.similarity(reasoning.strip(), EXPLANATION, "",
                              encoder) == pytest.approx(max(0, near), abs=1e-4)


def test_an_encoder_tells_the_same_text_from_another_and_from_the_question(encoder):
    same, other, copied, empty = (score(done("B", text), encoder=encoder)["similarity"]
                                  for text in (EXPLANATION, REASON, QUESTION, ""))
    assert same == pytest.approx(0.4) and same <= 0.4 and 0 < other < 0.399 and copied == empty == 0
    assert score(done("B", " ".join(QUESTION.split()[::-1])), encoder=encoder)["similarity"] == 0
    assert score(GOOD, encoder=encoder, similarity_weight=1.0)["similarity"] == pytest.approx(other / 0.4)
    assert score(GOOD, extra={**EXTRA, "explanation": ""}, encoder=encoder)["similarity"] == 0
    stuffed = score(done("B", "binds mu " * 120_000), encoder=encoder)["similarity"]
    assert 0 <= stuffed < 0.4


@pytest.mark.parametrize("cosine, share", [(-0.5, 0), (0.2, 0), (0.6, 0.5), (1.0000001, 1)])
def test_a_cosine_stays_between_nothing_and_all(monkeypatch, cosine, share):
    cosines = {REASON: cosine, QUESTION: 0.2, EXPLANATION: 1.0}  # to the explanation
    monkeypatch.setattr(rewards, "closeness", lambda pairs, name: [cosines[text] for text, _ in pairs])
    assert score(GOOD, encoder="any")["similarity"] == pytest.approx(0.4 * share, abs=1e-6)


def test_the_encoder_is_loaded_once(encoder, tmp_path, monkeypatch):
    folder, loaded, auto = str(shutil.copytree(encoder, tmp_path / "copy")), [], transformers.AutoModel
    load = auto.from_pretrained
    monkeypatch.setattr(auto, "from_pretrained", lambda name, **knobs: loaded.append(name)
                        or load(name, **knobs))
    score(done("B", QUESTION), encoder=folder)
    assert loaded == []  # nothing to embed
    results = [score(done(letter, f"{REASON} {letter}"), encoder=folder) for letter in "XYZ"]
    assert loaded == [folder] and len({result["similarity"] for result in results}) == 3
    assert [score(done(letter, f"{REASON} {letter}"), encoder=folder) for letter in "XYZ"] == results
    assert loaded == [folder]


def test_an_encoder_that_cannot_be_had_is_an_error_not_a_score(tmp_path):
    with pytest.raises(OSError):
        score(GOOD, encoder=str(tmp_path / "nowhere"))


def test_other_engines_load_the_file_by_path(encoder):
    # as verl does, without sys.modules
    spec = importlib.util.spec_from_file_location("custom_module", rewards.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # a list that came back from parquet
    extra = {**EXTRA, "options": np.array(OPTIONS, dtype=object), "index": 3}
    for knobs in ({}, {"encoder": encoder}):
        result = module.compute_score(data_source="medmcqa", solution_str=done("B", EXPLANATION),
                                      ground_truth="B",
                                      extra_info=extra, **knobs)
        assert result["score"] == pytest.approx(1.6)
