"""GRPO on PubMedQA in one file: a language model learns to answer yes/no from an abstract, by trial.

    python grpo_pubmedqa.py                GPU: Qwen2.5-0.5B-Instruct, all weights, the hub's PubMedQA
                                           no GPU: the built-in model and questions, about 2 minutes
    python grpo_pubmedqa.py --data PATH    your own file: a JSON list of {question, context, ground_truth}
    python grpo_pubmedqa.py --completions_per_forward 4    less memory in the update, the same gradient
    python grpo_pubmedqa.py --help         every knob

The method (Shao et al. 2024, arXiv:2402.03300): sample a group of completions of each prompt; an answer's
advantage is its reward, normalised within its group; push up the log-probabilities of the better ones,
clipped as in PPO, and stay close to a reference model, here a frozen copy of the policy that is renewed every
`ref_every` steps.

Look at the reward and the held-out accuracy, not at the loss: the advantages of a group sum to zero, so the
loss of the first epoch stands near 0 however well training goes. What this file leaves out: several GPUs, an
inference engine.
"""
import copy
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import DynamicCache

import eval as evaluation
from data import load_task, one_line_errors, pubmedqa
from data.run import Run, not_finite, retry_with_less_memory

GPU = torch.cuda.is_available()


@dataclass
class Config:
    """GRPO on PubMedQA: all weights of a small language model trained on yes/no questions about abstracts."""

    # --- model
    model: str = pubmedqa.BASE_MODEL if GPU else "tiny"  # hub id, model folder, or tiny (the built-in model)
    # to compute in; the weights are fp32. auto: bf16, or fp16 on cards that lack it
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    attn_implementation: str = "sdpa"  # attention kernel of transformers
    # --- data
    data: str = "hub" if GPU else "builtin"  # builtin, hub, hub:ORG/NAME[:CONFIG], or a file or folder
    maybe: bool = False  # keep the third class, maybe
    question_field: str = ""  # field of your own file that holds the question ("" = question)
    context_field: str = ""  # ... the abstract ("" = context)
    answer_field: str = ""  # ... the label ("" = ground_truth)
    system_prompt: str = ""  # file with a system prompt instead of the built-in one
    limit: int = 0  # read only so many rows (0 = all)
    # --- rollout
    steps: int = 300  # GRPO steps
    prompts_per_step: int = 8  # prompts in a step (P)
    group_size: int = 8  # completions per prompt (G)
    max_prompt_length: int = 1024  # tokens; rows with a longer prompt are left out, and counted
    max_completion_length: int = 300  # tokens; longer completions are cut and count as truncated
    # texts that end a completion, for base models that do not stop: </answer>
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0  # of sampling, and of the log-probabilities in the loss
    # draw up to so many extra batches to replace groups whose rewards are all equal
    resample_zero_std: int = 0
    # --- reward
    correct_weight: float = 2.0  # for the right answer in its one block
    tag_weight: float = 0.2  # for each of the four tags that stands once and in its place
    # --- loss
    mu: int = 1  # optimiser epochs over a rollout
    beta: float = 0.04  # weight of the KL to the reference; 0: no reference is made
    ref_every: int = 64  # steps after which the reference becomes a copy of the policy (0 = never)
    # its gradient: the KL's own, or that of the GRPO paper's form
    kl_estimator: Literal["unbiased", "k3"] = "unbiased"
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float = 0.2  # ... and above 1 + epsilon_high; larger than epsilon: clip-higher (DAPO)
    # how tokens' losses become one; see grpo_loss
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = "grpo"
    importance_level: Literal["token", "sequence"] = "token"  # a ratio a token, or one a sequence (GSPO)
    # whose standard deviation divides the advantages
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated: bool = False  # leave truncated completions out of the loss and of its denominators
    # > 0: weigh tokens by min(trainer / sampler probability, cap); for bf16 and fp16
    importance_cap: float = 0.0
    # --- optimiser
    learning_rate: float = 1e-6  # peak of AdamW's
    warmup: float = 0.1  # share of the steps in which the rate rises; then it falls, nearly to 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # completions of a group in a forward pass (0 = all); less memory, same gradient
    completions_per_forward: int = 0
    # --- evaluation
    eval_size: int = 200  # held-out questions scored before and after
    eval_every: int = 50  # also score them every so many steps (0 = only before and after)
    eval_batch_size: int = 64  # questions answered at a time
    # --- run
    out: str = ""  # folder of the run (default: runs/grpo_pubmedqa-<time>)
    resume: bool = False  # continue the run in --out from its checkpoint
    dry_run: bool = False  # only say how much memory and how long a step takes, after one; leaves no folder
    save_every: int = 50  # steps between checkpoints (0 = only when stopped)
    seed: int = 0  # of sampling and of the order of the questions
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # also log to Weights & Biases
    wandb_project: str = "grpo-medical"  # under this project


