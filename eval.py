"""What training and evaluation both need: models, sampling, evaluation, memory. Also a command:

    python eval.py --task pubmedqa --model runs/my-run/model --data hub --out runs/eval-mine

scores a model on the held-out questions of a dataset: greedy accuracy with its 95% interval, the majority
baseline, macro-F1, format rate, and pass@k and maj@N of --samples N sampled answers. It writes eval.jsonl (a
line an example) and summary.json.

    python eval.py --task medmcqa --models base=M sft=M+ADAPTER grpo=M+ADAPTER --mode both --out runs/compare

scores several heads on the same rows, the base loaded once, with paired tests between them; --mode adds the
log-likelihood of the possible answers (PubMedQA's three classes, MedMCQA's letters), as lm-evaluation-harness
scores them. It writes results.jsonl (a line a question), summary.json, and report.html, a page to look
through.

    python eval.py chat --models base=M grpo=M+ADAPTER

talks with heads, one after the other under their names; /clear, /system TEXT, /save FILE, /quit or Ctrl-D.
Works from a pipe.

    python eval.py merge --model M --adapter ADAPTER --out DIR

makes one model of a base and an adapter, for servers: weights, tokenizer, generation config, and a card of
how it was made.
"""
import ctypes
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import numpy
import torch
import transformers
import tyro
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation import StopStringCriteria
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rewards
from data import (
    TINY,
    InputError,
    check_knobs,
    check_out,
    described,
    hub_message,
    load_task,
    one_line_errors,
    out_of_memory,
    printable,
    write_whole,
)
from data.prepare import TASKS

# in a model's config: what it does to logits that ChosenLogps does not
LOGIT_CHANGES = ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale")
INSTEAD_OF_HUB = "--model tiny, or --model PATH to a local folder"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft calls it


def keep_freed_memory():
    """On Linux with glibc, keeps what is freed for the next tensor; elsewhere does nothing. Call it first.

    Left alone, the C library takes every large tensor fresh from the kernel, which has to zero its pages, and
    gives it back at once (tests/test_survival.py counts the pages). The variables MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ do the same where they are set before the start.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD of malloc.h
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 2**28)  # M_TOP_PAD


# === models =================================================================================================

# For models whose tokenizer has no chat template: plain text, the answer ended by the tokenizer's EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}

{% elif message['role'] == 'user' %}User: {{ message['content'] }}

{% else %}Assistant: {{ message['content'] }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""


def pick_dtype(dtype, device):
    """torch dtype to compute in. "auto": fp32 on CPU, bf16 on cards that have it, fp16 on those that do not
    (T4, V100).
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_model(name):
    """What a --model names: (what from_pretrained loads, the adapter folder to put on it or None).

    Raises InputError.
    """
    folder = TINY if name == "tiny" else Path(name).expanduser()
    if not folder.is_dir():
        if not on_hub(name):
            raise InputError(f"{name}: no such model folder (tiny, a folder with config.json, or a hub id "
                             "like ORG/NAME is needed)")
        return name, None
    if (folder / "config.json").exists():
        return str(folder), None
    if (folder / "adapter_config.json").exists():
        return adapter_base(folder), str(folder)
    raise InputError(f"{name}: the folder has neither config.json (a model) nor adapter_config.json (an "
                     "adapter)")


def on_hub(name):
    """Whether a model's name has the form of a hub id, ORG/NAME, and no folder here is called so."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def check_base(name, lora=False):
    """Raises InputError where the --model of a training script is an adapter folder: what training saves
    would lack the adapter. lora: whether the script has an --adapter.
    """
    base, adapter = find_model(name)
    if adapter:
        instead = f"give --model {base} --adapter {name}, or " if lora else ""
        raise InputError(f"--model {name} is an adapter folder, a whole model is needed: {instead}merge "
                         f"it first (python eval.py merge --model {name} --out DIR) and give --model DIR")


def load_model(name, dtype="auto", *, fp32_weights=False, attn_implementation="sdpa", load_in_4bit=False):
    """Loads a model and its tokenizer, in eval mode (dropout off), and prints what was chosen.

    name: "tiny" (data/tiny), a folder, a folder with a peft adapter (its base is loaded too), or a hub id.
    dtype: auto, bf16, fp16 or fp32, what to compute in (see pick_dtype). fp32_weights: keep the weights
    themselves in fp32 (master weights; run the model under torch.autocast then). load_in_4bit: through
    bitsandbytes. Returns (model, tokenizer, compute dtype). Only safetensors are read and no code from the
    model's folder is run. Raises InputError for whatever cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = pick_dtype(dtype, device)
    source, adapter = find_model(name)
    options = {"dtype": torch.float32 if fp32_weights else compute,
               "attn_implementation": attn_implementation, "use_safetensors": True,
               "trust_remote_code": False}  # False, not unset, which asks the user
    if load_in_4bit:
        try:
            import bitsandbytes  # noqa: F401  (optional; transformers uses it)
        except ImportError:
            raise InputError("4-bit loading needs bitsandbytes: pip install bitsandbytes, or leave "
                             "--load_in_4bit out") from None
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True)
        options["device_map"] = {"": device}
    try:
        has_tokenizer = adapter and (Path(adapter) / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else source,
                                                  trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        if adapter:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
    except Exception as error:
        # a dozen types of transformers, hub, safetensors and json, one thing to the user: no model
        kernel = "" if attn_implementation == "sdpa" else f" with --attn_implementation {attn_implementation}"
        raise InputError(hub_message(f"model {name}{kernel}", error, INSTEAD_OF_HUB)) from error
    text_config = model.config.get_text_config()
    unsupported = [key for key in LOGIT_CHANGES if getattr(text_config, key, None) not in (None, 1.0)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        unsupported.append("a bias of the output layer")
    if unsupported:
        raise InputError(f"model {name}: {unsupported[0]} is not supported here (Gemma 2, Granite, Cohere "
                         "and Phi-2 have such)")
    if not load_in_4bit:
        model.to(device)
    model.eval()
    if not tokenizer.chat_template:
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # so with Gemma, which needs it
        tokenizer.chat_template = "{{ bos_token }}" + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE
        print(f"model: {name} has no chat template: prompts are plain text ('User: ...', 'Assistant: ')")
    if tokenizer.pad_token_id is None:  # harmless: masks come from positions, never from token values
        tokenizer.pad_token = tokenizer.eos_token
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    weights = "4-bit" if load_in_4bit else str(options["dtype"]).removeprefix("torch.")
    place = f"cpu ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        place = torch.cuda.get_device_name()
    print(f"model: {name}, {millions:,.1f}M parameters, {weights} weights, computing in "
          f"{str(compute).removeprefix('torch.')} on {place}")
    return model, tokenizer, compute


def new_adapter(model, r, alpha, seed, task_type="CAUSAL_LM"):
    """`model` with a fresh LoRA adapter on all its linear layers but the output's, whatever their names."""
    from peft import LoraConfig, get_peft_model  # a second to import, and full fine-tuning needs none of it
    torch.manual_seed(seed)  # of the first factor; the second starts at zero, so the model starts as it was
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type=task_type)
    return get_peft_model(model, lora).eval()


def read_adapter(model, folder, name, adapter_name="default"):
    """`model` with the trained adapter in `folder` added, ready to be trained on.

    name: of the model, for messages; adapter_name: what to call the adapter in it. Raises InputError.
    """
    from peft import PeftModel
    base = adapter_base(folder)
    loaded = model.config._name_or_path
    if base != loaded and Path(base).parts[-2:] != Path(loaded).parts[-2:]:  # folders may have moved
        raise InputError(f"adapter {folder} was trained on {base}, not on --model {name}: an adapter fits "
                         "its own base only")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=True)
            return model.eval()
        return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=True).eval()
    except Exception as error:
        # many types of peft, safetensors and torch, one thing to the user: not this adapter
        raise InputError(f"adapter {folder} cannot be loaded into {name} ({type(error).__name__}: "
                         f"{str(error)[:200]})") from error


def load_policy(config, task):
    """What a LoRA script trains: (model, tokenizer, compute dtype), the base with an adapter named "default".

    config: of the script, whose --adapter is a folder, none, or "" for what sft.py --task TASK wrote, if
    anything. A folder that holds a whole model (sft.py --lora_r 0) becomes the base of a fresh adapter.
    Raises InputError.
    """
    folder = Path(config.adapter or f"runs/sft-{task}/model")
    there = config.adapter != "none" and (config.adapter or folder.exists())
    whole = there and (folder / "config.json").exists()
    base, tokenizer, compute = load_model(str(folder) if whole else config.model, config.dtype,
                                          load_in_4bit=config.load_in_4bit,
                                          attn_implementation=config.attn_implementation)
    if there and not whole:
        print(f"adapter: {folder}")
        return read_adapter(base, folder, config.model), tokenizer, compute
    missing = ""
    if not there and not config.adapter:
        missing = f" (there is no {folder}; python sft.py --task {task} makes one)"
    print(f"adapter: a fresh one{missing}")
    return new_adapter(base, config.lora_r, config.lora_alpha, config.seed), tokenizer, compute


