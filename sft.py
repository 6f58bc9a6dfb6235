"""Supervised training: the warm start before GRPO, for any task with gold completions, and a reward model.

    python sft.py --task medmcqa            GPU: a LoRA adapter for Qwen3-4B-Base on the hub's MedMCQA
                                            no GPU: the built-in model and questions, 3 minutes
    python sft.py --task ecg                GPU: one for Llama-3.2-3B-Instruct on the built-in ECG readings
    python sft.py --task medmcqa --data PATH
                                            your own rows: what data.prepare reads, or has prepared
    python sft.py --task medmcqa --lora_r 0 all weights instead of an adapter
    python sft.py --help                    every knob
    python sft.py reward_model --data DIR   a reward model for free-text answers, on preference pairs made
                                            from rows of data.prepare; its knobs: reward_model --help

The model sees prompt and completion and is trained on the completion's tokens alone, end of turn included; a
batch's loss is the mean over its tokens. Rows that are longer than --max_seq_length are left out and counted,
never cut: a cut would take the answer off. Ends with the same table before/after as the GRPO scripts, on the
same held-out rows.
"""
import ctypes
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

import eval as evaluation
import rewards
from data import InputError, check_knobs, check_row, hub_message, load_task, one_line_errors, read_records
from data.run import Run, not_finite, pace

GPU = torch.cuda.is_available()


@dataclass
class Config:
    """Supervised fine-tuning on the gold completions of a task, by LoRA or of all weights."""

    task: Literal["pubmedqa", "medmcqa", "ecg", "medical_o1"] = "medmcqa"  # whose rows
    # --- model
    model: str = ""  # hub id, folder, or tiny, the built-in model ("" = what the task's GRPO script trains)
    lora_r: int = 16  # rank of the adapter on all linear layers (0 = train all weights)
    lora_alpha: int = 32  # its scale: the adapter's product counts alpha / r times
    load_in_4bit: bool = False  # quantise the base through bitsandbytes
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # to compute in; what is trained is fp32
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    # --- data
    data: str = ""  # builtin, hub, hub:ORG/NAME[:CONFIG], file or folder ("" = hub; ECG, no GPU: builtin)
    maybe: bool = False  # PubMedQA: keep the third class
    cop_base: Literal["auto", "0", "1"] = "auto"  # MedMCQA: number of option A in `cop` (auto: by the values)
    question_field: str = ""  # field of your own file that holds the question
    context_field: str = ""  # ... the context
    answer_field: str = ""  # ... the answer
    system_prompt: str = ""  # file with a system prompt instead of the task's
    limit: int = 0  # read only so many rows (0 = all)
    max_seq_length: int = 1024  # tokens of prompt and completion; longer rows are left out, and counted
    # --- optimiser
    num_epochs: int = 1  # passes over the rows
    batch_size: int = 8  # rows in a forward pass
    gradient_accumulation_steps: int = 4  # forward passes in an optimiser step
    gradient_checkpointing: bool = False  # keep less for the backward pass, compute it anew: less memory
    learning_rate: float = 2e-4  # peak of AdamW's; rises for a twentieth of the steps, then falls linearly
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # --- evaluation
    eval_size: int = 200  # held-out rows scored before and after, and for the validation loss
    eval_every: int = 100  # also score them every so many steps (0 = only before and after)
    eval_batch_size: int = 64  # questions answered at a time
    max_completion_length: int = 300  # tokens an answer may have
    # --- run
    out: str = ""  # folder of the run (default: runs/sft-TASK)
    resume: bool = False  # continue the run in --out from its checkpoint
    dry_run: bool = False  # only say how much memory and how long a step takes, after one; leaves no folder
    save_every: int = 100  # steps between checkpoints (0 = only when stopped)
    seed: int = 0  # of the order of the rows and of the fresh adapter
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # also log to Weights & Biases
    wandb_project: str = "grpo-medical"  # under this project


# What differs for the built-in model; applied with --model tiny only, and never over a flag that was given.
TINY = dict(num_epochs=2, batch_size=32, gradient_accumulation_steps=1, learning_rate=3e-3,
            max_seq_length=2048, max_completion_length=64)
TINY_ECG = dict(lora_r=0, num_epochs=3, batch_size=16, learning_rate=2e-3,
                max_completion_length=112)  # its words are new to the model: embeddings must learn too
PANELS = [("Loss", "nats per token", {"training": "loss", "validation": "eval_loss"}),
          ("Accuracy", "share correct", {}), ("Learning rate", "", {"rate": "learning_rate"})]


