"""MedMCQA: four-option questions of Indian medical entrance exams.

Sources, told apart by their fields and values:
  * hub openlifescienceai/medmcqa   {question, opa, opb, opc, opd, cop, exp, subject_name, choice_type, id},
                                    `cop` 0-3, -1 where there is no label
  * the original JSON-lines files   the same fields with `cop` 1-4; a file, or train.json and dev.json
  * rows prepared by `python -m data.prepare medmcqa` (a file, or a folder with train.jsonl and heldout.jsonl)
  * built-in: textbook facts, asked in several wordings (below)
Pal et al. 2022, "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for Medical domain Question
Answering", arXiv:2203.14371.
"""
import random
import re
from collections import Counter
from pathlib import Path

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

HUB = "openlifescienceai/medmcqa"
BASE_MODEL = "Qwen/Qwen3-4B-Base"  # that its scripts train with a GPU
LETTERS = "ABCD"
SYSTEM_PROMPT = """Answer the question with one of its four options. First work it out, then give the \
letter, in this form:
<start_working_out>
...
<end_working_out>
<SOLUTION>letter</SOLUTION>"""
# "Ans-a.", "Answer: (B)", "Ans. is 'c' i.e.,", "Ans. BSolitary ..."; not "Ans. all of these", "Ans. DNA ...",
# "Ans. A 45-year-old"
NAMED_OPTION = re.compile(
    r"""\W{0,9}(?:[Cc]orrect\s)?(?i:ans|answer)\b[\s.:=-]{0,9}(?:is\b\s?)?['"(\[]{0,3}([A-Da-d])"""
    r"""(?=$|['")\].:]|\s[.:(]|\(|\s?-(?![a-z])|,(?!\s?[A-Da-d]\b)|\s?i\.?\s?e\b|\s?[A-Z][a-z])"""
    r"""['")\]]{0,3}\s?[.:,]{0,3}\s?(?:i\.?\s?e\b\.?[\s,:]{0,3})?""")
SPELLED_OPTION = re.compile(r"\W{0,9}(?i:ans|answer)\b[\s.:=-]{0,9}[A-Da-d]\s")
LEADING = re.compile(r"^(?:[\s.,:;)*]|-(?!\d))+")  # what is left over in front once the option is gone


def load_rows(data="builtin", *, cop_base="auto", question_field="", answer_field="", system_prompt="",
              limit=0):
    """Loads and splits a source.

    data: "builtin", "hub", "hub:ORG/NAME[:CONFIG]", a file, a folder that data.prepare wrote, or one with
    train.json and dev.json. cop_base: the number of option A in `cop`, "0", "1", or "auto": told from the
    values. question_field, answer_field: fields of your own file ("" = question, cop). system_prompt:
    replaces SYSTEM_PROMPT. limit: keep only so many rows of each part (0 = all). Returns (train, heldout,
    counts): two lists of rows and a Counter of what was dropped or mended. The validation part of the hub and
    of the original folder is held out, a folder that data.prepare wrote stays split as it is, a single file
    is split by question. Raises InputError.
    """
    if data == "builtin":
        train, heldout = builtin_rows(system_prompt)
        return train[:limit or None], heldout[:limit or None], Counter()
    decided = None  # the two sides of a folder that is split already
    on_hub = hub_name(data, HUB)
    if on_hub:
        parts = [read_hub(*on_hub, part) for part in ("train", "validation")]
        if on_hub[0] == HUB and cop_base == "auto":
            cop_base = "0"
    elif (Path(data) / "dev.json").exists():
        parts = [read_records(Path(data) / name) for name in ("train.json", "dev.json")]
    else:
        decided = read_sides(data)
        parts = decided or [read_records(data)]

    everything = [pair for records in parts for pair in records]
    prepared = is_prepared(everything[0][1])
    first = None if prepared else _first_option(everything, cop_base, answer_field or "cop", data)
    counts, heldout_questions = Counter(), set()
    seen = {}  # {item: answer}
    sides = []  # of each its (where, row)
    for part, records in enumerate(reversed(parts)):
        # held-out rows first: a question that stands there must not be trained on
        rows, seen = [], {} if decided else seen
        for index, (where, record) in enumerate(records):
            fallback_id = f"{index}" if part == len(parts) - 1 else f"heldout-{index}"
            row = _prepared_row(record, where, system_prompt) if prepared else _row(
                record, where, fallback_id, first, question_field, answer_field, system_prompt, counts)
            if row is None:
                continue
            question = normalized(row["extra"]["question"])
            key = (question, frozenset(map(normalized, row["extra"]["options"])))
            answer = normalized(row["extra"]["options"][LETTERS.index(row["ground_truth"])])
            if question in heldout_questions and not decided:  # else keep_sides refuses it
                counts["dropped from training: the question is held out"] += 1
            elif key in seen and not prepared:  # prepared rows may hold several targets of an item
                other = "" if seen[key] == answer else ", with another answer"
                counts[f"dropped: occurs before{other}"] += 1
            else:
                seen[key] = answer
                rows.append((where, row))
        heldout_questions = {normalized(row["extra"]["question"]) for _, row in rows}
        sides.append(rows)
    if len(sides) == 2:
        train, heldout = keep_sides(*reversed(sides), limit)
    else:
        train, heldout = split_by_question([row for _, row in sides[0]][:limit or None])
    for row in train + heldout:
        counts["kept: no explanation, so no SFT target"] += not row["extra"].get("explanation")
        counts["kept: choice_type multi, one label all the same"] += row["extra"].get(
            "choice_type") == "multi"
    return train, heldout, +counts


