"""What training and evaluation both need: models, sampling, evaluation, the run folder. Also a command:

    python eval.py --task pubmedqa --model runs/my-run/model --data hub --out runs/eval-mine

scores a model on the held-out questions of a dataset: greedy accuracy with its 95% interval, the majority baseline, macro-F1,
format rate, and pass@k and maj@N of --samples N sampled answers. It writes eval.jsonl (a line an example) and summary.json.

    python eval.py --task medmcqa --models base=M sft=M+ADAPTER grpo=M+ADAPTER --mode both --out runs/compare

scores several heads on the same rows, the base loaded once, with paired tests between them; --mode adds the log-likelihood of
the possible answers (PubMedQA's three classes, MedMCQA's letters), as lm-evaluation-harness scores them. It
writes results.jsonl (a line a question), summary.json, and report.html, a page to look through.

    python eval.py chat --models base=M grpo=M+ADAPTER

talks with heads, one after the other under their names; /clear, /system TEXT, /save FILE, /quit or Ctrl-D. Works from a pipe.

    python eval.py merge --model M --adapter ADAPTER --out DIR

makes one model of a base and an adapter, for servers: weights, tokenizer, generation config, and a card of how it was made.
"""
import ctypes
import fcntl
import dataclasses
import functools
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Literal
from urllib.parse import quote

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import numpy
import torch
import transformers
import tyro
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation import StopStringCriteria
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rewards
from data import (WRITTEN, InputError, check_knobs, check_out, described, ecg, hub_message, load_task, medical_o1, medmcqa,
                  one_line_errors, pubmedqa)

TASKS = {"pubmedqa": pubmedqa, "medmcqa": medmcqa, "ecg": ecg, "medical_o1": medical_o1}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft calls it


def keep_freed_memory():
    """On Linux with glibc, keeps what is freed for the next tensor; elsewhere does nothing. Called once, at a script's start.

    Left alone, the C library takes every large tensor fresh from the kernel, which has to zero its pages, and gives it
    back at once (tests/test_survival.py counts the pages). The variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_
    and MALLOC_TOP_PAD_ do the same where they are set before the start.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
    mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


# === models ===========================================================================================================

# For models whose tokenizer has no chat template: plain text, the answer ended by the tokenizer's EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}

{% elif message['role'] == 'user' %}User: {{ message['content'] }}

{% else %}Assistant: {{ message['content'] }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""


def pick_dtype(dtype, device):
    """torch dtype to compute in. "auto": fp32 on CPU, bf16 on cards that have it, fp16 on those that do not (T4, V100)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_model(name):
    """(what from_pretrained loads, the adapter folder to put on it or None) of a --model; raises InputError."""
    folder = Path(__file__).parent / "data" / "tiny" if name == "tiny" else Path(name).expanduser()
    if not folder.is_dir() and (name == "tiny" or name.count("/") != 1 or name[0] in "./~" or folder.exists()):
        raise InputError(f"{name}: no such model folder (tiny, a folder with config.json, or a hub id like ORG/NAME is needed)")
    source = str(folder) if folder.is_dir() else name
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise InputError(f"{name}: the folder has neither config.json (a model) nor adapter_config.json (an adapter)")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        return adapter_base(folder), source
    return source, None


def check_base(name, lora=False):
    """Raises InputError where the --model of a training script is an adapter folder: what training saves
    would lack the adapter. lora: whether the script has an --adapter.
    """
    base, adapter = find_model(name)
    if adapter:
        instead = f"give --model {base} --adapter {name}, or " * lora
        raise InputError(f"--model {name} is an adapter folder, a whole model is needed: {instead}merge "
                         f"it first (python eval.py merge --model {name} --out DIR) and give --model DIR")


def load_model(name, dtype="auto", *, fp32_weights=False, attn_implementation="sdpa", load_in_4bit=False):
    """Loads a model and its tokenizer, in eval mode (dropout off), and prints what was chosen.

    name: "tiny" (data/tiny), a folder, a folder with a peft adapter (its base is loaded too), or a hub id.
    dtype: auto, bf16, fp16 or fp32, what to compute in (see pick_dtype). fp32_weights: keep the weights themselves in fp32
    (master weights; run the model under torch.autocast then). load_in_4bit: through bitsandbytes.
    Returns (model, tokenizer, compute dtype). Only safetensors are read and no code from the model's folder is run.
    Raises InputError for whatever cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute, (source, adapter) = pick_dtype(dtype, device), find_model(name)
    options = {"dtype": torch.float32 if fp32_weights else compute, "attn_implementation": attn_implementation,
               "use_safetensors": True, "trust_remote_code": False}  # False, not unset, which asks the user
    if load_in_4bit:
        try:
            import bitsandbytes  # noqa: F401  (optional; transformers uses it)
        except ImportError:
            raise InputError("4-bit loading needs bitsandbytes: pip install bitsandbytes, or leave --load_in_4bit out") from None
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True)
        options["device_map"] = {"": device}
    try:
        has_tokenizer = adapter and (Path(adapter) / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        if adapter:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # a dozen types of transformers, hub, safetensors and json, one thing to the user: no model
        kernel = f" with --attn_implementation {attn_implementation}" * (attn_implementation != "sdpa")
        raise InputError(hub_message(f"model {name}{kernel}", error, "--model tiny, or --model PATH to a local folder")) from error
    capped = [key for key in ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale")
              if getattr(model.config.get_text_config(), key, None) not in (None, 1.0)]
    capped += ["a bias of the output layer"] if getattr(model.get_output_embeddings(), "bias", None) is not None else []
    if capped:
        raise InputError(f"model {name}: {capped[0]} is not supported here (Gemma 2, Granite, Cohere and Phi-2 have such)")
    if not load_in_4bit:
        model.to(device)
    model.eval()
    if not tokenizer.chat_template:
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # so with Gemma, which needs it
        tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_TEMPLATE
        print(f"model: {name} has no chat template: prompts are plain text ('User: ...', 'Assistant: ')")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from positions, never from token values
    parameters = sum(p.numel() for p in model.parameters())
    weights = "4-bit" if load_in_4bit else str(options["dtype"]).removeprefix("torch.")
    print(f"model: {name}, {parameters / 1e6:,.1f}M parameters, {weights} weights, computing in "
          f"{str(compute).removeprefix('torch.')} on "
          + (torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"))
    return model, tokenizer, compute


def new_adapter(model, r, alpha, seed):
    """`model` with a fresh LoRA adapter on all its linear layers but the output's, whatever their names (Phi's are fused)."""
    from peft import LoraConfig, get_peft_model  # a second to import, and full fine-tuning needs none of it
    torch.manual_seed(seed)  # of the first factor; the second starts at zero, so the model starts as it was
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def read_adapter(model, folder, name, adapter_name="default"):
    """`model` with the trained adapter in `folder` added, ready to be trained on. name: of the model, for messages.

    adapter_name: what to call the adapter in the model. Raises InputError.
    """
    from peft import PeftModel
    base = adapter_base(folder)
    known = model.config._name_or_path
    if base != known and Path(base).parts[-2:] != Path(known).parts[-2:]:  # folders may have moved, names not
        raise InputError(f"adapter {folder} was trained on {base}, not on --model {name}: an adapter fits its own base only")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=True)
            return model.eval()
        return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=True).eval()
    except Exception as error:  # many types of peft, safetensors and torch, one thing to the user: not this adapter
        raise InputError(f"adapter {folder} cannot be loaded into {name} ({type(error).__name__}: {str(error)[:200]})") from error


def adapter_base(folder):
    """What model an adapter folder was trained on; raises InputError where it does not say."""
    file = Path(folder) / "adapter_config.json"
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): {folder} is no adapter folder") from None
    if not base:
        raise InputError(f"{file} names no base model (base_model_name_or_path)")
    return base


def pick_encoder(similarity, encoder):
    """Name of the encoder or cross-encoder of the similarity reward, or "" for word overlap; prints the choice.

    similarity: "embeddings" (an InputError where the encoder cannot be had), "overlap", or "auto".
    """
    if similarity != "overlap":
        try:
            rewards.load_encoder(encoder)
        except Exception as error:  # a dozen types of transformers and hub, one thing to the user: no encoder
            if similarity == "embeddings":
                raise InputError(hub_message(f"encoder {encoder}", error, "--similarity overlap")) from error
            print(f"reward: {encoder} cannot be had, the similarity to the gold text is the overlap of words")
            return ""
        print(f"reward: the similarity to the gold text is by {encoder}")
        return encoder
    print("reward: the similarity to the gold text is the overlap of words")
    return ""


def check_scorers(language_model, reward_model):
    """Loads the language model of the fluency reward and the trained reward model, "" for none; raises InputError where it can't."""
    for name, load, flag in ((language_model, rewards.load_language_model, "--language_model"),
                             (reward_model, rewards.load_reward_model, "--reward_model")):
        try:
            load(name) if name else None
        except Exception as error:  # a dozen types of transformers, peft and hub, one thing to the user: no model
            made = "a folder of `python sft.py reward_model`, or none" if flag == "--reward_model" else f"{flag} ''"
            raise InputError(hub_message(f"{flag} {name}", error, made)) from error


def autocast(compute):
    """The context to run a model in whose weights are wider than `compute`; does nothing for fp32."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=compute, enabled=compute != torch.float32)


def encode_prompt(tokenizer, messages):
    """Token ids of a prompt in the model's own chat template, ready to be answered.

    Templates that refuse a system role get it in front of the user's words. Two known variables are fixed: no thinking
    block for Qwen3 (the task's tags carry the reasoning), and Llama 3's date, which would change the prompt every day.
    """
    options = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
    try:
        return list(tokenizer.apply_chat_template(messages, **options))
    except jinja2.TemplateError:
        if messages[0]["role"] != "system":
            raise
        user = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return list(tokenizer.apply_chat_template([user, *messages[2:]], **options))


def encode_rows(tokenizer, rows, max_prompt_length, what):
    """[(row, prompt_ids)] of the rows whose prompt fits; prints how many do not. Raises InputError when none does."""
    encoded = [(row, encode_prompt(tokenizer, row["prompt"])) for row in rows]
    fitting = [(row, ids) for row, ids in encoded if len(ids) <= max_prompt_length]
    if len(fitting) < len(encoded):
        longest = max(len(ids) for _, ids in encoded)
        print(f"data: {len(encoded) - len(fitting)} of {len(encoded)} {what} rows left out: their prompt is longer than "
              f"--max_prompt_length {max_prompt_length} (longest: {longest} tokens)")
    if not fitting:
        raise InputError(f"no {what} row has a prompt of at most --max_prompt_length {max_prompt_length} tokens")
    return fitting


def stop_ids(model, tokenizer):
    """Ids that end a completion: EOS of the generation config, EOS of the tokenizer, and the template's end of turn.

    All three are needed: Gemma 3 ends its turns on 106 (<end_of_turn>) while its tokenizer's EOS is 1.
    """
    eos = model.generation_config.eos_token_id
    return sorted((set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id, end_of_turn(tokenizer)}) - {None})


def end_of_turn(tokenizer):
    """The id that the chat template writes right after an answer, the tokenizer's EOS where it writes none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False)
    after = tokenizer(turn.rpartition("ANSWER")[2].strip(), add_special_tokens=False).input_ids[:1]
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


# === sampling =========================================================================================================


class SharedPromptCache(DynamicCache):
    """Keys and values of P prompts, held once each, and of their completions, which grow in place; rows can leave.

    prompt: (keys, values) [P, KV heads, S, d] a layer, of prompts padded on the left as prompt_mask [P, S] says. n: completions
    a prompt; room: most tokens a completion can have. The completions of a prompt stand side by side in a grid
    [P, KV heads, n, room, d]; `places` says where in it each row of the batch stands.
    """

    def __init__(self, prompt, prompt_mask, n, room):
        super().__init__()
        self.prompt = [(keys.flatten(0, 1).mT.contiguous(), values.flatten(0, 1)) for keys, values in prompt]  # keys [P * KV heads, d, S]
        bias = torch.zeros_like(prompt_mask, dtype=prompt[0][0].dtype).masked_fill(prompt_mask == 0, -torch.inf)
        self.bias = bias.repeat_interleave(prompt[0][0].shape[1], dim=0)[:, None]  # added to the scores: [P * KV heads, 1, S]
        self.own = [[x.new_empty(len(x), x.shape[1], n, room, x.shape[3]) for x in pair] for pair in prompt]
        self.grid = len(prompt_mask), n
        self.places = torch.arange(len(prompt_mask) * n, device=prompt_mask.device)  # prompt * n + i, ascending
        self.tokens = 0  # of each completion, the one that is being computed included

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Writes the new token of every row; returns the completions so far, [P * KV heads * n, tokens, d], as views."""
        for buffer, new in zip(self.own[layer_idx], (keys, values)):
            buffer.narrow(3, self.tokens - 1, 1).copy_(self.to_grid(new, new.shape[1]))
        return [buffer.flatten(0, 2).narrow(1, 0, self.tokens) for buffer in self.own[layer_idx]]

    def keep(self, rows):
        """Drops all rows but these; the grid shrinks to the prompts that still have some, and to the most that one has."""
        self.places = self.places[rows]
        old_prompt, i = self.places // self.grid[1], self.places % self.grid[1]
        left, prompt, counts = old_prompt.unique(return_inverse=True, return_counts=True)
        if (len(left), int(counts.max())) == self.grid:
            return  # the places of the others stay empty
        old_prompts, self.grid = self.grid[0], (len(left), int(counts.max()))
        new_i = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
        self.places = prompt * self.grid[1] + new_i
        for pair in self.own:
            for k, buffer in enumerate(pair):
                pair[k] = buffer.new_empty(len(left), buffer.shape[1], self.grid[1], *buffer.shape[3:])
                pair[k][prompt, :, new_i, :self.tokens] = buffer[old_prompt, :, i, :self.tokens]
        if len(left) < old_prompts:
            self.prompt = [[x.unflatten(0, (old_prompts, -1))[left].flatten(0, 1) for x in pair] for pair in self.prompt]
            self.bias = self.bias.unflatten(0, (old_prompts, -1))[left].flatten(0, 1)

    def to_grid(self, x, kv_heads):
        """[N, heads, 1, d], a row a completion, to [P, KV heads, n, heads of each, d]."""
        if x.shape[0] < self.grid[0] * self.grid[1]:
            x = x.new_zeros(self.grid[0] * self.grid[1], *x.shape[1:]).index_copy_(0, self.places, x)
        return x.view(*self.grid, kv_heads, -1, x.shape[-1]).transpose(1, 2)

    def to_rows(self, x):
        """The way back, from [P * KV heads * n, heads of each, d] to [N, 1, heads, d]."""
        (prompts, n), (_, heads, d) = self.grid, x.shape
        x = x.view(prompts, -1, n, heads, d).transpose(1, 2).reshape(prompts * n, 1, -1, d)
        return x if x.shape[0] == self.places.shape[0] else x[self.places]


def shared_prompt_attention(module, query, key, value, attention_mask, scaling, shared, sliding_window=None, **_):
    """Attention of one new token a row, in transformers' form: query [N, heads, 1, d], key and value as update returns them.

    No key is repeated: neither a prompt's for its completions, nor any for the query heads that share it.
    """
    (prompt_keys, prompt_values), bias = shared.prompt[module.layer_idx], shared.bias
    if sliding_window:  # the last `sliding_window` positions of prompt and completion
        drop = max(0, prompt_values.shape[1] + key.shape[1] - sliding_window)
        key, value = (x[:, max(0, drop - prompt_values.shape[1]):] for x in (key, value))
        prompt_keys, prompt_values = prompt_keys[..., drop:], prompt_values[:, drop:]
        bias = bias[..., drop:]
    S, tokens = prompt_values.shape[1], value.shape[1]
    query = (shared.to_grid(query, prompt_keys.shape[0] // shared.grid[0]) * scaling).flatten(0, 2)  # [P * KV heads * n, heads of each, d]
    on_prompt = torch.baddbmm(bias, query.view(prompt_keys.shape[0], -1, query.shape[2]), prompt_keys)  # all queries on one copy
    scores = torch.cat([on_prompt, torch.bmm(query, key.mT).view(*on_prompt.shape[:2], -1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)  # [P * KV heads, n * heads of each, S + tokens]
    on_prompt, own = weights.narrow(2, 0, S), weights.narrow(2, S, tokens).reshape(*query.shape[:2], -1)
    output = torch.baddbmm(torch.bmm(on_prompt, prompt_values).view_as(query), own, value)
    return shared.to_rows(output), None


ALL_ATTENTION_FUNCTIONS.register("shared_prompt", shared_prompt_attention)


def group_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention of the G completions of one prompt, in transformers' form: query [G, heads, T, d], key and value [G, KV heads,
    S + T, d], attention_mask the same for all of them or None. As transformers' "sdpa", but query heads that share a key
    stand one after the other in the dimension of T, where "sdpa" repeats the keys, and there is one mask, not G.
    """
    if attention_mask is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, dropout, scaling, **kwargs)
    query = query.unflatten(1, (key.shape[1], -1))  # [G, KV heads, heads of each, T, d]
    mask = attention_mask[:1].repeat(1, 1, query.shape[2], 1)
    output = torch.nn.functional.scaled_dot_product_attention(query.flatten(2, 3), key, value, mask, dropout, scale=scaling)
    return output.unflatten(2, query.shape[2:4]).flatten(1, 2).transpose(1, 2).contiguous(), None  # [G, T, heads, d]


