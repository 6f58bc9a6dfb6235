"""Tiny random models of five families, saved to disk as hub models are, with the families' own chat
templates.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub; those about the hub set this themselves

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA = """{{ bos_token }}{% for message in messages %}\
{% if loop.first and message.role == 'system' %}<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}

{{ message.content | trim }}<|eot_id|>{% else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3 = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
PHI = """{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
GEMMA = """{{ bos_token }}\
{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=4096, initializer_range=0.2)
# family: (model class, config, chat template, extra special tokens, eos, pad, eos ids of the generation
# config)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL), LLAMA,
              ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
              "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", None, ["<|end_of_text|>", "<|eot_id|>"]),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True), CHATML,
              ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16), QWEN3,
              ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>",
              "</think>"], "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SMALL, pad_token_id=None), PHI,
             ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>",
             "<|end|>"], "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"]),
    "gemma3": (Gemma3ForCausalLM,
               Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
               layer_types=["sliding_attention", "full_attention", "sliding_attention"]), GEMMA,
               ["<pad>", "<eos>", "<bos>",
               "<start_of_turn>", "<end_of_turn>"], "<eos>", "<pad>", ["<eos>"]),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by default, run with -m slow")
    config.addinivalue_line("markers", "real: on real weights; left out by default, run with -m real")
    # peft calls it
    config.addinivalue_line("filterwarnings",
                            "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "real"):
        if mark not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"{mark}: run with -m {mark}"))


def save_family(family, folder, vocab_size=None):
    """A random model of a family and a tokenizer with its special tokens and template, in the hub's file
    format.
    """
    model_class, config, template, special, eos, pad, eos_tokens = FAMILIES[family]
    base = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, eos_token=eos, pad_token=pad,
                                        bos_token=next((token for token in special if "begin" in token
                                                        or token == "<bos>"), None))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = type(config)(**{**config.to_dict(), "vocab_size": vocab_size or len(tokenizer),
                             "bos_token_id": None,
                             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    torch.manual_seed(len(family))
    model = model_class(config)
    model.generation_config = GenerationConfig(  # what hub models carry, and rollouts must not see
        eos_token_id=tokenizer.convert_tokens_to_ids(eos_tokens), pad_token_id=0, do_sample=True, top_k=3,
        top_p=0.8,
        temperature=0.7, repetition_penalty=1.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """Function from a family's name to the folder of its model."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = str(save_family(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return folder


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def real_model():
    """Function from a name of tests/real_models.py to its folder in GRPO_TEST_MODELS or models/, or skips."""
    def folder(name):
        path = Path(os.environ.get("GRPO_TEST_MODELS") or ROOT / "models") / name
        if not (path / "config.json").exists():
            pytest.skip(f"no {path}: python tests/real_models.py {name}")
        return str(path)

    return folder


@pytest.fixture
def real_data():
    """The folder of real rows that GRPO_TEST_DATA names; tests that need it are skipped without."""
    folder = os.environ.get("GRPO_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("GRPO_TEST_DATA names no folder with real rows")
    return Path(folder)
