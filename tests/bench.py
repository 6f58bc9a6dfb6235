"""Speed, memory and learning, side by side in one run; the only place where performance is claimed.

    python tests/bench.py cpu        a whole GRPO step of ours, of a padded loop, and of TRL where it is there
    python tests/bench.py cpu --settings A B C D E F --threads 1 2 --malloc default tuned    all (90 minutes)
    python tests/bench.py cpu --settings S T L --rounds 2    a real model's shape, LoRA on it, long answers
    python tests/bench.py memory     peak memory of each, GRPO and SFT, in a process of its own
    python tests/bench.py growth     step time against the group size and the completion length
    python tests/bench.py learning   the built-in model by ours and by TRL: accuracy against wall-clock
    python tests/bench.py gpu        real shapes, random weights, memory capped at 5, 16 and 24 GB

A step is sampling, reference log-probs and mu = 2 updates with beta > 0. All contenders get the same model,
prompts, lengths, rewards and thread count, and take turns within a process; figures are medians of --rounds
turns after one that is not counted. Sampling is short and the host's pauses are long, so ours and padded
sample three times a turn, alternating, the first time as part of the step. Lengths are forced: by a hook on
the output layer, in ours (which has none to hook) where a token is drawn.
  ours    eval.generate and policy_gradient of grpo_pubmedqa.py, as the script calls them
  padded  model.generate on repeated prompts, one padded forward over the batch, completion positions
          projected only, no pass of its own for old log-probs: what a good plain loop does
  TRL     GRPOTrainer as installed (1.16 was measured), fp32, num_iterations 2; for `memory` SFTTrainer too
Neither of the two checkpoints gradients, but at S and T, where they would not fit into 24 GB without; there
both loops of supervised training do (`memory` measures a step of each).
TRL lives in an environment of its own: pip install -r requirements.txt trl==1.16.0
"""
import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

import eval as evaluation
import grpo_pubmedqa as grpo
import sft

MU, BETA, EOS = 2, 0.04, 2
MALLOC = {"default": {},
          "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296",
                    "MALLOC_TOP_PAD_": "268435456"}}  # large tensors kept out of mmap
SMALL = (Qwen2ForCausalLM,
         dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
              num_key_value_heads=2, tie_word_embeddings=False))
SMOLLM2 = (LlamaForCausalLM, dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                  num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))
A = dict(P=2, G=8, prompt=(256, 256), completion=(64, 64), vocab=4096, lora=False, shape=SMALL,
         checkpointing=False)
S = {**A, "prompt": (300, 500), "completion": (40, 120), "vocab": 49_152, "shape": SMOLLM2,
     "checkpointing": True}
SETTINGS = {"A": A, "B": {**A, "prompt": (384, 384), "completion": (128, 128)},
            "C": {**A, "vocab": 151_936, "P": 1},
            "D": {**A, "lora": True}, "E": {**A, "prompt": (384, 384), "completion": (16, 128)},
            "F": {**A, "prompt": (128, 384), "completion": (128, 128)},
            "S": S, "T": {**S, "lora": True},  # the shape of SmolLM2-135M; minutes a step, so asked for
            "L": {**A, "P": 1, "completion": (64, 1024)}}


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REAL = {  # shapes of real models, for random weights: (model class, config, vocabulary, LoRA)
    "Qwen2.5-0.5B full": (
        Qwen2ForCausalLM,
        dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, tie_word_embeddings=True),
        151_936, False),
    "Llama-3.2-3B LoRA": (
        LlamaForCausalLM,
        dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
             num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        128_256, True),
    "Qwen3-4B LoRA": (
        Qwen3ForCausalLM,
        dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
             num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        151_936, True),
    "Llama-3.1-8B LoRA": (
        LlamaForCausalLM,
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, tie_word_embeddings=False),
        128_256, True)}


