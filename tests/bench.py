"""Speed, memory and learning, side by side in one run; the only place where performance is claimed.

    python tests/bench.py cpu                 a whole GRPO step of ours, of a padded loop, and of TRL where it is installed
    python tests/bench.py cpu --settings A B C D E F --threads 1 2 --malloc default tuned    the whole table (about 75 minutes)
    python tests/bench.py memory              peak memory of each, in a process of its own
    python tests/bench.py growth              step time against the group size and the completion length
    python tests/bench.py learning            the built-in model trained by ours and by TRL: accuracy against wall-clock
    python tests/bench.py gpu                 real shapes, random weights, memory capped at 16 and 24 GB (tiny shapes on CPU)

A step is sampling, reference log-probs and mu = 2 updates with beta > 0. All contenders get the same model, prompts, lengths,
rewards and thread count, and take turns within a process; figures are medians of --rounds turns after one that is not
counted. Lengths are forced by a hook on the output layer, the same for all.
  ours    eval.generate and policy_gradient of grpo_pubmedqa.py, as the script calls them
  padded  model.generate on repeated prompts, one padded forward over the batch, completion positions projected only, no
          pass of its own for old log-probs: what a good plain loop does
  TRL     GRPOTrainer as installed (1.16 was measured), fp32, no gradient checkpointing, num_iterations 2
TRL lives in an environment of its own: pip install -r requirements.txt trl==1.16.0
"""
import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import eval as evaluation
import grpo_pubmedqa as grpo

MU, BETA, EOS = 2, 0.04, 2
MALLOC = {"default": {}, "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296",
                                   "MALLOC_TOP_PAD_": "268435456"}}  # large tensors kept out of mmap
A = dict(P=2, G=8, prompt=(256, 256), completion=(64, 64), vocab=4096, lora=False)
SETTINGS = {"A": A, "B": {**A, "prompt": (384, 384), "completion": (128, 128)}, "C": {**A, "vocab": 151_936, "P": 1},
            "D": {**A, "lora": True}, "E": {**A, "prompt": (384, 384), "completion": (16, 128)},
            "F": {**A, "prompt": (128, 384), "completion": (128, 128)}}


class Bench:
    """The work of one setting: a model, prompts, forced lengths and rewards."""

    def __init__(self, s):
        torch.manual_seed(0)
        self.s = s
        config = Qwen2Config(vocab_size=s["vocab"], hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
                             num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
        self.config = config
        generator = torch.Generator().manual_seed(1)
        spread = [round(s["prompt"][0] + (s["prompt"][1] - s["prompt"][0]) * i / max(1, s["P"] - 1)) for i in range(s["P"])]
        self.prompts = [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in spread]
        low, high = s["completion"]
        rows = s["P"] * s["G"]
        self.lengths = [round(low + (high - low) * i / max(1, rows - 1)) for i in torch.randperm(rows, generator=generator).tolist()]
        self.rewards = torch.rand(s["P"], s["G"], generator=generator, dtype=torch.float64)

    def model(self):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(self.config).eval()
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
        if self.s["lora"]:
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        return model

    def reference(self, model):
        """A frozen copy; for LoRA the base without its adapter (same seed), which is TRL's reference too."""
        return Bench({**self.s, "lora": False}).model().requires_grad_(False) if self.s["lora"] else copy.deepcopy(model).requires_grad_(False)

    def force_lengths(self, model):
        """A switch {"on": bool}: while on, the output layer ends row i at its length and never before."""
        state = {"on": False, "t": 0}

        def hook(module, inputs, logits):
            if not state["on"]:
                return
            alive = [n for n in self.lengths if n > state["t"]]  # rows that ended have left, or are not read any more
            ending = [i for i, n in enumerate(alive if logits.shape[0] == len(alive) else self.lengths) if n == state["t"] + 1]
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
    return result, time.perf_counter() - start


def our_step(bench):
    """A function that makes one step and returns (sampling seconds, update seconds)."""
    model, s = bench.model(), bench.s
    reference, force = bench.reference(model), bench.force_lengths(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    config = replace(grpo.Config(), beta=BETA, mu=MU, group_size=s["G"], max_completion_length=s["completion"][1])
    scaler, generator = torch.amp.GradScaler("cpu", enabled=False), torch.Generator().manual_seed(0)

    def sample():
        force.update(on=True, t=0)
        result = evaluation.generate(model, bench.prompts, s["G"], max_new_tokens=s["completion"][1], stop_ids=[EOS], generator=generator)
        force.update(on=False)
        return result

    def update(ids, mask, logps):
        advantages, groups = grpo.group_advantages(bench.rewards, "group").float(), []
        for i, prompt in enumerate(bench.prompts):
            own = slice(i * s["G"], (i + 1) * s["G"])
            groups.append({"prompt_ids": torch.tensor(prompt), "completion_ids": ids[own], "completion_mask": mask[own],
                           "sampler_logps": logps[own], "advantages": advantages[i], "zero_std": False})
        for epoch in range(MU):
            grpo.policy_gradient(model, reference, groups, epoch == 0, config, torch.float32, scaler)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def step():
        sampled, sampling = timed(sample)
        assert sampled[1].sum(1).tolist() == bench.lengths
        return sampling, timed(lambda: update(*sampled))[1]

    return step


def padded_step(bench):
    """The same step by a plain loop that pads [P * G, prompt + completion]."""
    model, s = bench.model(), bench.s
    reference, force = bench.reference(model), bench.force_lengths(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    width = max(map(len, bench.prompts))
    prompts = torch.tensor([[0] * (width - len(p)) + p for p in bench.prompts]).repeat_interleave(s["G"], 0)
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in bench.prompts]).repeat_interleave(s["G"], 0)

    def sample():
        force.update(on=True, t=0)
        ids = model.generate(input_ids=prompts, attention_mask=prompt_mask, do_sample=True, top_k=0, max_new_tokens=s["completion"][1])
        force.update(on=False)
        return ids[:, width:]

    def logps_of(model, ids, attention_mask, keep):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=torch.cat([prompts, ids], 1), attention_mask=attention_mask, position_ids=positions,
                       logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]

    def update(ids):
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(bench.lengths)[:, None]
        attention_mask = torch.cat([prompt_mask, mask.long()], 1)
        advantages = grpo.group_advantages(bench.rewards, "group").float().flatten()
        with torch.no_grad():
            ref_logps = logps_of(reference, ids, attention_mask, ids.shape[1])
        old_logps = None
        for _ in range(MU):
            logps = logps_of(model, ids, attention_mask, ids.shape[1])
            old_logps = logps.detach() if old_logps is None else old_logps
            loss, _ = grpo.grpo_loss(logps, old_logps, ref_logps, advantages, mask, num_sequences=len(ids), num_tokens=int(mask.sum()),
                                     max_completion_length=s["completion"][1], epsilon=0.2, epsilon_high=0.2, beta=BETA,
                                     loss_type="grpo", importance_level="token")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def step():
        ids, sampling = timed(sample)
        return sampling, timed(lambda: update(ids))[1]

    return step


