"""The algorithm, to the digit: TRL's numbers, and the invariants of GRPO on real (tiny) models."""
import ast
import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model

import eval as evaluation
import grpo_pubmedqa as grpo
from data import pubmedqa

# made with TRL 1.16, see "source" in the file
TRL = json.loads((Path(__file__).parent / "trl_loss.json").read_text())
CONFIG = replace(grpo.Config(), model="tiny", data="builtin", prompts_per_step=3, group_size=4,
                 max_completion_length=48, beta=0.05)
SCRIPTS = sorted(Path(__file__).parents[1].glob("grpo_*.py"))


def tensor(name):
    return torch.tensor(TRL[name])


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda c: "-".join(str(v) for v in list(c.values())[:6]))
def test_loss_and_gradient_are_trls(case):
    logps, mask = tensor("per_token_logps").requires_grad_(), tensor("completion_mask").bool()
    loss, _ = grpo.grpo_loss(
        logps, tensor("old_per_token_logps"), tensor("ref_per_token_logps"),
        torch.tensor(TRL["advantages"]["group"]), mask,
        num_sequences=len(mask), num_tokens=TRL["num_tokens"],
        max_completion_length=TRL["max_completion_length"],
        epsilon=case["epsilon"], epsilon_high=case["epsilon"] if case["epsilon_high"] is None
        else case["epsilon_high"],
        beta=case["beta"], loss_type=case["loss_type"], importance_level=case["importance_sampling_level"],
        kl_estimator="unbiased" if case["use_bias_correction_kl"] else "k3")
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    assert torch.allclose(logps.grad, torch.tensor(case["dloss_dlogp"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
    rewards = tensor("rewards").view(-1, TRL["num_generations"])
    advantages = grpo.group_advantages(rewards, scale)
    assert torch.allclose(advantages.flatten(), torch.tensor(TRL["advantages"][scale]), atol=1e-6, rtol=0)
    assert torch.allclose(advantages.sum(dim=1), torch.zeros(len(rewards)), atol=1e-5)


def test_the_algorithm_block_is_the_same_in_all_scripts():
    blocks = [
        path.read_text().partition("# === shared: algorithm ===")[2].partition("# === end shared ===")[0]
        for path in SCRIPTS]
    assert blocks[0].strip() and all(block == blocks[0] for block in blocks)


MAY_IMPORT = {  # of ours, by name, "data" with all its modules (DESIGN 2)
    "data": {"data"}, "rewards": set(), "eval": {"data", "rewards"}, "sft": {"data", "rewards", "eval"},
    "grpo_pubmedqa": {"data", "rewards", "eval"}, "grpo_medmcqa": {"data", "rewards", "eval"},
    "grpo_ecg": {"data", "rewards", "eval"}}


def test_imports_run_one_way():
    for path in (*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")):
        name = "data" if path.parent.name == "data" else path.stem
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
        assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[name], (path, imported)


# --- the loss in every other setting, and the KL whose gradient is a KL's -----------------------------------


def loss_by_the_book(logps, old_logps, ref_logps, advantages, mask, *, num_tokens, max_completion_length,
                     epsilon, epsilon_high,
                     beta, loss_type, importance_level, kl_estimator):
    """The loss from its formulas in DESIGN 7, a token at a time, in double precision: no line in common with
    grpo_loss.
    """
    sequences = []
    for lp, old, ref, advantage, on in zip(logps, old_logps, ref_logps, advantages, mask):
        counted = [t for t in range(len(on)) if on[t]]
        sequence_ratio = torch.stack([lp[t] - old[t] for t in counted]).mean().exp()
        terms = []
        for t in counted:
            token_ratio = torch.exp(lp[t] - old[t])
            ratio = sequence_ratio if importance_level == "sequence" else token_ratio
            if loss_type == "cispo":
                gain = min(ratio.item(), epsilon_high) * advantage * lp[t]
            else:
                kept = min(max(ratio.item(), 1 - epsilon), 1 + epsilon_high)
                gain = ratio * advantage if ratio.item() * advantage <= kept * advantage else torch.tensor(
                    kept * advantage)
            k3 = torch.exp(ref[t] - lp[t]) - (ref[t] - lp[t]) - 1
            terms.append(beta * (k3 * token_ratio if kl_estimator == "unbiased" else k3) - gain)
        sequences.append(torch.stack(terms))
    if loss_type == "grpo":
        return torch.stack([terms.mean() for terms in sequences]).mean()
    total = torch.cat(sequences).sum()
    return total / (len(sequences) * max_completion_length if loss_type == "dr_grpo" else num_tokens)


@pytest.mark.parametrize("old", ["given", "the policy's own"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon_high", [None, 0.28, 3.0])
@pytest.mark.parametrize("kl_estimator", ["unbiased", "k3"])
@pytest.mark.parametrize("importance_level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_loss_and_gradient_in_every_setting(loss_type, importance_level, kl_estimator, epsilon_high, scale,
                                            old):
    mask = tensor("completion_mask").bool()
    setting = dict(num_tokens=TRL["num_tokens"], max_completion_length=TRL["max_completion_length"],
                   epsilon=0.2,
                   epsilon_high=0.2 if epsilon_high is None else epsilon_high, beta=0.04, loss_type=loss_type,
                   importance_level=importance_level, kl_estimator=kl_estimator)
    results = []
    for double in (False, True):
        logps = tensor("per_token_logps").to(torch.float64 if double else torch.float32).requires_grad_()
        old_logps = logps.detach() if old != "given" else tensor("old_per_token_logps").to(logps.dtype)
        ref_logps = tensor("ref_per_token_logps").to(logps.dtype)
        if double:
            loss = loss_by_the_book(logps, old_logps, ref_logps, TRL["advantages"][scale], mask, **setting)
        else:
            loss, _ = grpo.grpo_loss(logps, old_logps, ref_logps, torch.tensor(TRL["advantages"][scale]),
                                     mask,
                                     num_sequences=len(mask), **setting)
        loss.backward()
        results.append((loss.item(), logps.grad.double()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6, rtol=0)


def test_the_unbiased_estimators_expected_gradient_is_that_of_the_reverse_kl():
    """A policy over a vocabulary of 5 and answers of 2 tokens, all 25 of them summed with their
    probabilities.

    The exact value is the sum over positions of KL(policy || reference) after each prefix, prefixes weighted
    as sampled (constants, as in every token-level policy gradient). k3 as it stands misses its gradient by
    0.638 of its size here.
    """
    generator = torch.Generator().manual_seed(0)
    V = 5
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
                     for shape in ((V,), (V, V)))
    ref_first, ref_second = (torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)
                             for shape in ((V,), (V, V)))

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (first, second))])

    logp_first, logp_second = first.log_softmax(-1), second.log_softmax(-1)
    prefix = logp_first.detach().exp()
    exact = gradient((logp_first.exp() * (logp_first - ref_first)).sum()
                     + (prefix[:, None] * logp_second.exp() * (logp_second - ref_second)).sum())
    found = {}
    for kl_estimator in ("unbiased", "k3"):
        expected = 0.0
        for a in range(V):
            for b in range(V):
                logps = torch.stack([first.log_softmax(-1)[a], second.log_softmax(-1)[a, b]])[None]
                ref_logps = torch.stack([ref_first[a], ref_second[a, b]])[None]
                loss, _ = grpo.grpo_loss(
                    logps, logps.detach(), ref_logps, torch.zeros(1, dtype=torch.float64),
                    torch.ones(1, 2, dtype=torch.bool),
                    num_sequences=1, num_tokens=2, max_completion_length=1, epsilon=0.2, epsilon_high=0.2,
                    beta=1.0,
                    loss_type="dr_grpo", importance_level="token", kl_estimator=kl_estimator)
                expected = expected + logps.detach().sum().exp() * loss
        found[kl_estimator] = gradient(expected)
    assert (found["unbiased"] - exact).abs().max() < 1e-6
    assert ((found["k3"] - exact).norm() / exact.norm()).item() == pytest.approx(0.638, abs=0.001)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, watched = grpo.grpo_loss(logps, logps.detach() - 3, None, torch.ones(1),
                                   torch.ones(1, 2, dtype=torch.bool), num_sequences=1,
                                   num_tokens=2, max_completion_length=2, epsilon=0.2, epsilon_high=5.0,
                                   beta=0.0,
                                   loss_type="cispo", importance_level="token")
    loss.backward()
    assert logps.grad.tolist() == [[-2.5, -2.5]] and watched["clip_fraction"] == 2  # capped at 5, not cut off


# --- log-probabilities on models of five families -----------------------------------------------------------


def load(folder):
    return evaluation.load_model(folder, "fp32")[:2]


def random_prompts(tokenizer, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]


def plain_logps(model, prompt, completion, temperature=1.0):
    """What a forward pass over one unpadded sequence says: [T] log-probabilities of the completion."""
    logits = model(torch.tensor([prompt + completion])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(completion)[:, None])[:, 0]


PROMPT_LENGTHS = [21, 5, 13]  # unequal, and longer than Gemma's sliding window of 8


def test_greedy_tokens_are_those_of_transformers(family, family_folder):
    model, tokenizer = load(family_folder(family))
    prompts = random_prompts(tokenizer, PROMPT_LENGTHS)
    plain = evaluation.transformers.GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
    model.generation_config = plain
    free = [model.generate(torch.tensor([p]), generation_config=plain)[0, len(p):].tolist() for p in prompts]
    stop = [free[0][9]]  # an id that is really produced, so that rows of a batch end at different times
    expected = [ids[:ids.index(stop[0]) + 1] if stop[0] in ids else ids for ids in free]
    ids, mask, logps = evaluation.generate(model, prompts, max_new_tokens=24, stop_ids=stop, temperature=0.0)
    assert [row[m].tolist() for row, m in zip(ids, mask)] == expected
    assert len(expected[0]) <= 10 and ids.shape == mask.shape == logps.shape
    assert (ids[~mask] == 0).all() and (logps[~mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_trainer_and_plain_forward_agree(family, family_folder, temperature):
    model, tokenizer = load(family_folder(family))
    prompts = random_prompts(tokenizer, PROMPT_LENGTHS)
    ids, mask, sampled = evaluation.generate(model, prompts, 3, max_new_tokens=12, stop_ids=[7, 50, 51, 52],
                                             temperature=temperature,
                                             generator=torch.Generator().manual_seed(1))
    assert len({tuple(row.tolist()) for row in ids}) > 3  # it does sample
    for i, prompt in enumerate(prompts):
        own = slice(3 * i, 3 * i + 3)
        prompt_ids = torch.tensor(prompt)
        logps, entropy = grpo.token_logps(model, grpo.prompt_cache(model, prompt_ids), prompt_ids, ids[own],
                                          temperature)
        assert torch.allclose(logps[mask[own]], sampled[own][mask[own]], atol=1e-5)
        for row, row_mask, row_logps in zip(ids[own], mask[own], logps):
            expected = plain_logps(model, prompt, row[row_mask].tolist(), temperature)
            assert torch.allclose(row_logps[row_mask], expected, atol=1e-5)
        assert (entropy > 0).all() and (entropy < torch.tensor(float(model.config.vocab_size)).log()).all()


@pytest.mark.parametrize("length", [1, 6])
def test_attention_of_a_group_is_transformers_own(family, family_folder, length):
    """token_logps with keys not repeated, against the model's eager attention, which it leaves alone; also
    for one token.
    """
    results = []
    for name in ("sdpa", "eager"):
        model, tokenizer = evaluation.load_model(family_folder(family), "fp32", attn_implementation=name)[:2]
        prompt_ids = torch.tensor(random_prompts(tokenizer, [14])[0])
        ids = torch.tensor(random_prompts(tokenizer, [length] * 3, seed=1))
        logps, entropy = grpo.token_logps(model, grpo.prompt_cache(model, prompt_ids), prompt_ids, ids, 1.0)
        logps.sum().backward()
        results.append([logps, entropy, *(p.grad for p in model.parameters())])
        assert model.config.get_text_config()._attn_implementation == name
    for mine, plain in zip(*results):
        assert torch.allclose(mine, plain, atol=1e-5, rtol=1e-5)


def test_prompts_in_several_passes_give_the_same_samples(family, family_folder, monkeypatch):
    model, tokenizer = load(family_folder(family))
    prompts, caches = random_prompts(tokenizer, PROMPT_LENGTHS), []

    class Seen(evaluation.SharedPromptCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            caches.append(self)
    monkeypatch.setattr(evaluation, "SharedPromptCache", Seen)

    def sampled(dtype, prompts_a_pass):
        monkeypatch.setattr(evaluation, "PROMPT_TOKENS", prompts_a_pass * max(map(len, prompts)))
        with evaluation.autocast(dtype):
            return evaluation.generate(model, prompts, 2, max_new_tokens=8, stop_ids=[7],
                                       generator=torch.Generator().manual_seed(1))
    together, cut = sampled(torch.float32, len(prompts)), sampled(torch.float32, 2)
    assert torch.equal(cut[0], together[0]) and torch.equal(cut[1], together[1])
    assert torch.allclose(cut[2], together[2], atol=1e-5)
    first = [sampled(torch.bfloat16, n)[2][:, 0] for n in (len(prompts), 2)]
    assert torch.allclose(*first, atol=5e-2)
    stored = [cache.prompt[0][0].dtype for cache in caches]
    assert stored == 2 * [torch.float32] + 2 * [torch.bfloat16]


def test_sampling_follows_the_model_not_its_generation_config(family_folder):
    """qwen2's generation_config asks for top-k 3 and a repetition penalty: the frequencies must be the
    softmax's.
    """
    model, tokenizer = load(family_folder("qwen2"))
    prompt = random_prompts(tokenizer, [6])
    for temperature in (1.0, 2.0):
        ids, _, _ = evaluation.generate(model, prompt, 20_000, max_new_tokens=1, stop_ids=[],
                                        temperature=temperature,
                                        generator=torch.Generator().manual_seed(0))
        expected = (model(torch.tensor(prompt)).logits[0, -1] / temperature).softmax(-1)
        counts = torch.bincount(ids[:, 0], minlength=len(expected)) / 20_000
        assert (counts - expected).abs().max() < 0.012  # three standard errors of a frequency
        assert (counts > 0).sum() > 20


def padded_loop(model, groups, config):
    """The loss and gradient of a rollout the plain way: every completion behind its own copy of the prompt.
    """
    model.zero_grad()
    tokens, loss = sum(int(group["completion_mask"].sum()) for group in groups), 0
    for group in groups:
        ids, mask = group["completion_ids"], group["completion_mask"]
        logps = torch.zeros(ids.shape)
        for i in range(len(ids)):
            length = int(mask[i].sum())
            logps[i, :length] = plain_logps(model, group["prompt_ids"].tolist(), ids[i, :length].tolist(),
                                            config.temperature)
        loss = loss + grpo.grpo_loss(
            logps, logps.detach(), None, group["advantages"], mask,
            num_sequences=len(groups) * config.group_size, num_tokens=tokens,
            max_completion_length=9, epsilon=0.2, epsilon_high=0.2, beta=0.0, loss_type=config.loss_type,
            importance_level="token")[0]
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return loss.item(), flat


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_of_the_shared_prompt_is_the_padded_loops(family, family_folder, lora):
    model, tokenizer = load(family_folder(family))
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    config = replace(CONFIG, beta=0.0, loss_type="dapo", temperature=0.9, max_completion_length=9)
    groups = []
    all_lengths = ([9, 4, 1, 9], [3, 3, 3, 3], [1, 9, 2, 5])
    for i, (prompt, lengths) in enumerate(zip(random_prompts(tokenizer, PROMPT_LENGTHS), all_lengths)):
        rows = random_prompts(tokenizer, lengths, seed=i)
        mask = torch.tensor([[True] * len(row) + [False] * (9 - len(row)) for row in rows])
        groups.append({"prompt_ids": torch.tensor(prompt),
                       "completion_ids": torch.tensor([row + [0] * (9 - len(row)) for row in rows]),
                       "completion_mask": mask, "sampler_logps": torch.zeros(mask.shape), "zero_std": False,
                       "advantages": torch.randn(4, generator=torch.Generator().manual_seed(i))})
    loss, expected = padded_loop(model, groups, config)
    for size in (0, 1, 3):
        sums, flat = gradient(model, None, groups, replace(config, completions_per_forward=size))
        assert sums["loss"] == pytest.approx(loss, abs=1e-6)
        assert (flat - expected).norm() < 1e-5 * expected.norm()
    # bf16 autocast: as far from fp32 as the padded loop is under it, give or take
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast:
        padded = padded_loop(model, groups, config)[1]
    shared = gradient(model, None, groups, config, compute=torch.bfloat16)[1]
    own_error = (padded - expected).norm() / expected.norm()
    assert 1e-4 < own_error < 0.5 and (shared - expected).norm() / expected.norm() < 2 * own_error + 0.01


# --- a rollout and its gradient, through the script's own functions -----------------------------------------



@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def make_rollout(tiny, config, seed=0):
    model, tokenizer = tiny
    rows = evaluation.encode_rows(tokenizer, pubmedqa.load_rows(limit=60)[0], 2048, "training")
    groups = grpo.rollout(model, tokenizer, grpo.question_stream(rows, seed, 0), config, torch.float32,
                          evaluation.stop_ids(model, tokenizer), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    for group in groups:  # random rewards, so that every group has an advantage
        group["rewards"] = torch.rand(config.group_size, generator=generator, dtype=torch.float64)
        group["zero_std"] = False
    set_advantages(groups, config)
    return groups


def set_advantages(groups, config):
    advantages = grpo.group_advantages(torch.stack([group["rewards"] for group in groups]),
                                       config.scale_rewards)
    for group, own in zip(groups, advantages):
        group["advantages"] = own.float()


def gradient(model, reference, groups, config, first_epoch=True, compute=torch.float32):
    """(sums, flat gradient) of a rollout."""
    model.zero_grad()
    if first_epoch and config.beta:
        grpo.add_reference_logps(reference, groups, config, compute)
    sums = grpo.policy_gradient(model, groups, first_epoch, config, compute,
                                torch.amp.GradScaler("cpu", enabled=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trained])
    model.zero_grad()
    return sums, flat


def shaken(model, scale=0.02):
    """A copy of the model a little way off, as a policy is some steps after its reference was made."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * p.std() * scale)
    return other


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("importance_level", ["token", "sequence"])
def test_cutting_groups_into_passes_changes_nothing(tiny, loss_type, importance_level):
    config = replace(CONFIG, loss_type=loss_type, importance_level=importance_level, mask_truncated=True,
                     max_completion_length=36,
                     epsilon=0.001, epsilon_high=0.002)
    reference, results = shaken(tiny[0]), []
    for size in (0, 1, 3):
        config = replace(config, completions_per_forward=size)
        groups = make_rollout(tiny, config)
        assert 0 < sum(int(group["truncated"].sum()) for group in groups) < 12  # some are cut, some are not
        _, first = gradient(tiny[0], reference, groups, config)
        sums, second = gradient(shaken(tiny[0], 0.3), reference, groups, config, first_epoch=False)
        assert sums["clip_fraction"] > 0 and sums["kl"] > 0
        results.append((sums["loss"], torch.cat([first, second])))
    for loss, flat in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert (flat - results[0][1]).norm() < 1e-5 * results[0][1].norm()


def test_a_group_is_cut_by_length_where_padding_would_cost_more():
    def parts(lengths, size):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return [(places.tolist(), length) for places, length in grpo.length_parts(mask, size)]

    assert parts([50, 50, 50, 50],
                 4) == [([0, 1, 2, 3], 50)] and parts([50, 50, 50, 50], 3) != parts([50, 50, 50, 50], 4)
    assert parts([8, 100, 10, 98], 4) == [([1, 3], 100), ([2, 0], 10)]
    assert parts([20, 0, 30], 4) == [([2, 0], 30)]  # nothing of the second counts
    lengths = [90, 12, 55, 31, 77, 40, 8]
    cost = sum(length * len(places) + 32 for places, length in parts(lengths, 3))
    order, cheapest = sorted(lengths, reverse=True), math.inf
    for cuts in itertools.product((False, True), repeat=len(order) - 1):  # every way to cut the sorted group
        runs = [[order[0]]]
        for length, cut in zip(order[1:], cuts):
            runs.append([length]) if cut else runs[-1].append(length)
        if max(map(len, runs)) <= 3:
            cheapest = min(cheapest, sum(run[0] * len(run) + 32 for run in runs))
    assert cost == cheapest


def test_a_step_after_a_refresh_needs_no_pass_of_the_reference(tmp_path, monkeypatch):
    """The reference is the policy then: KL is 0 in the first epoch, and weights are those of a run that asks
    it.
    """
    results, usual = [], grpo.add_reference_logps
    for asked in (False, True):
        steps_asked = []

        def count(*arguments):
            steps_asked.append(len(steps_asked))
            usual(*arguments)

        monkeypatch.setattr(grpo, "add_reference_logps", count)
        usual_gradient = grpo.policy_gradient

        def gradient(model, groups, first_epoch, *rest):
            if asked and "ref_logps" not in groups[0]:
                usual(model, groups, *rest[:2]) if first_epoch else None
            return usual_gradient(model, groups, first_epoch, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(grpo, "policy_gradient", gradient)
            out = tmp_path / str(asked)
            grpo.main(grpo.parse(["--model", "tiny", "--steps", "3", "--prompts_per_step", "2",
                                  "--group_size", "2", "--mu", "2",
                                  "--eval_size", "4", "--ref_every", "2", "--beta", "0.1",
                                  "--max_completion_length", "24",
                                  "--kl_estimator", "k3", "--save_every", "0", "--out", str(out)]))
        assert len(steps_asked) == 1  # in step 2 alone
        results.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*results):
        assert ours["kl"] == pytest.approx(theirs["kl"],
                                           abs=1e-6) and ours["grad_norm"] == pytest.approx(
                                               theirs["grad_norm"], rel=1e-3)


def test_dapo_divides_by_the_tokens_of_the_rollout_not_of_the_pass(tiny):
    """With advantages of 1 and no clipping the dapo loss is minus the mean over all tokens of 1: -1, however
    it is cut.
    """
    for size in (0, 1):
        config = replace(CONFIG, beta=0.0, loss_type="dapo", completions_per_forward=size)
        groups = make_rollout(tiny, config)
        assert len({int(n) for group in groups for n in group["lengths"]}) > 1
        for group in groups:
            group["advantages"] = torch.ones(4)
        assert gradient(tiny[0], None, groups, config)[0]["loss"] == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_an_all_equal_group_is_skipped_and_changes_no_denominator(tiny, loss_type, scale_rewards):
    config = replace(CONFIG, beta=0.0, loss_type=loss_type, scale_rewards=scale_rewards)
    groups = make_rollout(tiny, config)
    groups[1]["rewards"] = torch.full((4,), 2.8, dtype=torch.float64)
    set_advantages(groups, config)
    assert groups[1]["advantages"].abs().max() < 1e-9
    _, passed = gradient(tiny[0], None, groups, config)
    groups[1]["zero_std"] = True  # as rollout marks it
    sums, skipped = gradient(tiny[0], None, groups, config)
    assert torch.allclose(passed, skipped, atol=1e-8)
    assert sums["tokens"] == sum(int(groups[i]["completion_mask"].sum()) for i in (0, 2))
    lengths = [int(group["completion_mask"].sum()) for group in groups]
    # without it every denominator would be smaller
    others = gradient(tiny[0], None, [groups[0], groups[2]], config)[1]
    smaller = (lengths[0] + lengths[2]) / sum(lengths) if loss_type == "dapo" else 2 / 3
    assert torch.allclose(skipped, others * smaller, atol=1e-7)


def test_rollout_marks_groups_whose_rewards_are_equal(tiny):
    model, tokenizer = tiny
    rows = evaluation.encode_rows(tokenizer, pubmedqa.load_rows(limit=60)[0], 2048, "training")
    groups = grpo.rollout(model, tokenizer, grpo.question_stream(rows, 0, 0),
                          replace(CONFIG, prompts_per_step=12), torch.float32,
                          evaluation.stop_ids(model, tokenizer), torch.Generator().manual_seed(0))
    assert {group["zero_std"] for group in groups} == {True, False}
    for group in groups:
        assert group["zero_std"] == (len({s["score"] for s in group["scores"]}) == 1)


def test_the_final_eos_is_trained_and_a_cut_completion_has_none(tiny):
    model, tokenizer = tiny
    stops = evaluation.stop_ids(model, tokenizer)
    groups = make_rollout(tiny, replace(CONFIG, max_completion_length=36))
    cut = whole = 0
    for group in groups:
        for ids, mask, truncated, length in zip(*(group[k]
                                                  for k in ("completion_ids", "completion_mask", "truncated",
                                                            "lengths"))):
            # the mask comes from positions and holds the last token
            assert mask[:length].all() and not mask[length:].any()
            assert (int(ids[length - 1]) in stops) != bool(truncated)
            assert not any(int(i) in stops for i in ids[:length - 1])
            assert not truncated or length == 36
            cut, whole = cut + bool(truncated), whole + (not truncated)
    assert cut and whole
    masked = make_rollout(tiny, replace(CONFIG, max_completion_length=36, mask_truncated=True))
    for group in masked:
        assert torch.equal(group["completion_mask"].any(dim=1), ~group["truncated"])


def test_pad_equal_to_eos_changes_nothing(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    one, two = make_rollout(tiny, CONFIG), make_rollout((model, other), CONFIG)
    assert all(torch.equal(a["completion_mask"], b["completion_mask"]) for a, b in zip(one, two))
    gradients = [gradient(model, model, groups, CONFIG)[1] for groups in (one, two)]
    assert torch.equal(*gradients)
    eos = tokenizer.eos_token_id
    ended = [group for group in two if not group["truncated"].all()][0]
    row = int((~ended["truncated"]).nonzero()[0])
    last = int(ended["lengths"][row]) - 1
    assert ended["completion_ids"][row, last] == eos and ended["completion_mask"][row, last]


def test_the_eos_receives_gradient(tiny):
    """A loss on the last token alone moves the model, so the EOS is not merely present but trained."""
    groups = make_rollout(tiny, CONFIG)
    group = [g for g in groups if not g["truncated"].all()][0]
    row = int((~group["truncated"]).nonzero()[0])
    only_eos = torch.zeros_like(group["completion_mask"])
    only_eos[row, int(group["lengths"][row]) - 1] = True
    group["completion_mask"] = group["completion_mask"] & only_eos
    assert gradient(tiny[0], None, [group], replace(CONFIG, beta=0.0))[1].norm() > 0


def test_temperature_enters_the_loss(tiny):
    groups = make_rollout(tiny, CONFIG)
    one, two = (gradient(tiny[0], tiny[0], groups, replace(CONFIG, temperature=t))[1] for t in (1.0, 0.5))
    assert (one - two).norm() > 0.1 * one.norm()


def test_kl_is_zero_against_oneself_and_positive_against_another(tiny):
    groups = make_rollout(tiny, CONFIG)
    assert gradient(tiny[0], copy.deepcopy(tiny[0]), groups, CONFIG)[0]["kl"] == 0
    assert gradient(tiny[0], shaken(tiny[0]), groups, CONFIG)[0]["kl"] > 0


def test_importance_weights_are_capped_ratios(tiny):
    config = replace(CONFIG, beta=0.0, importance_cap=1.5, loss_type="dapo")
    groups = make_rollout(tiny, config)
    plain = gradient(tiny[0], None, groups, replace(config, importance_cap=0.0))[1]
    # fp32: sampler and trainer agree
    assert torch.allclose(gradient(tiny[0], None, groups, config)[1], plain, atol=1e-5)
    for group in groups:
        # as if the sampler had found all tokens unlikelier
        group["sampler_logps"] = group["sampler_logps"] - 3
    assert torch.allclose(gradient(tiny[0], None, groups, config)[1], 1.5 * plain,
                          atol=1e-4 * float(plain.norm()))


def test_question_stream_continues_where_it_stood():
    rows = list(range(7))
    whole = grpo.question_stream(rows, 3, 0)
    drawn = [next(whole) for _ in range(20)]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == rows and drawn[:7] != drawn[7:14]
    later = grpo.question_stream(rows, 3, 11)
    assert [next(later) for _ in range(9)] == drawn[11:]
    other = grpo.question_stream(rows, 4, 0)
    assert [next(other) for _ in range(7)] != drawn[:7]


def test_learning_rate_rises_peaks_and_falls_over_the_steps_of_the_launch():
    config = replace(grpo.Config(), learning_rate=1.0, warmup=0.1)
    rates = [grpo.learning_rate(step, config, 100) for step in range(1, 131)]
    assert rates[4] == pytest.approx(0.5) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[9:100] == sorted(rates[9:100], reverse=True) and rates[99] == pytest.approx(1 / 91)
    assert rates[100:] == [rates[99]] * 30  # a run resumed with more steps goes on at the last rate
    assert grpo.learning_rate(1, replace(config, warmup=0.0), 100) == 1.0


def test_output_layer_in_blocks_is_a_plain_log_softmax(monkeypatch):
    """Values and gradients of ChosenLogps against autograd, with blocks that divide neither vocabulary nor
    rows, also a second time.
    """
    monkeypatch.setattr(evaluation, "BLOCK", 7)
    monkeypatch.setattr(evaluation, "ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 5, generator=generator, requires_grad=True)
    weight = (3 * torch.randn(30, 5, generator=generator)).requires_grad_()
    tokens, upstream = torch.randint(0, 30, (11,), generator=generator), torch.randn(11, generator=generator)
    for temperature in (1.0, 0.6):
        results = []
        for blocks in (True, False):
            if blocks:
                logps, entropy = evaluation.ChosenLogps.apply(hidden, weight, tokens, temperature)
            else:
                distribution = (hidden @ weight.T / temperature).log_softmax(-1)
                logps = distribution.gather(1, tokens[:, None])[:, 0]
                entropy = -(distribution.exp() * distribution).sum(-1)
            loss = (logps * upstream).sum()
            first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
            results.append([logps, entropy, *first, *second])
        for mine, plain in zip(*results):
            assert torch.allclose(mine, plain, atol=2e-5, rtol=1e-5)


def test_the_benchmark_and_its_gpu_command_run(tmp_path, capsys):
    import argparse

    import bench
    setting = bench.Bench({**bench.A, "P": 2, "G": 3, "prompt": (9, 14), "completion": (2, 6)})
    for step in (bench.our_step(setting), bench.padded_step(setting)):
        assert all(seconds > 0 for seconds in step())  # asserts the forced lengths
    assert bench.our_sft(setting, 1)[0] > 0
    bench.gpu(argparse.Namespace(rounds=1, out=str(tmp_path / "gpu.json")))
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert {(r["model"], r["cap_gb"], r["loop"])
            for r in results} == {(model, cap, loop) for model in bench.REAL
                                 for cap in (5, 16, 24) for loop in ("ours", "padded")}
    assert "tiny shapes" in capsys.readouterr().out