class Bench:
    """The work of one setting: a model, prompts, forced lengths and rewards. real: a key of REAL instead of
    the setting's shape.
    """

    def __init__(self, s, real=None):
        self.s = s
        self.model_class, shape = s.get("shape", SMALL)
        if real:
            self.model_class, shape = REAL[real][:2]
        if real and DEVICE.type == "cpu":  # the same code on a machine without a GPU
            shape = {**shape, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        self.config = self.model_class.config_class(vocab_size=s["vocab"], eos_token_id=EOS, pad_token_id=0,
                                                    bos_token_id=1, **shape)
        generator = torch.Generator().manual_seed(1)
        spread = [round(s["prompt"][0] + (s["prompt"][1] - s["prompt"][0]) * i / max(1, s["P"] - 1))
                  for i in range(s["P"])]
        self.prompts = [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in spread]
        low, high = s["completion"]
        rows = s["P"] * s["G"]
        self.lengths = [round(low + (high - low) * i / max(1, rows - 1))
                        for i in torch.randperm(rows, generator=generator).tolist()]
        self.rewards = torch.rand(s["P"], s["G"], generator=generator, dtype=torch.float64)

    def model(self):
        torch.manual_seed(0)
        with DEVICE:
            model = self.model_class(self.config).eval()
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
        if self.s["lora"]:
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        return model

    def reference(self, model):
        """A frozen copy; for LoRA the base without its adapter (same seed), which is TRL's reference too."""
        reference = Bench({**self.s, "lora": False}).model() if self.s["lora"] else copy.deepcopy(model)
        return reference.requires_grad_(False)

    def ending(self, rows, t):
        """Which of this many rows have token t as their last one. Rows that ended before have left, or are
        not read any more.
        """
        alive = [n for n in self.lengths if n > t]
        return [i for i, n in enumerate(alive if rows == len(alive) else self.lengths) if n == t + 1]

    def force_lengths(self, model):
        """A switch {"on": bool, "t": 0}: while on, the output layer ends row i at its length and never
        before.
        """
        state = {"on": False, "t": 0}

        def hook(module, inputs, logits):
            if not state["on"]:
                return
            ending = self.ending(len(logits), state["t"])
            logits[..., EOS] = -torch.inf
            if ending:
                logits[ending, -1] = -torch.inf
                logits[ending, -1, EOS] = 0.0
            state["t"] += 1

        model.get_output_embeddings().register_forward_hook(hook)
        return state


def timed(work):
    start = time.perf_counter()
    result = work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def our_step(bench, beta=BETA, compute=torch.float32, weights=torch.float32):
    """A function that makes one step and returns (sampling seconds, update seconds)."""
    model, s = bench.model(), bench.s
    if s["lora"] and beta:  # as grpo_medmcqa.py does: a second adapter on the same base
        model.add_adapter("reference", model.peft_config["default"])
        model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.data = (parameter.data.float() if parameter.requires_grad or "lora_" in name
                          else parameter.data.to(weights))
    model.eval()
    reference = (model if s["lora"] else bench.reference(model)) if beta else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    config = replace(grpo.Config(), beta=beta, mu=MU, group_size=s["G"],
                     max_completion_length=s["completion"][1])
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def sample():
        usual, t = evaluation.draw, itertools.count()

        def draw(probabilities, uniform):
            tokens = usual(probabilities, uniform).clamp_(min=EOS + 1)
            tokens[bench.ending(len(tokens), next(t))] = EOS
            return tokens

        with evaluation.autocast(compute), mock.patch.object(evaluation, "draw", draw):
            return evaluation.generate(model, bench.prompts, s["G"], max_new_tokens=s["completion"][1],
                                       stop_ids=[EOS], generator=generator)

    def update(ids, mask, logps):
        advantages, groups = grpo.group_advantages(bench.rewards, "group").float().to(DEVICE), []
        for i, prompt in enumerate(bench.prompts):
            own = slice(i * s["G"], (i + 1) * s["G"])
            groups.append({"prompt_ids": torch.tensor(prompt, device=DEVICE), "completion_ids": ids[own],
                           "completion_mask": mask[own], "sampler_logps": logps[own],
                           "advantages": advantages[i], "zero_std": False})
        if beta:
            if s["lora"]:
                model.set_adapter("reference")
            grpo.add_reference_logps(reference, groups, config, compute)
            if s["lora"]:
                model.set_adapter("default")
        for epoch in range(MU):
            grpo.policy_gradient(model, groups, epoch == 0, config, compute, scaler)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def step(update_too=True):
        sampled, sampling = timed(sample)
        assert sampled[1].sum(1).tolist() == bench.lengths
        return sampling, timed(lambda: update(*sampled))[1] if update_too else 0.0

    return step


def padded_step(bench, compute=torch.float32, weights=torch.float32):
    """The same step by a plain loop that pads [P * G, prompt + completion]."""
    model, s = bench.model(), bench.s
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data.to(weights)
    if s.get("checkpointing"):
        model.gradient_checkpointing_enable()
        if s["lora"]:
            model.enable_input_require_grads()
    reference, force = bench.reference(model).to(weights), bench.force_lengths(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    width = max(map(len, bench.prompts))
    prompts = torch.tensor([[0] * (width - len(p)) + p for p in bench.prompts],
                           device=DEVICE).repeat_interleave(s["G"], 0)
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in bench.prompts],
                               device=DEVICE).repeat_interleave(s["G"], 0)

    def sample():
        force.update(on=True, t=0)
        with evaluation.autocast(compute):
            ids = model.generate(input_ids=prompts, attention_mask=prompt_mask, do_sample=True, top_k=0,
                                 max_new_tokens=s["completion"][1])
        force.update(on=False)
        return ids[:, width:]

    def logps_of(model, ids, attention_mask, keep):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=torch.cat([prompts, ids], 1), attention_mask=attention_mask,
                       position_ids=positions, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]

    def update(ids):
        lengths = torch.tensor(bench.lengths, device=DEVICE)
        mask = torch.arange(ids.shape[1], device=DEVICE)[None] < lengths[:, None]
        attention_mask = torch.cat([prompt_mask, mask.long()], 1)
        advantages = grpo.group_advantages(bench.rewards, "group").float().flatten().to(DEVICE)
        with torch.no_grad(), evaluation.autocast(compute):
            ref_logps = logps_of(reference, ids, attention_mask, ids.shape[1])
        old_logps = None
        for _ in range(MU):
            with evaluation.autocast(compute):
                logps = logps_of(model, ids, attention_mask, ids.shape[1])
            old_logps = logps.detach() if old_logps is None else old_logps
            loss, _ = grpo.grpo_loss(logps, old_logps, ref_logps, advantages, mask, num_sequences=len(ids),
                                     num_tokens=int(mask.sum()), max_completion_length=s["completion"][1],
                                     epsilon=0.2, epsilon_high=0.2, beta=BETA, loss_type="grpo",
                                     importance_level="token")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def step(update_too=True):
        model.eval()
        ids, sampling = timed(sample)
        # layers checkpoint in training mode only; no dropout is set
        model.train(s.get("checkpointing", False))
        return sampling, timed(lambda: update(ids))[1] if update_too else 0.0

    return step