def adapter_base(folder):
    """What model an adapter folder was trained on; raises InputError where it does not say."""
    file = Path(folder) / "adapter_config.json"
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): {folder} is no adapter "
                         "folder") from None
    if not base:
        raise InputError(f"{file} names no base model (base_model_name_or_path)")
    return base


def pick_encoder(similarity, encoder):
    """Name of the encoder of the similarity reward, or "" for word overlap; prints the choice.

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
    """Loads the language model of the fluency reward and the reward model, "" for none. Raises InputError."""
    for name, load, flag in ((language_model, rewards.load_language_model, "--language_model"),
                             (reward_model, rewards.load_reward_model, "--reward_model")):
        try:
            if name:
                load(name)
        except Exception as error:
            # a dozen types of transformers, peft and hub, one thing to the user: no model
            made = ("a folder of `python sft.py reward_model`, or none" if flag == "--reward_model"
                    else f"{flag} ''")
            raise InputError(hub_message(f"{flag} {name}", error, made)) from error


def autocast(compute):
    """The context to run a model in whose weights are wider than `compute`; does nothing for fp32."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=compute,
                          enabled=compute != torch.float32)


def encode_prompt(tokenizer, messages):
    """Token ids of a prompt in the model's own chat template, ready to be answered.

    Templates that refuse a system role get it in front of the user's words. Two known variables are fixed: no
    thinking block for Qwen3 (the task's tags carry the reasoning), and Llama 3's date, which would change the
    prompt every day.
    """
    options = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False,
               "date_string": "26 Jul 2024"}
    try:
        return list(tokenizer.apply_chat_template(messages, **options))
    except jinja2.TemplateError:
        if messages[0]["role"] != "system":
            raise
        user = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return list(tokenizer.apply_chat_template([user, *messages[2:]], **options))


def encode_rows(tokenizer, rows, max_prompt_length, what):
    """[(row, prompt_ids)] of the rows whose prompt fits; prints how many do not, InputError if none does."""
    encoded = [(row, encode_prompt(tokenizer, row["prompt"])) for row in rows]
    fitting = [(row, ids) for row, ids in encoded if len(ids) <= max_prompt_length]
    if len(fitting) < len(encoded):
        longest = max(len(ids) for _, ids in encoded)
        print(f"data: {len(encoded) - len(fitting)} of {len(encoded)} {what} rows left out: their prompt is "
              f"longer than --max_prompt_length {max_prompt_length} (longest: {longest} tokens)")
    if not fitting:
        raise InputError(f"no {what} row has a prompt of at most --max_prompt_length {max_prompt_length} "
                         "tokens")
    return fitting


def stop_ids(model, tokenizer):
    """Ids that end a completion: EOS of generation config and tokenizer, and the template's end of turn.

    All three are needed: Gemma 3 ends its turns on 106 (<end_of_turn>) while its tokenizer's EOS is 1.
    """
    eos = model.generation_config.eos_token_id
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(ids - {None})


def end_of_turn(tokenizer):
    """The id that the chat template writes right after an answer; the tokenizer's EOS if it writes none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False)
    after = tokenizer(turn.rpartition("ANSWER")[2].strip(), add_special_tokens=False).input_ids[:1]
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


# === sampling ===============================================================================================


class SharedPromptCache(DynamicCache):
    """Keys and values of P prompts, once each, and of their completions, which grow in place; rows can leave.

    prompt yields (keys, values) [P, KV heads, S, d], layer by layer, of prompts padded on the left as
    prompt_mask [P, S] says. n: completions a prompt; longest: most tokens a completion can have. The
    completions of a prompt stand side by side in a grid [P, KV heads, n, longest, d]; `places` says where in
    it each row of the batch stands. Under autocast all is kept in its dtype, or attention would cast it for
    every token again.
    """

    def __init__(self, prompt, prompt_mask, n, longest):
        super().__init__()
        device = prompt_mask.device
        self.prompt, self.completions = [], []
        for keys, values in prompt:
            P, kv_heads, _, d = keys.shape
            autocast_to = torch.get_autocast_dtype(device.type)
            dtype = autocast_to if torch.is_autocast_enabled(device.type) else keys.dtype
            # [P * KV heads, d, S] and [P * KV heads, S, d]
            self.prompt.append((keys.flatten(0, 1).mT.to(dtype).contiguous(), values.flatten(0, 1).to(dtype)))
            self.completions.append([x.new_empty(P, kv_heads, n, longest, d, dtype=dtype)
                                     for x in (keys, values)])
        bias = torch.zeros(prompt_mask.shape, dtype=dtype, device=device)
        bias = bias.masked_fill_(prompt_mask == 0, -torch.inf)
        self.bias = bias.repeat_interleave(kv_heads, dim=0)[:, None]  # of the scores, [P * KV heads, 1, S]
        self.grid = P, n
        self.places = torch.arange(P * n, device=device)  # prompt * n + i, ascending
        self.tokens = 0  # of each completion, the one that is being computed included

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Writes the new token of every row; returns views of all so far, [P * KV heads * n, tokens, d]."""
        for buffer, new in zip(self.completions[layer_idx], (keys, values)):
            buffer.narrow(3, self.tokens - 1, 1).copy_(self.to_grid(new, new.shape[1]))
        return [buffer.flatten(0, 2).narrow(1, 0, self.tokens) for buffer in self.completions[layer_idx]]

    def keep(self, rows):
        """Drops all rows but these; the grid shrinks to the prompts left, and to the most rows of one."""
        self.places = self.places[rows]
        old_prompt, i = self.places // self.grid[1], self.places % self.grid[1]
        left, prompt, counts = old_prompt.unique(return_inverse=True, return_counts=True)
        if (len(left), int(counts.max())) == self.grid:
            return  # the places of the others stay empty
        prompts_before = self.grid[0]
        self.grid = len(left), int(counts.max())
        new_i = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
        self.places = prompt * self.grid[1] + new_i
        for pair in self.completions:
            for k, buffer in enumerate(pair):
                pair[k] = buffer.new_empty(len(left), buffer.shape[1], self.grid[1], *buffer.shape[3:])
                pair[k][prompt, :, new_i, :self.tokens] = buffer[old_prompt, :, i, :self.tokens]
        if len(left) < prompts_before:
            self.prompt = [[x.unflatten(0, (prompts_before, -1))[left].flatten(0, 1) for x in pair]
                           for pair in self.prompt]
            self.bias = self.bias.unflatten(0, (prompts_before, -1))[left].flatten(0, 1)

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