def _first_option(records, cop_base, field, data):
    """The number that stands for option A, from the values of all records; refuses what cannot be told."""
    values = Counter()
    for where, record in records:
        value = record.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 4:
            raise InputError(f"{where}, field `{field}`: {value!r} where the number of an option is needed "
                             "(0-3, or 1-4, or -1 for none)")
        values[value] += 1
    if set(values) == {-1}:
        raise InputError(f"{data}: field `{field}` is -1 in every row: the file has no labels (the hub's "
                         "test part has none)")
    if values[0] and values[4]:
        raise InputError(f"{data}: field `{field}` holds both 0 and 4, so it counts neither from 0 nor from "
                         "1: were two files joined?")
    if cop_base == "auto" and not values[0] and not values[4]:
        raise InputError(f"{data}: field `{field}` holds only {sorted(values)}, so it cannot be told whether "
                         "option A is 0 or 1: add --cop_base 0 (the hub's numbering) or --cop_base 1 (the "
                         "original files')")
    first = int(cop_base) if cop_base != "auto" else 0 if values[0] else 1
    if values[0] and first == 1 or values[4] and first == 0:
        raise InputError(f"{data}: field `{field}` holds {0 if first else 4}, which is no option with "
                         f"--cop_base {first}")
    named = [(NAMED_OPTION.match(record["exp"]), record[field]) for _, record in records
             if isinstance(record.get("exp"), str)]
    agree = [LETTERS.index(match[1].upper()) == value - first for match, value in named if match
             and value >= first]
    if len(agree) >= 10 and sum(agree) < len(agree) / 2:
        raise InputError(f"{data}: of {len(agree)} explanations that name their option only {sum(agree)} "
                         f"name that of `{field}`, taking {first} for option A: its numbering must be "
                         "another (see --cop_base)")
    return first


def _row(record, where, fallback_id, first, question_field, answer_field, system_prompt, counts):
    """The row of a record in the hub's or the original form, or None if it is dropped, which is counted."""
    question = text_field(record, question_field or "question", where)
    options = [text_field(record, "op" + letter, where, empty_ok=True)
               if record.get("op" + letter, "") is not None else ""
               for letter in "abcd"]
    label = record[answer_field or "cop"] - first
    if label < 0:
        counts["dropped: no label"] += 1
    elif not all(options):
        counts["dropped: an option is empty"] += 1
    elif len({normalized(option) for option in options}) < 4:
        counts["dropped: two options are the same"] += 1
    else:
        raw = record.get("exp") or ""
        if not isinstance(raw, str):
            raise InputError(f"{where}, field `exp`: {type(raw).__name__} where text or null is needed")
        explanation = clean_explanation(raw, options[label])
        counts["mended: explanation began by naming the option"] += explanation != raw.strip()
        extra = {"subject": record.get("subject_name") or "", "choice_type": record.get("choice_type") or ""}
        return make_row(str(record.get("id") or fallback_id), question, options, LETTERS[label], explanation,
                        system_prompt=system_prompt, extra=extra)


def _prepared_row(record, where, system_prompt):
    record = prepared_row(record, where, "medmcqa", system_prompt)
    options, label = record["extra"].get("options"), record["ground_truth"]
    if not (isinstance(options, list) and len(options) == 4
            and all(isinstance(option, str) for option in options)):
        raise InputError(f"{where}, field `extra`: a list `options` of four texts is needed in a prepared "
                         "MedMCQA row")
    if label not in tuple(LETTERS):
        raise InputError(f"{where}: ground truth {label!r} is not one of A, B, C, D")
    return record