def word_tokenizer(bench):
    """A tokenizer for which token i is the word wi; TRL takes texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(3, bench.s["vocab"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", padding_side="left")


def trl_steps(bench, between, rounds):
    """Runs rounds + 1 steps of TRL's trainer; `between` is called after each. Returns [(sampling, update)] of
    all.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    s, folder, tokenizer = bench.s, tempfile.mkdtemp(), word_tokenizer(bench)
    model = bench.model()
    base = model.get_base_model() if s["lora"] else model
    if not s["lora"]:  # TRL loads its reference from the model's folder
        base.save_pretrained(folder)
        base.config._name_or_path = folder
    force, generate, clock = bench.force_lengths(model), model.generate, {}
    times, seconds = [], {"sampling": 0.0}
    model.warnings_issued = {}

    def forced_generate(*arguments, **options):
        force.update(on=True, t=0)
        result, seconds["sampling"] = timed(lambda: generate(*arguments, **options))
        force.update(on=False)
        return result

    model.generate = forced_generate

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step % MU == 0:
                clock["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % MU == 0:
                whole = time.perf_counter() - clock["start"]
                times.append((seconds["sampling"], whole - seconds["sampling"]))
                between()

    rewards = iter(lambda: bench.rewards.flatten().tolist(), None)
    texts = [" ".join(f"w{i}" for i in prompt) for prompt in bench.prompts]
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: next(rewards), processing_class=tokenizer,
        callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        args=GRPOConfig(output_dir=folder, per_device_train_batch_size=s["P"] * s["G"],
                        num_generations=s["G"], num_iterations=MU,
                        max_completion_length=s["completion"][1], beta=BETA, learning_rate=1e-6,
                        gradient_checkpointing=s["checkpointing"],
                        bf16=False, use_cpu=True, report_to=[], save_strategy="no",
                        max_steps=MU * (rounds + 1), disable_tqdm=True,
                        logging_strategy="no", loss_type="grpo", shuffle_dataset=False))
    trainer.train()
    return times