def trl_steps(bench, between, rounds):
    """Runs rounds + 1 steps of TRL's trainer; `between` is called after each. Returns [(sampling, update)] of all."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    s, folder = bench.s, tempfile.mkdtemp()
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(3, s["vocab"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left")
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
        model=model, reward_funcs=lambda completions, **_: next(rewards), processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        args=GRPOConfig(output_dir=folder, per_device_train_batch_size=s["P"] * s["G"], num_generations=s["G"], num_iterations=MU,
                        max_completion_length=s["completion"][1], beta=BETA, learning_rate=1e-6, gradient_checkpointing=False,
                        bf16=False, use_cpu=True, report_to=[], save_strategy="no", max_steps=MU * (rounds + 1), disable_tqdm=True,
                        logging_strategy="no", loss_type="grpo", shuffle_dataset=False))
    trainer.train()
    return times


def gemm_rate():
    """fp32 matrix multiplication on this machine with the current threads, FLOP/s."""
    x, y = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(timed(lambda: x @ y)[1] for _ in range(15))


def update_flops(bench):
    """Operations that the update needs: mu forward and backward passes (1 + 2 forwards) and one reference forward."""
    s, c = bench.s, bench.config
    body = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704)  # weights of the linear layers
    total = 0
    for i, prompt in enumerate(bench.prompts):
        S, lengths = len(prompt), bench.lengths[i * s["G"]:(i + 1) * s["G"]]
        tokens = S + sum(lengths)
        pairs = S * S / 2 + sum(n * S + n * n / 2 for n in lengths)  # query-key pairs
        total += 2 * body * tokens + 6 * 4 * 256 * pairs + 2 * 256 * c.vocab_size * sum(lengths)
    return total * (3 * MU + 1)


def child_cpu(name, threads, rounds, contenders):
    """Measures one setting in this process; prints a JSON line."""
    torch.set_num_threads(threads)
    bench, times, gemm = Bench(SETTINGS[name]), {}, []
    steps = {key: make(bench) for key, make in (("ours", our_step), ("padded", padded_step)) if key in contenders}

    def others():
        gemm.append(gemm_rate())
        for key, step in steps.items():
            times.setdefault(key, []).append(step())

    if "trl" in contenders:
        times["trl"] = trl_steps(bench, others, rounds)
    else:
        for _ in range(rounds + 1):
            others()
    result = {"setting": name, "threads": threads, "rounds": rounds, "gemm_gflops": statistics.median(gemm) / 1e9}
    tokens = sum(bench.lengths)
    for key, pairs in times.items():
        pairs = pairs[1:]  # the first turn warms up
        sampling, update = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        result[key] = {"step": statistics.median(map(sum, pairs)), "sampling": sampling, "update": update,
                       "sampling_tokens_per_s": tokens / sampling, "update_tokens_per_s": MU * tokens / update,
                       "all_steps": [round(sum(pair), 3) for pair in pairs]}
    if "ours" in result:
        result["ours"]["share_of_gemm"] = update_flops(bench) / result["ours"]["update"] / statistics.median(gemm)
    for key in set(times) - {"ours"}:
        result["ratio_" + key] = result[key]["step"] / result["ours"]["step"] if "ours" in result else None
        result["sampling_ratio_" + key] = result[key]["sampling"] / result["ours"]["sampling"] if "ours" in result else None
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps(result), flush=True)


def run_child(name, threads, rounds, contenders, malloc):
    command = [sys.executable, __file__, "child", "--settings", name, "--threads", str(threads), "--rounds", str(rounds),
               "--contenders", *contenders]
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
    print("| setting | threads | malloc | ours s | padded s | TRL s | / padded | / TRL | sampling / padded | update, share of GEMM |\n"
          "|---|---|---|---|---|---|---|---|---|---|")
    for malloc in arguments.malloc:
        for threads in arguments.threads:
            for name in arguments.settings:
                r = run_child(name, threads, arguments.rounds, contenders, malloc)
                results.append(r)
                cells = [f"{r[key]['step']:.2f}" if key in r else "-" for key in ("ours", "padded", "trl")]
                cells += [f"{r[key]:.2f}" if r.get(key) else "-" for key in ("ratio_padded", "ratio_trl", "sampling_ratio_padded")]
                print(f"| {name} | {threads} | {malloc} | {' | '.join(cells)} | {r.get('ours', {}).get('share_of_gemm', 0):.0%} |", flush=True)
    save(arguments, "cpu", results)


def memory(arguments):
    results = []
    print("| setting | ours GB | padded GB | TRL GB | ours / TRL |\n|---|---|---|---|---|")
    for name in arguments.settings:
        peaks = {key: run_child(name, 2, 1, [key], arguments.malloc[0])["peak_memory_gb"]
                 for key in ["ours", "padded"] + (["trl"] if has_trl() else [])}
        results.append({"setting": name, **peaks})
        cells = [f"{peaks[key]:.2f}" if key in peaks else "-" for key in ("ours", "padded", "trl")]
        share = f"{peaks['ours'] / peaks['trl']:.2f}" if "trl" in peaks else "-"
        print(f"| {name} | {' | '.join(cells)} | {share} |", flush=True)
    save(arguments, "memory", results)


def growth(arguments):
    """Step time against G at prompt 384, completion 64, and against the completion length at G 8."""
    torch.set_num_threads(2)
    results = []
    cases = [("G", g, {**A, "P": 1, "G": g, "prompt": (384, 384)}) for g in (2, 4, 8, 16, 32)]
    cases += [("completion", n, {**A, "P": 1, "prompt": (384, 384), "completion": (n, n)}) for n in (32, 64, 128, 256)]
    print("| varied | value | ours s | padded s | padded / ours |\n|---|---|---|---|---|")
    for what, value, setting in cases:
        bench = Bench(setting)
        steps, times = {"ours": our_step(bench), "padded": padded_step(bench)}, {"ours": [], "padded": []}
        for _ in range(arguments.rounds + 1):
            for key, step in steps.items():
                times[key].append(sum(step()))
        ours, padded = (statistics.median(times[key][1:]) for key in ("ours", "padded"))
        results.append({"varied": what, "value": value, "ours": ours, "padded": padded})
        print(f"| {what} | {value} | {ours:.2f} | {padded:.2f} | {padded / ours:.2f} |", flush=True)
    save(arguments, "growth", results)


def save(arguments, name, results):
    versions = {**evaluation.versions(), "trl": has_trl() or None}
    path = Path(arguments.out or f"bench-{name}.json")
    path.write_text(json.dumps({"command": "python tests/bench.py " + " ".join(sys.argv[1:]), "versions": versions, "results": results}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu", "memory", "growth", "child"])
    parser.add_argument("--settings", nargs="+", default=["A", "B"], choices=list(SETTINGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--malloc", nargs="+", default=["default"], choices=list(MALLOC))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=["ours", "padded", "trl"])
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    if arguments.what == "child":
        child_cpu(arguments.settings[0], arguments.threads[0], arguments.rounds, arguments.contenders)
    else:
        {"cpu": cpu, "memory": memory, "growth": growth}[arguments.what](arguments)