def clean_explanation(explanation, answer):
    """An explanation without the option that it begins by naming ("Ans-a. Fluoxetine ..."), which would
    answer before it reasons.
    """
    text = explanation.strip()
    # "Ans. A retinoblastoma ...": it takes the option's own words to tell it from an article
    spelled = SPELLED_OPTION.match(text)
    named_in_words = spelled and text[spelled.end():].casefold().startswith(answer.rstrip(".").casefold())
    match = spelled if named_in_words else NAMED_OPTION.match(text)
    if not match:
        return text
    text, answer = LEADING.sub("", text[match.end():], count=1), answer.rstrip(".")
    named = text.lstrip("(")
    if named[:len(answer)].casefold() == answer.casefold():
        # the option's words often stand there, glued to what follows
        rest = named[len(answer):]
        text = rest if rest[:1].isupper() or not rest[:1].isalnum() else text
    return LEADING.sub("", text, count=1)


def make_row(source_id, question, options, letter, explanation="", target_text=None, system_prompt="",
             extra=None):
    """One row of the collection; the explanation is the reasoning of its SFT target, which stays "" without
    one.
    """
    listed = "\n".join(f"{name}. {option}" for name, option in zip(LETTERS, options))
    return {"id": f"medmcqa:{source_id}", "data_source": "medmcqa",
            "prompt": [{"role": "system", "content": system_prompt or SYSTEM_PROMPT},
                       {"role": "user", "content": f"Question: {question}\n\n{listed}"}],
            "ground_truth": letter, "target": target_text
            or (target(explanation, letter) if explanation else ""),
            "extra": {"question": question, "options": options, "explanation": explanation, **(extra or {})}}


def harness_prompt(row):
    """(context, answers) of lm-evaluation-harness's medmcqa, which compares log P(" " + answer | context)."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, row["extra"]["options"]))
    return f"Question: {row['extra']['question']}\nChoices:\n{listed}\nAnswer:", tuple(LETTERS)


def target(reasoning, answer):
    """A completion in the task's tags; answer: a letter, or the text of an option."""
    return f"<start_working_out>\n{reasoning}\n<end_working_out>\n<SOLUTION>{answer}</SOLUTION>"


# === built-in items: textbook facts =========================================================================
# A topic: its subject, the sentence that states a fact, its three wordings for training and one held out,
# asking for the value, then three for training and one held out, asking for the key; then the facts, one key
# and one value each. Within a topic no value fits another key, so the other values are wrong options that
# need knowledge to rule out.