# What differs for the built-in model; applied with --model tiny only, and never over a flag that was given.
TINY = dict(steps=60, prompts_per_step=16, learning_rate=1e-4, beta=0.01, ref_every=25,
            max_completion_length=64, max_prompt_length=2048, eval_every=20)


def score(texts, rows, config):
    """What completions earn: a dict each, of its parts and their sum, key `score` (2.0 for the right answer
    and 0.2 a tag by default).
    """
    return evaluation.score_completions(texts, rows, correct_weight=config.correct_weight,
                                        tag_weight=config.tag_weight)


def group_rewards(scores, config):
    """Rewards [G] of a group, of which the advantages are made, from the scores of its completions.

    config: not needed here; `rollout`, the same in the three scripts, gives it.
    """
    return torch.tensor([scored["score"] for scored in scores], dtype=torch.float64)


# === shared: algorithm ======================================================================================
# The same to the letter in the three scripts, in the order of a step. P prompts, G completions of each, at
# most T tokens long. What a completion earns is the task's: `score` and `group_rewards`, above.


def question_stream(rows, seed, position):
    """Endless rows, (row, prompt_ids) each, shuffled anew each epoch.

    The order hangs on the seed alone, so a resumed run goes on.
    """
    while True:
        epoch, start = divmod(position, len(rows))
        order = random.Random(f"{seed}-{epoch}").sample(range(len(rows)), len(rows))
        for index in order[start:]:
            position += 1
            yield rows[index]


def learning_rate(step, config, schedule_steps):
    """Linear warm-up to the peak, then linear decay; schedule_steps is the number of steps at launch."""
    warmup = max(1, config.warmup * schedule_steps)
    falling = max(1, schedule_steps + 1 - step) / max(1, schedule_steps + 1 - warmup)
    return config.learning_rate * min(1, step / warmup, falling)


def rollout(model, tokenizer, questions, config, compute, stops, generator):
    """Samples a group of completions for each of the next P questions and scores them; a list of P dicts."""
    batch = [next(questions) for _ in range(config.prompts_per_step)]
    with evaluation.autocast(compute):
        completion_ids, completion_mask, sampler_logps = evaluation.generate(
            model, [prompt_ids for _, prompt_ids in batch], config.group_size,
            max_new_tokens=config.max_completion_length, temperature=config.temperature, stop_ids=stops,
            stop_strings=config.stop_strings, tokenizer=tokenizer, generator=generator)
    texts = evaluation.decode(tokenizer, completion_ids, completion_mask, config.stop_strings)
    scores = score(texts, [row for row, _ in batch for _ in range(config.group_size)], config)
    groups = []
    for i, (row, prompt_ids) in enumerate(batch):
        members = slice(i * config.group_size, (i + 1) * config.group_size)
        lengths = completion_mask[members].sum(dim=1)
        ids = completion_ids[members, :lengths.max()]
        mask = completion_mask[members, :lengths.max()]
        last = ids.gather(1, lengths[:, None] - 1)[:, 0]
        ended = torch.isin(last, torch.tensor(stops, device=ids.device))
        ended |= torch.tensor([text.endswith(config.stop_strings) for text in texts[members]],
                              device=ids.device)
        rewards = group_rewards(scores[members], config)
        groups.append({
            "row": row, "prompt_ids": torch.tensor(prompt_ids, device=ids.device), "texts": texts[members],
            "completion_ids": ids,  # [G, T], as are the mask and the logps
            "completion_mask": mask & ended[:, None] if config.mask_truncated else mask,
            "sampler_logps": sampler_logps[members, :lengths.max()],
            "lengths": lengths, "truncated": ~ended,  # [G]; truncated: cut at the limit, without an EOS
            "scores": scores[members], "rewards": rewards,
            "zero_std": bool(rewards.max() == rewards.min())})
    return groups


