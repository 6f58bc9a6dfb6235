"""Supervised fine-tuning: the warm start before GRPO, for any task that has gold completions.

    python sft.py --task medmcqa                       GPU: a LoRA adapter for Qwen3-4B-Base on the hub's MedMCQA
                                                       no GPU: the built-in model and items, about 3 minutes
    python sft.py --task ecg                           GPU: one for Llama-3.2-3B-Instruct on the built-in ECG readings
    python sft.py --task medmcqa --data PATH           your own rows: what data.prepare reads, or has prepared
    python sft.py --task medmcqa --lora_r 0            all weights instead of an adapter
    python sft.py --help                               every knob

The model sees prompt and completion and is trained on the completion's tokens alone, end of turn included; a batch's loss is
the mean over its tokens. Rows that are longer than --max_seq_length are left out and counted, never cut: a cut would take
the answer off. Ends with the same table before/after as the GRPO scripts, on the same held-out rows.
"""
import ctypes
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import eval as evaluation
from data import InputError, check_knobs, load_task, one_line_errors
from data.run import Run, not_finite

GPU = torch.cuda.is_available()


@dataclass
class Config:
    """Supervised fine-tuning on the gold completions of a task, by LoRA or of all weights."""

    task: Literal["pubmedqa", "medmcqa", "ecg", "medical_o1"] = "medmcqa"  # whose rows
    # --- model
    model: str = ""  # hub id, model folder, or tiny, the built-in model ("" = what the task's GRPO script trains)
    lora_r: int = 16  # rank of the adapter on all linear layers (0 = train all weights)
    lora_alpha: int = 32  # its scale: the adapter's product counts alpha / r times
    load_in_4bit: bool = False  # quantise the base through bitsandbytes
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # to compute in; what is trained is fp32
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    # --- data
    data: str = ""  # builtin, hub, hub:ORG/NAME[:CONFIG], or a file or prepared folder ("" = hub with a GPU, builtin without; ECG: builtin)
    maybe: bool = False  # PubMedQA: keep the third class
    cop_base: Literal["auto", "0", "1"] = "auto"  # MedMCQA: the number of option A in `cop` (auto: told from the values)
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
    learning_rate: float = 2e-4  # peak of AdamW's; rises for a twentieth of the steps, then falls to 0 as a line
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
TINY = dict(num_epochs=2, batch_size=32, gradient_accumulation_steps=1, learning_rate=3e-3, max_seq_length=2048,
            max_completion_length=64)
TINY_ECG = dict(lora_r=0, num_epochs=3, batch_size=16, learning_rate=2e-3,
                max_completion_length=112)  # its words are new to the model: embeddings must learn too
PANELS = [("Loss", "nats per token", {"training": "loss", "validation": "eval_loss"}), ("Accuracy", "share correct", {}),
          ("Learning rate", "", {"rate": "learning_rate"})]


def encode(tokenizer, rows, config, what):
    """[(prompt_ids, completion_ids)] of the rows that have a gold completion and fit; says how many have or do not."""
    targets = [row for row in rows if row["target"]]
    end = [evaluation.end_of_turn(tokenizer)]
    pairs = [(evaluation.encode_prompt(tokenizer, row["prompt"]),
              tokenizer(row["target"], add_special_tokens=False).input_ids + end) for row in targets]
    fitting = [pair for pair in pairs if sum(map(len, pair)) <= config.max_seq_length]
    print(f"data: {len(targets)} of {len(rows)} {what} rows have a gold completion"
          + f", {len(pairs) - len(fitting)} of them longer than --max_seq_length {config.max_seq_length} and left out"
          * (len(fitting) < len(pairs)))
    if not fitting:
        raise InputError(f"no {what} row of --data {config.data} has a gold completion that fits into --max_seq_length "
                         f"{config.max_seq_length}: bring rows with explanations, or raise the limit")
    return fitting


