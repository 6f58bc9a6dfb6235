"""Makes the built-in model: `python -m data.tiny` writes data/tiny/ (about 10 minutes on 2 cores, from built-in text alone).

A Qwen2 of 1.3 million parameters that knows the formats of the tasks and answers badly for an honest reason: it is
warm-started, to the end, on demonstrations of which 60% are by a careless annotator (looks only at the direction of
an effect and ignores the p-value) and 40% by a careful one. Greedily it follows the majority and is wrong on effects that are
not significant; sampled, it sometimes does it right, which is what GRPO needs to find. It is warm-started on training
questions alone, never on held-out ones.
"""
import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

from data import pubmedqa, question_hash

FOLDER = Path(__file__).parent / "tiny"
CARELESS = 0.6  # share of demonstrations by the careless annotator
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def demonstrations(seed):
    """Endless (messages, completion) pairs of all tasks, from questions of the training side."""
    generator = random.Random(seed)
    while True:
        trial = pubmedqa.builtin_trial(generator)
        question = pubmedqa.trial_question(trial)
        if question_hash(question, pubmedqa.SPLIT_SEED) < 0.5:
            continue  # held out
        row = pubmedqa.make_row("demonstration", question, pubmedqa.trial_abstract(trial), trial["label"])
        if generator.random() < CARELESS:
            completion = pubmedqa.target(pubmedqa.careless_reasoning(trial), pubmedqa.careless_label(trial))
        else:
            completion = pubmedqa.target(pubmedqa.careful_reasoning(trial), trial["label"])
        yield row["prompt"], completion


def make_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE (any text can be encoded), every digit a token of its own, chat template in Qwen's form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=4096)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(out, steps, batch_size, learning_rate, hidden, layers, seed):
    torch.manual_seed(seed)
    stream = demonstrations(seed)
    corpus = [text for _ in range(20000 // 4) for messages, completion in [next(stream)]
              for text in (*(message["content"] for message in messages), completion)]
    tokenizer = make_tokenizer(corpus + ["user\n", "assistant\n", "system\n"] * 100)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    start = time.time()
    for step in range(steps):
        batch = []
        for _ in range(batch_size):
            messages, completion = next(stream)
            prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            completion_ids = tokenizer(completion).input_ids + [tokenizer.eos_token_id]
            batch.append((prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids))
        width = max(len(ids) for ids, _ in batch)  # right padding: no mask needed under causal attention
        input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([ids + [-100] * (width - len(ids)) for _, ids in batch])
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  width {width}  {time.time() - start:.0f} s", flush=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(out)  # half the size in the repository; loaded as fp32
    tokenizer.save_pretrained(out)
    (Path(out) / "how_it_was_made.json").write_text(json.dumps(
        {"command": "python -m data.tiny", "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
         "careless": CARELESS, "final_loss": round(loss.item(), 4), "seconds": round(time.time() - start)}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(FOLDER))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