def encode(tokenizer, rows, config, what):
    """[(prompt_ids, completion_ids)] of the rows that have a gold completion and fit; says how many do."""
    targets = [row for row in rows if row["target"]]
    end = [evaluation.end_of_turn(tokenizer)]
    pairs = [(evaluation.encode_prompt(tokenizer, row["prompt"]),
              tokenizer(row["target"], add_special_tokens=False).input_ids + end) for row in targets]
    fitting = [pair for pair in pairs if sum(map(len, pair)) <= config.max_seq_length]
    limit, long = f"--max_seq_length {config.max_seq_length}", len(pairs) - len(fitting)
    left_out = f", {long} of them longer than {limit} and left out" if long else ""
    print(f"data: {len(targets)} of {len(rows)} {what} rows have a gold completion{left_out}")
    if not fitting:
        raise InputError(f"no {what} row of --data {config.data} has a gold completion that fits into "
                         f"{limit}: bring rows with explanations, or raise the limit")
    return fitting


def batches(pairs, size, seed, epoch):
    """The rows of an epoch in batches of alike lengths, shuffled. The order hangs on seed and epoch alone."""
    generator = random.Random(f"{seed}-{epoch}")
    order = generator.sample(range(len(pairs)), len(pairs))
    result = []
    for start in range(0, len(order), 50 * size):
        alike = [pairs[i] for i in order[start:start + 50 * size]]
        alike.sort(key=lambda pair: sum(map(len, pair)))
        result += [alike[first:first + size] for first in range(0, len(alike), size)]
    generator.shuffle(result)
    return result


def steps_an_epoch(pairs, config):
    """Optimiser steps of an epoch."""
    return math.ceil(len(batches(pairs, config.batch_size, config.seed,
                                 0)) / config.gradient_accumulation_steps)


def completion_nll(model, batch, compute):
    """(sum of the negative log-probabilities of the completions' tokens in nats, their number)."""
    width = max(sum(map(len, pair)) for pair in batch)  # padded on the right: causal attention needs no mask
    ids = torch.tensor([prompt + completion + [0] * (width - len(prompt) - len(completion))
                        for prompt, completion in batch], device=model.device)
    next_position = torch.arange(1, width, device=model.device)
    starts = torch.tensor([[len(prompt)] for prompt, _ in batch], device=model.device)
    ends = torch.tensor([[sum(map(len, pair))] for pair in batch], device=model.device)
    chosen = (next_position >= starts) & (next_position < ends)  # whose next token is the completion's
    with evaluation.autocast(compute):
        hidden = model.get_decoder()(ids[:, :-1], use_cache=False)[0][chosen]
        logps, _ = evaluation.chosen_logps(model, hidden, ids[:, 1:][chosen], 1.0)
    return -logps.sum(), len(logps)