def batches(pairs, size, seed, epoch):
    """The rows of an epoch in batches of alike lengths, shuffled. The order hangs on seed and epoch alone."""
    generator = random.Random(f"{seed}-{epoch}")
    order = generator.sample(range(len(pairs)), len(pairs))
    result = []
    for start in range(0, len(order), 50 * size):
        alike = sorted(order[start:start + 50 * size], key=lambda i: sum(map(len, pairs[i])))
        result += [[pairs[i] for i in alike[first:first + size]] for first in range(0, len(alike), size)]
    generator.shuffle(result)
    return result


def completion_nll(model, batch, compute):
    """(sum of the negative log-probabilities of the completions' tokens in nats, their number)."""
    width = max(sum(map(len, pair)) for pair in batch)  # padded on the right: causal attention needs no mask
    ids = torch.tensor([prompt + completion + [0] * (width - len(prompt) - len(completion)) for prompt, completion in batch],
                       device=model.device)
    position = torch.arange(width - 1, device=model.device)
    starts, ends = (torch.tensor(x, device=model.device)[:, None] for x in (
        [len(prompt) - 1 for prompt, _ in batch], [sum(map(len, pair)) - 1 for pair in batch]))
    chosen = (position >= starts) & (position < ends)  # positions whose next token belongs to the completion
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
    out = config.out or ("" if config.resume else f"runs/sft-{config.task}")  # --resume needs --out, which Run says
    run = Run("sft", replace(config, out=out), PANELS)
    if run.finished:
        print(f"{run.folder} is finished (it has a summary.json): nothing left to do")
        return
    evaluation.check_base(config.model)

    # --- data, model, and everything else that a checkpoint holds
    train, heldout, counts = load_task(evaluation.TASKS[config.task], config)
    evaluation.check_rows(config, train, heldout, counts)
    libraries = evaluation.doctor(config, train, heldout)  # bytes in memory before the model
    heldout = heldout[:config.eval_size]
    model, tokenizer, compute = evaluation.load_model(config.model, config.dtype, fp32_weights=not config.lora_r,
                                                      attn_implementation=config.attn_implementation, load_in_4bit=config.load_in_4bit)
    pairs, validation = encode(tokenizer, train, config, "training"), encode(tokenizer, heldout, config, "held-out")
    heldout = evaluation.encode_rows(tokenizer, heldout, config.max_seq_length, "held-out")
    if config.dry_run:
        pairs, heldout, estimate = evaluation.longest_rows(config, pairs, heldout, libraries)
        config = replace(config, num_epochs=3, eval_every=0)
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
    print(f"training {sum(p.numel() for p in trained):,} weights" + (f" of a LoRA adapter (r {config.lora_r})" if config.lora_r else ""))
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=compute == torch.float16)
    an_epoch = -(-len(batches(pairs, config.batch_size, config.seed, 0)) // config.gradient_accumulation_steps)  # steps
    steps = an_epoch * config.num_epochs
    run.open([row for row in train if row["target"]], [row for row, _ in heldout])
    step, start = 0, time.time()
    state = run.load_checkpoint()
    if state:
        set_peft_model_state_dict(model, state["model"]) if config.lora_r else model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, start = state["step"], time.time() - state["seconds"]
        print(f"resumed: {run.folder} after step {step}")

    def save():
        weights = get_peft_model_state_dict(model) if config.lora_r else model.state_dict()
        run.save_checkpoint({"model": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                             "seconds": time.time() - start})

    def evaluate(title):
        return evaluation.evaluate(model, tokenizer, heldout, compute, title=title, batch_size=config.eval_batch_size,
                                   max_completion_length=config.max_completion_length)

    def validation_loss():
        parts = [validation[i:i + config.batch_size] for i in range(0, len(validation), config.batch_size)]
        with torch.no_grad():
            sums, tokens = zip(*(completion_nll(model, part, compute) for part in parts))
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
        clock, (epoch, place) = time.time(), divmod(step - 1, an_epoch)
        if epoch != ordered:
            order, ordered = batches(pairs, config.batch_size, config.seed, epoch), epoch
        parts = order[place * config.gradient_accumulation_steps:(place + 1) * config.gradient_accumulation_steps]
        num_tokens = sum(len(completion) for part in parts for _, completion in part)
        loss = 0.0
        for layer in recomputed:
            layer.training = True
        for part in parts:
            with evaluation.memory_advice(f"in training on {len(part)} rows at once: lower --batch_size and raise "
                                          "--gradient_accumulation_steps, or add --gradient_checkpointing"):
                nll, _ = completion_nll(model, part, compute)
                scaler.scale(nll / num_tokens).backward()
            loss += nll.item() / num_tokens
        for layer in recomputed:
            layer.training = False  # else the sampler's cache would be dropped
        rate = config.learning_rate * min(1, step / max(1, steps / 20), (steps + 1 - step) / max(1, steps * 0.95))
        optimizer.param_groups[0]["lr"] = rate
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        batch = [{"prompt_ids": prompt, "completion_ids": completion} for part in parts for prompt, completion in part]
        numbers = {"loss": loss, "gradient": grad_norm}
        bad = not_finite(numbers, batch)
        if bad:
            run.skip_update_or_give_up(step, bad, numbers, batch, scaler)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        metrics = {"step": step, "epoch": step / an_epoch, "loss": loss, "grad_norm": grad_norm, "skipped_updates": run.skipped[step],
                   "learning_rate": rate, "num_tokens": num_tokens, "update_seconds": time.time() - clock, "peak_memory_gb": evaluation.peak_memory_gb()}
        if config.eval_every and step % config.eval_every == 0 or step == steps:
            metrics["eval_loss"] = validation_loss()
        if config.eval_every and step % config.eval_every == 0 and step < steps:
            metrics["eval_accuracy"] = evaluation.summarize(evaluate(f"step {step}"))["accuracy"]
        run.log("metrics", metrics)
        if config.dry_run and step == 2:  # the first one warmed up
            evaluation.print_dry_run(metrics, estimate, None)
            run.close()
            return
        bar.set_postfix_str(f"loss {loss:.3f}, epoch {step / an_epoch:.1f}")
        if step == 1 or step % max(1, steps // 15) == 0 or "eval_loss" in metrics:
            heldout_words = f"  held-out loss {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else ""
            heldout_words += f"  held-out accuracy {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else ""
            bar.write(f"step {step:4}  epoch {step / an_epoch:.1f}  loss {loss:.4f}{heldout_words}  {metrics['update_seconds']:.2f} s")
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
    run.finish({**comparison, "steps": steps, "seconds": time.time() - start, "seed": config.seed, "task": config.task,
                "model": config.model, "data": config.data, "versions": evaluation.versions()})


def parse(arguments=None):
    """Command line to Config. With --model tiny, TINY stands in for the defaults, below every flag that was given."""
    config = tyro.cli(Config, args=arguments, use_underscores=True, description=__doc__)
    chosen = {"model": config.model or (evaluation.TASKS[config.task].BASE_MODEL if GPU else "tiny"),
              "data": config.data or ("hub" if GPU and config.task != "ecg" else "builtin")}
    config = replace(config, **chosen)
    if config.model == "tiny":
        own = TINY | TINY_ECG if config.task == "ecg" else TINY
        usual, tiny = config, replace(Config(), **own)
        config = replace(tyro.cli(Config, args=arguments, use_underscores=True, default=tiny), **chosen)
        changed = [f"{key} {getattr(config, key)}" for key in own if getattr(config, key) != getattr(usual, key)]
        print(f"{'' if GPU else 'no GPU: '}the built-in tiny model{' and questions' if config.data == 'builtin' else ''}; "
              f"settings for it: {', '.join(changed)}")
    return config


if __name__ == "__main__":
    evaluation.keep_freed_memory()
    with one_line_errors():
        main(parse())