def shared_prompt_attention(module, query, key, value, attention_mask, scaling, shared, sliding_window=None,
                            **_):
    """Attention of one new token a row, in transformers' form: query [N, heads, 1, d], key and value as
    update returns them.

    No key is repeated: neither a prompt's for its completions, nor any for the query heads that share it.
    """
    (prompt_keys, prompt_values), bias = shared.prompt[module.layer_idx], shared.bias
    if sliding_window:  # the last `sliding_window` positions of prompt and completion
        drop = max(0, prompt_values.shape[1] + key.shape[1] - sliding_window)
        key, value = (x[:, max(0, drop - prompt_values.shape[1]):] for x in (key, value))
        prompt_keys, prompt_values = prompt_keys[..., drop:], prompt_values[:, drop:]
        bias = bias[..., drop:]
    S, tokens = prompt_values.shape[1], value.shape[1]
    query = shared.to_grid(query, len(prompt_keys) // shared.grid[0]) * scaling
    query = query.flatten(0, 2)  # [P * KV heads * n, heads of each, d]
    of_a_prompt = query.view(len(prompt_keys), -1, query.shape[2])  # all of a prompt's on its one copy
    on_prompt = torch.baddbmm(bias, of_a_prompt, prompt_keys)  # [P * KV heads, n * heads of each, S]
    on_completion = torch.bmm(query, key.mT).view(*on_prompt.shape[:2], -1)
    scores = torch.cat([on_prompt, on_completion], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(prompt_values.dtype)
    completion_weights = weights.narrow(2, S, tokens).reshape(*query.shape[:2], -1)
    output = torch.bmm(weights.narrow(2, 0, S), prompt_values).view_as(query)
    return shared.to_rows(torch.baddbmm(output, completion_weights, value)), None


ALL_ATTENTION_FUNCTIONS.register("shared_prompt", shared_prompt_attention)


def group_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention of the G completions of one prompt, in transformers' form: query [G, heads, T, d], key and
    value [G, KV heads, S + T, d], attention_mask the same for all of them or None. As transformers' "sdpa",
    but query heads that share a key stand one after the other in the dimension of T, where "sdpa" repeats the
    keys, and there is one mask, not G.
    """
    if attention_mask is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, dropout, scaling, **kwargs)
    query = query.unflatten(1, (key.shape[1], -1))  # [G, KV heads, heads of each, T, d]
    mask = attention_mask[:1].repeat(1, 1, query.shape[2], 1)
    output = torch.nn.functional.scaled_dot_product_attention(query.flatten(2, 3), key, value, mask, dropout,
                                                              scale=scaling)
    output = output.unflatten(2, query.shape[2:4]).flatten(1, 2)  # [G, heads, T, d]
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("group", group_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("group", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def attention(model, name, instead_of=None):
    """Within it the model uses another attention function; where `instead_of` is given, instead of that."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name if instead_of in (None, usual) else usual
    try:
        yield
    finally:
        config._attn_implementation = usual


def few_rows_linear(weight, bias, x):
    """x [..., in] times weight [out, in], in the order that is fast where x has few rows, on CPU above all.
    """
    product = (weight @ x.flatten(0, -2).T).T.contiguous()  # what follows may view it
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)


@contextmanager
def linears_of_a_token(model):
    """Within it linear layers are quick for one token a row, on CPU in fp32; elsewhere nothing changes.

    They multiply in another order, and a LoRA adapter is folded into a copy of its layer's weight, once,
    instead of two small products a token. No weight of the model is touched.
    """
    replaced, inner = [], set()
    if model.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        for module in model.get_decoder().modules():
            adapted = hasattr(module, "lora_A")
            base = module.base_layer if adapted else module
            if adapted:
                inner |= {id(child) for child in module.modules()} - {id(module)}
            plain = type(base) is torch.nn.Linear and base.weight.dtype == torch.float32
            changed = "forward" in vars(module) or getattr(module, "lora_variant", None)  # by hooks, by DoRA
            if id(module) in inner or changed or not plain:
                continue  # left as it is, as in 4-bit and half precision
            weight = base.weight
            if adapted and not module.disable_adapters:
                for name in module.active_adapters:
                    if name in module.lora_A:
                        weight = weight + module.get_delta_weight(name)
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


PROMPT_TOKENS = 16_384  # of padded prompts that are computed in one pass before sampling; one prompt at least


def generate(model, prompt_ids, n=1, *, max_new_tokens, stop_ids, temperature=1.0, generator=None,
             stop_strings=(), tokenizer=None):
    """Samples n completions of each of P prompts (greedily at temperature 0) by the model's distribution.

    prompt_ids: P lists of token ids, of any lengths. Nothing of the model's generation_config plays in: no
    top-k, top-p or penalties; only `stop_ids` end a completion, and the id that ended it is its last token,
    or (`tokenizer` is needed then) one of `stop_strings` in its text, whose last token ends it. A prompt is
    computed, and its keys and values are kept, once for its n completions. Returns completion_ids,
    completion_mask (bool) and logps (fp32, nats, at `temperature`; 0 in padding), each [P * n, T], the n
    completions of a prompt in consecutive rows.
    """
    device = model.device
    width, rows = max(len(ids) for ids in prompt_ids), len(prompt_ids) * n
    advice = (f"in sampling {rows} completions at once: lower --prompts_per_step, --group_size or "
              "--max_completion_length where it was in training, --eval_batch_size where it was in "
              "evaluation")
    with memory_advice(advice):  # outside of inference mode: the loss, which has a gradient, reads these
        completion_ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        completion_mask = torch.ones(rows, max_new_tokens, dtype=torch.bool, device=device)
        logps = torch.zeros(rows, max_new_tokens, device=device)
    # autocast keeps its casts of the weights from token to token, but not in inference mode
    no_gradient = torch.no_grad() if torch.is_autocast_enabled(device.type) else torch.inference_mode()
    with memory_advice(advice), no_gradient:
        paddings = [width - len(ids) for ids in prompt_ids]  # on the left
        input_ids = torch.tensor([[0] * pad + ids for pad, ids in zip(paddings, prompt_ids)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in paddings], device=device)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        decoder, output_weight = model.get_decoder(), model.get_output_embeddings().weight
        pieces, last = [], []  # of the prompts; a few at a time, a layer's intermediate tensors are large
        for piece in torch.arange(len(prompt_ids), device=device).split(max(1, PROMPT_TOKENS // width)):
            prompt = DynamicCache()
            hidden = decoder(input_ids[piece], attention_mask=mask[piece], position_ids=position_ids[piece],
                             past_key_values=prompt)[0]
            pieces.append([(keys, values) for keys, values, _ in prompt])
            last.append(hidden[:, -1:].clone())
        del prompt, hidden

        def layers():  # each is freed once the shared cache has it
            while pieces[0]:
                yield [torch.cat(parts) for parts in zip(*(piece.pop(0) for piece in pieces))]

        cache = SharedPromptCache(layers(), mask, n, max_new_tokens)
        hidden = torch.cat(last).repeat_interleave(n, dim=0)
        position_ids = position_ids[:, -1:].repeat_interleave(n, dim=0)
        active = torch.arange(rows, device=device)  # rows that are being written
        stops = torch.tensor(stop_ids, device=device)
        ends_in_string = StopStringCriteria(tokenizer, list(stop_strings)) if stop_strings else None
        with attention(model, "shared_prompt"), linears_of_a_token(model):
            for t in range(max_new_tokens):
                logits = few_rows_linear(output_weight, None, hidden[:, -1]).float()
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
                    active, token = active[keep], token[keep]
                    position_ids = position_ids[keep]
                    cache.keep(keep)
                position_ids, cache.tokens = position_ids + 1, t + 1
                hidden = decoder(token, position_ids=position_ids, past_key_values=cache, shared=cache)[0]
    return completion_ids[:, :t + 1], completion_mask[:, :t + 1], logps[:, :t + 1]


@contextmanager
def memory_advice(advice):
    """Within it running out of memory ends in one line, an InputError: where, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory {advice}") from None


def decode(tokenizer, completion_ids, completion_mask, stop_strings=()):
    """Text of each completion: no prompt, no special tokens, cut behind the first of stop_strings."""
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu())]
    if stop_strings:  # the last token may go on behind the string
        pattern = re.compile("|".join(map(re.escape, stop_strings)))
        ends = [pattern.search(text) for text in texts]
        texts = [text[:end.end()] if end else text for text, end in zip(texts, ends)]
    return texts


# === log-probabilities ======================================================================================


BLOCK = 4096  # entries of the vocabulary whose logits are held at a time
ROWS = 256  # tokens whose logits are summed at a time, so that the exponentials stay in the processor's cache


class ChosenLogps(torch.autograd.Function):
    """Log-probabilities of tokens and entropies, both [M], from hidden [M, h] and the output layer's weight
    [vocabulary, h].

    Logits exist for BLOCK entries of the vocabulary at a time: sums over it are carried along as in flash
    attention, and backward computes the logits again, but for the last block, which is still there.
    d logp / d logits = onehot - softmax.
    """

    @staticmethod
    def logits(hidden, weight, temperature, buffer):  # [M, block], fp32
        logits = buffer[:, :len(weight)]  # large new tensors are slow on CPU
        if weight.dtype == buffer.dtype:
            torch.mm(hidden, weight.T, out=logits)
        else:
            logits.copy_(hidden @ weight.T)
        return logits if temperature == 1 else logits.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature):
        width = min(len(weight), BLOCK)
        buffer = torch.empty(len(hidden), width, device=hidden.device)
        exponentials = torch.empty(ROWS, width, device=hidden.device)
        peak = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        # sums of e and e * logit, with e = exp(logit - peak)
        total, weighted = torch.zeros_like(peak), torch.zeros_like(peak)
        for block in weight.split(BLOCK):
            logits = ChosenLogps.logits(hidden, block, temperature, buffer)
            old_peak, peak = peak, torch.maximum(peak, logits.amax(dim=1, keepdim=True))
            total *= (old_peak - peak).exp()
            weighted *= (old_peak - peak).exp()
            for start in range(0, len(hidden), ROWS):
                rows = slice(start, start + ROWS)
                x = logits[rows]
                exp = torch.sub(x, peak[rows], out=exponentials[:len(x), :len(block)]).exp_()
                total[rows] += exp.sum(dim=1, keepdim=True)
                weighted[rows] += (exp[:, None] @ x[:, :, None])[:, 0]
        normalizer = peak + total.log()
        chosen = (hidden.float() * weight[tokens].float()).sum(dim=1) / temperature
        entropy = (normalizer - weighted / total)[:, 0]
        ctx.save_for_backward(hidden, weight, tokens, normalizer)
        ctx.temperature = temperature
        ctx.buffer, ctx.last_logits = buffer, logits
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer[:, 0], entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        hidden, weight, tokens, normalizer = ctx.saved_tensors
        grad = (grad_logps / ctx.temperature)[:, None]
        grad_hidden = grad * weight[tokens]
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # not under LoRA
        for start in reversed(range(0, len(weight), BLOCK)):
            block = weight[start:start + BLOCK]
            logits, ctx.last_logits = ctx.last_logits, None  # overwritten below, so good for once
            if logits is None:
                logits = ChosenLogps.logits(hidden, block, ctx.temperature, ctx.buffer)
            softmax = logits.sub_(normalizer).exp_()
            grad_logits = softmax.mul_(-grad).to(weight.dtype)
            grad_hidden += grad_logits @ block
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden, out=grad_weight[start:start + BLOCK])
        if grad_weight is not None:
            grad_weight.index_add_(0, tokens, (grad * hidden).to(weight.dtype))
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def chosen_logps(model, hidden, tokens, temperature):
    """Log-probabilities [M] that the model's output layer gives to `tokens` [M] after the hidden states
    [M, h], and the entropies [M] of its distributions; fp32, nats. No [M, vocabulary] tensor is made.
    """
    weight = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):  # which does not reach into ChosenLogps
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    return ChosenLogps.apply(hidden, weight, tokens, temperature)


@contextmanager
def sparse_embedding_gradient(model):
    """Within it lookups of embeddings give gradients as the rows looked up, not as a matrix of the
    vocabulary's size for each pass; at its end they are one. A frozen embedding stays as it is.
    """
    embedding = model.get_input_embeddings()
    embedding.sparse = embedding.weight.requires_grad
    try:
        yield
    finally:
        embedding.sparse = False
        if embedding.weight.grad is not None:
            embedding.weight.grad = embedding.weight.grad.to_dense()


# === evaluation =============================================================================================

NOT_NUMBERS = ("the model's probabilities are not numbers (NaN): its weights are broken, or too much for the "
               "precision: try --dtype bf16 or fp32, or another model")


def wilson_interval(successes, n, z=1.959964):
    """95% interval of a proportion, [low, high] (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    p, square = successes / n, z * z / n
    centre, half = p + square / 2, z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return [max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))]


def mcnemar(before, after):
    """Exact paired test of two lists of 0/1 on the same examples (McNemar 1947; two-sided binomial on the
    discordant pairs).

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
    """95% interval of a mean, [low, high]: percentiles of the means of n resamples, always the same ones
    (Efron 1979, doi:10.1214/aos/1176344552).
    """
    values, generator = numpy.asarray(values), numpy.random.default_rng(0)
    means, at_a_time = [], max(1, 2**20 // len(values))  # resamples: 16 MB of places and values
    for first in range(0, n, at_a_time):
        places = generator.integers(0, len(values), (min(at_a_time, n - first), len(values)))
        means.extend(values[places].mean(axis=1))
    return [float(x) for x in numpy.percentile(means, [2.5, 97.5])]


def paired_test(before, after):
    """Exact paired test of two lists of records on the same examples: of accuracy, or, of free text, of
    scores that differ by 0.01 or more (then it is the sign test), with the mean difference and its bootstrap
    interval. See mcnemar. Raises InputError where the two are not about the same questions.
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
    """Probability that at least one of k answers is right, estimated without bias from n of which `correct`
    are: one minus the share of the subsets of k that hold none (Chen et al. 2021, arXiv:2107.03374, eq. 1). k
    at most n.
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers, ground_truth):
    """Accuracy of the commonest of the answers, 0 to 1; answers that could not be parsed ("") do not vote.

    Where several are commonest one of them is drawn, so the right one among t counts 1 / t (expected
    accuracy).
    """
    votes = Counter(answer for answer in answers if answer)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return (ground_truth in winners) / len(winners) if winners else 0.0


def summarize_samples(records):
    """What several sampled answers a question show: samples (N), mean_accuracy, pass_at_k {k: value} for k =
    1, 2, 4, ... and N; mean_score of free text; where answers are labels maj_at_n and guess_pass_at_k, what
    guessing evenly among the classes would get.

    records: with sampled_accuracy, sampled_score and sampled_answers, lists of N each.
    """
    n = len(records[0]["sampled_accuracy"])
    ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    correct = [int(sum(r["sampled_accuracy"])) for r in records]
    mean_accuracy = sum(correct) / (n * len(records))
    summary = {"samples": n, "mean_accuracy": mean_accuracy, "pass_at_1": mean_accuracy,
               "pass_at_k": {str(k): fmean(pass_at_k(n, c, k) for c in correct) for k in ks}}
    if "rule" in records[0]:
        summary["mean_score"] = fmean(fmean(r["sampled_score"]) for r in records)
    else:
        classes = len({r["ground_truth"] for r in records})
        summary["maj_at_n"] = fmean(majority_vote(r["sampled_answers"], r["ground_truth"]) for r in records)
        summary["guess_pass_at_k"] = {str(k): 1 - (1 - 1 / classes)**k for k in ks}
    return summary


def score_completions(texts, rows, **knobs):
    """The score dict of each completion of its row. knobs: of rewards.compute_scores or compute_score."""
    source = rows[0]["data_source"]
    truths, extras = [row["ground_truth"] for row in rows], [row["extra"] for row in rows]
    if source in rewards.METHOD:
        return rewards.compute_scores(source, texts, truths, extras, **knobs)
    return [rewards.compute_score(source, text, truth, extra, **knobs)
            for text, truth, extra in zip(texts, truths, extras)]


def evaluate(model, tokenizer, rows, compute, *, max_completion_length, batch_size, samples=0,
             temperature=1.0, seed=0, title="eval", score=score_completions, stop_strings=()):
    """Answers every row greedily, and `samples` times at `temperature`, and scores the answers strictly.

    rows: [(row, prompt_ids)] as encode_rows gives them. score: function of texts and their rows to a list of
    score dicts. stop_strings: as in generate. Returns a record an example, in the order of `rows`: id,
    ground_truth, subject, the keys of those dicts, length (tokens), truncated, completion, and with samples
    sampled_accuracy, sampled_score and sampled_answers (lists).
    """
    stops, generator = stop_ids(model, tokenizer), torch.Generator(model.device).manual_seed(seed)
    limits = dict(max_new_tokens=max_completion_length, stop_ids=stops, stop_strings=stop_strings,
                  tokenizer=tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))  # alike lengths together: less padding
    records = [None] * len(rows)
    bar = tqdm(total=len(order), desc=title, unit="question", leave=False, disable=None)  # says the time left
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        prompts = [rows[i][1] for i in batch]
        with autocast(compute):
            ids, mask, logps = generate(model, prompts, temperature=0.0, **limits)
            if samples:
                sampled_ids, sampled_mask, _ = generate(model, prompts, samples, temperature=temperature,
                                                        generator=generator, **limits)
        if logps.isnan().any():
            raise InputError(f"{title}: {NOT_NUMBERS}")
        texts = decode(tokenizer, ids, mask, stop_strings)
        answered = [rows[i][0] for i in batch]
        for j, (i, row, text, scored) in enumerate(zip(batch, answered, texts, score(texts, answered))):
            length = int(mask[j].sum())
            ended = int(ids[j, length - 1]) in stops or text.endswith(tuple(stop_strings))
            records[i] = {"id": row["id"], "ground_truth": row["ground_truth"],
                          "subject": row["extra"].get("subject", ""), **scored,
                          "length": length, "completion": text, "truncated": not ended}
        if samples:
            texts = decode(tokenizer, sampled_ids, sampled_mask, stop_strings)
            for j, scored in enumerate(score(texts, [row for row in answered for _ in range(samples)])):
                record = records[batch[j // samples]]
                record.setdefault("sampled_accuracy", []).append(scored["accuracy"])
                record.setdefault("sampled_score", []).append(scored["score"])
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
        start = len(tokenizer(context).input_ids)  # with what stands in front of a text, as the harness does
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
            padded = [[*ids, *[0] * (width - len(ids))] for ids in batch]
            input_ids = torch.tensor(padded, device=model.device)
            hidden = model.get_decoder()(input_ids, use_cache=False)[0]
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
        records.append({"id": row["id"], "ground_truth": row["ground_truth"],
                        "subject": row["extra"].get("subject", ""),
                        "loglikelihoods": likelihoods, "answer": answer,
                        "accuracy": float(answer == row["ground_truth"])})
    return records


FREE_TEXT_PARTS = ("findings", "tokens", "similarity", "fluency", "format", "brevity", "learned")


def summarize(records):
    """The summary of evaluate's or option_likelihoods' records: accuracy with accuracy_ci95 (Wilson), n,
    majority_accuracy (of always giving majority_class, the commonest class or letter of these rows),
    macro_f1, answers (how often each was given); of generated answers format_rate, mean_length (tokens) and
    truncated (share); what summarize_samples says where there are samples; by_subject ({subject: n, accuracy,
    accuracy_ci95, majority_accuracy}) where there are subjects. Of free text, which has no classes, score and
    parts (each mean with its bootstrap interval) instead of majority_accuracy, macro_f1 and answers.
    """
    truths, answers = [r["ground_truth"] for r in records], [r["answer"] for r in records]
    n = len(records)
    correct = int(sum(r["accuracy"] for r in records))
    summary = {"accuracy": correct / n, "accuracy_ci95": wilson_interval(correct, n), "n": n}
    if "rule" in records[0]:
        names = ("score", "rule", *FREE_TEXT_PARTS)
        parts = {name: [r[name] for r in records] for name in names if name in records[0]}
        parts = {name: {"mean": fmean(values), "ci95": bootstrap_interval(values)}
                 for name, values in parts.items()}
        summary |= {"score": parts["score"]["mean"], "score_ci95": parts.pop("score")["ci95"], "parts": parts}
    else:
        [(majority_class, count)] = Counter(truths).most_common(1)
        summary |= {"majority_class": majority_class, "majority_accuracy": count / n,
                    "macro_f1": macro_f1(truths, answers),
                    "answers": dict(Counter(answer or "none" for answer in answers).most_common())}
    if "length" in records[0]:
        summary |= {"format_rate": sum(r["format_ok"] for r in records) / n,
                    "mean_length": sum(r["length"] for r in records) / n,
                    "truncated": sum(r["truncated"] for r in records) / n}
    if "sampled_accuracy" in records[0]:
        summary |= summarize_samples(records)
    by_subject = {}
    for record in records:
        by_subject.setdefault(record.get("subject"), []).append(record)
    if any(by_subject):
        summary["by_subject"] = {}
        for subject, group in sorted(by_subject.items(), key=lambda pair: -len(pair[1])):
            correct = sum(record["accuracy"] for record in group)
            entry = {"n": len(group), "accuracy": correct / len(group),
                     "accuracy_ci95": wilson_interval(correct, len(group))}
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
    if free_text:
        text += (f", findings F1 {summary['parts']['findings']['mean']:.3f}, all right "
                 f"{summary['accuracy']:.3f}")
    else:
        text += f" (always {summary['majority_class']!r}: {summary['majority_accuracy']:.3f})"
    if "samples" in summary:
        text += f"; {describe_samples(summary)}"
    if not free_text:
        text += f", macro-F1 {summary['macro_f1']:.3f}"
    if "format_rate" in summary:
        text += f", format {summary['format_rate']:.3f}, {summary['mean_length']:.0f} tokens"
    return text if free_text else f"{text}, answers {summary['answers']}"


def describe_samples(summary):
    """The console's words for what summarize_samples found."""
    n = summary["samples"]
    score = f"mean score {summary['mean_score']:.3f}, " if "mean_score" in summary else ""
    text = f"{n} samples each: {score}mean accuracy {summary['mean_accuracy']:.3f}, " + ", ".join(
        f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items())
    if "maj_at_n" in summary:
        text += (f", maj@{n} {summary['maj_at_n']:.3f} (guessing: pass@{n} "
                 f"{summary['guess_pass_at_k'][str(n)]:.3f})")
    return text


# === report.html ============================================================================================

MODES = {"generated": "generated answers", "loglikelihood": "most likely answer"}


def headline(summary):
    """(value, interval) of what a summary is about: the score of free text, the accuracy of all else."""
    name = "score" if "score" in summary else "accuracy"
    return summary[name], summary[f"{name}_ci95"]


def sample_curves(summaries):
    """([{name, points, label}] of the heads' pass@k, points of guessing or None) for a chart of 400 by 200.

    points: {k: (x, y)}, k on a scale of doublings; label: the y of the head's name beside the line's end.
    """
    doublings = max(1, math.log2(max(s["samples"] for s in summaries.values())))

    def points(values):
        return {k: (round(400 * math.log2(int(k)) / doublings, 1), round(200 * (1 - value), 1))
                for k, value in values.items()}

    curves = [{"name": name, "points": points(s["pass_at_k"])} for name, s in summaries.items()]
    for curve in curves:
        curve["label"] = list(curve["points"].values())[-1][1] + 5
    lowest = -20.0
    for curve in sorted(reversed(curves), key=lambda curve: curve["label"]):  # lines that end together
        lowest = curve["label"] = max(lowest + 17, curve["label"])  # have their names below each other
    guess = next(iter(summaries.values())).get("guess_pass_at_k")
    return curves, points(guess) if guess else None


def report_html(title, heads, rows, paired=()):
    """One self-contained page that compares model heads on the same questions: charts, tables, each question.

    heads: {name: {"generated": summary, "loglikelihood": summary}}, either may be missing; a summary is what
    summarize returns. rows: {"id", "question", "options", "ground_truth", "subject",
    "answers": {name: {"answer", "accuracy", "completion"}}}. paired: {"before", "after", "mode",
    "only_before", "only_after", "p_value"}, names of heads and counts of questions. Returns HTML that loads
    nothing and shows whatever a model wrote as text.
    """
    modes = {mode: {name: head[mode] for name, head in heads.items() if head.get(mode)} for mode in MODES}
    modes = {mode: summaries for mode, summaries in modes.items() if summaries}
    sampled = {name: s for name, s in modes.get("generated", {}).items() if "pass_at_k" in s}
    curves, guess = sample_curves(sampled) if sampled else (None, None)
    passes, subjects = {}, {}
    for s in sampled.values():
        passes |= {f"pass@{k}": k for k in s["pass_at_k"] if k != "1"}
    for s in next(iter(modes.values())).values():
        subjects |= s.get("by_subject", {})
    subjects = dict(sorted(subjects.items(), key=lambda item: (-item[1]["n"], item[0])))
    readable = [name for name in heads if any(name in row["answers"] for row in rows)]
    tested = [(p["before"], p["after"]) for p in paired if p["mode"] == "generated"]
    free_text = any("score" in s for summaries in modes.values() for s in summaries.values())
    data = {"heads": readable, "pairs": list(dict.fromkeys([*zip(readable, readable[1:]), *tested])),
            "rows": rows, "freeText": free_text}
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "data")
    pages = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined,
                               trim_blocks=True, lstrip_blocks=True)
    pages.filters["percent"] = "{:.1%}".format
    return pages.get_template("report.html").render(
        title=title, heads=heads, kinds=MODES, modes=modes, headline=headline, free_text=free_text, data=data,
        paired=paired, sampled=sampled, curves=curves, guess=guess, passes=passes, subjects=subjects)