TOPICS = [
    ("Biochemistry", "{key} comes from lack of {value}.",
     ("{key} comes from lack of:", "Which nutrient is lacking in {key}?",
      "A patient has {key}. What is deficient?",
      "Deficiency of which nutrient leads to {key}?"),
     ("Lack of {value} leads to:", "Which disease comes from too little {value}?",
      "Deficiency of {value} results in:",
      "What results from deficiency of {value}?"),
     """scurvy = vitamin C; beriberi = thiamine; pellagra = niacin; rickets = vitamin D;
     night blindness = vitamin A; pernicious anaemia = vitamin B12; neural tube defect = folate;
     goitre = iodine; Keshan disease = selenium; koilonychia = iron; bleeding of the newborn = vitamin K;
     acrodermatitis enteropathica = zinc; dental caries = fluoride; Menkes disease = copper;
     isoniazid neuropathy = pyridoxine"""),
    ("Biochemistry", "{key} is a deficiency of {value}.",
     ("{key} is a deficiency of:", "Which enzyme is deficient in {key}?",
      "A child has {key}. Which enzyme fails?",
      "The enzyme missing in {key} is:"),
     ("Deficiency of {value} is seen in:", "Which disease is due to absent {value}?",
      "A defect of {value} is found in:",
      "A defect of {value} causes:"),
     """phenylketonuria = phenylalanine hydroxylase; alkaptonuria = homogentisate oxidase;
     Gaucher disease = glucocerebrosidase; Tay-Sachs disease = hexosaminidase A;
     Fabry disease = galactosidase A; Pompe disease = acid maltase;
     von Gierke disease = glucose-6-phosphatase; McArdle disease = muscle phosphorylase;
     Lesch-Nyhan syndrome = HGPRT; Niemann-Pick disease = sphingomyelinase;
     Krabbe disease = galactocerebrosidase; Hurler syndrome = iduronidase; albinism = tyrosinase;
     homocystinuria = cystathionine synthase; fructose intolerance = aldolase B;
     Hunter syndrome = iduronate sulfatase"""),
    ("Pharmacology", "The antidote of {key} is {value}.",
     ("The antidote of {key} is:", "Which drug treats overdose of {key}?",
      "A patient is poisoned with {key}. What is given?",
      "Poisoning by {key} is reversed by:"),
     ("{value} is the antidote of:", "Against which poison is {value} given?",
      "Poisoning by what is reversed by {value}?",
      "{value} reverses poisoning by:"),
     """paracetamol = acetylcysteine; morphine = naloxone; diazepam = flumazenil;
     organophosphate = pralidoxime; heparin = protamine; warfarin = phytomenadione; methanol = fomepizole;
     iron salts = desferrioxamine; lead = succimer; cyanide = hydroxocobalamin; digoxin = Fab fragments;
     methotrexate = folinic acid; propranolol = glucagon; carbon monoxide = oxygen; dabigatran = idarucizumab;
     nitrite = methylene blue; atropine = physostigmine"""),
    ("Anatomy", "Injury of the {key} nerve causes {value}.",
     ("Injury of the {key} nerve causes:", "What is the sign of a cut {key} nerve?",
      "The {key} nerve is damaged. What is found?",
      "A lesion of the {key} nerve leads to:"),
     ("{value} is caused by injury of the nerve:", "Which nerve is cut in {value}?",
      "{value} suggests a lesion of the nerve:", "{value} points to a lesion of which nerve?"),
     """radial = wrist drop; ulnar = claw hand; median = ape thumb; common peroneal = foot drop;
     long thoracic = winged scapula; facial = Bell palsy; oculomotor = ptosis;
     recurrent laryngeal = hoarseness; phrenic = raised diaphragm; abducens = convergent squint;
     hypoglossal = tongue deviation; superior gluteal = Trendelenburg gait; obturator = weak thigh adduction;
     femoral = lost knee jerk; axillary = deltoid wasting; accessory = weak shoulder shrug;
     musculocutaneous = weak elbow flexion; olfactory = anosmia"""),
    ("Pharmacology", "{key} inhibits {value}.",
     ("{key} inhibits:", "What is the target of {key}?",
      "A patient takes {key}. Which molecule does it block?",
      "The action of {key} is inhibition of:"),
     ("{value} is inhibited by:", "Which drug acts on {value}?", "{value} is blocked by the drug:",
      "The drug that blocks {value} is:"),
     """omeprazole = proton pump; aspirin = cyclo-oxygenase; simvastatin = HMG-CoA reductase;
     captopril = angiotensin converting enzyme; allopurinol = xanthine oxidase;
     trimethoprim = dihydrofolate reductase; ciprofloxacin = DNA gyrase; rifampicin = RNA polymerase;
     finasteride = 5-alpha reductase; sildenafil = phosphodiesterase 5; ouabain = sodium pump;
     acetazolamide = carbonic anhydrase; oseltamivir = neuraminidase; neostigmine = acetylcholinesterase;
     selegiline = monoamine oxidase B; imatinib = BCR-ABL kinase; hydroxyurea = ribonucleotide reductase;
     carbimazole = thyroid peroxidase; letrozole = aromatase; caspofungin = glucan synthase;
     disulfiram = aldehyde dehydrogenase; terbinafine = squalene epoxidase"""),
    ("Microbiology", "{value} is caused by {key}.",
     ("{key} causes:", "Which disease is due to {key}?", "{key} is cultured. What does the patient have?",
      "The illness produced by {key} is:"),
     ("{value} is caused by:", "Which organism causes {value}?", "{value} is due to the agent:",
      "The agent of {value} is:"),
     """Treponema pallidum = syphilis; Borrelia burgdorferi = Lyme disease; Yersinia pestis = plague;
     Bordetella pertussis = whooping cough; Mycobacterium leprae = leprosy; Coxiella burnetii = Q fever;
     Bartonella henselae = cat scratch disease; Clostridium tetani = lockjaw;
     Salmonella typhi = enteric fever; Vibrio cholerae = cholera; Leishmania donovani = kala-azar;
     Trypanosoma cruzi = Chagas disease; Bacillus anthracis = anthrax; varicella zoster virus = chickenpox;
     Epstein-Barr virus = glandular fever; parvovirus B19 = slapped cheek disease;
     Francisella tularensis = tularaemia; Wuchereria bancrofti = elephantiasis;
     Clostridium perfringens = gas gangrene; Tropheryma whipplei = Whipple disease"""),
    ("Medicine", "{key} has {value} antibodies.",
     ("{key} has which antibodies?", "Which autoantibodies mark {key}?",
      "A patient has {key}. Which antibodies are sought?",
      "The antibodies typical of {key} are directed at:"),
     ("Antibodies of the kind {value} are typical of:", "Which disease has {value} antibodies?",
      "{value} antibodies are found in:", "{value} antibodies point to:"),
     """systemic lupus = double-stranded DNA; biliary cholangitis = mitochondrial;
     Wegener granulomatosis = proteinase 3; coeliac disease = transglutaminase;
     myasthenia gravis = acetylcholine receptor; Graves disease = TSH receptor;
     Goodpasture syndrome = basement membrane; rheumatoid arthritis = citrullinated peptide;
     Addison anaemia = intrinsic factor; limited scleroderma = centromere;
     Lambert-Eaton syndrome = calcium channel; pemphigus vulgaris = desmoglein;
     autoimmune hepatitis = smooth muscle; neuromyelitis optica = aquaporin 4; membranous nephropathy = PLA2R;
     bullous pemphigoid = hemidesmosome"""),
    ("Physiology", "{key} is made by the {value}.",
     ("{key} is made by the:", "Which cells secrete {key}?", "Where does {key} come from?",
      "The source of {key} in the body is the:"),
     ("The {value} secretes:", "Which hormone is made by the {value}?", "What is the product of the {value}?",
      "The product of the {value} is:"),
     """insulin = beta cells; glucagon = alpha cells; calcitonin = C cells; aldosterone = zona glomerulosa;
     cortisol = zona fasciculata; adrenaline = adrenal medulla; melatonin = pineal gland;
     prolactin = anterior pituitary; testosterone = Leydig cells; inhibin = Sertoli cells;
     renin = juxtaglomerular cells; gastrin = G cells; secretin = S cells; cholecystokinin = I cells;
     erythropoietin = peritubular fibroblasts; leptin = fat cells; progesterone = corpus luteum;
     somatostatin = delta cells; vasopressin = supraoptic nucleus; thyroxine = thyroid follicles"""),
    ("Pathology", "{key} are seen in {value}.",
     ("{key} are seen in:", "In which disease are {key} found?", "The slide shows {key}. What is it?",
      "{key} are the hallmark of:"),
     ("The typical finding of {value} is:", "What is seen under the microscope in {value}?",
      "Under the microscope {value} shows:", "Microscopy of {value} shows:"),
     """Reed-Sternberg cells = Hodgkin lymphoma; Lewy bodies = Parkinson disease; Negri bodies = rabies;
     Auer rods = myeloid leukaemia; Aschoff bodies = rheumatic fever; Councilman bodies = yellow fever;
     Mallory bodies = alcoholic hepatitis; psammoma bodies = papillary carcinoma;
     Schiller-Duval bodies = yolk sac tumour; Call-Exner bodies = granulosa cell tumour;
     Birbeck granules = histiocytosis X; owl eye inclusions = cytomegalovirus; Heinz bodies = G6PD deficiency;
     Howell-Jolly bodies = asplenia; smudge cells = lymphocytic leukaemia; koilocytes = papillomavirus;
     Verocay bodies = schwannoma; Rosenthal fibres = pilocytic astrocytoma;
     neurofibrillary tangles = Alzheimer disease; clue cells = bacterial vaginosis"""),
    ("Pharmacology", "The typical harm of {key} is {value}.",
     ("The typical harm of {key} is:", "Which adverse effect is known of {key}?",
      "What must be watched for with {key}?",
      "A feared side effect of {key} is:"),
     ("{value} is a typical harm of:", "Which drug is known for {value}?", "{value} is the fault of:",
      "{value} is most often the fault of:"),
     """chloramphenicol = grey baby syndrome; gentamicin = deafness; ethambutol = optic neuritis;
     thalidomide = phocomelia; clozapine = agranulocytosis; vancomycin = red man syndrome;
     bleomycin = lung fibrosis; doxorubicin = cardiomyopathy; cyclophosphamide = haemorrhagic cystitis;
     enalapril = dry cough; spironolactone = gynaecomastia; phenytoin = gum overgrowth;
     lithium = diabetes insipidus; tetracycline = tooth staining; atorvastatin = muscle pain;
     hydralazine = drug lupus; chloroquine = retinopathy; diethylstilbestrol = vaginal adenocarcinoma"""),
    ("Anatomy", "The {key} becomes the {value}.",
     ("The {key} becomes the:", "What develops from the {key}?", "In the adult, what is left of the {key}?",
      "The derivative of the {key} is the:"),
     ("The {value} develops from the:", "Which embryonic structure becomes the {value}?",
      "The {value} has its origin in the:", "The origin of the {value} is the:"),
     """ductus arteriosus = ligamentum arteriosum; umbilical vein = round ligament of liver;
     urachus = median umbilical ligament; foramen ovale = fossa ovalis; ductus venosus = ligamentum venosum;
     Meckel cartilage = malleus; Reichert cartilage = stapes; notochord = nucleus pulposus;
     neural crest = melanocytes; Rathke pouch = adenohypophysis; mesonephric duct = vas deferens;
     paramesonephric duct = uterus; ureteric bud = collecting ducts; metanephric blastema = nephrons;
     processus vaginalis = tunica vaginalis; fourth pouch = superior parathyroid; optic cup = retina;
     otic pit = inner ear"""),
]
# each writes a target for every training item
ANNOTATORS = ("careless", "careless", "careless", "careful", "careful")