def sft_pairs(bench):
    """At most eight rows (prompt ids, completion ids) of the setting's lengths, its longest among them."""
    lengths = sorted(bench.lengths)[::max(1, len(bench.lengths) // 8)][:7] + [max(bench.lengths)]
    return [(bench.prompts[i % len(bench.prompts)], [7 + i] * (length - 1) + [EOS])
            for i, length in enumerate(lengths)]


def our_sft(bench, rounds):
    """Seconds of `rounds` steps of supervised training on sft_pairs, as sft.py makes them, its allocator's
    settings included.
    """
    evaluation.keep_freed_memory()
    model = bench.model()
    if bench.s["checkpointing"]:
        model.activation_checkpointing_enable()
        sft.give_back_freed_memory()
        for module in model.modules():
            module.training = isinstance(module, sft.GradientCheckpointingLayer)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def step():
        nll, num_tokens = sft.completion_nll(model, sft_pairs(bench), torch.float32)
        (nll / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return [timed(step)[1] for _ in range(rounds)]


def trl_sft(bench, rounds):
    """The same by TRL's SFTTrainer, whose loss is on the completions too."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    clock, seconds = {}, []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            clock["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - clock["start"])

    rows = [{"prompt": " ".join(f"w{i}" for i in prompt),
             "completion": "".join(f" w{i}" for i in completion[:-1]) + " </s>"}
            for prompt, completion in sft_pairs(bench)]
    SFTTrainer(model=bench.model(), processing_class=word_tokenizer(bench), callbacks=[Clock()],
               train_dataset=Dataset.from_list(rows),
               args=SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, max_length=None,
                              gradient_checkpointing=bench.s["checkpointing"], learning_rate=1e-6, bf16=False,
                              use_cpu=DEVICE.type == "cpu", report_to=[], save_strategy="no",
                              max_steps=rounds, disable_tqdm=True, logging_strategy="no")).train()
    return seconds


def gemm_rate():
    """fp32 matrix multiplication on this machine with the current threads, FLOP/s."""
    x, y = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(timed(lambda: x @ y)[1] for _ in range(15))


def update_flops(bench):
    """Operations that the update needs: a reference forward, and mu forwards with their backward passes,
    twice a forward, or once where weights are frozen and only the gradient on its way to the adapters is
    needed.
    """
    s, c, passes = bench.s, bench.config, 3 * MU + 1
    h, layers, ffn = c.hidden_size, c.num_hidden_layers, c.intermediate_size
    kv = h // c.num_attention_heads * c.num_key_value_heads
    body = layers * (2 * h * h + 2 * h * kv + 3 * h * ffn)  # weights of the linear layers
    adapters = layers * 16 * (2 * 2 * h + 2 * (h + kv) + 3 * (h + ffn)) if s["lora"] else 0
    total = 0
    for i, prompt in enumerate(bench.prompts):
        S, lengths = len(prompt), bench.lengths[i * s["G"]:(i + 1) * s["G"]]
        tokens = S + sum(lengths)
        pairs = S * S / 2 + sum(n * S + n * n / 2 for n in lengths)  # query-key pairs
        linear = 2 * body * tokens + 2 * h * c.vocab_size * sum(lengths)
        total += linear * (2 * MU + 1 if s["lora"] else passes)
        total += (layers * 4 * h * pairs + 2 * adapters * tokens) * passes
    return total


SFT = {"sft": our_sft, "trl-sft": trl_sft}  # contenders of `memory`, each alone in its process


def child_cpu(name, threads, rounds, contenders):
    """Measures one setting in this process; prints a JSON line."""
    torch.set_num_threads(threads)
    if contenders[0] in SFT:
        seconds = SFT[contenders[0]](Bench(SETTINGS[name]), rounds + 1)[1:]
        print("RESULT " + json.dumps({"step": statistics.median(seconds),
                                      "peak_memory_gb": evaluation.peak_memory_gb()}), flush=True)
        return
    bench, times, resampled, gemm = Bench(SETTINGS[name]), {}, {}, []
    steps = {key: make(bench) for key, make in (("ours", our_step), ("padded", padded_step))
             if key in contenders}

    def others():
        gemm.append(gemm_rate())
        for key, step in steps.items():
            times.setdefault(key, []).append(step())
        for key, step in 2 * [*steps.items()]:
            resampled.setdefault(key, []).append(step(update_too=False)[0])

    if "trl" in contenders:
        times["trl"] = trl_steps(bench, others, rounds)
    else:
        for _ in range(rounds + 1):
            others()
    result = {"setting": name, "threads": threads, "rounds": rounds,
              "gemm_gflops": statistics.median(gemm) / 1e9}
    tokens = sum(bench.lengths)
    for key, pairs in times.items():
        pairs = pairs[1:]  # the first turn warms up
        samplings = [pair[0] for pair in pairs] + resampled.get(key, [])[2:]
        sampling, update = statistics.median(samplings), statistics.median(pair[1] for pair in pairs)
        result[key] = {"step": statistics.median(map(sum, pairs)), "sampling": sampling, "update": update,
                       "sampling_tokens_per_s": tokens / sampling,
                       "update_tokens_per_s": MU * tokens / update,
                       "all_steps": [round(sum(pair), 3) for pair in pairs],
                       "all_samplings": [round(seconds, 3) for seconds in samplings]}
    if "ours" in result:
        result["ours"]["share_of_gemm"] = (
            update_flops(bench) / result["ours"]["update"] / statistics.median(gemm))
    for key in set(times) - {"ours"}:
        result["ratio_" + key] = result[key]["step"] / result["ours"]["step"] if "ours" in result else None
        sampling = result[key]["sampling"]
        result["sampling_ratio_" + key] = sampling / result["ours"]["sampling"] if "ours" in result else None
    result["peak_memory_gb"] = evaluation.peak_memory_gb()
    print("RESULT " + json.dumps(result), flush=True)


def run_child(name, threads, rounds, contenders, malloc):
    command = [sys.executable, __file__, "child", "--settings", name, "--threads", str(threads),
               "--rounds", str(rounds), "--contenders", *contenders]
    env = {**os.environ, **MALLOC[malloc], "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"setting {name} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(lines[0][7:]), "malloc": malloc}


def has_trl():
    try:
        import trl
    except ImportError:
        return ""
    return trl.__version__


def cpu(arguments):
    contenders = arguments.contenders or (["ours", "padded"] + (["trl"] if has_trl() else []))
    results = []
    print("| setting | threads | malloc | ours s | sampling s (tokens/s) | update s (tokens/s) | padded s | "
          "TRL s | / padded | / TRL | sampling / padded | update, share of GEMM "
          "|\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for malloc in arguments.malloc:
        for threads in arguments.threads:
            for name in arguments.settings:
                r = run_child(name, threads, arguments.rounds, contenders, malloc)
                results.append(r)
                cells = [f"{r[key]['step']:.2f}" if key in r else "-" for key in ("ours", "padded", "trl")]
                cells[1:1] = [f"{r['ours'][part]:.2f} ({r['ours'][part + '_tokens_per_s']:.0f})"
                              if "ours" in r else "-" for part in ("sampling", "update")]
                cells += [f"{r[key]:.2f}" if r.get(key) else "-"
                          for key in ("ratio_padded", "ratio_trl", "sampling_ratio_padded")]
                print(f"| {name} | {threads} | {malloc} | {' | '.join(cells)} | "
                      f"{r.get('ours', {}).get('share_of_gemm', 0):.0%} |", flush=True)
    save(arguments, "cpu", results)


def memory(arguments):
    """Peak memory of a GRPO step and of a supervised one on eight rows, each in a process of its own."""
    results = []
    print("| setting | training | ours GB | padded GB | TRL GB | ours / TRL |\n|---|---|---|---|---|---|")
    for name in arguments.settings:
        for training, ours, padded, trl in (("GRPO", "ours", "padded", "trl"), ("SFT", "sft", "", "trl-sft")):
            contenders = [key for key in (ours, padded, trl if has_trl() else "") if key]
            peaks = {}
            for key in contenders:
                if key in (arguments.contenders or contenders):
                    child = run_child(name, arguments.threads[0], 1, [key], arguments.malloc[0])
                    peaks[key] = child["peak_memory_gb"]
            if not peaks:
                continue
            results.append({"setting": name, "training": training, **peaks})
            cells = [f"{peaks[key]:.2f}" if key in peaks else "-" for key in (ours, padded, trl)]
            share = f"{peaks[ours] / peaks[trl]:.2f}" if ours in peaks and trl in peaks else "-"
            print(f"| {name} | {training} | {' | '.join(cells)} | {share} |", flush=True)
    save(arguments, "memory", results)


def growth(arguments):
    """Step time at one prompt of 384 tokens against G (completions of 64 tokens) and against the completion
    length (G 8); L's completions are of 64 tokens up to that length.
    """
    torch.set_num_threads(arguments.threads[0])
    results = []
    print("| setting | varied | value | ours s | padded s | padded / ours |\n|---|---|---|---|---|---|")
    for name in arguments.settings:
        one = {**SETTINGS[name], "P": 1, "prompt": (384, 384)}
        cases = [("G", g, {**one, "G": g, "completion": (64, 64)}) for g in (2, 4, 8, 16, 32)]
        cases += [("completion", n, {**one, "completion": (n, n)}) for n in (32, 64, 128, 256)]
        if name == "L":
            cases = [("completion", n, {**one, "completion": (64, n)}) for n in (64, 128, 256, 512, 1024)]
        for what, value, setting in cases:
            bench = steps = None  # the last case's models go first
            bench = Bench(setting)
            steps, times = {"ours": our_step(bench), "padded": padded_step(bench)}, {"ours": [], "padded": []}
            for _ in range(arguments.rounds + 1):
                for key, step in steps.items():
                    times[key].append(sum(step()))
            ours, padded = (statistics.median(times[key][1:]) for key in ("ours", "padded"))
            results.append({"setting": name, "varied": what, "value": value, "ours": ours, "padded": padded})
            cells = f"{ours:.2f} | {padded:.2f} | {padded / ours:.2f}"
            print(f"| {name} | {what} | {value} | {cells} |", flush=True)
    save(arguments, "growth", results)


def gpu(arguments):
    """Real shapes with random weights under a memory cap, ours and the padded loop: does a step fit, its
    peak, its speed. On CPU: the same with tiny shapes. LoRA: bf16 base, fp32 adapters, the reference a second
    adapter (the padded loop's the base).
    """
    cuda, results = DEVICE.type == "cuda", []
    print(f"device: {torch.cuda.get_device_name() if cuda else 'cpu, tiny shapes: a check of the command'}")
    print("| model | cap GB | loop | fits | peak GB | sampling tokens/s | update s "
          "|\n|---|---|---|---|---|---|---|")
    for real, (_, _, vocabulary, lora) in REAL.items():
        size = dict(P=4, G=8, prompt=(400, 400), completion=(300, 300), vocab=vocabulary,
                    lora=lora) if cuda else \
            dict(P=2, G=4, prompt=(20, 20), completion=(8, 8), vocab=4096, lora=lora)
        bench, weights = Bench(size, real), torch.bfloat16 if lora else torch.float32
        makers = {"ours": lambda: our_step(bench, BETA, torch.bfloat16, weights),
                  "padded": lambda: padded_step(bench, torch.bfloat16, weights)}
        for cap, (name, make) in itertools.product((5, 16, 24), makers.items()):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                whole = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / whole))
            result, step = {"model": real, "cap_gb": cap, "loop": name}, None
            try:
                step = make()
                times = [step() for _ in range(arguments.rounds + 1)][1:]
                sampling, update = (statistics.median(pair[i] for pair in times) for i in (0, 1))
                result |= {"fits": True, "peak_gb": evaluation.peak_memory_gb(), "sampling": sampling,
                           "sampling_tokens_per_s": sum(bench.lengths) / sampling, "update": update}
                cells = (f"yes | {result['peak_gb']:.1f} | {result['sampling_tokens_per_s']:.0f} | "
                         f"{update:.2f}")
            except torch.cuda.OutOfMemoryError:
                result["fits"], cells = False, "no | - | - | -"
            del step
            results.append(result)
            print(f"| {real} | {cap} | {name} | {cells} |", flush=True)
    save(arguments, "gpu", results)


# === learning: the built-in model trained by ours and by TRL, with equal settings ===========================

LEARNING = ["--model", "tiny", "--data", "builtin", "--eval_every", "0", "--save_every", "0"]


def learning_ours(arguments, seed, steps):
    """[(seconds, reward, accuracy)] a step and the held-out accuracy, by the script itself."""
    with tempfile.TemporaryDirectory() as folder:
        grpo.main(grpo.parse([*LEARNING, "--steps", str(steps), "--seed", str(seed), "--out", folder
                              + "/run"]))
        records = [json.loads(line)
                   for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        after = json.loads((Path(folder) / "run" / "summary.json").read_text())["after"]["accuracy"]
    clock, curve = 0.0, []
    for record in records:
        clock += record["generate_seconds"] + record["update_seconds"]
        curve.append((clock, record["reward"], record["accuracy"]))
    return curve, after


def learning_trl(arguments, seed, steps):
    """The same by TRL's trainer: the same rows in the same order, rewards, and hyper-parameters."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    config = grpo.parse([*LEARNING, "--steps", str(steps), "--seed", str(seed)])
    model, tokenizer, compute = evaluation.load_model("tiny")
    model.warnings_issued = {}
    train, heldout, _ = grpo.pubmedqa.load_rows()
    stream = grpo.question_stream(train, seed, 0)
    rows = [next(stream) for _ in range(steps * config.prompts_per_step)]
    curve, clock, scored = [], {"spent": 0.0}, []

    def reward(completions, ground_truth, **_):
        scores = [evaluation.rewards.compute_score("pubmedqa", c[0]["content"], truth)
                  for c, truth in zip(completions, ground_truth)]
        scored[:] = scores
        return [score["score"] for score in scores]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            clock["spent"] += time.perf_counter() - clock["start"]
            curve.append((clock["spent"], statistics.fmean(s["score"] for s in scored),
                          statistics.fmean(s["accuracy"] for s in scored)))

    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "ground_truth": row["ground_truth"]}
                                         for row in rows]),
        args=GRPOConfig(output_dir=tempfile.mkdtemp(),
                        per_device_train_batch_size=config.prompts_per_step * config.group_size,
                        num_generations=config.group_size, num_iterations=config.mu,
                        max_completion_length=config.max_completion_length,
                        temperature=config.temperature, beta=config.beta, sync_ref_model=True,
                        ref_model_sync_steps=config.ref_every,
                        ref_model_mixup_alpha=1.0, learning_rate=config.learning_rate,
                        lr_scheduler_type="linear",
                        warmup_steps=int(config.warmup * steps), adam_beta1=0.9, adam_beta2=0.99,
                        weight_decay=0.0,
                        max_grad_norm=config.max_grad_norm, loss_type="grpo", gradient_checkpointing=False,
                        bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
                        max_steps=steps, seed=seed,
                        disable_tqdm=True, shuffle_dataset=False))
    trainer.train()
    heldout = evaluation.encode_rows(tokenizer, heldout[:config.eval_size], config.max_prompt_length,
                                     "held-out")
    records = evaluation.evaluate(model.eval(), tokenizer, heldout, compute,
                                  max_completion_length=config.max_completion_length, batch_size=64)
    return curve, evaluation.summarize(records)["accuracy"]