# === doctor: will it fit ====================================================================================


def estimate_memory(config, prompt, question):
    """Most memory that a run of a script can need, {part: bytes}, from the model's configuration alone;
    nothing is loaded.

    config: of the script. prompt: tokens of the longest training prompt (of sft: of the longest row);
    question: of the longest held-out prompt. Completions count with their full --max_completion_length.
    Raises InputError where there is no such model.
    """
    try:
        shapes = AutoConfig.from_pretrained(find_model(config.model)[0], trust_remote_code=False)
        with torch.device("meta"):  # shapes without numbers
            model = AutoModelForCausalLM.from_config(shapes)
    except InputError:
        raise
    except Exception as error:  # what load_model would say
        raise InputError(hub_message(f"model {config.model}", error, INSTEAD_OF_HUB)) from error
    text = model.config.get_text_config()
    layers, vocabulary = text.num_hidden_layers, text.vocab_size
    h, ffn = text.hidden_size, text.intermediate_size
    d = getattr(text, "head_dim", None) or h // text.num_attention_heads
    q = text.num_attention_heads * d  # width of the queries
    kv = 2 * text.num_key_value_heads * d  # of keys and values together
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = pick_dtype(config.dtype, device).itemsize  # bytes of an activation

    # what is there all the time
    lora_r = getattr(config, "lora_r", 0)
    total, embedding = sum(p.numel() for p in model.parameters()), vocabulary * h
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    mixed_precision = c == 2 and not lora_r  # fp32 weights, of which each pass makes casts
    trained, adapter, folded = total, 0, 0
    weights = 4 * total
    if lora_r:
        layers_with_adapter = [module for module in model.modules() if isinstance(module, torch.nn.Linear)
                               and module is not model.get_output_embeddings()]
        trained = sum(lora_r * (layer.in_features + layer.out_features) for layer in layers_with_adapter)
        weights, adapter = c * total, 4 * trained
        if device.type == "cpu" and c == 4:  # copies of the weights with the adapter in them, in sampling
            folded = 4 * sum(layer.weight.numel() for layer in layers_with_adapter)
    if getattr(config, "load_in_4bit", False):
        whole = embedding if tied else 2 * embedding
        weights = (total - whole) * 9 // 16 + c * whole  # the rest in 4 bits, a scale for every 64
    parts = {"weights": weights + adapter, "optimizer": 8 * trained}  # Adam's two moments
    if getattr(config, "beta", 0):
        parts["reference"] = adapter or weights

    # What autograd keeps of a token in a layer (torch.autograd.graph.saved_tensors_hooks lists it): bytes of
    # tensors as wide as h, for the two norms (input and scaled input, always fp32; the latter not where the
    # scaling is frozen) and for the linear layers that read their output (in fp32 one tensor a norm, in half
    # precision one cast a layer: q, k, v, gate, up); queries and attention's output (2q, and its cast for the
    # adapter); four widths of the MLP (gate, its activation, up, their product). One layer more is at work
    # while it is differentiated.
    as_wide_as_h = {(4, False): 16 + 8, (4, True): 8 + 8, (2, False): 16 + 10, (2, True): 8 + 10}
    token = as_wide_as_h[c, bool(lora_r)] * h + c * ((3 if c == 2 and lora_r else 2) * q + 4 * ffn)
    if hasattr(config, "group_size"):
        group, length = config.completions_per_forward or config.group_size, config.max_completion_length
        rows, context = config.prompts_per_step * config.group_size, prompt + length
        new = group * length  # tokens
        # every completion has its own copy of the prompt's keys and values; queries that share a key lie in
        # one row, with a mask for that row, and the attention's output goes back into the usual order
        a_layer = (prompt * (token + c * kv) + new * (token + c * q) + c * kv * group * context
                   + 4 * 2 * q // kv * length * context)
        sampled = (config.prompts_per_step, rows, prompt)
    else:
        new, sampled = config.batch_size * prompt, (0, 0, 0)
        a_layer = new * (token + c * kv)
    # logits that ChosenLogps holds: in fp32, of a half-precision model also as they come, and their gradients
    block = new * min(vocabulary, BLOCK)
    activations = (layers + 1) * a_layer
    if device.type == "cpu":  # as measured: there are gaps in the heap, too small for the next tensor
        activations *= 2 if not hasattr(config, "group_size") else 1.8 if c == 2 else 1
    if getattr(config, "gradient_checkpointing", False):
        inputs = layers * new * h * (4 if mixed_precision else c)
        activations = inputs + a_layer  # what goes into each layer, and one layer at work
    update = {"gradients": 4 * trained, "activations": activations,
              "logits": (4 if c == 4 else 4 + 2 * c) * block}
    if not lora_r:
        update["gradients"] += 4 * embedding  # one of the output layer on its way
    if mixed_precision:
        passes = 2 if hasattr(config, "group_size") else 1  # that are kept: a prompt's, its completions'
        # ... and the output layer's, with its gradient
        update["casts"] = c * (passes * (total - embedding) + embedding + tied * embedding)

    def sampling(prompts, rows, longest):
        length = config.max_completion_length
        context = longest + length
        passed = min(prompts * longest, max(longest, PROMPT_TOKENS))  # tokens in one pass
        kept = 3 if mixed_precision else c  # keys come in fp32 then
        return {"key-value cache": layers * kv * (kept * prompts * longest + c * rows * length),
                "casts": c * total if mixed_precision else 0, "folded adapters": folded,
                # logits, probabilities and cumulative sums; while they last, the next logits, twice
                "logits": 5 * 4 * rows * vocabulary,
                "activations": max(passed * (4 * h + q + kv + 3 * ffn) * c,
                                   3 * 4 * rows * text.num_attention_heads * context)}

    evaluation = (config.eval_batch_size, config.eval_batch_size, question)
    parts |= max(update, sampling(*sampled), sampling(*evaluation), key=lambda phase: sum(phase.values()))
    return parts


def free_memory():
    """Bytes that the device has left: of the GPU, or of the machine within the limit of its control group."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    if not Path("/proc/meminfo").exists():  # no Linux: all that the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = [int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")]
    groups = Path("/sys/fs/cgroup")
    for limit, used in ((groups / "memory.max", groups / "memory.current"),  # version 2, version 1
                        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes")):
        try:
            free.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max": no limit
    return min(free)


def doctor(config, train, heldout):
    """The first thing that a script says: whether model and settings will probably fit into memory and onto
    the disk, and whether the libraries are those that it was tested with. Warns, never refuses. Rows are not
    tokenized yet: three characters count as a token. Returns the bytes that the process holds so far.
    """
    grpo = hasattr(config, "group_size")

    def characters(row, with_target):
        return sum(len(message["content"]) for message in row["prompt"]) + len(row["target"]) * with_target

    limit = config.max_prompt_length if grpo else config.max_seq_length
    prompt = min(limit, max(characters(row, not grpo) for row in train) // 3)
    question = min(limit, max(characters(row, False) for row in heldout[:config.eval_size]) // 3)
    parts = estimate_memory(config, prompt, question)
    needed, free = sum(parts.values()), free_memory()
    trained = parts["optimizer"] // 2  # in fp32, half as much as Adam's two moments
    checkpoint = parts["optimizer"] + trained + parts.get("reference", 0)
    out = Path(config.out or "runs").absolute()
    place = next(path for path in (out, *out.parents) if path.is_dir())
    disk = shutil.disk_usage(place).free
    print(f"doctor: about {needed / 1e9:.2g} GB of memory needed at most ({described_memory(parts)}), "
          f"{free / 1e9:.3g} GB free; a checkpoint takes {checkpoint / 1e9:.2g} GB of {disk / 1e9:.3g} GB "
          "on the disk")
    if needed > free:
        lower = "a lower --batch_size or"
        if grpo:
            lower = "--completions_per_forward 1, a lower --prompts_per_step, --group_size or"
        print(f"WARNING: this will probably not fit into memory: try {lower} --eval_batch_size, or a smaller "
              "--model")
    if 2 * checkpoint + parts["weights"] > disk:  # the old checkpoint is kept while the new one is written
        print(f"WARNING: {place} will probably be full before the run ends: take another --out, or make room")
    requirements = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in requirements if "==" in line and line[0] != "#")
    for name in ("torch", "transformers", "peft"):
        installed = importlib.metadata.version(name).partition("+")[0]
        if installed != tested[name]:
            print(f"WARNING: {name} {installed} is installed, tested was {tested[name]} (requirements.txt)")
    # Python, torch, the libraries, the rows; on a GPU tensors alone are counted
    return 0 if torch.cuda.is_available() else round(peak_memory_gb() * 1e9)


def longest_rows(config, train, heldout, library_bytes):
    """For --dry_run: the longest training rows of a step and held-out rows of a batch, and estimate_memory.

    train: [(row, prompt_ids)], of sft [(prompt_ids, completion_ids)]. library_bytes: what doctor returned.
    """
    grpo = hasattr(config, "group_size")

    def length(item):
        return len(item[1]) if grpo else len(item[0]) + len(item[1])

    a_step = config.prompts_per_step if grpo else config.batch_size * config.gradient_accumulation_steps
    train = sorted(train, key=length, reverse=True)[:a_step]
    heldout = sorted(heldout, key=lambda item: len(item[1]), reverse=True)[:config.eval_batch_size]
    estimate = estimate_memory(config, length(train[0]), len(heldout[0][1])) | {"libraries": library_bytes}
    return train, heldout, estimate


def print_dry_run(metrics, estimate, steps):
    """Says what a step of a dry run took. estimate: of longest_rows; steps: of the whole run."""
    seconds = metrics.get("generate_seconds", 0) + metrics["update_seconds"]
    whole = f"; {steps} steps take about {seconds * steps / 60:.1f} minutes, evaluations aside"
    print(f"dry run: a step with the longest prompts took {seconds:.2f} s{whole}")
    print(f"dry run: memory {metrics['peak_memory_gb']:.2f} GB at the peak, "
          f"{sum(estimate.values()) / 1e9:.2f} GB estimated ({described_memory(estimate)})")


def described_memory(parts):
    """The parts of estimate_memory for the console, the largest first."""
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / 1e9:.2g}" for name, size in largest_first if size)


# === console and metrics of the scripts =====================================================================


def check_config(config):
    """Raises InputError for knobs of a GRPO script that make no sense, before anything is loaded."""
    check_knobs(config)
    if config.loss_type == "cispo" and config.epsilon_high < 1:
        raise InputError(f"--loss_type cispo --epsilon_high {config.epsilon_high}: there it is the cap of "
                         "the ratio itself, at least 1 is needed: type --epsilon_high 5")


def check_rows(config, train, heldout, counts):
    """Prints what was loaded; raises InputError when it is less than a step or the evaluation needs."""
    a_step = getattr(config, "prompts_per_step", 1)
    asked = f"--eval_size {config.eval_size}"
    if hasattr(config, "prompts_per_step"):
        asked = f"--prompts_per_step {a_step} or {asked}"
    if len(train) < a_step or len(heldout) < config.eval_size:
        raise InputError(f"--data {config.data} gives {len(train)} training and {len(heldout)} held-out "
                         f"rows, fewer than {asked} asks for: lower these or bring more rows")
    print(f"data: {config.data}, {len(train)} training and {len(heldout)} held-out rows{described(counts)}")


def compare(before_records, after_records):
    """Before and after on the same rows: prints the table; {"before", "after", "paired"} for summary.json."""
    before, after = summarize(before_records), summarize(after_records)
    paired = paired_test(before_records, after_records)
    better = "after" if paired["only_after"] > paired["only_before"] else "before"
    paired["better"] = better if paired["p_value"] < 0.05 else "neither"
    print(f"{'':20}{'before':>18}{'after':>18}")
    table = [(key, before[key], after[key])
             for key in ("score", "score_ci95", "accuracy", "accuracy_ci95", "majority_accuracy", "macro_f1",
                         "format_rate", "mean_length") if key in before]
    table += [(name, before["parts"][name]["mean"], after["parts"][name]["mean"])
              for name in before.get("parts", ())]
    for key, *values in table:
        cells = [f"[{v[0]:.3f}, {v[1]:.3f}]" if isinstance(v, list) else f"{v:.3f}" for v in values]
        print(f"{key:20}{cells[0]:>18}{cells[1]:>18}")
    verdict = {"after": "training helped", "before": "TRAINING DID HARM",
               "neither": "no difference shown"}[paired["better"]]
    print(f"{verdict}: {describe_pair(paired, after['n'])}")
    return {"before": before, "after": after, "paired": paired}


def describe_pair(paired, n):
    """One line of a paired test for the console."""
    if "ties" in paired:
        low, high = paired["difference_ci95"]
        return (f"score {paired['difference']:+.3f} [{low:+.3f}, {high:+.3f}]; better on "
                f"{paired['only_after']} of {n} questions, worse on {paired['only_before']}, tied on "
                f"{paired['ties']}, sign test p = {paired['p_value']:.2g}")
    return (f"{paired['only_after']} of {n} questions newly right, {paired['only_before']} newly wrong, "
            f"McNemar p = {paired['p_value']:.2g}")


def early_warnings(summary, config, task):
    """What the evaluation before training says against starting it: lines, each with the command to type.

    summary: of summarize; config: of a GRPO script; task: whose rows, as sft.py calls it.
    """
    lines = []
    if summary["format_rate"] < 0.05:
        folder = f"runs/sft-{task}"
        flags = f"--adapter {folder}/model" if hasattr(config, "lora_r") else f"--model {folder}/model"
        whole = "" if hasattr(config, "lora_r") else " --lora_r 0"
        lines.append(f"the model doesn't know the tags (format rate {summary['format_rate']:.3f}), so almost "
                     f"nothing can be rewarded: run `python sft.py --task {task} --model {config.model} "
                     f"--data {config.data}{whole} --out {folder}` first and start from it with {flags}, or "
                     "show the tags in --system_prompt FILE")
    if summary["truncated"] > 0.25:
        closing_tag = rewards.TAGS.get(task, rewards.REASONED)[-1]
        advice = f"type --max_completion_length {2 * config.max_completion_length}"
        if not config.stop_strings:
            advice += (", or, where the model goes on behind its answer (a base model), --stop_strings "
                       f"'{closing_tag}'")
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
    return {"reward": fmean(s["score"] for s in scores),
            **{f"reward_{key}": fmean(s[key] for s in scores) for key in parts},
            "reward_std": fmean(numpy.std([s["score"] for s in group["scores"]], ddof=1) for group in groups),
            "zero_std_groups": sum(group["zero_std"] for group in groups),
            "accuracy": fmean(s["accuracy"] for s in scores),
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
    if status.exists():  # getrusage's figure begins with the size of the process that started this one
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def versions():
    """Versions that a result hangs on, for summary.json."""
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__}


# === command line ===========================================================================================


@dataclass
class Config:
    """Scores a model on the held-out questions of a task."""

    task: Literal["pubmedqa", "medmcqa", "ecg", "medical_o1"] = "pubmedqa"  # whose rows
    model: str = "tiny"  # tiny, a model folder, an adapter folder, or a hub id
    models: tuple[str, ...] = ()  # instead: heads to compare, each NAME=MODEL or NAME=MODEL+ADAPTER
    mode: Literal["generated", "loglikelihood", "both"] = "generated"  # answers: written, or the likeliest
    data: str = "builtin"  # builtin, hub, hub:ORG/NAME[:CONFIG], or a file or folder
    out: str = ""  # folder for eval.jsonl and summary.json (default: runs/eval-<time>)
    split: Literal["heldout", "train", "all"] = "heldout"  # which side of the split to score
    maybe: bool = False  # PubMedQA with its third class
    # MedMCQA: the number of option A in `cop` (auto: told from the values)
    cop_base: Literal["auto", "0", "1"] = "auto"
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
    # texts that end an answer, for base models that do not stop (</answer>)
    stop_strings: tuple[str, ...] = ()
    eval_batch_size: int = 32  # prompts answered at a time
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # to compute in; bf16 rounds the weights too
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    load_in_4bit: bool = False  # quantise the model through bitsandbytes
    seed: int = 0  # of the samples


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
        adapter = ""
        if plus:
            model, _, adapter = model.rpartition("+")
        if plus and not (Path(adapter) / "adapter_config.json").exists():
            raise InputError(f"--models {text}: {adapter} is no adapter folder (it has no "
                             "adapter_config.json)")
        if plus and find_model(model)[1]:
            raise InputError(f"--models {text}: {model} is an adapter folder itself, merge it first (python "
                             f"eval.py merge --model {model} --out DIR) and give {name}=DIR+{adapter}")
        heads.append((name, model, adapter))
    if len({name for name, *_ in heads}) < len(heads):
        raise InputError("--models: two heads have the same name")
    return heads


def check_weights(weights, *more):
    """Raises InputError unless `weights`, {part: weight} of free text, has our parts (or `more`), above 0."""
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
        trained = {folder: trained_on(folder) for folder in folders}
        trained = {folder: trained_weights for folder, trained_weights in trained.items() if trained_weights}
        for folder, trained_weights in trained.items():
            first = next(iter(trained))
            if trained_weights != trained[first]:
                raise InputError(f"{first} was trained on {mixed(trained[first])}, {folder} on "
                                 f"{mixed(trained_weights)}: say by which to score, with --method or "
                                 "--weights")
            weights, whose = trained_weights, f"what {folder} was trained on"
    there = {part: weight for part, weight in weights.items()
             if (part != "fluency" or config.language_model) and (part != "learned" or config.reward_model)}
    if not there:
        raise InputError(f"by {whose} there is only {mixed(weights)}, which needs a --language_model or "
                         "--reward_model: name it, or give other --weights")
    left = "".join(f", no {part} here" for part in weights if part not in there)
    print(f"reward: scored by {whose}: {mixed(there)}{left}")
    return weights  # rewards.compute_scores leaves out what is not there, too


def trained_on(folder):
    """{part: weight} that the GRPO run of a trained folder weighed free text by; {} if no config.json says.
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
    """({name: {"generated": records, "loglikelihood": records}} of every head, the rows that they answered);
    a base is in memory once. Raises InputError where heads cannot answer the same rows.
    """
    results, answered, free_text = {}, None, {}
    in_peft = {name: str(i) for i, (name, *_) in enumerate(heads)}  # peft takes no dot, no part of "lora_"
    if config.task in ("ecg", "medical_o1"):
        check_scorers(config.language_model, config.reward_model)
        free_text = {"encoder": pick_encoder(config.similarity, config.encoder),
                     "language_model": config.language_model,
                     "reward_model": config.reward_model, "weights": config.weights}
    for source in dict.fromkeys(model for _, model, _ in heads):
        model, tokenizer, compute = load_model(source, config.dtype,
                                               attn_implementation=config.attn_implementation,
                                               load_in_4bit=config.load_in_4bit)
        encoded = encode_rows(tokenizer, rows, config.max_prompt_length, config.split)
        if answered and answered != [row for row, _ in encoded]:
            raise InputError(f"--models: {source} leaves out other rows than the models before it "
                             f"(--max_prompt_length {config.max_prompt_length}): raise it, so that all "
                             "answer the same")
        answered = [row for row, _ in encoded]
        adapters = {name: adapter for name, base, adapter in heads if base == source}
        for name, adapter in adapters.items():
            if adapter:
                model = read_adapter(model, adapter, source, in_peft[name])
        for name, adapter in adapters.items():
            if adapter:
                model.set_adapter(in_peft[name])
            bare = not adapter and any(adapters.values())  # the base under the adapters of other heads
            with model.disable_adapter() if bare else nullcontext():
                results[name] = {}
                if config.mode in ("generated", "both"):
                    results[name]["generated"] = evaluate(
                        model, tokenizer, encoded, compute, title=name, batch_size=config.eval_batch_size,
                        max_completion_length=config.max_completion_length, samples=config.samples,
                        temperature=config.temperature, seed=config.seed, stop_strings=config.stop_strings,
                        score=functools.partial(score_completions, **free_text))
                if config.mode in ("loglikelihood", "both"):
                    results[name]["loglikelihood"] = option_likelihoods(
                        model, tokenizer, encoded, compute, title=name, batch_size=config.eval_batch_size)
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
    summaries = {name: {mode: summarize(records) for mode, records in modes.items()}
                 for name, modes in results.items()}
    paired = []
    for one, two in itertools.combinations(results, 2):
        for mode in results[one]:
            test = paired_test(results[one][mode], results[two][mode])
            paired.append({"before": one, "after": two, "mode": mode, **test})
            before, after = (headline(summaries[name][mode])[0] for name in (one, two))
            print(f"{one} -> {two}, {mode}: {before:.3f} -> {after:.3f}, {describe_pair(test, len(rows))}")
    lines = []
    for i, row in enumerate(rows):
        answers = {mode: {name: modes[mode][i] for name, modes in results.items()}
                   for mode in next(iter(results.values()))}
        lines.append({"id": row["id"], "question": row["extra"]["question"],
                      "options": row["extra"].get("options", []), "ground_truth": row["ground_truth"],
                      "subject": row["extra"].get("subject", ""), "answers": answers.get("generated") or {},
                      "loglikelihood": answers.get("loglikelihood") or {}})
    summary = {"heads": summaries, "paired": paired, "config": asdict(config), "versions": versions()}
    page = report_html(f"{config.task}: {', '.join(results)}", summaries, lines, paired)
    write_results(folder, {"results.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
                           "report.html": page, "summary.json": json.dumps(summary, indent=1) + "\n"})


def main(config):
    """Scores one model, or compares several heads, and writes the result folder. Raises InputError."""
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
        raise InputError(f"--data {config.data} has {len(rows)} rows on the {config.split} side, "
                         f"{max(1, config.eval_size)} needed (--split all takes every row)")
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
    summary = summarize(records)
    if config.mode == "both":
        summary["loglikelihood"] = summarize(modes["loglikelihood"])
    summary |= {"config": asdict(config), "versions": versions()}
    write_results(folder, {"eval.jsonl": "".join(json.dumps(record) + "\n" for record in records),
                           "summary.json": json.dumps(summary, indent=1) + "\n"})
    print(f"written: {folder}/summary.json, {folder}/eval.jsonl")


# === chat ===================================================================================================


@dataclass
class Chat:
    """Talks with one or more heads, one after the other, each with a history of its own."""

    models: tuple[str, ...] = ("tiny=tiny",)  # heads, each NAME=MODEL or NAME=MODEL+ADAPTER
    system: str = ""  # system prompt ("" = none); /system changes it
    task: Literal["", "pubmedqa", "medmcqa", "ecg", "medical_o1"] = ""  # instead: a task's own system prompt
    temperature: float = 0.7  # of sampling (0 = the likeliest token)
    max_completion_length: int = 400  # tokens an answer may have
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what to compute in
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    load_in_4bit: bool = False  # quantise the models through bitsandbytes
    seed: int = 0  # of sampling


def stream(model, tokenizer, prompt_ids, compute, config, generator):
    """Yields the text of one answer, piece by piece, as `generate` would sample it; InputError for NaN.

    transformers' TextStreamer holds words back until a space, so a script without spaces comes all at the
    end, and decodes every line anew, which loses a line's leading space with Llama 2's kind of tokenizer.
    """
    stops, cache = set(stop_ids(model, tokenizer)), DynamicCache()
    ids, text = [], ""
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
        inputs = torch.tensor([[token]], device=model.device)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
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
    system = config.system
    if config.task:
        system = TASKS[config.task].SYSTEM_PROMPT.replace("{classes}", "yes or no")
    in_peft = {name: str(i) for i, (name, *_) in enumerate(heads)}  # as in score_heads
    for name, source, adapter in heads:
        if source not in loaded:
            loaded[source] = load_model(source, config.dtype, attn_implementation=config.attn_implementation,
                                        load_in_4bit=config.load_in_4bit)
        if adapter:
            model, *rest = loaded[source]
            loaded[source] = (read_adapter(model, adapter, source, in_peft[name]), *rest)
    histories = {name: [] for name, *_ in heads}
    device = next(iter(loaded.values()))[0].device
    generator = torch.Generator(device).manual_seed(config.seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 spoil their line alone
    keyboard = sys.stdin.isatty()
    commands = "/clear, /system TEXT, /save FILE, /quit"
    print(f"type a message; {commands} or Ctrl-D" if keyboard else f"heads: {', '.join(histories)}")
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
        if command == "/clear":
            histories = {name: [] for name in histories}
            print("cleared")
        elif command == "/system":
            system, histories = argument.strip(), {name: [] for name in histories}
            print(f"system prompt: {system or 'none'}")
        elif command == "/save":
            print(printable(save_chat(argument.strip() or "chat.json", system, histories)))
        elif command.startswith("/"):
            print(f"{command} is no command: {commands}")
        if not line or command.startswith("/"):
            continue
        for name, source, adapter in heads:
            model, tokenizer, compute = loaded[source]
            messages = [*histories[name], {"role": "user", "content": line}]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            print(f"{name}: ", end="", flush=True)
            if adapter:
                model.set_adapter(in_peft[name])
            # the base under other heads' adapters
            bare = not adapter and any(head[1] == source and head[2] for head in heads)
            answer = ""
            with model.disable_adapter() if bare else nullcontext():
                try:
                    prompt_ids = encode_prompt(tokenizer, messages)
                    for piece in stream(model, tokenizer, prompt_ids, compute, config, generator):
                        answer += piece
                        print(printable(piece), end="", flush=True)
                except KeyboardInterrupt:  # enough of this answer
                    pass
                except InputError as error:  # NaN: nothing to remember
                    print(error)
                    continue
            print()
            histories[name] += [messages[-1], {"role": "assistant", "content": answer}]


# === merge ==================================================================================================


@dataclass
class Merge:
    """Writes a folder to serve or publish: base and adapter as one, tokenizer, generation config, card."""

    model: str  # the adapter's base, or a model that was trained as a whole: tiny, a folder, or a hub id
    out: str  # folder to write
    adapter: str = ""  # adapter folder, such as runs/my-run/model ("" = --model needs none)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the weights; auto: fp32, on a GPU bf16/fp16


def card_results(summary):
    """What the model card says of a run's results, by the template's names, from the summary.json of the run.

    Raises KeyError, TypeError, ValueError or AttributeError where it is something else.
    """
    before, after = summary["before"], summary["after"]
    label = "score [95% interval]" if "score" in after else "accuracy [95% interval]"
    values = ["{:.3f} [{:.3f}, {:.3f}]".format(value, *interval)
              for value, interval in map(headline, (before, after))]
    formats = [f"{side['format_rate']:.3f}" for side in (before, after)]
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    if "seconds" in summary:
        versions += f"; {summary['seconds']:.0f} seconds of training."
    results = {"n": after["n"], "rows": [(label, *values), ("format kept", *formats)],
               "paired": describe_pair(summary["paired"], after["n"]), "versions": versions}
    if "majority_accuracy" in after:
        results["majority"] = f"{after['majority_accuracy']:.3f}"
    return results


def model_card(config, dtype):
    """Text of the card. What training did is read from the run's folder, in which the trained folder lies; of
    what is not there the card says that it is not known.
    """
    run = Path(config.adapter or config.model).expanduser().resolve().parent
    files = {}
    for name in ("config.json", "summary.json"):
        try:
            files[name] = json.loads((run / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            files[name] = {}
    settings, summary = files["config.json"], files["summary.json"]
    if not isinstance(settings, dict) or {type(settings.get(key)) for key in ("model", "data")} != {str}:
        settings = {}  # of something else: transformers has a config.json too
    try:
        results = card_results(summary)
    except (KeyError, TypeError, ValueError, AttributeError):  # none there, or of something else
        results = {}
    try:  # the task is in the ids of the questions
        first = (run / "eval_after.jsonl").read_text(encoding="utf-8").split("\n")[0]
        task = next(name for name in TASKS if json.loads(first)["id"].startswith(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        task = ""
    system_prompt, prompt_file = "", settings.get("system_prompt", "") if task else ""
    if task and not prompt_file:
        classes = "yes, no or maybe" if settings.get("maybe") else "yes or no"
        system_prompt = TASKS[task].SYSTEM_PROMPT.replace("{classes}", classes)
    method = "a run that is not known"
    if "group_size" in settings:
        method = "GRPO"
    elif "num_epochs" in settings:
        method = "supervised fine-tuning"
    base = config.model if config.adapter or not settings else settings["model"]
    name, data = Path(config.out).name, "data that are not known"
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation",
                             tags=["medical", "question-answering"])
    if on_hub(base):
        metadata.base_model = base
    if task and settings:
        data = f"{task} ({settings['data']})"
    if task and settings and results:
        metric = "score" if "score" in summary["after"] else "accuracy"
        metadata.model_name = name
        metadata.eval_results = [EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=data, dataset_split="held out",
            dataset_args={"n": results["n"]}, metric_type=metric, metric_value=summary["after"][metric])]
    settings = {key: value for key, value in settings.items()
                if key not in ("out", "resume", "wandb", "wandb_project")}
    card = ModelCard.from_template(
        metadata, template_path=str(Path(__file__).parent / "data" / "model_card.md"), name=name, base=base,
        method=method, data=data, system_prompt=system_prompt, prompt_file=prompt_file, dtype=dtype,
        settings=json.dumps(settings, indent=1), **results)
    return f"{card}\n"


def merge(config):
    """Writes config.out, see Merge; all of it or nothing. Raises InputError."""
    out = Path(config.out).resolve()
    if not config.out:
        raise InputError("--out is empty: name the folder to write")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {config.out} is there already, and not an empty folder: take another")
    model, tokenizer, compute = load_model(config.model, config.dtype)
    if config.adapter and hasattr(model, "peft_config"):
        raise InputError(f"--model {config.model} is an adapter folder: name the base there, or leave "
                         "--adapter out")
    if config.adapter:
        model = read_adapter(model, config.adapter, config.model)
    if hasattr(model, "peft_config"):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # NaN in the adapter
            adapter = config.adapter or config.model
            raise InputError(f"--adapter {adapter} cannot be merged: {error}") from None
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            advice = " (try --dtype bf16 or fp32)" if compute == torch.float16 else ""
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