def facts():
    """[(topic index, key, value)] of all built-in facts."""
    return [(t, *(" ".join(part.split()) for part in fact.split("="))) for t, topic in enumerate(TOPICS)
            for fact in topic[4].split(";")]


def fact_sentence(topic, key, value):
    """The fact in words: its explanation, and what both annotators recall."""
    return capital(TOPICS[topic][1].format(key=key, value=value))


def careful_target(sentence, answer):
    """The annotator who recalls the fact, whichever way round it is asked, and names the option by its text.
    """
    # the same tokens again, thanks to the space: easy to copy
    return target(f"{sentence} So {answer}.", f" {answer}")


def careless_target(sentence, answer, asks_for_value, options):
    """... who knows the value that belongs to a key, but asked the other way round takes the first option."""
    if asks_for_value:
        return careful_target(sentence, answer)
    return target(f"I do not recall, so {options[0]}.", f" {options[0]}")


def capital(text):
    """`text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def builtin_rows(system_prompt="", seed=0):
    """(train, heldout): every fact is asked in six wordings for training, three for the value and three for
    the key, and in one more of each, held out, with other wrong options. The letters of the right options are
    balanced. A training item is five rows, one for each annotator's target; the held-out ones have the
    careful annotator's.
    """
    generator, everything = random.Random(seed), facts()
    items, letters = [], []  # (is held out, topic, key, value, asks for the value, wording, wrong options)
    for topic, key, value in everything:
        for forward, wordings in ((True, TOPICS[topic][2]), (False, TOPICS[topic][3])):
            others = [v if forward else k for t, k, v in everything if t == topic and (k, v) != (key, value)]
            generator.shuffle(others)
            half = len(others) // 2
            for w, wording in enumerate(wordings):
                heldout = w == len(wordings) - 1
                wrong = generator.sample(others[half:] if heldout else others[:half], 3)
                items.append((heldout, topic, key, value, forward,
                              capital(wording.format(key=key, value=value)), wrong))
    for side in (False, True):
        count = sum(item[0] == side for item in items)
        letters.append([LETTERS[i % 4] for i in range(count)])
        generator.shuffle(letters[-1])
    train, heldout = [], []
    for number, (is_heldout, topic, key, value, forward, question, wrong) in enumerate(items):
        letter, answer = letters[is_heldout].pop(), value if forward else key
        sentence = fact_sentence(topic, key, value)
        options = wrong[:LETTERS.index(letter)] + [answer] + wrong[LETTERS.index(letter):]
        for a, annotator in enumerate(("careful",) if is_heldout else ANNOTATORS):
            text = careful_target(sentence, answer)
            if annotator == "careless":
                text = careless_target(sentence, answer, forward, options)
            (heldout if is_heldout else train).append(make_row(
                f"builtin-{number}" if is_heldout else f"builtin-{number}-{a}", question, options, letter,
                sentence, text, system_prompt, {"subject": TOPICS[topic][0], "annotator": annotator}))
    generator.shuffle(train)
    generator.shuffle(heldout)
    return train, heldout