ALL_ATTENTION_FUNCTIONS.register("group", group_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("group", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def attention(model, name, instead_of=None):
    """Within it the model uses another attention function; only if it is `instead_of` that it uses now, where that is given."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name if instead_of in (None, usual) else usual
    try:
        yield
    finally:
        config._attn_implementation = usual


def few_rows_linear(weight, bias, x):
    """x [..., in] times weight [out, in], in the order that is fast on CPU where x has few rows."""
    product = (weight @ x.flatten(0, -2).T).T.contiguous()  # what follows may view it
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)


@contextmanager
def linears_of_a_token(model):
    """Within it the decoder's linear layers are quick for one token a row, on CPU in fp32; elsewhere nothing changes.

    They multiply in another order, and a LoRA adapter is folded into a copy of its layer's weight, once, instead of two
    small products a token. No weight of the model is touched.
    """
    replaced, inner = [], set()
    if model.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        for module in model.get_decoder().modules():
            adapted = hasattr(module, "lora_A")
            base = module.base_layer if adapted else module
            if adapted:
                inner |= {id(child) for child in module.modules()} - {id(module)}
            plain = type(base) is torch.nn.Linear and base.weight.dtype == torch.float32
            if id(module) in inner or not plain or "forward" in vars(module) or getattr(module, "lora_variant", None):
                continue  # 4-bit, half precision, hooks, DoRA: left as they are
            weight = base.weight
            if adapted and not module.disable_adapters:
                for name in module.active_adapters:
                    weight = weight + module.get_delta_weight(name) if name in module.lora_A else weight
            module.forward = functools.partial(few_rows_linear, weight, base.bias)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def draw(probabilities, uniform, width=512):
    """One token a row of probabilities [N, V], which need not add up to 1: that at which their running sum
    reaches the share `uniform` of the whole, [N, 1] in fp64, in (0, 1]. Returns [N, 1]; no token of
    probability 0 is drawn; rows of NaN give some token.

    In fp32 a running sum loses whatever stands behind a likely token. In fp64 that of a whole vocabulary
    is slow: first a block of `width` tokens is drawn by the sums of the blocks, then a token of that block.
    """
    vocabulary = probabilities.shape[1]
    if vocabulary <= 4 * width:
        sums = probabilities.cumsum(dim=1, dtype=torch.double)
        return torch.searchsorted(sums, uniform * sums[:, -1:]).clamp_(max=vocabulary - 1)
    whole = vocabulary // width * width
    rest = probabilities[:, whole:].sum(dim=1, keepdim=True)  # the last block, which may be empty
    sums = torch.cat([probabilities[:, :whole].unflatten(1, (-1, width)).sum(dim=2), rest], dim=1)
    sums = sums.cumsum(dim=1, dtype=torch.double)
    wanted = uniform * sums[:, -1:]
    block = torch.searchsorted(sums, wanted).clamp_(max=sums.shape[1] - 1)
    below = sums.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0)
    share = (wanted - below) / (sums.gather(1, block) - below)
    places = block * width + torch.arange(width, device=block.device)
    inside = probabilities.gather(1, places.clamp(max=vocabulary - 1)).masked_fill_(places >= vocabulary, 0)
    inside = inside.cumsum(dim=1, dtype=torch.double)
    place = torch.searchsorted(inside, share * inside[:, -1:]).clamp_(max=width - 1)
    return places.gather(1, place).clamp_(max=vocabulary - 1)


def generate(model, prompt_ids, n=1, *, max_new_tokens, stop_ids, temperature=1.0, generator=None, stop_strings=(),
             tokenizer=None):
    """Samples n completions of each of P prompts (greedily at temperature 0), with the model's own distribution.

    prompt_ids: P lists of token ids, of any lengths. Nothing of the model's generation_config plays in: no top-k, top-p
    or penalties; only `stop_ids` end a completion, and the id that ended it is its last token, or (`tokenizer` is needed
    then) one of `stop_strings` in its text, whose last token ends it. A prompt is computed, and its keys and values are
    kept, once for its n completions.
    Returns completion_ids, completion_mask (bool) and logps (fp32, nats, at `temperature`; 0 in padding), each
    [P * n, T], the n completions of a prompt in consecutive rows.
    """
    device, width, rows = model.device, max(len(ids) for ids in prompt_ids), len(prompt_ids) * n
    advice = (f"in sampling {rows} completions at once: lower --prompts_per_step, --group_size or --max_completion_length where it was in "
              "training, --eval_batch_size where it was in evaluation")
    with memory_advice(advice):
        completion_ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        completion_mask = torch.ones(rows, max_new_tokens, dtype=torch.bool, device=device)
        logps = torch.zeros(rows, max_new_tokens, device=device)
    with memory_advice(advice), torch.inference_mode():
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids], device=device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        prompt = DynamicCache()
        decoder, output_weight = model.get_decoder(), model.get_output_embeddings().weight
        hidden = decoder(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=prompt)[0]
        cache = SharedPromptCache([(keys, values) for keys, values, _ in prompt], mask, n, max_new_tokens)
        hidden, position_ids = (x[:, -1:].repeat_interleave(n, dim=0) for x in (hidden, position_ids))
        active, stops = torch.arange(rows, device=device), torch.tensor(stop_ids, device=device)  # active: rows being written
        ends_in_string = StopStringCriteria(tokenizer, list(stop_strings)) if stop_strings else None
        with attention(model, "shared_prompt"), linears_of_a_token(model):
            for t in range(max_new_tokens):
                logits = (output_weight @ hidden[:, -1].T).T.contiguous().float()  # for few rows faster on CPU than hidden @ weight.T
                if temperature not in (0, 1):
                    logits = logits / temperature
                probabilities = logits.softmax(dim=-1)
                if temperature:
                    uniform = torch.rand(len(active), 1, dtype=torch.double, generator=generator,
                                         device=device)
                    token = draw(probabilities, 1 - uniform)  # never 0
                else:
                    token = logits.argmax(dim=-1, keepdim=True)
                completion_ids[active, t] = token[:, 0]
                logps[active, t] = probabilities.gather(1, token)[:, 0].log_()
                going = (token != stops).all(dim=1)
                if ends_in_string:
                    going &= ~ends_in_string(completion_ids[active, :t + 1], None)
                if t == max_new_tokens - 1 or not going.any():
                    break
                if not going.all():  # finished rows leave the batch
                    completion_mask[active[~going], t + 1:] = False
                    keep = going.nonzero()[:, 0]
                    active, token, position_ids = active[keep], token[keep], position_ids[keep]
                    cache.keep(keep)
                position_ids, cache.tokens = position_ids + 1, t + 1
                hidden = decoder(token, position_ids=position_ids, past_key_values=cache, shared=cache)[0]
    return completion_ids[:, :t + 1], completion_mask[:, :t + 1], logps[:, :t + 1]


def out_of_memory(error):
    """Whether an exception of torch or Python says that memory ran out, on the GPU or on CPU."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


@contextmanager
def memory_advice(advice):
    """Within it running out of memory ends in one line, an InputError: where it happened and which settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory {advice}") from None


def decode(tokenizer, completion_ids, completion_mask, stop_strings=()):
    """Text of each completion: generated tokens only, special tokens left out, cut behind the first of stop_strings."""
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu())]
    if stop_strings:  # the last token may go on behind the string
        pattern = re.compile("|".join(map(re.escape, stop_strings)))
        ends = [pattern.search(text) for text in texts]
        texts = [text[:end.end()] if end else text for text, end in zip(texts, ends)]
    return texts


# === log-probabilities ================================================================================================


BLOCK = 4096  # entries of the vocabulary whose logits are held at a time
ROWS = 256  # tokens whose logits are summed at a time, so that the exponentials stay in the processor's cache


class ChosenLogps(torch.autograd.Function):
    """Log-probabilities of tokens and entropies, both [M], from hidden [M, h] and the output layer's weight [vocabulary, h].

    Logits exist for BLOCK entries of the vocabulary at a time: sums over it are carried along as in flash attention, and
    backward computes the logits again, but for the last block, which is still there. d logp / d logits = onehot - softmax.
    """

    @staticmethod
    def logits(hidden, weight, temperature, room):  # [M, some of the vocabulary], fp32
        logits = room[:, :len(weight)]  # large new tensors are slow on CPU
        if weight.dtype == room.dtype:
            torch.mm(hidden, weight.T, out=logits)
        else:
            logits.copy_(hidden @ weight.T)
        return logits if temperature == 1 else logits.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature):
        width = min(len(weight), BLOCK)
        room, more_room = (torch.empty(rows, width, device=hidden.device) for rows in (len(hidden), ROWS))
        peak = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        total, weighted = torch.zeros_like(peak), torch.zeros_like(peak)  # sums of e = exp(logit - peak), and e * logit
        for some in weight.split(BLOCK):
            logits = ChosenLogps.logits(hidden, some, temperature, room)
            old_peak, peak = peak, torch.maximum(peak, logits.amax(dim=1, keepdim=True))
            total *= (old_peak - peak).exp()
            weighted *= (old_peak - peak).exp()
            for x, its_peak, its_total, its_weighted in zip(*(y.split(ROWS) for y in (logits, peak, total, weighted))):
                exp = torch.sub(x, its_peak, out=more_room[:len(x), :len(some)]).exp_()
                its_total += exp.sum(dim=1, keepdim=True)
                its_weighted += (exp[:, None] @ x[:, :, None])[:, 0]
        normalizer = peak + total.log()
        chosen = (hidden.float() * weight[tokens].float()).sum(dim=1) / temperature
        entropy = (normalizer - weighted / total)[:, 0]
        ctx.save_for_backward(hidden, weight, tokens, normalizer)
        ctx.temperature, ctx.room, ctx.last_logits = temperature, room, logits
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer[:, 0], entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        hidden, weight, tokens, normalizer = ctx.saved_tensors
        grad = (grad_logps / ctx.temperature)[:, None]
        grad_hidden = grad * weight[tokens]
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # not under LoRA
        for start in reversed(range(0, len(weight), BLOCK)):
            some = weight[start:start + BLOCK]
            logits, ctx.last_logits = ctx.last_logits, None  # overwritten below, so good for once
            if logits is None:
                logits = ChosenLogps.logits(hidden, some, ctx.temperature, ctx.room)
            softmax = logits.sub_(normalizer).exp_()
            grad_logits = softmax.mul_(-grad).to(weight.dtype)
            grad_hidden += grad_logits @ some
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden, out=grad_weight[start:start + BLOCK])
        if grad_weight is not None:
            grad_weight.index_add_(0, tokens, (grad * hidden).to(weight.dtype))
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def chosen_logps(model, hidden, tokens, temperature):
    """Log-probabilities [M] that the model's output layer gives to `tokens` [M] after the hidden states [M, h], with the
    entropies [M] of the distributions; fp32, nats. Differentiable in both; no [M, vocabulary] tensor is made.
    """
    weight = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):  # which does not reach into ChosenLogps
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    return ChosenLogps.apply(hidden, weight, tokens, temperature)


# === evaluation =======================================================================================================

NOT_NUMBERS = ("the model's probabilities are not numbers (NaN): its weights are broken, or too much for the "
               "precision: try --dtype bf16 or fp32, or another model")


def wilson_interval(successes, n, z=1.959964):
    """95% interval of a proportion, [low, high] (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    p, square = successes / n, z * z / n
    centre, half = p + square / 2, z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return [max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))]


def mcnemar(before, after):
    """Exact paired test of two lists of 0/1 on the same examples (McNemar 1947; two-sided binomial on the discordant pairs).

    Returns {"only_before", "only_after", "p_value"}.
    """
    only_before = sum(b > a for b, a in zip(before, after, strict=True))
    only_after = sum(a > b for b, a in zip(before, after, strict=True))
    n, k = only_before + only_after, min(only_before, only_after)
    tail = 1.0  # sum of comb(n, j) for j <= k, over comb(n, k): each term is the next one's share of it
    for i in range(1, k + 1):
        tail = 1 + tail * i / (n - i + 1)
    p_value = min(1.0, 2 * (math.comb(n, k) / 2**n) * tail)
    return {"only_before": only_before, "only_after": only_after, "p_value": p_value}


def bootstrap_interval(values, n=2000):
    """95% interval of a mean, [low, high]: percentiles of the means of n resamples, always the same ones (Efron 1979,
    doi:10.1214/aos/1176344552).
    """
    values, generator = numpy.asarray(values), numpy.random.default_rng(0)
    means, some = [], max(1, 2**20 // len(values))  # resamples at a time: 16 MB of places and values
    for first in range(0, n, some):
        places = generator.integers(0, len(values), (min(some, n - first), len(values)))
        means.extend(values[places].mean(axis=1))
    return [float(x) for x in numpy.percentile(means, [2.5, 97.5])]


def paired_test(before, after):
    """Exact paired test of two lists of records on the same examples: of accuracy, or, of free text, of scores that differ by 0.01 or
    more (then it is the sign test), with the mean difference and its bootstrap interval. See mcnemar. Raises
    InputError where the two are not about the same questions.
    """
    for one, two in itertools.zip_longest(before, after, fillvalue={"id": "nothing"}):
        if one["id"] != two["id"]:
            raise InputError(f"a paired test is of the same questions, but before has {one['id']} where "
                             f"after has {two['id']}: score both on the same rows")
    if "rule" not in before[0]:
        return mcnemar([r["accuracy"] for r in before], [r["accuracy"] for r in after])
    differences = [b["score"] - a["score"] for a, b in zip(before, after, strict=True)]
    least = 0.01 - 1e-9  # 0.06 - 0.05 is a little less than 0.01
    test = mcnemar([d <= -least for d in differences], [d >= least for d in differences])
    ties = len(differences) - test["only_before"] - test["only_after"]
    return {**test, "ties": ties, "difference": fmean(differences),
            "difference_ci95": bootstrap_interval(differences)}


def macro_f1(truths, answers):
    """Mean F1 over the classes of `truths`; an unparsed answer ("") is a miss of its class."""
    scores = []
    for label in sorted(set(truths)):
        hits = sum(t == a == label for t, a in zip(truths, answers))
        scores.append(2 * hits / (truths.count(label) + answers.count(label)))
    return sum(scores) / len(scores)


def pass_at_k(n, correct, k):
    """Probability that at least one of k answers is right, estimated without bias from n of which `correct` are: one
    minus the share of the subsets of k that hold none (Chen et al. 2021, arXiv:2107.03374, eq. 1). k at most n.
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers, ground_truth):
    """Accuracy of the commonest of the answers, 0 to 1; answers that could not be parsed ("") do not vote.

    Where several are commonest one of them is drawn, so the right one among t counts 1 / t (expected accuracy).
    """
    votes = Counter(answer for answer in answers if answer)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return (ground_truth in winners) / len(winners) if winners else 0.0


def summarize_samples(records):
    """What several sampled answers a question show: samples (N), mean_accuracy, pass_at_k {k: value} for k = 1, 2, 4, ...
    and N; where answers are labels also maj_at_n and guess_pass_at_k, what guessing evenly among the classes would get.

    records: with sampled_accuracy and sampled_answers, lists of N each.
    """
    n = len(records[0]["sampled_accuracy"])
    ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    correct = [int(sum(r["sampled_accuracy"])) for r in records]
    mean_accuracy = sum(correct) / (n * len(records))
    summary = {"samples": n, "mean_accuracy": mean_accuracy, "pass_at_1": mean_accuracy,
               "pass_at_k": {str(k): fmean(pass_at_k(n, c, k) for c in correct) for k in ks}}
    if "rule" not in records[0]:
        classes = len({r["ground_truth"] for r in records})
        summary["maj_at_n"] = fmean(majority_vote(r["sampled_answers"], r["ground_truth"]) for r in records)
        summary["guess_pass_at_k"] = {str(k): 1 - (1 - 1 / classes)**k for k in ks}
    return summary


def score_completions(texts, rows, **knobs):
    """The score dict of each completion of its row; knobs: of rewards.compute_scores for free text, else
    compute_score.
    """
    source = rows[0]["data_source"]
    truths, extras = [row["ground_truth"] for row in rows], [row["extra"] for row in rows]
    if source in rewards.METHOD:
        return rewards.compute_scores(source, texts, truths, extras, **knobs)
    return [rewards.compute_score(source, *row, **knobs) for row in zip(texts, truths, extras)]


def evaluate(model, tokenizer, rows, compute, *, max_completion_length, batch_size, samples=0, temperature=1.0, seed=0,
             title="eval", score=score_completions, stop_strings=()):
    """Answers every row greedily, and `samples` times at `temperature` for pass@k, and scores the answers strictly.

    rows: [(row, prompt_ids)] as encode_rows gives them. score: function of texts and their rows to a list of score dicts.
    stop_strings: as in generate. Returns a record an example, in the order of `rows`: id, ground_truth, the keys of those
    dicts, length (tokens), truncated, completion, and with samples sampled_accuracy and sampled_answers (lists).
    """
    stops, generator = stop_ids(model, tokenizer), torch.Generator(model.device).manual_seed(seed)
    limits = dict(max_new_tokens=max_completion_length, stop_ids=stops, stop_strings=stop_strings, tokenizer=tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))  # alike lengths together: less padding
    records = [None] * len(rows)
    bar = tqdm(total=len(order), desc=title, unit="question", leave=False, disable=None)  # says the time left
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        prompts = [rows[i][1] for i in batch]
        with autocast(compute):
            ids, mask, logps = generate(model, prompts, temperature=0.0, **limits)
            sampled = generate(model, prompts, samples, temperature=temperature, generator=generator, **limits)[:2] if samples else None
        if logps.isnan().any():
            raise InputError(f"{title}: {NOT_NUMBERS}")
        texts, own = decode(tokenizer, ids, mask, stop_strings), [rows[i][0] for i in batch]
        for j, (i, row, text, scored) in enumerate(zip(batch, own, texts, score(texts, own))):
            length = int(mask[j].sum())
            records[i] = {"id": row["id"], "ground_truth": row["ground_truth"], "subject": row["extra"].get("subject", ""), **scored,
                          "length": length, "completion": text,
                          "truncated": int(ids[j, length - 1]) not in stops and not text.endswith(tuple(stop_strings))}
        if samples:
            texts = decode(tokenizer, *sampled, stop_strings)
            for j, scored in enumerate(score(texts, [row for row in own for _ in range(samples)])):
                record = records[batch[j // samples]]
                record.setdefault("sampled_accuracy", []).append(scored["accuracy"])
                record.setdefault("sampled_answers", []).append(scored["answer"])
        bar.update(len(batch))
    bar.close()
    return records


def option_likelihoods(model, tokenizer, rows, compute, *, batch_size, title="likelihood"):
    """Scores the possible answers of each row by log-likelihood after a standard prompt, nothing generated.

    Prompt and answers are those of lm-evaluation-harness's task of the same name, see the dataset's
    harness_prompt (github.com/EleutherAI/lm-evaluation-harness); no chat template. As there, an answer is the
    tokens that context + answer has after those of the context, and what is longer than the model's
    max_position_embeddings loses its beginning. rows as in evaluate.
    Returns a record an example: id, ground_truth, subject, loglikelihoods (nats, in the answers' order),
    answer (the likeliest; of equals the first), accuracy.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    choices = []  # the answers of each row
    tasks = []  # (ids that go in, row, number of the answer, the answer's tokens)
    for i, (row, _) in enumerate(rows):
        context, answers = TASKS[row["data_source"]].harness_prompt(row)
        choices.append(answers)
        start = len(tokenizer(context).input_ids)  # with what the tokenizer puts in front of a text, as the harness does
        for k, answer in enumerate(answers):
            ids = tokenizer(f"{context} {answer}").input_ids
            tasks.append((ids[-longest - 1:-1], i, k, ids[start:]))
    inputs = sorted({tuple(ids) for ids, *_ in tasks}, key=len)  # answers of one token share their input
    logps = {}
    for first in tqdm(range(0, len(inputs), batch_size), desc=title, unit="batch", leave=False, disable=None):
        batch = {ids: place for place, ids in enumerate(inputs[first:first + batch_size])}
        wanted = [(batch[tuple(ids)], i, k, ids, answer)
                  for ids, i, k, answer in tasks if tuple(ids) in batch]
        width = max(map(len, batch))  # padded on the right: causal attention needs no mask
        with torch.inference_mode(), autocast(compute):
            hidden = model.get_decoder()(torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=model.device),
                                         use_cache=False)[0]
            places = [(place, len(ids) - len(answer) + j, token) for place, _, _, ids, answer in wanted
                      for j, token in enumerate(answer)]
            at, position, token = torch.tensor(places, device=model.device).T
            scores = chosen_logps(model, hidden[at, position], token, 1.0)[0]
        if not scores.isfinite().all():
            raise InputError(f"{title}: {NOT_NUMBERS}")
        scores = iter(scores.tolist())
        logps |= {(i, k): sum(next(scores) for _ in answer) for _, i, k, _, answer in wanted}
    records = []
    for i, (row, _) in enumerate(rows):
        likelihoods = [logps[i, k] for k in range(len(choices[i]))]
        answer = choices[i][likelihoods.index(max(likelihoods))]
        records.append({"id": row["id"], "ground_truth": row["ground_truth"], "subject": row["extra"].get("subject", ""),
                        "loglikelihoods": likelihoods, "answer": answer, "accuracy": float(answer == row["ground_truth"])})
    return records


FREE_TEXT_PARTS = ("findings", "tokens", "similarity", "fluency", "format", "brevity", "learned")


def summarize(records):
    """The summary of evaluate's or option_likelihoods' records: accuracy with accuracy_ci95 (Wilson), n, majority_accuracy
    (of always giving majority_class, the commonest class or letter of these rows), macro_f1, answers (how often each was
    given); of generated answers format_rate, mean_length (tokens) and truncated (share); what summarize_samples says where
    there are samples; by_subject ({subject: n, accuracy, accuracy_ci95, majority_accuracy}) where there are subjects.
    Of free text, which has no classes, score and parts (each mean with its bootstrap interval) instead of
    majority_accuracy, macro_f1 and answers.
    """
    truths, answers, n = [r["ground_truth"] for r in records], [r["answer"] for r in records], len(records)
    correct = int(sum(r["accuracy"] for r in records))
    summary = {"accuracy": correct / n, "accuracy_ci95": wilson_interval(correct, n), "n": n}
    if "rule" in records[0]:
        names = ("score", "rule", *FREE_TEXT_PARTS)
        parts = {name: [r[name] for r in records] for name in names if name in records[0]}
        parts = {name: {"mean": fmean(values), "ci95": bootstrap_interval(values)} for name, values in parts.items()}
        summary |= {"score": parts["score"]["mean"], "score_ci95": parts.pop("score")["ci95"], "parts": parts}
    else:
        [(majority_class, count)] = Counter(truths).most_common(1)
        summary |= {"majority_class": majority_class, "majority_accuracy": count / n, "macro_f1": macro_f1(truths, answers)}
    if "length" in records[0]:
        summary |= {"format_rate": sum(r["format_ok"] for r in records) / n, "mean_length": sum(r["length"] for r in records) / n,
                    "truncated": sum(r["truncated"] for r in records) / n}
    if "macro_f1" in summary:
        summary["answers"] = dict(Counter(a or "none" for a in answers).most_common())
    if "sampled_accuracy" in records[0]:
        summary |= summarize_samples(records)
    by_subject = {}
    for record in records:
        by_subject.setdefault(record.get("subject"), []).append(record)
    if any(by_subject):
        summary["by_subject"] = {}
        for subject, group in sorted(by_subject.items(), key=lambda pair: -len(pair[1])):
            correct = sum(record["accuracy"] for record in group)
            entry = {"n": len(group), "accuracy": correct / len(group), "accuracy_ci95": wilson_interval(correct, len(group))}
            if "majority_class" in summary:
                classes = Counter(record["ground_truth"] for record in group)
                entry["majority_accuracy"] = max(classes.values()) / len(group)
            summary["by_subject"][subject or "none"] = entry
    return summary


def describe(summary):
    """One line of an evaluation for the console."""
    free_text, name = "score" in summary, "score" if "score" in summary else "accuracy"
    low, high = summary[f"{name}_ci95"]
    text = f"{name} {summary[name]:.3f} [{low:.3f}, {high:.3f}] on {summary['n']}"
    text += f", findings F1 {summary['parts']['findings']['mean']:.3f}, all right {summary['accuracy']:.3f}" if free_text else (
        f" (always {summary['majority_class']!r}: {summary['majority_accuracy']:.3f})")
    text += f"; {describe_samples(summary)}" if "samples" in summary else ""
    text += "" if free_text else f", macro-F1 {summary['macro_f1']:.3f}"
    if "format_rate" in summary:
        text += f", format {summary['format_rate']:.3f}, {summary['mean_length']:.0f} tokens"
    return text + ("" if free_text else f", answers {summary['answers']}")


def describe_samples(summary):
    """The console's words for what summarize_samples found."""
    n = summary["samples"]
    text = f"{n} samples each: mean accuracy {summary['mean_accuracy']:.3f}, " + ", ".join(
        f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items())
    if "maj_at_n" in summary:
        text += f", maj@{n} {summary['maj_at_n']:.3f} (guessing: pass@{n} {summary['guess_pass_at_k'][str(n)]:.3f})"
    return text


# === report.html ======================================================================================================

MODES = {"generated": "generated answers", "loglikelihood": "most likely option"}


def _bars(mode, summaries):
    """One figure: a bar a head on a scale from 0 to 400, whiskers for the 95% interval, the majority baseline dashed."""
    bottom = 48 * len(summaries)
    parts = [f'<path class="grid" d="M{x} 0V{bottom}"/><text x="{x}" y="{bottom + 18}" text-anchor="middle">{x // 4}%</text>'
             for x in range(0, 401, 100)]
    for top, (name, s) in zip(range(0, bottom, 48), summaries.items()):
        value, interval = headline(s)
        x, low, high = (round(400 * max(0, v), 1) for v in (value, *interval))
        dashed = f'<path class="majority" d="M{round(400 * s["majority_accuracy"], 1)} {top}v48"/>' if "majority_accuracy" in s else ""
        parts.append(f'<text x="4" y="{top + 15}">{html.escape(name)}</text>'
                     f'<text x="400" y="{top + 15}" text-anchor="end">{value:.1%}</text>'
                     f'<rect y="{top + 21}" width="{x}" height="18"/>{dashed}'
                     f'<path class="whisker" d="M{low} {top + 25}v10m0-5H{high}m0-5v10"/>')
    title, below = (MODES[mode].capitalize(), " Dashed: always giving the commonest answer.") if dashed else (
        "Score of the answers, 100% is the most", "")
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="-14 0 436 {bottom + 24}" role="img" '
            f'aria-label="Bars of {"accuracy" if dashed else "score"}; the numbers are in the next table">{"".join(parts)}</svg>'
            f'<small>Whiskers: 95% interval.{below}</small></figure>')


def _sample_curves(summaries):
    """One figure: pass@k against k, a line a head; k on a scale of doublings. Guessing, where there are classes, dashed."""
    width, height = 400, 200
    n = max(s["samples"] for s in summaries.values())

    def path(values):
        points = (f"{width * math.log2(int(k)) / max(1, math.log2(n)):.1f} {height * (1 - v):.1f}"
                  for k, v in values.items())
        return "M" + "L".join(points)

    parts = [f'<path class="grid" d="M0 {height * (1 - share / 100):g}H{width}"/>'
             f'<text x="-6" y="{height * (1 - share / 100) + 5:g}" text-anchor="end">{share}%</text>' for share in range(0, 101, 25)]
    first = next(iter(summaries.values()))
    for k in first["pass_at_k"]:
        x = width * math.log2(int(k)) / max(1, math.log2(n))
        parts.append(f'<text x="{x:.1f}" y="{height + 20}" text-anchor="middle">{k}</text>')
    if "guess_pass_at_k" in first:
        parts.append(f'<path class="majority line" d="{path(first["guess_pass_at_k"])}"/>')
    labels = sorted(((s["pass_at_k"][max(s["pass_at_k"], key=int)], number, name)
                     for number, (name, s) in enumerate(summaries.items())), reverse=True)
    lowest = -20.0  # two heads can end at the same height: labels stand below each other
    for value, number, name in labels:
        lowest = max(lowest + 17, height * (1 - value) + 5)
        parts.append(f'<text class="label{number % 4}" x="{width + 8}" y="{lowest:.1f}">{html.escape(name)}</text>')
    parts += [f'<path class="line line{number % 4}" d="{path(s["pass_at_k"])}"/>' for number, s in enumerate(summaries.values())]
    below = " Dashed: guessing evenly among the classes." if "guess_pass_at_k" in first else ""
    return (f'<figure><figcaption>pass@k: at least one of k samples is right</figcaption>'
            f'<svg viewBox="-52 -10 {width + 160} {height + 40}" role="img" aria-label="Lines of pass@k against k; the numbers '
            f'are in the table of sampled answers">{"".join(parts)}</svg><small>k samples a question.{below}</small></figure>')


def _samples_table(summaries):
    """What each head's sampled answers show, and what guessing would."""
    first = next(iter(summaries.values()))
    ks = list(first["pass_at_k"])
    votes = "maj_at_n" in first
    columns = ["head", "mean accuracy", *(f"pass@{k}" for k in ks if k != "1"), *([f"maj@{first['samples']}"] if votes else [])]
    lines = [[html.escape(name), f"{s['mean_accuracy']:.1%}", *(f"{s['pass_at_k'][k]:.1%}" for k in ks if k != "1"),
              *([f"{s['maj_at_n']:.1%}"] if votes else [])] for name, s in summaries.items()]
    if votes:
        guess = first["guess_pass_at_k"]
        lines.append(["guessing", f"{guess['1']:.1%}", *(f"{guess[k]:.1%}" for k in ks if k != "1"), f"{guess['1']:.1%}"])
    return _table(f"Sampled answers ({first['samples']} a question)", columns, lines)


def headline(summary):
    """(value, interval) of what a summary is about: the score of free text, the accuracy of everything else."""
    name = "score" if "score" in summary else "accuracy"
    return summary[name], summary[f"{name}_ci95"]


def _table(caption, columns, lines):
    """A table in a box that scrolls on its own. Cells are HTML; the first of each line is that line's heading."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
                   for first, *cells in lines)
    return (f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def report_html(title, heads, rows, paired=()):
    """One self-contained page that compares model heads on the same questions: chart, tables, and each question to read.

    heads: {name: {"generated": summary, "loglikelihood": summary}}, either may be missing; summary: accuracy, accuracy_ci95, n,
    majority_accuracy, by_subject {subject: {n, accuracy, accuracy_ci95}} and, of generated answers, format_rate, mean_length, and
    what summarize_samples gives; of
    free text score, score_ci95 and parts.
    rows: {"id", "question", "options", "ground_truth", "subject", "answers": {name: {"answer", "accuracy", "completion"}}}.
    paired: {"before", "after", "mode", "only_before", "only_after", "p_value"}, names of heads and counts of questions.
    Returns HTML that loads nothing and shows whatever a model wrote as text.
    """
    modes = {mode: {name: head[mode] for name, head in heads.items() if head.get(mode)} for mode in MODES}
    modes = {mode: summaries for mode, summaries in modes.items() if summaries}
    readable = [name for name in heads if any(name in row["answers"] for row in rows)]
    tested = [(p["before"], p["after"]) for p in paired if p["mode"] == "generated"]
    free_text = any("score" in summary for summaries in modes.values() for summary in summaries.values())
    data = {"heads": readable, "pairs": list(dict.fromkeys([*zip(readable, readable[1:]), *tested])), "rows": rows, "freeText": free_text}
    words = ("better", "worse", "sign test on scores") if free_text else ("newly right", "newly wrong", "McNemar")

    def named(name, mode):
        return f"{html.escape(name)} <small>{MODES[mode]}</small>"

    def score(s):
        return "{:.1%} <small>({:.1%} to {:.1%})</small>".format(s["accuracy"], *s["accuracy_ci95"]) if s else "–"

    def majority(s):
        named_class = f" <small>always {html.escape(s['majority_class'])}</small>" if "majority_class" in s else ""
        return f"{s['majority_accuracy']:.1%}{named_class}" if "majority_accuracy" in s else "–"

    def count(p, kind, key):
        view = quote(f"{kind}: {p['before']} → {p['after']}")
        return f'<a href="#filter={view}">{p[key]}</a>' if p["mode"] == "generated" else p[key]

    def verdict(p):
        better = p["after"] if p["only_after"] > p["only_before"] else p["before"]
        return f"{html.escape(better)} is better" if p["p_value"] < 0.05 else "no difference shown"

    tables = _table("Heads", ["head", "all right (95% interval)" if free_text else "accuracy (95% interval)", "questions",
                              "commonest answer", "format", "mean length"], [
        [named(name, mode), score(s), s["n"], majority(s),
         f"{s['format_rate']:.1%}" if "format_rate" in s else "–", f"{s['mean_length']:.1f}" if "mean_length" in s else "–"]
        for mode, summaries in modes.items() for name, s in summaries.items()])
    if free_text:
        summaries = modes["generated"]
        tables += _table("Parts of the score (95% interval)", ["part", *map(html.escape, summaries)], [
            [part, *("{:.3f} <small>({:.3f} to {:.3f})</small>".format(value, *interval) for value, interval in (
                headline(s) if part == "score" else (s["parts"][part]["mean"], s["parts"][part]["ci95"]) for s in summaries.values()))]
            for part in ("score", *next(iter(summaries.values()))["parts"])])
    sampled = {name: s for name, s in modes.get("generated", {}).items() if "pass_at_k" in s}
    if sampled:
        tables += _samples_table(sampled)
    if paired:
        tables += _table(f"Paired tests ({words[2]})", ["before → after", *words[:2], *["ties"] * free_text, "p", "verdict"], [
            [named(f"{p['before']} → {p['after']}", p["mode"]), count(p, words[0], "only_after"),
             count(p, words[1], "only_before"), *[p.get("ties")] * free_text, f"{p['p_value']:.2g}", verdict(p)] for p in paired])
    mode, summaries = next(iter(modes.items()))
    sizes = {subject: part["n"] for s in summaries.values() for subject, part in s.get("by_subject", {}).items()}
    if sizes:
        baselines = {subject: majority(part) for s in summaries.values() for subject, part in s.get("by_subject", {}).items()}
        tables += _table(f"By subject: {MODES[mode]}", ["subject", "questions", "commonest answer", *map(html.escape, summaries)], [
            [html.escape(subject), sizes[subject], baselines[subject],
             *(score(s.get("by_subject", {}).get(subject)) for s in summaries.values())]
            for subject in sorted(sizes, key=lambda subject: (-sizes[subject], subject))])
    page = Template((Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=html.escape(title), what="Score" if free_text else "Accuracy", intro=f"How {html.escape(', '.join(heads))} answer the same questions, and what each wrote.",
        charts="".join(_bars(*item) for item in modes.items()) + (_sample_curves(sampled) if sampled else ""), tables=tables,
        # "<" could close the script element; json.dumps itself escapes all beyond ASCII: U+2028, U+2029, lone surrogates.
        data=json.dumps(data).replace("<", "\\u003c"))


# === doctor: will it fit ==============================================================================================


def estimate_memory(config, prompt, question):
    """Most memory that a run of a script can need, {part: bytes}, from the model's configuration alone; nothing is loaded.

    config: of the script. prompt: tokens of the longest training prompt (of sft: of the longest row); question: of the longest held-out
    prompt. Completions count with their full --max_completion_length. Raises InputError where there is no such model.
    """
    try:
        with torch.device("meta"):  # shapes without numbers
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(find_model(config.model)[0], trust_remote_code=False))
    except InputError:
        raise
    except Exception as error:  # what load_model would say
        raise InputError(hub_message(f"model {config.model}", error, "--model tiny, or --model PATH to a local folder")) from error
    text, lora_r = model.config.get_text_config(), getattr(config, "lora_r", 0)
    h, layers, ffn, vocabulary = text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size
    d = getattr(text, "head_dim", None) or h // text.num_attention_heads
    q, kv = text.num_attention_heads * d, 2 * text.num_key_value_heads * d  # widths of queries, and of keys and values together
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = pick_dtype(config.dtype, device).itemsize  # bytes of an activation
    total, embedding = sum(p.numel() for p in model.parameters()), vocabulary * h
    trained = sum(lora_r * (m.in_features + m.out_features) for m in model.modules()
                  if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()) if lora_r else total
    weights = 4 * total if not lora_r else c * total
    if getattr(config, "load_in_4bit", False):
        weights = (total - embedding) * 9 // 16 + c * embedding  # 4 bits, and a scale for every 64 of them
    parts = {"weights": weights + (4 * trained if lora_r else 0),
             "reference": (4 * trained if lora_r else weights) if getattr(config, "beta", 0) else 0,
             "optimizer": 8 * trained}  # Adam's two moments
    # What autograd keeps of a token in a layer: what goes into and comes out of each of the two norms' scaling, and what goes into the
    # linear layers after them (6h, or 4h where the scaling is frozen); queries and the attention's output (2q); four widths of the
    # MLP (gate, its activation, up, their product). One layer more is at work while it is differentiated.
    token = c * ((4 if lora_r else 6) * h + 2 * q + 4 * ffn)
    if hasattr(config, "group_size"):
        group, length = config.completions_per_forward or config.group_size, config.max_completion_length
        new, rows, context = group * length, config.prompts_per_step * config.group_size, prompt + length
        # every completion has its own copy of the prompt's keys and values; queries that share a key lie in one row, with a mask for
        # that row, and the attention's output goes back into the usual order
        activations = (layers + 1) * (prompt * (token + c * kv) + new * (token + c * q) + c * kv * group * context
                                      + 4 * 2 * q // kv * length * context)
        sampled = (config.prompts_per_step, rows, prompt)
    else:
        new, sampled = config.batch_size * prompt, (0, 0, 0)
        activations = (layers + 1) * new * (token + c * kv)
    block = new * min(vocabulary, BLOCK)  # logits that ChosenLogps holds: in fp32, of a half-precision model also as they come, and their gradients
    update = {"gradients": 4 * trained + (0 if lora_r else 4 * embedding),  # and one of the output layer on its way
              "activations": activations, "logits": (4 if c == 4 else 4 + 2 * c) * block}

    def sampling(prompts, rows, longest):
        context = longest + config.max_completion_length
        return {"key-value cache": layers * c * kv * (prompts * longest + rows * config.max_completion_length),
                "logits": 5 * 4 * rows * vocabulary,  # logits, probabilities and cumulative sums; while they last, the next logits, twice
                "activations": max(prompts * longest * (4 * h + q + kv + 3 * ffn) * c, 3 * 4 * rows * text.num_attention_heads * context)}

    evaluation = (config.eval_batch_size, config.eval_batch_size, question)
    parts |= max(update, sampling(*sampled), sampling(*evaluation), key=lambda phase: sum(phase.values()))
    return parts


def free_memory():
    """Bytes that the device has left: of the GPU, or of the machine within the limit of its control group."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    if not Path("/proc/meminfo").exists():  # no Linux: all that the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = [int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # v2, v1
        try:
            free.append(int((Path("/sys/fs/cgroup") / limit).read_text()) - int((Path("/sys/fs/cgroup") / used).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max": no limit
    return min(free)


def doctor(config, train, heldout):
    """The first thing that a script says: whether model and settings will probably fit into memory and onto the disk, and whether the
    libraries are those that it was tested with. Warns, never refuses. Rows are not tokenized yet: three characters count as a token.
    Returns the bytes that the process holds so far.
    """
    limit = getattr(config, "max_prompt_length", 0) or config.max_seq_length
    prompt, question = (min(limit, max(sum(len(m["content"]) for m in row["prompt"]) + len(row["target"]) * (rows is train and not hasattr(
        config, "group_size")) for row in rows) // 3) for rows in (train, heldout[:config.eval_size]))
    parts = estimate_memory(config, prompt, question)
    needed, free = sum(parts.values()), free_memory()
    checkpoint = parts["optimizer"] * 3 // 2 + parts["reference"]
    place = next(path for path in (Path(config.out or "runs").absolute(), *Path(config.out or "runs").absolute().parents) if path.is_dir())
    room = shutil.disk_usage(place).free
    print(f"doctor: about {needed / 1e9:.2g} GB of memory needed at most ({described_memory(parts)}), {free / 1e9:.3g} GB free; a checkpoint "
          f"takes {checkpoint / 1e9:.2g} GB of {room / 1e9:.3g} GB on the disk")
    if needed > free:
        lower = "--completions_per_forward 1, a lower --prompts_per_step, --group_size or" if hasattr(config, "group_size") else "a lower --batch_size or"
        print(f"WARNING: this will probably not fit into memory: try {lower} --eval_batch_size, or a smaller --model")
    if 2 * checkpoint + parts["weights"] > room:  # the old checkpoint is kept while the new one is written
        print(f"WARNING: {place} will probably be full before the run ends: take another --out, or make room")
    wanted = dict(line.split("==") for line in (Path(__file__).parent / "requirements.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    for name in ("torch", "transformers", "peft"):
        found = importlib.metadata.version(name).partition("+")[0]
        if found != wanted[name]:
            print(f"WARNING: {name} {found} is installed, tested was {wanted[name]} (requirements.txt)")
    # what the process holds before anything is loaded: Python, torch, the libraries, the rows; on a GPU tensors alone are counted
    return 0 if torch.cuda.is_available() else round(peak_memory_gb() * 1e9)


def described_memory(parts):
    """The parts of estimate_memory for the console, the largest first."""
    return ", ".join(f"{name} {size / 1e9:.2g}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size)


# === the run folder ===================================================================================================

GRPO_PANELS = [
    ("Reward", "reward per completion", {"total": "reward"}),  # and its parts
    ("Accuracy", "share correct", {"sampled completions": "accuracy"}),
    ("KL to the reference", "nats per token", {"KL": "kl"}),
    ("Entropy", "nats per token", {"policy": "entropy"}),
    ("Completion length", "tokens", {"mean": "completion_length"}),
    ("Shares", "share",
     {"clipped tokens": "clip_fraction", "truncated": "truncated",
      "groups without variance": "zero_std_share"}),
    ("Answers", "share of the samples", {})]  # a line a label; left out where answers are free text
MAY_CHANGE = {"resume", "out", "steps", "save_every", "eval_every", "eval_batch_size", "completions_per_forward", "wandb",
              "wandb_project"}  # on --resume
BAD_STEPS = 3  # so many in a row whose update had to be skipped end the run


class Run:
    """The folder of a run: config.json, metrics.jsonl, samples.jsonl, eval_*.jsonl, summary.json, curves.png, checkpoint/."""

    def __init__(self, script, config, panels=GRPO_PANELS):
        """config: the script's dataclass; panels: of curves.png, [(title, unit, {label: metric})].

        Raises InputError where the folder holds another run, or another configuration.
        """
        if config.resume and not config.out:
            raise InputError("--resume needs --out DIR: the folder of the run to continue")
        self.rehearsal = tempfile.TemporaryDirectory() if config.dry_run else None  # gone when the process ends
        self.folder = Path(self.rehearsal.name) if config.dry_run else Path(config.out or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        self.script, self.panels, self.lock, self.signal, self.wandb, self.finished, self.warned = script, panels, None, None, None, False, False
        self.identity = None  # of the run, whose checkpoints carry it
        self.in_steps, self.saved = False, 0  # between the first step and the last; the last step in checkpoint/
        self.skipped, self.bad_step, self.in_a_row = Counter(), None, 0  # updates a step; the last step that had one
        self.watched, self.collapses = [], set()  # metrics of this launch; what was warned about
        known = self.folder / "config.json"
        check_out(self.folder, may_hold=WRITTEN)
        try:
            text = known.read_text() if known.exists() else ""  # empty where a run was killed making it
            before = json.loads(text or "{}")
        except (OSError, ValueError) as error:
            raise InputError(f"{known} cannot be read ({type(error).__name__}), so nobody can tell what run "
                             "this was: take another --out") from None
        if text:
            if not isinstance(before, dict) or "script" not in before:
                raise InputError(f"--out {self.folder} holds a config.json of no run: take another folder")
            if not (self.folder / "summary.json").exists():
                self._lock()
            if not config.resume:
                raise InputError(f"--out {self.folder} holds another run: add --resume to continue it, or take another folder")
            if before["script"] != script:
                raise InputError(f"--out {self.folder} holds a run of {before['script']}.py: take another folder")
            changed = [f"--{key} ({before[key]!r} at launch)" for key, value in json.loads(json.dumps(asdict(config))).items()
                       if key not in MAY_CHANGE and before.get(key, value) != value]
            if changed:
                raise InputError(f"--resume with another value of {', '.join(changed)} would be another run: give the values "
                                 "of the launch")
            self.finished = (self.folder / "summary.json").exists()
        else:
            check_out(self.folder, may_hold=("config.json",))
        self.config, self.launched = asdict(config), before if text else asdict(config)
        self.config |= {"resume": False, "wandb": "disabled"} if config.dry_run else {}
        self.schedule_steps = self.launched.get("steps")  # of the learning rate: fixed at launch

    def open(self, train=(), heldout=()):
        """Called once the input is known to be good: makes the folder, catches signals, starts wandb if
        asked.

        train, heldout: the rows that are used; their fingerprint goes into config.json. Raises InputError
        where --resume comes with others.
        """
        rows = {"training": fingerprint(train), "held-out": fingerprint(heldout)}
        known = self.launched.get("rows", rows) if self.lock else rows
        if known != rows:
            known = known if isinstance(known, dict) else {}
            other = " and ".join(side for side in rows if known.get(side) != rows[side])
            raise InputError(f"--resume with other {other} rows than at launch would be another run: give "
                             "the launch's --data as it was then, or take another --out")
        if not self.lock:
            self.launched = {**self.config, "script": self.script, "rows": rows}
        if "rows" in self.launched:  # else a run from before there were fingerprints
            fixed = {key: value for key, value in self.launched.items() if key not in MAY_CHANGE}
            self.identity = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.lock:
                self._lock()
                if (self.folder / "config.json").stat().st_size:  # since this process looked
                    raise InputError(f"--out {self.folder} holds another run: add --resume to continue it, or take another folder")
                try:
                    self.lock.write((json.dumps(self.launched, indent=1) + "\n").encode())
                except OSError:
                    self.lock.truncate(0)  # half of it would block the folder
                    raise
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be written ({error.strerror})") from None
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        if self.config["wandb"] != "disabled":
            import wandb  # seconds to import, and only when asked for
            identity = self.folder / "wandb_id"
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:8])
            self.wandb = wandb.init(project=self.config["wandb_project"], mode=self.config["wandb"], dir=str(self.folder),
                                    config=self.config, name=self.folder.name, id=identity.read_text(), resume="allow")

    def _lock(self):
        """Holds a lock on config.json while this process lives: the kernel lets go of it, however the process ends."""
        try:
            self.lock = open(self.folder / "config.json", "ab", buffering=0)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {self.folder}: another run is at work in it: wait for its end or stop it, or take another folder") from None
        except OSError as error:
            if not self.lock:
                raise InputError(f"--out {self.folder} cannot be written ({error.strerror})") from None
            print(f"{self.folder} has no file locks ({error.strerror}): see to it yourself that no second run works in it")

    def close(self):
        """Lets go of the lock and of the signals."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.lock:
            self.lock.close()

    def steps(self, first, last):
        """The numbers first to last. A SIGINT or SIGTERM waits for the end of the step while they run, and ends the process at once
        before and after, in an evaluation say, where nothing would be lost."""
        self.in_steps = True
        yield from range(first, last + 1)
        self.in_steps = False
        self.stop_if_asked(None, last)  # came after the last step was saved

    def _stop(self, number, frame):
        self.signal = number
        if not self.in_steps:
            self.stop_if_asked(None, self.saved)
        signal.signal(number, signal.SIG_DFL)  # a second one quits at once
        tqdm.write("stopping: this step is finished and saved first (again to quit at once)", file=sys.stderr)

    def log(self, name, record):
        """Appends a line to NAME.jsonl; metrics go to wandb too."""
        with self._writing(f"{name}.jsonl"), open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb and name == "metrics":
            self.wandb.log(record, step=record["step"])
        if name == "metrics" and any(key.startswith("eval_") for key in record):
            self.curves()  # a long run can be looked at while it goes on
        if self.rehearsal and name == "metrics" and record["step"] == 2:  # the first one warmed up
            self.end_rehearsal(record)

    def report(self, bar, metrics, group):
        """One step: metrics.jsonl and the bar always; now and then a line, samples.jsonl, and a completion to read."""
        step, steps = metrics["step"], self.config["steps"]
        self.log("metrics", metrics)
        self.warn_of_collapse(bar, metrics)
        bar.set_postfix_str(f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.2f}, kl {metrics['kl']:.3f}, "
                            f"{metrics['completion_length']:.0f} tokens")
        if step == 1 or step % max(1, steps // 20) == 0:
            heldout = f"  held-out {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else ""
            bar.write(f"step {step:4}  reward {metrics['reward']:.3f}  accuracy {metrics['accuracy']:.3f}{heldout}  kl "
                      f"{metrics['kl']:.4f}  entropy {metrics['entropy']:.3f}  tokens {metrics['completion_length']:.0f}  "
                      f"{metrics['generate_seconds'] + metrics['update_seconds']:.1f} s")
            self.log("samples", {"step": step, "id": group["row"]["id"], "prompt": group["row"]["prompt"],
                                 "ground_truth": group["row"]["ground_truth"], "completions": group["texts"],
                                 "rewards": group["rewards"].tolist()})
        if step == 1 or step % max(1, steps // 4) == 0:
            text = f"{group['row']['extra']['question']} ({group['row']['ground_truth']})\n{group['texts'][0][:600]}"
            bar.write(printable(text).replace("\n", "\n    | ") + f"\n    reward {group['rewards'][0]:.1f}")

    def warn_if_parted(self, bar, window=20):
        """Says once when, from one window of steps to the next, the learned reward rose and the rule reward fell: it is being gamed."""
        records = self.read_records("metrics")[-2 * window:]
        if self.warned or len(records) < 2 * window:
            return
        (learned, rule) = (fmean(r[f"reward_{name}"] for r in records[window:]) - fmean(r[f"reward_{name}"] for r in records[:window])
                           for name in ("learned", "rule"))
        if learned > 0.02 and rule < -0.02:
            self.warned = True
            bar.write(f"WARNING: over the last {window} steps the reward model's score rose by {learned:.3f} while the rules' fell by "
                      f"{-rule:.3f}: it is being gamed. Lower --learned_weight, raise --beta, or train the reward model on such answers")

    def stop_if_asked(self, bar, step):
        """Ends the process with 128 + signal after a SIGINT or SIGTERM; call it right after save_checkpoint."""
        if self.signal:
            if bar:
                bar.close()
                self.curves()
            self.close()
            print(f"stopped after step {step}; to go on, repeat the command with --out {self.folder} --resume")
            sys.exit(128 + self.signal)

    def write_records(self, name, records):
        """NAME.jsonl at once, a line a record."""
        self._write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def _write(self, name, text):
        """Writes a file under another name and renames it: whenever the process is killed, the file is the old or the new one."""
        with self._writing(name):
            (self.folder / f"{name}.new").write_text(text, encoding="utf-8")
            synced(self.folder / f"{name}.new").rename(self.folder / name)

    @contextmanager
    def _writing(self, name):
        """Within it a full disk and the like end in one line, an InputError: what is lost, what is not, what to do."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of the former
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0][:200]
            kept = f"the checkpoint of step {self.saved} is whole, make room and go on with --resume" if self.saved else (
                "there was no checkpoint yet")
            raise InputError(f"{self.folder / name} cannot be written ({reason}): {kept}") from error

    def read_records(self, name):
        """The records of NAME.jsonl."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def read_before(self, heldout):
        """The records of eval_before.jsonl; raises InputError unless they are about heldout's questions,
        (row, ...) each.
        """
        file, wrong = self.folder / "eval_before.jsonl", "is about other questions than the run's"
        try:
            records = self.read_records("eval_before")
            summarize(records)
            if [record["id"] for record in records] == [row["id"] for row, *_ in heldout]:
                return records
        except (OSError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
            wrong = f"is damaged ({type(error).__name__})" if file.exists() else "is missing"
        raise InputError(f"{file} {wrong}, so before and after cannot be compared: put back a copy, or delete"
                         f" {self.folder}/checkpoint to start again from the first step")

    def save_checkpoint(self, state):
        """Replaces checkpoint/ by `state` (a dict of tensors and numbers); the old one stays until the new one is whole and on disk."""
        new, current, old = (self.folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        try:
            with self._writing("checkpoint.new"):
                new.mkdir()
                with open(new / "state.pt", "wb") as file:
                    torch.save({**state, "run": self.identity}, file)
                for path in (new / "state.pt", new, *self.folder.glob("*.jsonl")):  # a full disk may only say so now
                    synced(path)
        except InputError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        new.rename(current)
        synced(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self.saved = state["step"]

    def load_checkpoint(self):
        """The last whole checkpoint, or None; lines of the logs that belong to later steps are cut off."""
        state, broken = None, []
        for file in [self.folder / name / "state.pt" for name in ("checkpoint", "checkpoint.old")] if self.config["resume"] else ():
            if file.exists() and state is None:
                try:
                    state, found = torch.load(file, map_location="cpu", weights_only=True), file
                except Exception as error:  # cut short or damaged: torch, zip and pickle have a dozen types for it
                    if out_of_memory(error):
                        raise
                    broken.append(file)
                    print(f"{file} cannot be read, it is cut short or damaged ({type(error).__name__})")
        if broken and state is None:
            raise InputError(f"{broken[0]} cannot be read, and no other checkpoint is there: delete {broken[0].parent} to start again "
                             "from the first step, or put back a copy")
        own = isinstance(state, dict) and "step" in state and state.get("run") == self.identity
        if state is not None and not own:
            raise InputError(f"{found} is no checkpoint of this run: put back its own, or delete "
                             f"{found.parent} to start again from the first step")
        for file in broken:  # so that the whole one, checkpoint.old, is kept until the next is complete
            shutil.rmtree(file.parent)
        if state:
            self.saved = state["step"]
            if self.config.get("completions_per_forward") != self.launched.get("completions_per_forward"):
                state["completions_per_forward"] = self.config["completions_per_forward"]  # the user's word beats what was halved
        for name in ("metrics", "samples"):
            file = self.folder / f"{name}.jsonl"
            if file.exists():
                records = []
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:
                        break  # half a last line, written when the run was killed
                    if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                        break
                    records.append(record)
                self.write_records(name, [record for record in records if state and record["step"] <= state["step"]])
        return state

    # --- dry run

    def rehearse(self, config, train, heldout, libraries):
        """For --dry_run: the longest rows of a step, and a batch of the evaluation; two steps will be made. Estimates the memory.

        train: (row, prompt_ids), of sft (prompt_ids, completion_ids). libraries: what doctor returned.
        """
        grpo = hasattr(config, "group_size")
        length = (lambda item: len(item[1])) if grpo else lambda item: sum(map(len, item))
        a_step = config.prompts_per_step if grpo else config.batch_size * config.gradient_accumulation_steps
        train = sorted(train, key=length, reverse=True)[:a_step]
        heldout = sorted(heldout, key=lambda item: len(item[1]), reverse=True)[:config.eval_batch_size]
        self.estimate = estimate_memory(config, length(train[0]), len(heldout[0][1])) | {"libraries": libraries}
        config.eval_every = 0
        setattr(config, "steps" if hasattr(config, "steps") else "num_epochs", 3)
        return train, heldout

    def end_rehearsal(self, record):
        """Says what the second step of a dry run took, and ends the process."""
        seconds, peak, estimate = record.get("generate_seconds", 0) + record["update_seconds"], record["peak_memory_gb"], sum(self.estimate.values())
        steps = self.config.get("steps")  # sft counts epochs
        whole = f"; {steps} steps take about {seconds * steps / 60:.1f} minutes, evaluations aside" if steps else ""
        print(f"dry run: a step with the longest prompts took {seconds:.2f} s{whole}")
        print(f"dry run: memory {peak:.2f} GB at the peak, {estimate / 1e9:.2f} GB estimated ({described_memory(self.estimate)})")
        self.close()
        self.rehearsal.cleanup()
        sys.exit(0)

    # --- guards: a step that goes wrong

    def sound(self, step, numbers, groups, scaler):
        """Whether all that an update hangs on is finite; else it must be skipped. The batch is then in bad_batch_STEP.json, and the
        third such step in a row ends the run.

        numbers: {"loss": ..., "gradient": norm}. groups: dicts of what was trained on. An infinite gradient in fp16 is no fault: the
        scaler is still looking for its scale, and lowers it.
        """
        bad = [name for name in ("rewards", "advantages", "ref_logps", "old_logps")
               if any(name in group and not group[name].isfinite().all() for group in groups)]
        bad += [name for name, value in numbers.items() if not math.isfinite(value)]
        if not bad:
            return True
        self.skipped[step] += 1
        if bad == ["gradient"] and scaler.is_enabled() and scaler.get_scale() > 1 or step == self.bad_step:
            return False
        self.in_a_row = self.in_a_row + 1 if self.bad_step == step - 1 else 1
        self.bad_step, file = step, self.folder / f"bad_batch_{step}.json"
        if len(list(self.folder.glob("bad_batch_*.json"))) < 10:
            batch = [{key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in group.items()} for group in groups]
            self._write(file.name, json.dumps({"step": step, "not_finite": bad, **numbers, "batch": batch}) + "\n")
        words = f"step {step}: {' and '.join(bad).replace('_', ' ')} not finite (NaN or infinite), the update is skipped; the batch is in {file}"
        tqdm.write(f"WARNING: {words}", file=sys.stderr)
        if self.in_a_row == BAD_STEPS:
            advice = "look there for what the reward function made of the texts" if bad[0] == "rewards" else (
                "lower --learning_rate or --max_grad_norm, or try --dtype bf16 or fp32")
            kept = f"; the checkpoint of step {self.saved} is kept" if self.saved else ""
            raise InputError(f"{words}, as in the {BAD_STEPS - 1} steps before it: {advice}{kept}")
        return False

    def fit(self, config, optimizer, attempt):
        """attempt(), again with config.completions_per_forward halved each time memory runs out: slower, but the same gradient."""
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            size = config.completions_per_forward or config.group_size
            if size == 1:
                raise InputError("out of memory with --completions_per_forward 1 too: lower --max_completion_length or --max_prompt_length"
                                 + ", take --load_in_4bit" * hasattr(config, "load_in_4bit") + ", a smaller --model, or --beta 0, which needs no reference")
            optimizer.zero_grad()  # and out of the except block, where the failed attempt's tensors are free
            torch.cuda.empty_cache()
            config.completions_per_forward = size // 2
            tqdm.write(f"out of memory: going on with --completions_per_forward {size // 2} (slower, the same gradient)", file=sys.stderr)

    def warn_of_collapse(self, bar, metrics, window=10):
        """Says once each when the policy leaves its reference, stops trying, or finds nothing to learn from; and the knob to turn."""
        self.watched.append(metrics)
        last, warnings = self.watched[-window:], {}
        if len(self.watched) == 3 and all(record["zero_std_groups"] == self.config["prompts_per_step"] for record in last):
            warnings["reward"] = (f"in the first 3 steps all completions of a group earned the same (reward {metrics['reward']:.2f}, "
                                  f"accuracy {metrics['accuracy']:.2f}), so there was nothing to learn: type --group_size "
                                  f"{2 * self.config['group_size']} --temperature {self.config['temperature'] + 0.2:.1f}, take "
                                  "questions that are neither too easy nor too hard, or a warm start by sft.py")
        if len(last) < window:
            self.warn_once(bar, metrics["step"], warnings)
            return
        kl, entropy, accuracy = (fmean(record[key] for record in last) for key in ("kl", "entropy", "accuracy"))
        if sorted(record["kl"] for record in last)[window // 2] > 0.5:
            warnings["kl"] = (f"the policy has left its reference (KL {kl:.2f} nats per token): raise --beta, lower --learning_rate, or renew "
                              "the reference more often (--ref_every)")
        if entropy < 0.1 * fmean(record["entropy"] for record in self.watched[:window]) and entropy < 0.05 and accuracy < 0.8:
            warnings["entropy"] = (f"the entropy has collapsed ({entropy:.3f} nats): the policy says the same again and again, at accuracy "
                                   f"{accuracy:.2f}; lower --learning_rate, raise --temperature, --epsilon_high or --beta")
        if all(record["zero_std_groups"] == self.config["prompts_per_step"] for record in last):
            warnings["reward"] = (f"in {window} steps no group had two different rewards, so there was nothing to learn: raise --group_size or "
                                  "--temperature, or take questions that are neither too easy nor too hard")
        labels = {key.removeprefix("gold_share_"): fmean(record[key] for record in last)
                  for key in metrics if key.startswith("gold_share_")}
        given = {label: fmean(record[f"label_share_{label}"] for record in last) for label in labels}
        most, parsed = max(given, key=given.get, default=""), sum(given.values())
        if parsed >= 0.1 and given[most] > 0.95 * parsed and labels[most] < 0.9:
            warnings["labels"] = (
                f"answers are nearly all {most!r}: {given[most] / parsed:.1%} of those that could be read in "
                f"{window} steps, while it is right for {labels[most]:.1%} of the questions; raise "
                "--prompts_per_step or --beta, or lower --learning_rate")
        self.warn_once(bar, metrics["step"], warnings)

    def warn_once(self, bar, step, warnings):
        """Writes those of the warnings, {name: text}, whose name was not warned of before."""
        for name in warnings.keys() - self.collapses:
            bar.write(f"WARNING: step {step}: {warnings[name]}")
            self.collapses.add(name)

    def curves(self):
        """Draws curves.png from metrics.jsonl: what a person would look at first."""
        records = self.read_records("metrics") if (self.folder / "metrics.jsonl").exists() else []
        if not records:
            return
        from matplotlib.figure import Figure  # a second to import

        points = [(record["step"], record["eval_accuracy"]) for record in records if "eval_accuracy" in record]
        for name, step in (("eval_before", 0), ("eval_after", records[-1]["step"])):
            if (self.folder / f"{name}.jsonl").exists():
                points.append((step, summarize(self.read_records(name))["accuracy"]))
        for record in records if self.panels is GRPO_PANELS else ():
            record["zero_std_share"] = record["zero_std_groups"] / self.config["prompts_per_step"]
        shares = [key for key in records[-1] if key.startswith("label_share_")
                  and any(record.get(key) for record in records)]
        panels = [panel for panel in self.panels if panel[0] != "Answers" or shares]
        lines, columns = math.ceil(len(panels) / 4), min(len(panels), 3 if len(panels) % 3 == 0 else 4)
        figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
        axes = figure.subplots(lines, columns).flat
        for axis in axes[len(panels):]:
            axis.set_visible(False)
        for axis, (title, unit, series) in zip(axes, panels):
            if title == "Reward":
                parts = [key for key in records[0] if key.startswith("reward_") and key != "reward_std"]
                series = {**series, **{key.removeprefix("reward_"): key for key in parts}}
            if title == "Answers":
                series = {key.removeprefix("label_share_"): key for key in shares}
            for name, key in series.items():
                steps = [record["step"] for record in records if key in record]
                values = [record[key] for record in records if key in record]
                window = max(1, len(values) // 20)
                smooth = [fmean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]
                colour = axis.plot(steps, values, alpha=0.25, linewidth=1)[0].get_color()
                axis.plot(steps, smooth, color=colour, linewidth=2, label=name)
            if title == "Accuracy":
                axis.plot(*zip(*sorted(points)), "ko-", markersize=5, linewidth=1, label="held out, greedy") if points else None
                axis.set_ylim(0, 1.02)
            if title == "Answers":
                axis.set_ylim(0, 1.02)
            if title == "Reward":
                axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.set_title(title, fontsize=13)
            axis.set_xlabel("step")
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=9)
        with self._writing("curves.png"):
            figure.savefig(self.folder / "curves.png.new", format="png", dpi=80)
            (self.folder / "curves.png.new").rename(self.folder / "curves.png")

    def finish(self, summary):
        """Draws the curves, writes summary.json, which marks the run as finished, and closes wandb."""
        self.curves()
        self._write("summary.json", json.dumps(summary, indent=1) + "\n")
        self.close()
        print(f"written: {self.folder}/ ({', '.join(sorted(path.name for path in self.folder.iterdir()))})")
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()


def fingerprint(rows):
    """{"n", "sha256"} of rows: of all that is in them, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return {"n": len(rows), "sha256": digest.hexdigest()}


def synced(path):
    """The path, once what it holds is on the disk itself: then it outlives a power cut too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def write_whole(path, text):
    """Writes a file aside and renames it: `path` is the old one or the whole new one. Raises OSError."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        synced(new).rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def compare(before_records, after_records):
    """Before and after on the same rows: prints the table, returns {"before", "after", "paired"} for summary.json."""
    before, after = summarize(before_records), summarize(after_records)
    paired = paired_test(before_records, after_records)
    better = "after" if paired["only_after"] > paired["only_before"] else "before"
    paired["better"] = better if paired["p_value"] < 0.05 else "neither"
    print(f"{'':20}{'before':>18}{'after':>18}")
    table = [(key, before[key], after[key]) for key in ("score", "score_ci95", "accuracy", "accuracy_ci95", "majority_accuracy", "macro_f1",
                                                        "format_rate", "mean_length") if key in before]
    table += [(name, before["parts"][name]["mean"], after["parts"][name]["mean"]) for name in before.get("parts", ())]
    for key, *values in table:
        cells = [f"[{v[0]:.3f}, {v[1]:.3f}]" if isinstance(v, list) else f"{v:.3f}" for v in values]
        print(f"{key:20}{cells[0]:>18}{cells[1]:>18}")
    verdict = {"after": "training helped", "before": "TRAINING DID HARM", "neither": "no difference shown"}[paired["better"]]
    print(f"{verdict}: {describe_pair(paired, after['n'])}")
    return {"before": before, "after": after, "paired": paired}


def describe_pair(paired, n):
    """One line of a paired test for the console."""
    if "ties" in paired:
        low, high = paired["difference_ci95"]
        return (f"score {paired['difference']:+.3f} [{low:+.3f}, {high:+.3f}]; better on {paired['only_after']} of {n} questions, worse on "
                f"{paired['only_before']}, tied on {paired['ties']}, sign test p = {paired['p_value']:.2g}")
    return f"{paired['only_after']} of {n} questions newly right, {paired['only_before']} newly wrong, McNemar p = {paired['p_value']:.2g}"


def early_warnings(summary, config, task):
    """What the evaluation before training says against starting it: lines, each with the command to type; often none.

    summary: of summarize; config: of a GRPO script; task: whose rows, as sft.py calls it.
    """
    lines = []
    if summary["format_rate"] < 0.05:
        folder = f"runs/sft-{task}"
        flags = f"--adapter {folder}/model" if hasattr(config, "lora_r") else f"--model {folder}/model"
        whole = "" if hasattr(config, "lora_r") else " --lora_r 0"
        lines.append(f"the model doesn't know the tags (format rate {summary['format_rate']:.3f}), so almost nothing can be "
                     f"rewarded: run `python sft.py --task {task} --model {config.model} --data {config.data}{whole} --out "
                     f"{folder}` first and start from it with {flags}, or show the tags in --system_prompt FILE")
    if summary["truncated"] > 0.25:
        closing_tag = rewards.TAGS.get(task, rewards.REASONED)[-1]
        advice = f"type --max_completion_length {2 * config.max_completion_length}"
        if not config.stop_strings:
            advice += f", or, where the model goes on behind its answer (a base model), --stop_strings '{closing_tag}'"
        lines.append(f"{summary['truncated']:.0%} of the answers were cut at --max_completion_length "
                     f"{config.max_completion_length}, before they could earn anything: {advice}")
    return lines


def rollout_metrics(groups):
    """What a rollout earned and looked like: means over its completions.

    Of rows whose answer is a label also label_share_<label>, how often it was the answer (label_share_none:
    no label could be read), and gold_share_<label>, how often it is right.
    """
    scores = [score for group in groups for score in group["scores"]]
    lengths = torch.cat([group["lengths"] for group in groups])
    parts = [key for key in scores[0] if key not in ("score", "accuracy", "format_ok", "answer")]
    return {"reward": fmean(s["score"] for s in scores), **{f"reward_{key}": fmean(s[key] for s in scores) for key in parts},
            "reward_std": fmean(group["rewards"].std().item() for group in groups),
            "zero_std_groups": sum(group["zero_std"] for group in groups), "accuracy": fmean(s["accuracy"] for s in scores),
            "completion_length": lengths.float().mean().item(),
            "truncated": torch.cat([group["truncated"] for group in groups]).float().mean().item(),
            "num_tokens": int(lengths.sum()), **label_shares(groups)}


def label_shares(groups):
    """{label_share_<label>, gold_share_<label>}, see rollout_metrics; {} where answers are free text."""
    rows = [group["row"] for group in groups]
    labels = rewards.LABELS.get(rows[0]["data_source"], ())
    answers = [score["answer"] or "none" for group in groups for score in group["scores"]]
    if not labels:
        return {}
    given = {f"label_share_{label}": answers.count(label) / len(answers) for label in (*labels, "none")}
    right = {f"gold_share_{label}": fmean(row["ground_truth"] == label for row in rows) for label in labels}
    return given | right


def peak_memory_gb():
    """Most memory held so far: by tensors on the GPU, by the process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage's figure, which begins with the size of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def printable(text):
    """Model output for the terminal: control characters (escape codes) replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def versions():
    """Versions that a result hangs on, for summary.json."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}


# === command line =====================================================================================================


@dataclass
class Config:
    """Scores a model on the held-out questions of a task."""

    task: Literal["pubmedqa", "medmcqa", "ecg", "medical_o1"] = "pubmedqa"  # which dataset module reads the data
    model: str = "tiny"  # tiny, a model folder, an adapter folder, or a hub id
    models: tuple[str, ...] = ()  # instead: heads to compare, each NAME=MODEL or NAME=MODEL+ADAPTER
    mode: Literal["generated", "loglikelihood", "both"] = "generated"  # answers: written, or the likeliest
    data: str = "builtin"  # builtin, hub, hub:ORG/NAME[:CONFIG], or a file or folder
    out: str = ""  # folder for eval.jsonl and summary.json (default: runs/eval-<time>)
    split: Literal["heldout", "train", "all"] = "heldout"  # which side of the split to score
    maybe: bool = False  # PubMedQA with its third class
    cop_base: Literal["auto", "0", "1"] = "auto"  # MedMCQA: the number of option A in `cop` (auto: told from the values)
    question_field: str = ""  # field of your own file that holds the question
    context_field: str = ""  # ... the context
    answer_field: str = ""  # ... the answer
    system_prompt: str = ""  # file with a system prompt instead of the task's
    eval_size: int = 0  # score only so many rows (0 = all)
    limit: int = 0  # read only so many rows (0 = all)
    method: Literal["", "hybrid", "reasoning"] = ""  # free text: which mix ("" = the run's, or the usual)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # ... instead: parts and weights
    similarity: Literal["auto", "embeddings", "overlap"] = "auto"  # ... how answers are compared with gold
    encoder: str = "cross-encoder/stsb-roberta-base"  # ... by which cross-encoder or sentence encoder
    language_model: str = ""  # ... whose perplexity is the fluency ("" = leave fluency out)
    reward_model: str = ""  # ... and a trained reward model to report beside the rules
    samples: int = 0  # also sample so many answers a question: pass@k and the majority's accuracy
    temperature: float = 1.0  # of those samples
    max_prompt_length: int = 2048  # rows with a longer prompt are left out, and counted
    max_completion_length: int = 300  # tokens an answer may have
    stop_strings: tuple[str, ...] = ()  # texts that end an answer, for base models that do not stop (</answer>)
    eval_batch_size: int = 32  # prompts answered at a time
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what to compute in
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    load_in_4bit: bool = False  # quantise the model through bitsandbytes
    seed: int = 0  # of the samples


def check_config(config):
    """Raises InputError for knobs of a GRPO script that make no sense, before anything is loaded."""
    check_knobs(config)
    if config.loss_type == "cispo" and config.epsilon_high < 1:
        raise InputError(f"--loss_type cispo --epsilon_high {config.epsilon_high}: there it is the cap of the ratio itself, at "
                         "least 1 is needed: type --epsilon_high 5")


def check_rows(config, train, heldout, counts):
    """Prints what was loaded; raises InputError when it is less than a step or the evaluation needs."""
    a_step = getattr(config, "prompts_per_step", 1)
    if len(train) < a_step or len(heldout) < config.eval_size:
        raise InputError(f"--data {config.data} gives {len(train)} training and {len(heldout)} held-out rows, fewer than "
                         f"--prompts_per_step {a_step} or --eval_size {config.eval_size} asks for: lower these or bring more rows")
    print(f"data: {config.data}, {len(train)} training and {len(heldout)} held-out rows{described(counts)}")


def parse_heads(models):
    """[(name, model, adapter)] of --models; adapter is "" where there is none. Raises InputError."""
    heads = []
    if not models:
        raise InputError("--models names no head: NAME=MODEL or NAME=MODEL+ADAPTER is needed")
    for text in models:
        name, equals, model = text.partition("=")
        if not (name and equals and model):
            raise InputError(f"--models {text}: the form is NAME=MODEL or NAME=MODEL+ADAPTER")
        plus = not Path(model).is_dir() and "+" in model  # a folder's own name may hold one
        model, _, adapter = model.rpartition("+") if plus else (model, "", "")
        if plus and not (Path(adapter) / "adapter_config.json").exists():
            raise InputError(f"--models {text}: {adapter} is no adapter folder (it has no adapter_config.json)")
        if plus and find_model(model)[1]:
            raise InputError(f"--models {text}: {model} is an adapter folder itself, merge it first (python "
                             f"eval.py merge --model {model} --out DIR) and give {name}=DIR+{adapter}")
        heads.append((name, model, adapter))
    if len({name for name, *_ in heads}) < len(heads):
        raise InputError("--models: two heads have the same name")
    return heads


def check_weights(weights, *more):
    """Raises InputError unless `weights`, {part: weight} of free text, has known parts (or `more`), all above
    0.
    """
    parts = (*rewards.WEIGHTS["hybrid"], *more)
    for part, weight in weights.items():
        if part not in parts or not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise InputError(f"--weights {part} {weight}: weights of {', '.join(parts)}, more than 0, are "
                             "needed")


def pick_weights(config, heads, source):
    """{part: weight} to score free text by, and prints it: --weights, those of --method, those that the
    heads' runs trained on (in the config.json beside a trained folder), or the usual ones of the data_source.
    Raises InputError where two runs differ, or no part can be scored.
    """
    check_weights(config.weights, "learned")
    weights, whose = rewards.WEIGHTS[rewards.METHOD[source]], f"the usual mix, {rewards.METHOD[source]}"
    if config.weights:
        weights, whose = config.weights, "--weights"
    elif config.method:
        weights, whose = rewards.WEIGHTS[config.method], f"--method {config.method}"
    else:
        folders = dict.fromkeys(adapter or model for _, model, adapter in heads)
        trained = {folder: own for folder in folders if (own := trained_on(folder))}
        for folder, own in trained.items():
            first = next(iter(trained))
            if own != trained[first]:
                raise InputError(f"{first} was trained on {mixed(trained[first])}, {folder} on {mixed(own)}: "
                                 "say by which to score, with --method or --weights")
            weights, whose = own, f"what {folder} was trained on"
    there = {part: weight for part, weight in weights.items()
             if (part != "fluency" or config.language_model) and (part != "learned" or config.reward_model)}
    if not there:
        raise InputError(f"by {whose} there is only {mixed(weights)}, which needs a --language_model or "
                         "--reward_model: name it, or give other --weights")
    left = "".join(f", no {part} here" for part in weights if part not in there)
    print(f"reward: scored by {whose}: {mixed(there)}{left}")
    return weights


def trained_on(folder):
    """{part: weight} that the GRPO run of a trained folder weighed free text by, {} where there is no such
    run's config.json.
    """
    folder = Path(folder).expanduser()
    if str(folder) == "tiny" or not folder.is_dir():
        return {}
    try:
        file = folder.resolve().parent / "config.json"
        run = json.loads(file.read_text(encoding="utf-8"))
        weights = run["weights"] or rewards.WEIGHTS[run["method"]]
        check_weights(weights, "learned")
        return weights
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError):
        return {}


def mixed(weights):
    """{part: weight} for the console."""
    return ", ".join(f"{weight:g} {part}" for part, weight in weights.items())


def score_heads(config, heads, rows):
    """({name: {"generated": records, "loglikelihood": records}} of every head, the rows that they answered); a base is in memory
    once. Raises InputError where heads cannot answer the same rows.
    """
    results, answered, free_text = {}, None, {}
    if config.task in ("ecg", "medical_o1"):
        check_scorers(config.language_model, config.reward_model)
        free_text = {"encoder": pick_encoder(config.similarity, config.encoder), "language_model": config.language_model,
                     "reward_model": config.reward_model, "weights": config.weights}
    for source in dict.fromkeys(model for _, model, _ in heads):
        model, tokenizer, compute = load_model(source, config.dtype, attn_implementation=config.attn_implementation,
                                               load_in_4bit=config.load_in_4bit)
        encoded = encode_rows(tokenizer, rows, config.max_prompt_length, config.split)
        if answered and answered != [row for row, _ in encoded]:
            raise InputError(f"--models: {source} leaves out other rows than the models before it (--max_prompt_length "
                             f"{config.max_prompt_length}): raise it, so that all answer the same")
        answered = [row for row, _ in encoded]
        own = [(name, adapter) for name, of, adapter in heads if of == source]
        for name, adapter in own:
            if adapter:
                model = read_adapter(model, adapter, source, name)
        for name, adapter in own:
            if adapter:
                model.set_adapter(name)
            bare = not adapter and any(other for _, other in own)  # the base under the adapters of other heads
            with model.disable_adapter() if bare else nullcontext():
                results[name] = {}
                if config.mode in ("generated", "both"):
                    results[name]["generated"] = evaluate(
                        model, tokenizer, encoded, compute, max_completion_length=config.max_completion_length, title=name,
                        batch_size=config.eval_batch_size, samples=config.samples, temperature=config.temperature, seed=config.seed,
                        stop_strings=config.stop_strings,
                        score=functools.partial(score_completions, **free_text))
                if config.mode in ("loglikelihood", "both"):
                    results[name]["loglikelihood"] = option_likelihoods(model, tokenizer, encoded, compute, title=name,
                                                                        batch_size=config.eval_batch_size)
            for mode, records in results[name].items():
                print(f"{name}, {mode}: {describe(summarize(records))}")
    return {name: results[name] for name, *_ in heads}, answered


def write_results(folder, files):
    """Writes the files of a result, {name: text}, all or none of them. Raises InputError."""
    written = []
    for name, text in files.items():
        try:
            write_whole(folder / name, text)
            written.append(name)
        except OSError as error:
            for other in written:  # half a result would keep the next one out of the folder
                (folder / other).unlink()
            raise InputError(f"{folder / name} cannot be written ({error.strerror}): make room, or take "
                             "another --out, and start again") from None


def compare_heads(config, folder, rows, results):
    """Writes results.jsonl, summary.json and report.html of score_heads, and prints the paired tests."""
    summaries = {name: {mode: summarize(records) for mode, records in modes.items()} for name, modes in results.items()}
    paired = []
    for one, two in itertools.combinations(results, 2):
        for mode in results[one]:
            a, b = (results[name][mode] for name in (one, two))
            test = paired_test(a, b)
            paired.append({"before": one, "after": two, "mode": mode, **test})
            print(f"{one} -> {two}, {mode}: {headline(summaries[one][mode])[0]:.3f} -> {headline(summaries[two][mode])[0]:.3f}, "
                  + describe_pair(test, len(a)))
    lines = []
    for i, row in enumerate(rows):
        answers = {mode: {name: modes[mode][i] for name, modes in results.items()} for mode in next(iter(results.values()))}
        lines.append({"id": row["id"], "question": row["extra"]["question"], "options": row["extra"].get("options", []),
                      "ground_truth": row["ground_truth"], "subject": row["extra"].get("subject", ""),
                      "answers": answers.get("generated") or {}, "loglikelihood": answers.get("loglikelihood") or {}})
    summary = {"heads": summaries, "paired": paired, "config": asdict(config), "versions": versions()}
    page = report_html(f"{config.task}: {', '.join(results)}", summaries, lines, paired)
    write_results(folder, {"results.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
                           "report.html": page,
                           "summary.json": json.dumps(summary, indent=1) + "\n"})


def main(config):
    """Scores one model, or compares several heads, as `config` says, and writes the result folder. Raises InputError."""
    check_knobs(config, "temperature", "eval_size")
    heads = parse_heads(config.models or (f"model={config.model}",))
    if config.mode != "generated" and config.task not in ("pubmedqa", "medmcqa"):
        raise InputError(f"--mode {config.mode} compares given answers, and --task {config.task} has none: "
                         "--mode generated")
    folder = Path(config.out or f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    check_out(folder)
    train, heldout, counts = load_task(TASKS[config.task], config)
    rows = {"heldout": heldout, "train": train, "all": train + heldout}[config.split]
    if len(rows) < max(1, config.eval_size):
        raise InputError(f"--data {config.data} has {len(rows)} rows on the {config.split} side, {max(1, config.eval_size)} "
                         "needed (--split all takes every row)")
    print(f"data: {config.data}, {len(rows)} rows ({config.split}){described(counts)}")
    rows = rows[:config.eval_size or None]
    if config.mode != "generated":
        for row in rows:  # before anything is loaded: rows that an older data.prepare wrote lack a field
            TASKS[config.task].harness_prompt(row)
        if config.task == "pubmedqa" and not config.maybe:
            print("loglikelihood: yes, no and maybe compete, as in lm-evaluation-harness; without --maybe no "
                  "right answer is maybe, so it counts as wrong")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # is it writable? Better known now than after the scoring
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror})") from None
    if rows[0]["data_source"] in rewards.METHOD:
        config = replace(config, weights=pick_weights(config, heads, rows[0]["data_source"]))
    results, rows = score_heads(config, heads, rows)
    if config.models:
        compare_heads(config, folder, rows, results)
        print(f"written: {folder}/report.html, summary.json, results.jsonl")
        return
    [modes] = results.values()
    records = modes.get("generated") or modes["loglikelihood"]
    summary = {**summarize(records), **({"loglikelihood": summarize(modes["loglikelihood"])} if config.mode == "both" else {})}
    summary |= {"config": asdict(config), "versions": versions()}
    write_results(folder, {"eval.jsonl": "".join(json.dumps(record) + "\n" for record in records),
                           "summary.json": json.dumps(summary, indent=1) + "\n"})
    print(f"written: {folder}/summary.json, {folder}/eval.jsonl")


# === chat =============================================================================================================


@dataclass
class Chat:
    """Talks with one or more heads, one after the other, each with a history of its own."""

    models: tuple[str, ...] = ("tiny=tiny",)  # heads, each NAME=MODEL or NAME=MODEL+ADAPTER
    system: str = ""  # system prompt ("" = none); /system changes it
    task: Literal["", "pubmedqa", "medmcqa", "ecg", "medical_o1"] = ""  # instead: the system prompt that a task trains with
    temperature: float = 0.7  # of sampling (0 = the likeliest token)
    max_completion_length: int = 400  # tokens an answer may have
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what to compute in
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    load_in_4bit: bool = False  # quantise the models through bitsandbytes
    seed: int = 0  # of sampling


def stream(model, tokenizer, prompt_ids, compute, config, generator):
    """Yields the text of one answer, piece by piece, as `generate` would sample it; InputError for NaN."""
    stops, ids, text, cache = set(stop_ids(model, tokenizer)), [], "", DynamicCache()
    inputs = torch.tensor([prompt_ids], device=model.device)
    for _ in range(config.max_completion_length):
        with torch.inference_mode(), autocast(compute):
            logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            probabilities = (logits.float() / (config.temperature or 1)).softmax(dim=-1)
            if probabilities.isnan().any():
                raise InputError(NOT_NUMBERS)
            if config.temperature:
                uniform = torch.rand(1, 1, generator=generator, device=model.device, dtype=torch.double)
                token = int(draw(probabilities, 1 - uniform))
            else:
                token = int(probabilities.argmax())
        if token in stops:
            break
        ids.append(token)
        inputs, whole = torch.tensor([[token]], device=model.device), tokenizer.decode(ids, skip_special_tokens=True)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            yield whole[len(text):]
            text = whole
    yield tokenizer.decode(ids, skip_special_tokens=True)[len(text):]


SAVED_CHAT = b'{\n "system": '  # how the file of /save begins


def save_chat(name, system, histories):
    """Writes a conversation as JSON; returns the line for the user. A file of another kind stays as it is."""
    try:
        path = Path(name)
        if path.exists():
            with open(path if path.is_file() else os.devnull, "rb") as file:
                if file.read(len(SAVED_CHAT)) != SAVED_CHAT:
                    return f"{name} is there already and no saved chat: take another name"
        write_whole(path, json.dumps({"system": system, "heads": histories}, indent=1) + "\n")
    except (OSError, ValueError) as error:  # the latter: a null byte
        return f"{name}: cannot be written ({getattr(error, 'strerror', None) or error})"
    return f"saved: {name}"


def chat(config):
    """Reads lines from the keyboard or a pipe until /quit or its end; see Chat."""
    check_knobs(config, "temperature")
    heads, loaded = parse_heads(config.models), {}
    system = TASKS[config.task].SYSTEM_PROMPT.replace("{classes}", "yes or no") if config.task else config.system
    for name, source, adapter in heads:
        if source not in loaded:
            loaded[source] = load_model(source, config.dtype, attn_implementation=config.attn_implementation, load_in_4bit=config.load_in_4bit)
        if adapter:
            model, *rest = loaded[source]
            loaded[source] = (read_adapter(model, adapter, source, name), *rest)
    histories, generator = {name: [] for name, *_ in heads}, torch.Generator(loaded[heads[0][1]][0].device).manual_seed(config.seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 spoil their line alone
    keyboard = sys.stdin.isatty()
    print("type a message; /clear, /system TEXT, /save FILE, /quit or Ctrl-D" if keyboard else f"heads: {', '.join(histories)}")
    while True:
        try:
            line = input("you: " if keyboard else "").strip()
            line.encode()
        except UnicodeEncodeError:
            print("a line that is no UTF-8 was left out")
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not keyboard and line:
            print(f"you: {printable(line)}")
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/clear", "/system"):
            system = argument.strip() if command == "/system" else system
            histories = {name: [] for name in histories}
            print("system prompt: " + (system or "none") if command == "/system" else "cleared")
        elif command == "/save":
            print(printable(save_chat(argument.strip() or "chat.json", system, histories)))
        elif command.startswith("/"):
            print(f"{command} is no command: /clear, /system TEXT, /save FILE, /quit")
        elif line:
            for name, source, adapter in heads:
                model, tokenizer, compute = loaded[source]
                history = [*([{"role": "system", "content": system}] if system else []), *histories[name], {"role": "user", "content": line}]
                print(f"{name}: ", end="", flush=True)
                if adapter:
                    model.set_adapter(name)
                bare = not adapter and any(other for _, of, other in heads if of == source)  # the base under other heads' adapters
                answer = ""
                with model.disable_adapter() if bare else nullcontext():
                    try:
                        for piece in stream(model, tokenizer, encode_prompt(tokenizer, history), compute, config, generator):
                            answer += piece
                            print(printable(piece), end="", flush=True)
                    except KeyboardInterrupt:  # enough of this answer
                        pass
                    except InputError as error:  # NaN: nothing to remember
                        print(error)
                        continue
                print()
                histories[name] += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


# === merge ============================================================================================================


@dataclass
class Merge:
    """Writes a folder to serve or to publish: base and adapter as one model, tokenizer, generation config, model card."""

    model: str  # the adapter's base, or a model that was trained as a whole: tiny, a folder, or a hub id
    out: str  # folder to write
    adapter: str = ""  # adapter folder, such as runs/my-run/model ("" = --model needs none)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the weights; auto: fp32 on CPU, bf16 (or fp16) on a GPU


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [medical, question-answering]
${base_line}---

# $name

`$base`, trained by $method on $data.

| $questions | before | after |
|---|---|---|
$table

$verdict

## Use

$prompt

For research and teaching: how such training changes a small model. **This is no medical device.** It must not be used to diagnose,
to treat, or to advise anyone; its answers can be wrong and sound right. The numbers above hold for these questions only.
The licences of the base model and of the data apply.

## Settings

Weights: $dtype, safetensors. $versions

```json
$settings
```
"""


def card_results(summary):
    """(questions, table, verdict, versions) of the card, from the summary.json of a run.

    Raises KeyError, TypeError, ValueError or AttributeError where it is something else.
    """
    before, after = summary["before"], summary["after"]
    values = ["{:.3f} [{:.3f}, {:.3f}]".format(value, *interval) for value, interval in
              map(headline, (before, after))]
    table = "\n".join(f"| {label} | {one} | {two} |" for label, one, two in (
        (f"{'score' if 'score' in after else 'accuracy'} [95% interval]", *values),
        ("format kept", *(f"{side['format_rate']:.3f}" for side in (before, after)))))
    verdict = f"Before is what training started from. Paired: {describe_pair(summary['paired'], after['n'])}."
    if "majority_accuracy" in after:
        verdict += f" Always giving the commonest answer: {after['majority_accuracy']:.3f}."
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    versions += f"; {summary['seconds']:.0f} seconds of training." if "seconds" in summary else ""
    return f"{after['n']} held-out questions, greedy answers", table, verdict, versions


def model_card(config, dtype):
    """Text of the card. What training did is read from the run's folder, in which the trained folder lies; of what is not there the
    card says that it is not known.
    """
    run, known = Path(config.adapter or config.model).expanduser().resolve().parent, {}
    for name in ("config", "summary"):
        try:
            known[name] = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known[name] = {}
    settings, summary = known["config"], known["summary"]
    if not isinstance(settings, dict) or {type(settings.get(key)) for key in ("model", "data")} != {str}:
        settings = {}  # of something else: transformers has a config.json too
    try:
        questions, table, verdict, versions = card_results(summary)
    except (KeyError, TypeError, ValueError, AttributeError):  # none there, or of something else
        questions, table, versions = "held-out questions", "| not known | | |", ""
        verdict = "No summary.json of a training run lies beside the trained folder."
    try:  # the task is in the ids of the questions
        source = json.loads((run / "eval_after.jsonl").read_text(encoding="utf-8").split("\n")[0])["id"].partition(":")[0]
        task = next(name for name in TASKS if source.startswith(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        task = ""
    if task and not settings.get("system_prompt"):
        words = TASKS[task].SYSTEM_PROMPT.replace("{classes}", "yes, no or maybe" if settings.get("maybe") else "yes or no")
        prompt = f"It was trained with this system prompt:\n\n```\n{words}\n```"
    else:
        prompt = "It was trained with a system prompt of its own" + (f" ({settings['system_prompt']})." if task else ", which is not known here.")
    base = config.model if config.adapter or not settings else settings["model"]
    method = "GRPO" if "group_size" in settings else "supervised fine-tuning" if "num_epochs" in settings else "a run that is not known"
    on_hub = base.count("/") == 1 and not Path(base).exists()
    return Template(CARD).substitute(
        name=Path(config.out).name, base=base, base_line=f"base_model: {base}\n" if on_hub else "", method=method,
        data=f"{task} ({settings['data']})" if task and settings else "data that are not known", questions=questions, table=table,
        verdict=verdict, prompt=prompt, dtype=dtype,
        versions=versions,
        settings=json.dumps({k: v for k, v in settings.items() if k not in ("out", "resume", "wandb", "wandb_project")}, indent=1))


def merge(config):
    """Writes config.out, see Merge; all of it or nothing. Raises InputError."""
    out = Path(config.out).resolve()
    if not config.out:
        raise InputError("--out is empty: name the folder to write")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {config.out} is there already, and not an empty folder: take another")
    model, tokenizer, compute = load_model(config.model, config.dtype)
    if config.adapter and hasattr(model, "peft_config"):
        raise InputError(f"--model {config.model} is an adapter folder: name the base there, or leave --adapter out")
    if config.adapter:
        model = read_adapter(model, config.adapter, config.model)
    if hasattr(model, "peft_config"):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # NaN in the adapter
            raise InputError(f"--adapter {config.adapter or config.model} cannot be merged: {error}") from None
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            advice = " (try --dtype bf16 or fp32)" * (compute == torch.float16)
            raise InputError(f"--model {config.model} cannot be merged: {name} holds NaN or infinity{advice}")
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)  # a server stops where training did
    card = model_card(config, str(compute).removeprefix("torch."))
    new = out.with_name(f"{out.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        new.rename(out)  # in place of an empty folder too
    except OSError as error:
        raise InputError(f"--out {config.out} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"written: {config.out}/ ({', '.join(sorted(path.name for path in out.iterdir()))})")


if __name__ == "__main__":
    keep_freed_memory()
    with one_line_errors():
        if sys.argv[1:2] == ["chat"]:
            chat(tyro.cli(Chat, args=sys.argv[2:], use_underscores=True))
        elif sys.argv[1:2] == ["merge"]:
            merge(tyro.cli(Merge, args=sys.argv[2:], use_underscores=True))
        else:
            main(tyro.cli(Config, use_underscores=True, description=__doc__))