def learning(arguments):
    """Trains, prints the table and draws accuracy and reward against wall-clock."""
    results = json.loads(Path(arguments.redraw).read_text())["results"] if arguments.redraw else []
    for seed in (1, 2, 3) if not results else ():
        for name in ["ours"] + (["trl"] if has_trl() else []):
            command = [sys.executable, __file__, "learning-child", "--contenders", name, "--seed", str(seed),
                       "--steps",
                       str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(done.stderr[-3000:])
            results.append({"name": name, "seed": seed, **json.loads(lines[0][7:])})
            print(f"{name} seed {seed}: held-out accuracy {results[-1]['accuracy']:.3f} after "
                  f"{results[-1]['curve'][-1][0]:.0f} s",
                  flush=True)
    if not arguments.redraw:
        save(arguments, "learning", results)
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, colour in (("ours", "this collection", "C0"), ("trl", "TRL", "C1")):
        runs = [result for result in results if result["name"] == name]
        for axis, column in ((left, 2), (right, 1)) if runs else ():
            for run in runs:
                axis.plot([point[0] for point in run["curve"]], [point[column] for point in run["curve"]],
                          colour, alpha=0.2, linewidth=1)
            seconds, values = ([statistics.fmean(run["curve"][i][k] for run in runs)
                                for i in range(len(runs[0]["curve"]))]
                               for k in (0, column))
            smooth = [statistics.fmean(values[max(0, i - 7):i + 1]) for i in range(len(values))]
            axis.plot(seconds, smooth, colour, linewidth=2.2,
                      label=f"{label}: samples, mean of {len(runs)} seeds")
        left.plot([run["curve"][-1][0] for run in runs], [run["accuracy"] for run in runs], "o", color=colour,
                  markeredgecolor="k",
                  label=f"{label}: held out, greedy, at the end")
    for axis, title, unit in ((left, "Accuracy", "share correct"),
                              (right, "Reward per completion", "reward")):
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    left.set_ylim(0.5, 1.02)
    figure.savefig(arguments.picture, dpi=80)
    print(f"written: {arguments.picture}")


def save(arguments, name, results):
    versions = {**evaluation.versions(), "trl": has_trl() or None}
    path = Path(arguments.out or f"bench-{name}.json")
    path.write_text(json.dumps({"command": "python tests/bench.py " + " ".join(sys.argv[1:]),
                                "versions": versions, "results": results}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what",
                        choices=["cpu", "memory", "growth", "learning", "gpu", "child", "learning-child"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="A B; of growth A")
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--malloc", nargs="+", default=["default"], choices=list(MALLOC))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=["ours", "padded", "trl", *SFT])
    parser.add_argument("--steps", type=int, default=40, help="of learning")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="", help="JSON file (default: bench-WHAT.json)")
    parser.add_argument("--redraw", default="", help="draw the picture of an earlier learning run from its "
                                                     "JSON file")
    parser.add_argument("--picture", default="bench-learning.png")
    arguments = parser.parse_args()
    arguments.settings = arguments.settings or (["A"] if arguments.what == "growth" else ["A", "B"])
    if set(arguments.contenders or ()) & set(SFT) and arguments.what not in ("memory", "child"):
        parser.error(f"--contenders {' '.join(SFT)} are for memory")
    if arguments.what == "child":
        child_cpu(arguments.settings[0], arguments.threads[0], arguments.rounds, arguments.contenders)
    elif arguments.what == "learning-child":
        learn = {"ours": learning_ours, "trl": learning_trl}[arguments.contenders[0]]
        curve, accuracy = learn(arguments, arguments.seed, arguments.steps)
        print("RESULT " + json.dumps({"curve": curve, "accuracy": accuracy}))
    else:
        {"cpu": cpu, "memory": memory, "growth": growth, "learning": learning,
         "gpu": gpu}[arguments.what](arguments)
