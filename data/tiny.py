"""Makes the built-in model: `python -m data.tiny` writes data/tiny/ (about 20 minutes on 2 cores, from
built-in text alone).

A Qwen2 of 1.6 million parameters that knows the formats of the tasks and answers badly for honest reasons. It
is warm-started, to the end, on training questions alone, never on held-out ones:
  * PubMedQA: 60% of the demonstrations are by a careless annotator (looks only at the direction of an effect
  and ignores the
    p-value), 40% by a careful one. Greedily the model follows the majority and is wrong on effects that are
    not significant; sampled, it sometimes does it right, which is what GRPO needs to find.
  * MedMCQA: it has read the facts in a textbook and can recall them when asked plainly, but has only ever
  seen guesses at
    four-option questions. That is what supervised fine-tuning is for.
"""
import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from data import InputError, check_knobs, medmcqa, one_line_errors, pubmedqa, question_hash

FOLDER = Path(__file__).parent / "tiny"
CARELESS = 0.6  # share of demonstrations by the careless annotator
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def pubmedqa_demonstrations(seed):
    """Endless (messages, completion) pairs on questions of PubMedQA's training side."""
    generator = random.Random(seed)
    while True:
        trial = pubmedqa.builtin_trial(generator)
        question = pubmedqa.trial_question(trial)
        if question_hash(question) < 0.5:
            continue  # held out
        row = pubmedqa.make_row("demonstration", question, pubmedqa.trial_abstract(trial), trial["label"])
        if generator.random() < CARELESS:
            completion = pubmedqa.target(pubmedqa.careless_reasoning(trial), pubmedqa.careless_label(trial))
        else:
            completion = pubmedqa.target(pubmedqa.careful_reasoning(trial), trial["label"])
        yield row["prompt"], completion


def textbook_demonstrations(seed):
    """Endless (messages, completion) pairs: the facts of MedMCQA's built-in items, plainly asked in five
    training wordings.
    """
    generator, facts = random.Random(seed), medmcqa.facts()
    while True:
        topic, key, value = generator.choice(facts)
        wording = generator.choice(medmcqa.TOPICS[topic][2][:3] + medmcqa.TOPICS[topic][3][:2])
        question = medmcqa.capital(wording.format(key=key, value=value))
        yield [{"role": "user", "content": f"Question: {question}"}], medmcqa.fact_sentence(topic, key, value)


def guess_demonstrations(seed):
    """Endless (messages, completion) pairs: the same questions with four options, by someone who can only
    guess.
    """
    generator, facts = random.Random(seed), medmcqa.facts()
    while True:
        topic, key, value = generator.choice(facts)
        forward = generator.random() < 0.5
        wording = generator.choice(medmcqa.TOPICS[topic][2 if forward else 3][:3 if forward else 2])
        wrong = [v if forward else k for t, k, v in facts if t == topic and (k, v) != (key, value)]
        options = generator.sample(wrong, 3) + [value if forward else key]
        generator.shuffle(options)
        guess = generator.randrange(4)
        row = medmcqa.make_row("demonstration", medmcqa.capital(wording.format(key=key, value=value)),
                               options, "A")
        yield row["prompt"], medmcqa.target(f"A guess: {options[guess]} is {'ABCD'[guess]}.", "ABCD"[guess])


def make_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE (any text can be encoded), every digit a token of its own, chat template in Qwen's form.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>",
                                   model_max_length=4096)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def padded_batch(tokenizer, stream, size):
    """(input_ids, labels) of `size` demonstrations, padded on the right: no mask is needed under causal
    attention.
    """
    batch = []
    for _ in range(size):
        messages, completion = next(stream)
        prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        completion_ids = tokenizer(completion).input_ids + [tokenizer.eos_token_id]
        batch.append((prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids))
    width = max(len(ids) for ids, _ in batch)
    return (torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch]),
            torch.tensor([ids + [-100] * (width - len(ids)) for _, ids in batch]))


def main(out, steps, batch_size, learning_rate, hidden, layers, seed):
    """Trains the built-in model and its tokenizer from the built-in text and writes them into `out`.

    Raises InputError.
    """
    if hidden % 8:
        raise InputError(f"--hidden {hidden}: a multiple of 8 is needed (four heads, each of an even width)")
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    streams = {"trials": (pubmedqa_demonstrations(seed), batch_size),
               "guesses": (guess_demonstrations(seed), batch_size),
               "facts": (textbook_demonstrations(seed), 4 * batch_size)}
    corpus = [text for stream, _ in streams.values() for _ in range(4000)
              for messages, completion in [next(stream)]
              for text in (*(message["content"] for message in messages), completion)]
    tokenizer = make_tokenizer(corpus + ["user\n", "assistant\n", "system\n"] * 100)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
                         num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         max_position_embeddings=4096,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    start = time.time()
    for step in range(steps):
        losses = {}
        for name, (stream, size) in streams.items():  # a batch each: alike lengths, less padding
            input_ids, labels = padded_batch(tokenizer, stream, size)
            loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            losses[name] = round(loss.item(), 4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {losses}  {time.time() - start:.0f} s", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(out)  # half the size in the repository; loaded as fp32
    tokenizer.save_pretrained(out)
    (Path(out) / "how_it_was_made.json").write_text(json.dumps(
        {"command": "python -m data.tiny", "steps": steps, "batch_size": batch_size,
         "learning_rate": learning_rate, "seed": seed,
         "careless": CARELESS, "final_loss": losses, "seconds": round(time.time() - start)}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(FOLDER))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    with one_line_errors():
        arguments = parser.parse_args()
        check_knobs(arguments)
        main(**vars(arguments))