def group_advantages(rewards, scale_rewards):
    """Advantages [P, G] of rewards [P, G]: how much better than its group each completion did.

    Divided by the standard deviation (n - 1) of the group, of the batch, or by nothing (Dr. GRPO,
    arXiv:2503.20783).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "none":
        return centred
    std = rewards.std(dim=1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centred / (std + 1e-4)


def prompt_cache(model, prompt_ids):
    """Keys and values of all tokens of a prompt, [S] ids, but the last: pairs of [1, KV heads, S - 1, d].

    The G completions of a group share their prompt, so it is computed once for all of them, here.
    Differentiable.
    """
    cache = DynamicCache()
    model.get_decoder()(prompt_ids[None, :-1], past_key_values=cache, use_cache=True)
    return [(keys, values) for keys, values, _ in cache]


def token_logps(model, prompt, prompt_ids, completion_ids, temperature):
    """Log-probabilities of completions of one prompt, token by token, and the entropy of each choice.

    prompt: prompt_cache(model, prompt_ids); completion_ids [G, T], padded on the right. Returns logps and
    entropy, both [G, T], fp32, in nats; logps is differentiable in the model and in `prompt`. No mask is
    needed: under causal attention padding comes after everything that counts, and its own values are masked
    in the loss.
    """
    G = len(completion_ids)
    cache = DynamicCache([[x.expand(G, -1, -1, -1) for x in pair] for pair in prompt])  # which copies them
    inputs = torch.cat([prompt_ids[-1:].expand(G, 1), completion_ids[:, :-1]], dim=1)
    # no key is copied for the query heads that share it
    with evaluation.attention(model, "group", instead_of="sdpa"):
        hidden = model.get_decoder()(inputs, past_key_values=cache, use_cache=True)[0]
    logps, entropy = evaluation.chosen_logps(model, hidden.flatten(0, 1), completion_ids.flatten(),
                                             temperature)
    return logps.view_as(completion_ids), entropy.view_as(completion_ids)


def length_parts(completion_mask, size):
    """Cuts a group into parts of alike lengths, at most `size` completions each; [(places, length)].

    completion_mask [G, T]. A part is padded to its longest completion, and is a pass of its own, which costs
    about as much as 32 tokens: the cuts are those with the least cost together. Completions that no loss
    counts are left out.
    """
    positions = torch.arange(1, completion_mask.shape[1] + 1, device=completion_mask.device)
    lengths = (completion_mask * positions).amax(dim=1).tolist()  # up to the last token that counts
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    cheapest = [(0, [])]  # of the first n completions: tokens, and the parts
    for end in range(1, len(order) + 1):
        cheapest.append(min((cheapest[start][0] + lengths[order[start]] * (end - start) + 32,
                             [*cheapest[start][1], order[start:end]])
                            for start in range(max(0, end - size), end)))
    return [(torch.tensor(part, device=completion_mask.device), lengths[part[0]]) for part in cheapest[-1][1]]


def add_reference_logps(reference, groups, config, compute):
    """Gives each group ref_logps [G, T]: the log-probabilities of its completions under the reference."""
    size = 8 * (config.completions_per_forward or config.group_size)  # a pass without gradient keeps less
    for group in groups:
        group["ref_logps"] = torch.zeros_like(group["sampler_logps"])
        with torch.no_grad(), evaluation.autocast(compute):
            prompt = prompt_cache(reference, group["prompt_ids"])
            for part, T in length_parts(group["completion_mask"], size):
                ids = group["completion_ids"][part, :T]
                logps, _ = token_logps(reference, prompt, group["prompt_ids"], ids, config.temperature)
                group["ref_logps"][part, :T] = logps


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, *, num_sequences, num_tokens,
              max_completion_length, epsilon, epsilon_high, beta, loss_type, importance_level,
              kl_estimator="unbiased", weights=None):
    """GRPO loss of some completions of a rollout, and sums over their tokens of what one wants to watch.

    logps, old_logps, ref_logps (not read where beta = 0), completion_mask, weights (importance weights, or
    None): [G, T]; advantages [G]. The denominators num_sequences, num_tokens and max_completion_length are
    those of the whole rollout, so the losses of its parts add up to its loss, however it is cut. Returns
    (loss, sums of kl, clip_fraction).

    The numbers are TRL 1.16's for loss_type grpo, dapo, dr_grpo and cispo, token and sequence level, with
    kl_estimator "unbiased" for its use_bias_correction_kl=True and "k3" for False. One difference is on
    purpose: at sequence level "unbiased" takes the token's ratio, where TRL takes the sequence's (its issue
    6594).
    """
    mask = completion_mask.float()
    advantages = advantages[:, None]
    token_ratio = (logps - old_logps).exp()
    ratio = token_ratio
    if importance_level == "sequence":  # GSPO, arXiv:2507.18071: the geometric mean of the token ratios
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        ratio = (((logps - old_logps) * mask).sum(dim=1, keepdim=True) / lengths).exp()
    too_high = (ratio > (epsilon_high if loss_type == "cispo" else 1 + epsilon_high)) & (advantages > 0)
    if loss_type == "cispo":  # arXiv:2506.13585: the capped ratio is a weight, no token loses its gradient
        token_loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logps
        was_clipped = too_high
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        token_loss = -torch.min(ratio * advantages, clipped * advantages)  # PPO, arXiv:1707.06347, eq. 7
        was_clipped = too_high | ((ratio < 1 - epsilon) & (advantages < 0))
    if weights is not None:
        token_loss = token_loss * weights
    kl = torch.zeros_like(logps)
    if beta:
        kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1  # k3, http://joschu.net/blog/kl-approx.html
        if kl_estimator == "unbiased":  # then its mean gradient is the reverse KL's, arXiv:2510.01555
            token_loss = token_loss + beta * token_ratio * kl
        else:
            token_loss = token_loss + beta * kl
    token_loss = token_loss * mask
    if loss_type == "grpo":  # mean over each sequence's tokens, then over sequences
        loss = (token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / num_sequences
    elif loss_type in ("dapo", "cispo"):  # mean over all tokens, arXiv:2503.14476
        loss = token_loss.sum() / num_tokens
    else:  # dr_grpo: over a constant, so that long answers weigh no less
        loss = token_loss.sum() / (num_sequences * max_completion_length)
    return loss, {"kl": (kl.detach() * mask).sum().item(), "clip_fraction": (was_clipped * mask).sum().item()}


def policy_gradient(model, groups, first_epoch, config, compute, scaler):
    """Adds the gradient of the whole rollout's loss to the model's parameters, a few completions at a time.

    The first epoch after sampling writes each group's old_logps, later ones read them; groups without
    ref_logps are of a policy that is its own reference, or has none. Returns sums over the tokens passed:
    loss, kl, clip_fraction, entropy, sampler_gap (|trainer - sampler| log-probability), tokens.
    """
    masks = [group["completion_mask"] for group in groups]
    # denominators: the whole rollout's, for all its parts
    num_tokens = max(1, sum(int(mask.sum()) for mask in masks))
    num_sequences = max(1, sum(int(mask.any(dim=1).sum()) for mask in masks))
    size = config.completions_per_forward or config.group_size
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "entropy", "sampler_gap", "tokens"), 0.0)
    with evaluation.sparse_embedding_gradient(model):
        for group in groups:
            if (group["zero_std"] and not config.beta) or not group["completion_mask"].any():
                continue  # no advantage and no KL, or no token that counts: no gradient
            if first_epoch:
                group["old_logps"] = torch.zeros_like(group["sampler_logps"])
            with evaluation.autocast(compute):
                prompt = prompt_cache(model, group["prompt_ids"])
            # the parts of a group send their gradients to copies of the prompt's keys and values ...
            leaves = [[x.detach().requires_grad_() for x in pair] for pair in prompt]
            for part, T in length_parts(group["completion_mask"], size):
                ids, mask = group["completion_ids"][part, :T], group["completion_mask"][part, :T]
                with evaluation.autocast(compute):
                    logps, entropy = token_logps(model, leaves, group["prompt_ids"], ids, config.temperature)
                if first_epoch:  # the policy is still the one that sampled: its own logps are the old ones
                    group["old_logps"][part, :T] = logps.detach()
                old_logps = group["old_logps"][part, :T]
                ref_logps = group["ref_logps"][part, :T] if "ref_logps" in group else old_logps
                gap = old_logps - group["sampler_logps"][part, :T]
                loss, watched = grpo_loss(
                    logps, old_logps, ref_logps, group["advantages"][part], mask, num_sequences=num_sequences,
                    num_tokens=num_tokens, max_completion_length=config.max_completion_length,
                    epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta,
                    loss_type=config.loss_type, importance_level=config.importance_level,
                    kl_estimator=config.kl_estimator,
                    weights=gap.exp().clamp(max=config.importance_cap) if config.importance_cap else None)
                scaler.scale(loss).backward()
                watched |= {"loss": loss.item(), "entropy": (entropy * mask).sum().item(),
                            "sampler_gap": (gap.abs() * mask).sum().item(), "tokens": int(mask.sum())}
                sums = {key: sums[key] + watched[key] for key in sums}
            # ... and these go through the prompt once
            torch.autograd.backward([x for pair in prompt for x in pair],
                                    [x.grad for pair in leaves for x in pair])
    return sums


def training_state(optimizer, scaler, generator, config, **progress):
    """All that a checkpoint holds but the weights. progress: step, position, seconds."""
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "generator": generator.get_state(), "completions_per_forward": config.completions_per_forward,
            **progress}


def restore_training(state, optimizer, scaler, generator, config):
    """The way back. Returns (step, position, when a run without stops would have started)."""
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    generator.set_state(state["generator"])
    config.completions_per_forward = state["completions_per_forward"]  # halved where memory had run out
    return state["step"], state["position"], time.time() - state["seconds"]


def parse(arguments=None):
    """Command line to Config. With --model tiny, TINY stands in for the defaults, below every given flag."""
    usual = tyro.cli(Config, args=arguments, use_underscores=True)
    if usual.model != "tiny":
        return usual
    config = tyro.cli(Config, args=arguments, use_underscores=True, default=replace(Config(), **TINY))
    changed = [f"{key} {getattr(config, key)}" for key in TINY if getattr(config, key) != getattr(usual, key)]
    why = "" if GPU else "no GPU: "
    questions = " and questions" if config.data == "builtin" else ""
    print(f"{why}the built-in tiny model{questions}; settings for it: {', '.join(changed)}")
    return config


# === end shared =============================================================================================


def main(config):
    """The whole run: load, evaluate, train step by step, evaluate, save. Raises InputError."""
    evaluation.check_config(config)
    run = Run("grpo_pubmedqa", config)
    if run.finished:
        print(f"{run.folder} is finished (it has a summary.json): nothing left to do")
        return
    evaluation.check_base(config.model)

    # --- data, model, and everything else that a checkpoint holds
    train, heldout, counts = load_task(pubmedqa, config)
    evaluation.check_rows(config, train, heldout, counts)
    library_bytes = evaluation.doctor(config, train, heldout)  # in memory before the model
    model, tokenizer, compute = evaluation.load_model(config.model, config.dtype, fp32_weights=True,
                                                      attn_implementation=config.attn_implementation)
    train = evaluation.encode_rows(tokenizer, train, config.max_prompt_length, "training")
    heldout = evaluation.encode_rows(tokenizer, heldout[:config.eval_size], config.max_prompt_length,
                                     "held-out")
    if config.dry_run:  # two steps on the longest rows, in a folder that is gone afterwards
        train, heldout, estimate = evaluation.longest_rows(config, train, heldout, library_bytes)
        config = replace(config, steps=2, eval_every=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = copy.deepcopy(model).requires_grad_(False) if config.beta else None
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=compute == torch.float16)
    generator = torch.Generator(model.device).manual_seed(config.seed)
    stops = evaluation.stop_ids(model, tokenizer)
    run.open([row for row, _ in train], [row for row, _ in heldout])
    step, position = 0, 0  # steps done, prompts drawn
    start = time.time()  # a resumed run's lies further back
    state = run.load_checkpoint()
    if state:
        model.load_state_dict(state["model"])
        if config.beta:
            reference.load_state_dict(state["reference"])
        step, position, start = restore_training(state, optimizer, scaler, generator, config)

    def save():
        weights = {"model": model.state_dict()}
        if config.beta:
            weights["reference"] = reference.state_dict()
        rest = training_state(optimizer, scaler, generator, config, step=step, position=position,
                              seconds=time.time() - start)
        run.save_checkpoint(weights | rest)

    def evaluate(title):
        return evaluation.evaluate(model, tokenizer, heldout, compute, title=title,
                                   batch_size=config.eval_batch_size,
                                   max_completion_length=config.max_completion_length,
                                   stop_strings=config.stop_strings,
                                   score=lambda texts, rows: score(texts, rows, config))

    # --- before
    if not state:
        run.write_records("eval_before", evaluate("before"))
    before, summary = run.read_before(heldout, evaluation.summarize)
    print("before:", evaluation.describe(summary))
    for line in evaluation.early_warnings(summary, config, "pubmedqa"):
        print(f"WARNING: {line}")

    # --- training
    questions = question_stream(train, config.seed, position)
    bar = tqdm(run.steps(step + 1, config.steps), "train", config.steps, initial=step, unit="step",
               disable=None)
    for step in bar:
        # the reference is the policy in the first step, and every ref_every steps again
        renewed = step == 1 or (config.ref_every > 0 and (step - 1) % config.ref_every == 0)
        if config.beta and renewed:
            reference.load_state_dict(model.state_dict())

        # sample groups; on demand, groups whose rewards are all equal make room for those of other questions
        clock = time.time()
        groups = rollout(model, tokenizer, questions, config, compute, stops, generator)
        extra_batches = 0
        while extra_batches < config.resample_zero_std and any(group["zero_std"] for group in groups):
            extra_batches += 1
            groups += rollout(model, tokenizer, questions, config, compute, stops, generator)
            groups = sorted(groups, key=lambda group: group["zero_std"])[:config.prompts_per_step]
        position += config.prompts_per_step * (1 + extra_batches)
        generate_seconds = time.time() - clock

        # rewards to advantages, each completion against its group
        clock = time.time()
        step_rewards = torch.stack([group["rewards"] for group in groups])  # [P, G]
        for group, advantages in zip(groups, group_advantages(step_rewards, config.scale_rewards)):
            group["advantages"] = advantages.float().to(model.device)

        # the reference's log-probabilities; not in a step where it is the policy itself
        if config.beta and not renewed:
            retry_with_less_memory(config, optimizer,
                                   lambda: add_reference_logps(reference, groups, config, compute))

        # mu epochs on the same rollout: gradient, clip, step
        optimizer.param_groups[0]["lr"] = learning_rate(step, config, run.schedule_steps)
        epochs, grad_norm = [], 0.0
        for epoch in range(config.mu):
            epochs.append(retry_with_less_memory(config, optimizer, lambda: policy_gradient(
                model, groups, epoch == 0, config, compute, scaler)))
            if not epochs[-1]["tokens"]:
                continue  # every group was skipped
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
            numbers = {"loss": epochs[-1]["loss"], "gradient": grad_norm}
            bad = not_finite(numbers, groups)
            if bad:
                run.skip_update_or_give_up(step, bad, numbers, groups, scaler)
            else:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        # metrics: means over the step's completions (and, of what the loss saw, over its tokens)
        sums = {key: sum(epoch[key] for epoch in epochs) for key in epochs[0]}
        per_token = ("kl", "clip_fraction", "entropy", "sampler_gap")
        metrics = {
            "step": step, **evaluation.rollout_metrics(groups), "extra_batches": extra_batches,
            "loss": sums["loss"] / config.mu,
            **{key: sums[key] / max(1, sums["tokens"]) for key in per_token},
            "grad_norm": grad_norm, "skipped_updates": run.skipped[step],
            "learning_rate": optimizer.param_groups[0]["lr"], "generate_seconds": generate_seconds,
            "update_seconds": time.time() - clock, "peak_memory_gb": evaluation.peak_memory_gb()}
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            metrics["eval_accuracy"] = evaluation.summarize(evaluate(f"step {step}"))["accuracy"]
        run.report(bar, metrics, groups[0])
        if config.dry_run and step == 2:  # the first one warmed up
            evaluation.print_dry_run(metrics, estimate, run.settings["steps"])
            run.close()
            return
        if run.stop_signal or step == config.steps or (config.save_every and step % config.save_every == 0):
            save()
            if run.stop_signal:
                bar.close()
                sys.exit(run.stopped(step))

    # --- after
    run.write_records("eval_after", evaluate("after"))
    comparison = evaluation.compare(before, run.read_records("eval_after"))
    model.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    run.finish({**comparison, "steps": config.steps, "seconds": time.time() - start, "seed": config.seed,
                "model": config.model, "data": config.data, "versions": evaluation.versions()})


if __name__ == "__main__":
    evaluation.keep_freed_memory()
    with one_line_errors():
        main(parse())