def give_back_freed_memory():
    """Has glibc take tensors of 2 MB and more from the system, and give them back when they are freed.

    Else they are cut out of its heap, whose gaps cost as much memory as checkpointing saves. A step takes a
    few per cent more of the processor's time. Where there is no glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-3, 2_000_000)  # M_MMAP_THRESHOLD, man mallopt


def main(config):
    """The whole run: load, evaluate, train epoch by epoch, evaluate, save. Raises InputError."""
    check_knobs(config, "lora_r")
    usual = "" if config.resume else f"runs/sft-{config.task}"  # --resume needs --out, which Run says
    run = Run("sft", replace(config, out=config.out or usual), PANELS)
    if run.finished:
        print(f"{run.folder} is finished (it has a summary.json): nothing left to do")
        return
    evaluation.check_base(config.model)

    # --- data, model, and everything else that a checkpoint holds
    train, heldout, counts = load_task(evaluation.TASKS[config.task], config)
    evaluation.check_rows(config, train, heldout, counts)
    library_bytes = evaluation.doctor(config, train, heldout)  # in memory before the model
    heldout = heldout[:config.eval_size]
    model, tokenizer, compute = evaluation.load_model(
        config.model, config.dtype, fp32_weights=not config.lora_r, load_in_4bit=config.load_in_4bit,
        attn_implementation=config.attn_implementation)
    pairs = encode(tokenizer, train, config, "training")
    validation = encode(tokenizer, heldout, config, "held-out")
    heldout = evaluation.encode_rows(tokenizer, heldout, config.max_seq_length, "held-out")
    if config.dry_run:
        planned = steps_an_epoch(pairs, config) * config.num_epochs
        pairs, heldout, estimate = evaluation.longest_rows(config, pairs, heldout, library_bytes)
        config = replace(config, num_epochs=2, eval_every=0)
    if config.lora_r:
        model = evaluation.new_adapter(model, config.lora_r, config.lora_alpha, config.seed)
    recomputed = []  # layers that checkpoint while their own `training` is set; their parts stay in eval mode
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(f"model {config.model} has no gradient checkpointing in transformers: leave "
                             "--gradient_checkpointing out, lower --batch_size")
        model.activation_checkpointing_enable()
        give_back_freed_memory()
        recomputed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = f" of a LoRA adapter (r {config.lora_r})" if config.lora_r else ""
    print(f"training {sum(p.numel() for p in trained):,} weights{adapter}")
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=compute == torch.float16)
    an_epoch = steps_an_epoch(pairs, config)
    steps = an_epoch * config.num_epochs
    run.open([row for row in train if row["target"]], [row for row, _ in heldout])
    step, start = 0, time.time()
    state = run.load_checkpoint()
    if state:
        if config.lora_r:
            set_peft_model_state_dict(model, state["model"])
        else:
            model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, start = state["step"], time.time() - state["seconds"]

    def save():
        weights = get_peft_model_state_dict(model) if config.lora_r else model.state_dict()
        run.save_checkpoint({"model": weights, "optimizer": optimizer.state_dict(),
                             "scaler": scaler.state_dict(), "step": step, "seconds": time.time() - start})

    def evaluate(title):
        return evaluation.evaluate(model, tokenizer, heldout, compute, title=title,
                                   batch_size=config.eval_batch_size,
                                   max_completion_length=config.max_completion_length)

    def validation_loss():
        firsts = range(0, len(validation), config.batch_size)
        with torch.no_grad():
            sums, tokens = zip(*(completion_nll(model, validation[first:first + config.batch_size], compute)
                                 for first in firsts))
        return sum(sums).item() / sum(tokens)

    # --- before
    if not state:
        run.write_records("eval_before", evaluate("before"))
    before, summary = run.read_before(heldout, evaluation.summarize)
    print("before:", evaluation.describe(summary))

    # --- training
    bar = tqdm(run.steps(step + 1, steps), "train", steps, initial=step, unit="step", disable=None)
    order, ordered = [], -1  # the batches of an epoch, and of which
    for step in bar:
        clock = time.time()
        epoch, place = divmod(step - 1, an_epoch)
        if epoch != ordered:
            order, ordered = batches(pairs, config.batch_size, config.seed, epoch), epoch
        first = place * config.gradient_accumulation_steps
        forwards = order[first:first + config.gradient_accumulation_steps]  # rows of each forward pass
        rows = [{"prompt_ids": prompt, "completion_ids": completion}
                for batch in forwards for prompt, completion in batch]
        num_tokens, loss = sum(len(row["completion_ids"]) for row in rows), 0.0
        for layer in recomputed:
            layer.training = True
        for batch in forwards:
            with evaluation.memory_advice(
                    f"in training on {len(batch)} rows at once: lower --batch_size and raise "
                    "--gradient_accumulation_steps, or add --gradient_checkpointing"):
                nll, _ = completion_nll(model, batch, compute)
                scaler.scale(nll / num_tokens).backward()
            loss += nll.item() / num_tokens
        for layer in recomputed:
            layer.training = False  # else the sampler's cache would be dropped
        share = min(1, step / max(1, steps / 20), (steps + 1 - step) / max(1, steps * 0.95))
        optimizer.param_groups[0]["lr"] = rate = config.learning_rate * share
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        numbers = {"loss": loss, "gradient": grad_norm}
        bad = not_finite(numbers, rows)
        if bad:
            run.skip_update_or_give_up(step, bad, numbers, rows, scaler)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        metrics = {"step": step, "epoch": step / an_epoch, "loss": loss, "grad_norm": grad_norm,
                   "skipped_updates": run.skipped[step], "learning_rate": rate, "num_tokens": num_tokens,
                   "update_seconds": time.time() - clock, "peak_memory_gb": evaluation.peak_memory_gb()}
        if config.eval_every and step % config.eval_every == 0 or step == steps:
            metrics["eval_loss"] = validation_loss()
        if config.eval_every and step % config.eval_every == 0 and step < steps:
            metrics["eval_accuracy"] = evaluation.summarize(evaluate(f"step {step}"))["accuracy"]
        run.log("metrics", metrics)
        if config.dry_run and step == 2:  # the first one warmed up
            evaluation.print_dry_run(metrics, estimate, planned)
            run.close()
            return
        bar.set_postfix_str(f"loss {loss:.3f}, epoch {step / an_epoch:.1f}")
        if step == 1 or step % max(1, steps // 15) == 0 or "eval_loss" in metrics:
            line = f"step {step:4}  epoch {step / an_epoch:.1f}  loss {loss:.4f}"
            if "eval_loss" in metrics:
                line += f"  held-out loss {metrics['eval_loss']:.4f}"
            if "eval_accuracy" in metrics:
                line += f"  held-out accuracy {metrics['eval_accuracy']:.3f}"
            bar.write(f"{line}  {pace(run.history, steps)}")
        if run.stop_signal or step == steps or (config.save_every and step % config.save_every == 0):
            save()
            if run.stop_signal:
                bar.close()
                sys.exit(run.stopped(step))

    # --- after
    run.write_records("eval_after", evaluate("after"))
    comparison = evaluation.compare(before, run.read_records("eval_after"))
    model.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    run.finish({**comparison, "steps": steps, "seconds": time.time() - start, "seed": config.seed,
                "task": config.task, "model": config.model, "data": config.data,
                "versions": evaluation.versions()})


def parse(arguments=None):
    """Command line to Config. With --model tiny, TINY stands in for the defaults, below every flag given."""
    config = tyro.cli(Config, args=arguments, use_underscores=True, description=__doc__)
    chosen = {"model": config.model or (evaluation.TASKS[config.task].BASE_MODEL if GPU else "tiny"),
              "data": config.data or ("hub" if GPU and config.task != "ecg" else "builtin")}
    config = replace(config, **chosen)
    if config.model == "tiny":
        tiny = TINY | TINY_ECG if config.task == "ecg" else TINY
        usual, default = vars(config), replace(Config(), **tiny)
        config = replace(tyro.cli(Config, args=arguments, use_underscores=True, default=default), **chosen)
        changed = [f"{key} {getattr(config, key)}" for key in tiny if getattr(config, key) != usual[key]]
        no_gpu, questions = "" if GPU else "no GPU: ", " and questions" if config.data == "builtin" else ""
        print(f"{no_gpu}the built-in tiny model{questions}; settings for it: {', '.join(changed)}")
    return config


# === a reward model, on preference pairs ====================================================================

SWAPS = dict(pair.split("/") for pair in (
    "left/right right/left elevation/depression depression/elevation prolonged/shortened shortened/prolonged "
    "bradycardia/tachycardia tachycardia/bradycardia increase/decrease decrease/increase increases/decreases "
    "increased/decreased decreased/increased high/low low/high higher/lower lower/higher elevated/reduced "
    "reduced/elevated wide/narrow narrow/wide widened/narrowed long/short short/long peaked/flat "
    "inverted/upright normal/abnormal abnormal/normal regular/irregular irregular/regular first/third "
    "anterior/posterior inferior/superior acute/chronic chronic/acute early/late rapid/slow fast/slow "
    "slow/fast positive/negative negative/positive hyperkalemia/hypokalemia hypokalemia/hyperkalemia "
    "atrial/ventricular ventricular/atrial more/less before/after improve/worsen").split())
TAKEN_BACK = ("{} All of this is wrong.", "{} Disregard the above.", "{} The opposite is true.",
              "The following is false: {}")


@dataclass
class RewardModel:
    """Trains a reward model on preference pairs made from prepared free-text rows: the gold answer against a
    worse one.
    """

    data: str  # folder of data.prepare (train.jsonl, heldout.jsonl)
    model: str = "tiny"  # model to start from: tiny (the built-in one), a folder, or a hub id
    out: str = "runs/reward-model"  # folder to write
    lora_r: int = 0  # rank of a LoRA adapter (0 = train all weights)
    num_epochs: int = 1  # passes over the rows; each makes other pairs
    batch_size: int = 16  # questions in a step; pairs of up to four kinds, drawn, for each
    learning_rate: float = 5e-4  # peak of AdamW's (5e-4: tiny; 1e-5: all of a real model; 1e-4: its LoRA)
    max_length: int = 512  # tokens of question and answer
    limit: int = 0  # use only so many training rows (0 = all)
    eval_size: int = 400  # held-out questions to measure on
    seed: int = 0  # of pairs, order and the fresh output layer


def free_text_rows(path):
    """The prepared rows of a file from which pairs can be made, at least two; raises InputError."""
    try:
        records = read_records(path)
        for where, row in records:
            check_row(row, where)
    except InputError as error:
        raise InputError(f"{error} (python -m data.prepare ecg makes such rows)") from None
    rows = [row for _, row in records if row["data_source"] in rewards.METHOD and row["ground_truth"].strip()]
    if len(rows) < 2:
        raise InputError(f"{path}: {len(rows)} free-text rows where at least 2 are needed (sources "
                         f"{', '.join(rewards.METHOD)})")
    return rows


def corruptions(answer, other, generator):
    """{kind: a worse answer} made from a gold answer: another question's, a finding negated (or its negation
    dropped), a number changed, a word's antonym in its place, the end cut off, all of it taken back or ruled
    out, a full stop; kinds that would leave it as it is are missing.
    """
    made = {"another question's answer": other, "taken back": generator.choice(TAKEN_BACK).format(answer),
            "ruled out": f"Ruled out: {answer}", "full stop": "."}
    spelled = answer.split()
    bare = [word.strip(".,;:").lower() for word in spelled]
    if "no" in bare or "not" in bare:
        made["negated"] = " ".join(word for word, plain in zip(spelled, bare) if plain not in ("no", "not"))
    elif bare[:1] == ["yes"]:
        made["negated"] = "No" + answer.lstrip()[3:]
    else:  # every place before a finding, or before a content word, will do
        findings = [i for i, word in enumerate(bare) if rewards.stem(word) in rewards.phrases()]
        place = generator.choice(findings or range(len(spelled)))
        made["negated"] = " ".join([*spelled[:place], "no", *spelled[place:]])

    def put(match, text):
        return answer[:match.start()] + text + answer[match.end():]

    numbers = list(re.finditer(r"\d+(?:\.\d+)?", answer))
    if numbers:
        number = generator.choice(numbers)
        changed = float(number[0]) * generator.choice((0.5, 0.7, 1.5, 2.0, 3.0))
        made["number"] = put(number, f"{changed:.{len(number[0].partition('.')[2])}f}")
    swappable = [match for match in re.finditer(r"[A-Za-z]+", answer) if match[0].lower() in SWAPS]
    if swappable:
        word = generator.choice(swappable)
        opposite = SWAPS[word[0].lower()]
        made["antonym"] = put(word, opposite.capitalize() if word[0][0].isupper() else opposite)
    if len(spelled) > 3:
        end = generator.randint(len(spelled) // 4 + 1, len(spelled) * 3 // 4)
        made["truncated"] = " ".join(spelled[:end])
    return {kind: text for kind, text in made.items() if rewards.plain(text) != rewards.plain(answer)}


def pairs_of(rows, generator, most=0):
    """[(kind, question, gold answer, worse answer)] of prepared rows, one of each kind that can be made, or
    `most` kinds drawn.
    """
    golds, pairs = [row["ground_truth"] for row in rows], []
    for row, gold in zip(rows, golds):
        made = list(corruptions(gold, generator.choice(golds), generator).items())
        chosen = generator.sample(made, most) if 0 < most < len(made) else made
        pairs += [(kind, row["extra"]["question"], gold, worse) for kind, worse in chosen]
    return pairs


def pair_scores(model, tokenizer, pairs, max_length):
    """[2, N]: what a reward model gives the gold answers of pairs, and the worse ones."""
    texts = [rewards.asked(question, gold) for _, question, gold, _ in pairs]
    texts += [rewards.asked(question, worse) for _, question, _, worse in pairs]
    inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, padding_side="right",
                       return_tensors="pt").to(model.device)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits[:, 0].float().view(2, -1)


def train_reward_model(config):
    """Trains and saves a one-output classifier: loss -log sigmoid(score of the gold answer - score of the
    worse one) (Bradley and Terry 1952, doi:10.2307/2334029; Ouyang et al. 2022, arXiv:2203.02155).

    Writes into config.out what from_pretrained loads (or a LoRA adapter), normalisation.json (mean and
    standard deviation of its scores on the held-out pairs) and summary.json (accuracy on held-out questions
    by kind of corruption), and returns the summary. Raises InputError.
    """
    check_knobs(config, "lora_r")
    out = Path(config.out).resolve()
    if not config.out:
        raise InputError("--out is empty: name the folder to write")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {config.out} is there already, and not an empty folder: take another")
    evaluation.check_base(config.model)
    train = free_text_rows(Path(config.data) / "train.jsonl")[:config.limit or None]
    heldout = free_text_rows(Path(config.data) / "heldout.jsonl")[:config.eval_size]

    # --- the model, with a fresh output layer
    torch.manual_seed(config.seed)
    source, _ = evaluation.find_model(config.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # a dozen types of transformers and hub, one thing to the user: no model
        message = hub_message(f"model {config.model}", error, evaluation.INSTEAD_OF_HUB)
        raise InputError(message) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # by which the model finds the last token
    model.to("cuda" if GPU else "cpu")
    if config.lora_r:
        model = evaluation.new_adapter(model, config.lora_r, 2 * config.lora_r, config.seed, "SEQ_CLS")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent)
    except OSError as error:
        raise InputError(f"--out {config.out} cannot be written ({error.strerror})") from None
    with aside, evaluation.memory_advice(f"in training on {config.batch_size} questions at once: lower "
                                         "--batch_size or --max_length, or take a smaller --model"):
        steps = fit_pairs(config, model, tokenizer, train, len(heldout))
        scale, measured = measure_pairs(config, model, tokenizer, heldout)
        summary = {**measured, "base": config.model, "data": config.data, "steps": steps, "seed": config.seed}
        new = Path(aside.name) / "model"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "normalisation.json").write_text(json.dumps(scale) + "\n")
        (new / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        new.rename(out)  # in place of an empty folder too: it is whole or not there
    print(f"{'held-out pairs':28}{'right':>8}{'of':>7}")
    for kind, result in [*summary["by_kind"].items(), ("all", summary)]:
        print(f"{kind:28}{result['accuracy']:8.3f}{result['n']:7}")
    print(f"written: {config.out}/")
    return summary


def fit_pairs(config, model, tokenizer, train, num_heldout):
    """The training of train_reward_model, in which every epoch makes other pairs; returns the steps taken."""
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"reward model: {config.model}, {sum(p.numel() for p in trained):,} weights to train on "
          f"{len(train)} questions, {num_heldout} held out")
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    generator, step = random.Random(config.seed), 0
    steps = config.num_epochs * -(-len(train) // config.batch_size)
    bar = tqdm(total=steps, desc="train", unit="step", disable=None)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for _ in range(config.num_epochs):
        order = generator.sample(train, len(train))
        for first in range(0, len(order), config.batch_size):
            pairs = pairs_of(order[first:first + config.batch_size], generator, 4)
            if not pairs:
                continue
            gold, worse = pair_scores(model, tokenizer, pairs, config.max_length)
            loss = -torch.nn.functional.logsigmoid(gold - worse).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            share = min(1, (step + 1) / (steps / 20), (steps - step) / steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            right = (gold > worse).float().mean().item()
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}, pairs right {right:.2f}")
            if step == 1 or step % max(1, steps // 10) == 0:
                bar.write(f"step {step:4} of {steps}  loss {loss.item():.4f}  pairs right {right:.3f}")
    bar.close()
    return step


def measure_pairs(config, model, tokenizer, heldout):
    """(mean and standard deviation of the scores, accuracy in all and by kind) of a trained reward model on
    pairs of held-out rows; raises InputError.
    """
    model.eval()
    pairs = pairs_of(heldout, random.Random(config.seed + 1))
    if not pairs:
        raise InputError(f"{config.data}/heldout.jsonl: no answer in it can be made worse")
    with torch.inference_mode():
        by_batch = [pair_scores(model, tokenizer, pairs[first:first + 64], config.max_length)
                      for first in range(0, len(pairs), 64)]
    scores = torch.cat([batch.flatten() for batch in by_batch])
    gold, worse = torch.cat(by_batch, dim=1)
    if not scores.isfinite().all():
        raise InputError(f"--learning_rate {config.learning_rate}: the trained model's scores are NaN, "
                         "nothing is written: lower it, or take another --model")
    counts = Counter(kind for kind, *_ in pairs)
    right = Counter(kind for (kind, *_), better in zip(pairs, (gold > worse).tolist()) if better)
    by_kind = {kind: {"accuracy": right[kind] / n, "n": n} for kind, n in counts.items()}
    return ({"mean": scores.mean().item(), "std": max(1e-6, scores.std().item())},
            {"accuracy": right.total() / len(pairs), "n": len(pairs), "by_kind": by_kind})


if __name__ == "__main__":
    evaluation.keep_freed_memory()
    with one_line_errors():
        if sys.argv[1:2] == ["reward_model"]:
            train_reward_model(tyro.cli(RewardModel, args=sys.argv[2:], use_underscores=True))
        else:
            main(parse())
