"""The LoRA path: sft.py, grpo_medmcqa.py, and heads side by side in eval.py."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import CONTRACT, METRICS, command, metrics, same_but_for_clocks
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
import grpo_ecg
import grpo_medmcqa as grpo
import grpo_pubmedqa
import rewards
import sft
from data import medmcqa, one_line_errors, pubmedqa

TINY = str(ROOT / "data" / "tiny")
QUICK = ["--model", "tiny", "--data", "builtin", "--steps", "3", "--prompts_per_step", "3", "--group_size",
         "4", "--eval_size", "4",
         "--max_completion_length", "48", "--ref_every", "2", "--warmup", "0", "--limit", "200"]
QUICK_SFT = ["--model", "tiny", "--data", "builtin", "--task", "medmcqa", "--limit", "96", "--num_epochs",
             "1", "--eval_size", "6",
             "--batch_size", "16", "--eval_every", "2", "--save_every", "2"]


def in_process(script, *arguments):
    """A script's main without a new process; returns the exit code."""
    try:
        with one_line_errors():
            script.main(script.parse(list(map(str, arguments))))
    except SystemExit as end:
        return end.code
    return 0


def adapter_weights(model, name):
    """{name: weight} of one adapter of a peft model."""
    return {key.replace(f".{name}.", "."): p.detach().clone() for key, p in model.named_parameters()
            if f".{name}." in key}


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    assert in_process(sft, *QUICK_SFT, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def grpo_run(sft_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    assert in_process(grpo, *QUICK, "--adapter", sft_run / "model", "--out", folder) == 0
    return folder


# --- sampling with an adapter -------------------------------------------------------------------------------


def two_adapters(folder, dtype="fp32"):
    """A family's model with two different adapters, and three prompts of unequal length."""
    base, _, _ = evaluation.load_model(folder, dtype)
    model = evaluation.new_adapter(base, r=4, alpha=8, seed=0)
    model.add_adapter("reference", model.peft_config["default"])
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    model.set_adapter("default")
    generator = torch.Generator().manual_seed(1)
    return model.eval(), [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (21, 5, 13)]


@pytest.mark.parametrize("state", ["default", "reference", "disabled"])
def test_adapters_are_folded_in_while_sampling_and_the_base_stays(family, family_folder, monkeypatch, state):
    """Against sampling with the adapters beside their layers: log-probabilities within 1e-5, every weight the
    same bit for bit.
    """
    model, prompts = two_adapters(family_folder(family))
    before = {key: weight.detach().clone() for key, weight in model.state_dict().items()}
    if state == "reference":
        model.set_adapter("reference")
    results = []
    with model.disable_adapter() if state == "disabled" else nullcontext():
        for folded in (True, False):
            if not folded:
                monkeypatch.setattr(evaluation, "linears_of_a_token", lambda model: nullcontext())
            results.append(evaluation.generate(model, prompts, 3, max_new_tokens=10, stop_ids=[7],
                                               temperature=0.8,
                                               generator=torch.Generator().manual_seed(2)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][2], results[1][2], atol=1e-5)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_sampling_works_where_all_heads_share_one_key():
    """No copy is made of a query on its way then, so it must be laid out as the attention reads it."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=50, pad_token_id=None)).eval()
    ids, mask, logps = evaluation.generate(model, [[5, 6, 7], [8, 9]], 2, max_new_tokens=4, stop_ids=[1],
                                           temperature=1.0,
                                           generator=torch.Generator().manual_seed(0))
    plain = model(torch.cat([torch.tensor([5, 6, 7]), ids[0, :2]])[None]).logits[0].log_softmax(-1)
    assert logps[0, 0].item() == pytest.approx(plain[2, ids[0, 0]].item(), abs=1e-5)


def test_folding_reaches_every_layer_in_fp32_and_none_in_bf16(family_folder):
    for dtype, layers in (("fp32", 7 * 3), ("bf16", 0)):
        model, _ = two_adapters(family_folder("qwen2"), dtype)
        with evaluation.linears_of_a_token(model):
            assert sum("forward" in vars(module) for module in model.modules()) == layers


# --- what is trained and what is not ------------------------------------------------------------------------


def trained_model(family_folder, family, tmp_path, **knobs):
    """The policy of a LoRA script after a step of GRPO with made-up rewards, and a copy of all its weights
    from before.
    """
    config = replace(grpo.Config(), model=str(family_folder(family)), dtype="fp32", adapter="none",
                     group_size=4, prompts_per_step=2, max_completion_length=8, lora_r=4, **knobs)
    config = replace(config, encoder="")
    model, tokenizer, compute = evaluation.load_policy(config, "medmcqa")
    grpo.add_reference_adapter(model)
    with torch.no_grad():  # as after some training: a fresh adapter changes nothing
        for key, p in model.named_parameters():
            if ".default." in key:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))) * 0.05)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows = evaluation.encode_rows(tokenizer, medmcqa.builtin_rows()[0][:4], 4096, "training")
    groups = grpo.rollout(model, tokenizer, grpo.question_stream(rows, 0, 0), config, compute,
                          evaluation.stop_ids(model, tokenizer),
                          torch.Generator().manual_seed(0))
    for i, group in enumerate(groups):
        group["advantages"], group["zero_std"] = torch.tensor([1.0, -1.0, 0.5, -0.5]) * (i + 1), False
        group["completion_mask"][:] = True
    model.set_adapter("reference")
    grpo.add_reference_logps(model, groups, config, compute)
    model.set_adapter("default")
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = grpo.policy_gradient(model, groups, True, config, compute,
                                torch.amp.GradScaler("cpu", enabled=False))
    return model, tokenizer, before, trained, sums


def test_only_the_adapter_moves_and_the_reference_gets_no_gradient(family, family_folder, tmp_path):
    model, _, before, trained, sums = trained_model(family_folder, family, tmp_path)
    assert sums["kl"] > 1e-4  # policy and reference are two adapters: one is used after the other
    names = {key for key, p in model.named_parameters() if p.requires_grad}
    assert names == {key for key in before if ".default." in key} and len(trained) == len(names)
    assert all((p.grad is not None) == (key in names) for key, p in model.named_parameters())
    targets = {key.split(".lora_")[0].rpartition(".")[2] for key in names}
    assert targets == ({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} if family == "phi3" else
                       {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    torch.optim.AdamW(trained, lr=1e-2).step()
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == (key not in names)
    grpo.copy_adapter(model)
    policy, reference = adapter_weights(model, "default"), adapter_weights(model, "reference")
    assert policy.keys() == reference.keys()
    assert all(torch.equal(policy[key], reference[key]) for key in policy)


def test_the_saved_adapter_alone_gives_the_same_logits_in_a_new_process(family, family_folder, tmp_path):
    model, tokenizer, _, trained, _ = trained_model(family_folder, family, tmp_path)
    torch.optim.AdamW(trained, lr=1e-2).step()
    model.save_pretrained(tmp_path / "model", selected_adapters=["default"])
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "adapter_config.json",
                                                      "adapter_model.safetensors"]
    ids = torch.arange(10, 40)[None]
    torch.save(model(ids).logits.detach(), tmp_path / "logits.pt")
    program = ("import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as "
               f"M\ntorch.set_num_threads({torch.get_num_threads()})\nmodel = "
               f"PeftModel.from_pretrained(M.from_pretrained({family_folder(family)!r}, "
               f"dtype=torch.float32), {str(tmp_path / 'model')!r}).eval()\nlogits = model(torch.arange(10, "
               "40)[None]).logits\nprint((logits - "
               f"torch.load({str(tmp_path / 'logits.pt')!r})).abs().max().item())")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0.0


def test_kl_is_zero_right_after_a_refresh(grpo_run):
    kl = [record["kl"] for record in metrics(grpo_run)]
    assert kl[0] == 0 and kl[1] > 0 and kl[2] == 0  # renewed before step 3


# --- the runs -----------------------------------------------------------------------------------------------


def test_an_sft_run_leaves_its_files_and_learns(sft_run):
    assert sorted(path.name for path in sft_run.iterdir()) == sorted(set(CONTRACT) - {"samples.jsonl"})
    records = metrics(sft_run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["eval_loss"] < records[1]["eval_loss"]
    assert "eval_accuracy" in records[1] and "eval_accuracy" in records[3]
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), sft_run / "model")
    known = json.loads((sft_run / "model" / "adapter_config.json").read_text())
    assert known["r"] == 16 and known["base_model_name_or_path"] == TINY


def test_sft_of_all_weights(tmp_path):
    assert in_process(sft, *QUICK_SFT, "--lora_r", 0, "--learning_rate", 1e-3, "--limit", 32, "--out",
                      tmp_path / "run") == 0
    before, after = load_file(TINY
                              + "/model.safetensors"), load_file(
                                  tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name].float() != after[name]).any() for name in before)


def test_sft_every_task_and_family(family, family_folder, tmp_path):
    for task in ("pubmedqa", "medmcqa"):
        assert in_process(sft, *QUICK_SFT, "--task", task, "--model", family_folder(family), "--limit", 20,
                          "--eval_every", 0,
                          "--max_completion_length", 8, "--max_seq_length", 4096, "--out",
                          tmp_path / task) == 0


def test_the_sft_loss_is_the_completions_alone(family, family_folder):
    """Against transformers' own loss on each row by itself, unpadded, the prompt's labels masked."""
    model, tokenizer, compute = evaluation.load_model(family_folder(family), "fp32")
    rows = medmcqa.builtin_rows()[0][:5]
    pairs = sft.encode(tokenizer, rows, sft.Config(max_seq_length=4096), "training")
    nll, tokens = sft.completion_nll(model, pairs, compute)
    expected = 0.0
    for prompt, completion in pairs:
        loss = model(torch.tensor([prompt + completion]),
                     labels=torch.tensor([[-100] * len(prompt) + completion])).loss
        expected += loss.item() * len(completion)
    assert tokens == sum(len(completion) for _, completion in pairs)
    assert nll.item() == pytest.approx(expected, rel=1e-5)
    turn = {"llama": "<|eot_id|>", "phi3": "<|end|>", "gemma3": "<end_of_turn>"}.get(family, "<|im_end|>")
    assert all(completion[-1] == tokenizer.convert_tokens_to_ids(turn) for _, completion in pairs)
    assert tokenizer.decode(pairs[0][1][:-1]) == rows[0]["target"]


def test_long_rows_are_counted_not_cut(capsys, tmp_path):
    tokenizer = evaluation.load_model("tiny")[1]
    rows = medmcqa.builtin_rows()[0][:50]
    lengths = [sum(map(len, pair))
               for pair in sft.encode(tokenizer, rows, sft.Config(max_seq_length=4096), "training")]
    limit = sorted(lengths)[29]
    short = sft.encode(tokenizer, rows, sft.Config(max_seq_length=limit), "training")
    assert len(short) == sum(length <= limit for length in lengths)
    assert all(sum(map(len, pair)) <= limit for pair in short)
    said = capsys.readouterr().out
    assert f"{50 - len(short)} of them longer than --max_seq_length {limit} and left out" in said
    assert in_process(sft, *QUICK_SFT, "--max_seq_length", 5, "--out", tmp_path / "run") == 2
    assert "--max_seq_length 5" in capsys.readouterr().err


def test_batches_hold_every_row_once_and_alike_lengths_together():
    pairs = [([0] * n, [1]) for n in range(2, 302)]
    result = sft.batches(pairs, 8, 0, 0)
    assert sorted(len(prompt) for batch in result for prompt, _ in batch) == list(range(2, 302))
    assert all(max(len(p) for p, _ in batch) - min(len(p) for p, _ in batch) <= 8 for batch in result)
    assert result == sft.batches(pairs, 8, 0, 0) != sft.batches(pairs, 8, 0, 1)
    order = [len(batch[0][0]) for batch in result]
    assert order != sorted(order)


def test_a_grpo_run_from_the_sft_adapter(grpo_run):
    assert sorted(path.name for path in grpo_run.iterdir()) == sorted(CONTRACT)
    records = metrics(grpo_run)
    assert all(key in records[0] for key in [*METRICS, "reward_similarity"])
    assert all(record["sampler_gap"] < 1e-5 for record in records)
    assert sorted(os.listdir(grpo_run / "model"))[:2] == ["README.md", "adapter_config.json"]
    # as given, not as resolved
    assert json.loads((grpo_run / "config.json").read_text())["encoder"].endswith("MiniLM-L6-v2")


@pytest.mark.slow  # test_survival.py has the short form
@pytest.mark.parametrize("script, flags",
                         [("sft.py", QUICK_SFT),
                          ("grpo_medmcqa.py",
                           [*QUICK, "--adapter", "none", "--steps", "6", "--save_every", "2"])])
def test_killed_and_resumed_is_the_same_run_bit_by_bit(script, flags, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert command(script, *flags, "--out", whole).returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags, "--out", str(folder)],
                               stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()
    done = command(script, *flags, "--out", folder, "--resume")
    assert done.returncode == 0 and "resumed:" in done.stdout, done.stderr
    one, two = (load_file(f / "model" / "adapter_model.safetensors") for f in (whole, folder))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert same_but_for_clocks(metrics(whole)) == same_but_for_clocks(metrics(folder))
    assert (whole / "eval_after.jsonl").read_text() == (folder / "eval_after.jsonl").read_text()


def test_real_questions(real_data, tmp_path):
    data = real_data / "medmcqa_dev_2000.json"
    assert in_process(sft, *QUICK_SFT, "--data", data, "--max_seq_length", 512, "--eval_every", 0, "--out",
                      tmp_path / "sft") == 0
    assert in_process(grpo, *QUICK, "--data", data, "--steps", 2, "--adapter", tmp_path / "sft" / "model",
                      "--out", tmp_path / "grpo") == 0


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, arguments, words", [
    (grpo, ["--adapter", "nowhere"], ["nowhere", "adapter_config.json"]),
    (grpo, ["--adapter", "{other}"], ["was trained on some/model", "--model tiny"]),
    (grpo, ["--adapter", "{broken}"], ["{broken}", "cannot be loaded"]),
    (grpo, ["--similarity", "embeddings", "--adapter", "none"], ["all-MiniLM-L6-v2", "--similarity overlap"]),
    (grpo, ["--data", "{few}", "--adapter", "none"], ["cop", "--cop_base"]),
    (sft, ["--data", "{few}"], ["cop", "--cop_base"]),
    (sft, ["--data", "{bare}", "--eval_size", "1"], ["no training row", "gold completion"]),
    (sft, ["--num_epochs", "0"], ["--num_epochs 0"]),
    (sft, ["--learning_rate", "0"], ["--learning_rate"]),
    (sft, ["--resume"], ["--resume needs --out"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", None))
def test_bad_input_is_one_line_and_exit_code_2(script, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    item = {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "exp": None}
    for name, cops in (("few", (1, 2, 3)), ("bare", (1, 2, 3, 4) * 5)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**item, "question": f"q {i}", "cop": cop}
                                                           for i, cop in enumerate(cops)]))
    for name, config in (("other", {"base_model_name_or_path": "some/model"}),
                         ("broken", {"base_model_name_or_path": TINY, "peft_type": "LORA"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    places = {"few": "few.json", "bare": "bare.json", "other": "other", "broken": "broken"}
    assert in_process(script, "--model", "tiny",
                      *(["--data", "builtin"] if "--data" not in arguments else []),
                      *[argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word.format(**places) in error for word in words), error
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """A fresh adapter of the built-in model."""
    folder = tmp_path_factory.mktemp("adapter") / "model"
    evaluation.new_adapter(evaluation.load_model("tiny")[0], 2, 4, 0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", [grpo, grpo_ecg, grpo_pubmedqa, sft], ids=lambda script: script.__name__)
def test_an_adapter_folder_as_the_model_is_refused(script, adapter_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [QUICK_SFT, ["--lora_r", 0]] if script is sft else [QUICK]
    flags = [flag for part in flags for flag in part]
    for more in ([], ["--adapter", "none"]) if script in (grpo, grpo_ecg) else ([],):
        assert in_process(script, *flags, *more, "--model", adapter_folder) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--model {adapter_folder} is an adapter folder" in error, error
        assert f"python eval.py merge --model {adapter_folder} --out DIR" in error
        assert (f"--model {TINY} --adapter {adapter_folder}" in error) == (script in (grpo, grpo_ecg))
        assert not list(tmp_path.iterdir())


def test_what_the_refusal_of_an_adapter_folder_says_works(adapter_folder, tmp_path):
    evaluation.merge(evaluation.Merge(model=str(adapter_folder), out=str(tmp_path / "merged")))
    quick = [*QUICK, "--steps", 1, "--eval_size", 1, "--prompts_per_step", 1, "--max_completion_length", 4]
    for folder, model, adapter in (("a", TINY, adapter_folder), ("b", tmp_path / "merged", "none")):
        flags = ["--model", model, "--adapter", adapter, "--out", tmp_path / folder]
        assert in_process(grpo, *quick, *flags) == 0
        evaluation.load_model(str(tmp_path / folder / "model"))


def test_an_adapter_on_an_adapter_is_no_head(adapter_folder, tmp_path, capsys):
    assert heads("--models", f"x={adapter_folder}+{adapter_folder}", "--out", tmp_path / "e") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{adapter_folder} is an adapter folder itself" in error
    assert f"merge --model {adapter_folder}" in error and f"x=DIR+{adapter_folder}" in error
    assert not (tmp_path / "e").exists()
    alone = [f"x={adapter_folder}"]
    assert evaluation.parse_heads(alone) == [("x", str(adapter_folder), "")]  # by itself it is one


def test_a_reward_model_does_not_start_from_an_adapter(adapter_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        sft.train_reward_model(sft.RewardModel(data="x", model=str(adapter_folder), out=str(tmp_path / "r")))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "is an adapter folder" in error


@pytest.mark.parametrize("script", [grpo, grpo_pubmedqa], ids=lambda script: script.__name__)
def test_a_runs_own_evaluation_is_scored_by_its_weights(script, tmp_path, monkeypatch):
    source = "medmcqa" if script is grpo else "pubmedqa"
    first, last, opening, closing = rewards.TAGS[source]
    answer = "A" if script is grpo else "yes"
    text = f"{first}It is so.{last}{opening}{answer}{closing}"
    monkeypatch.setattr(evaluation, "decode", lambda tokenizer, ids, mask, stop_strings=(): [text] * len(ids))
    flags = [*QUICK, "--steps", 1, "--max_completion_length", 4, "--eval_size", 12]
    flags += ["--correct_weight", 7, "--tag_weight", 0.5]
    flags += ["--adapter", "none", "--similarity_weight", 0] if script is grpo else []
    assert in_process(script, *flags, "--out", tmp_path / "run") == 0
    for name in ("eval_before", "eval_after"):
        records = [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        assert {record["accuracy"] for record in records} == {0.0, 1.0}
        assert all(record["score"] == 7 * record["accuracy"] + 4 * 0.5 for record in records)


def test_without_the_default_adapter_the_script_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process(grpo, *QUICK, "--steps", 1, "--out", "run") == 0
    said = capsys.readouterr().out
    assert "there is no runs/sft-medmcqa/model; python sft.py --task medmcqa makes one" in said


@pytest.mark.parametrize("task, script, data",
                         [("pubmedqa", "grpo_pubmedqa", "hub"), ("medmcqa", "grpo_medmcqa", "hub"),
                          ("ecg", "grpo_ecg", "builtin"),
                          ("medical_o1", "grpo_ecg", "hub")])
def test_on_a_gpu_sft_takes_the_base_of_the_grpo_script(task, script, data, monkeypatch):
    monkeypatch.setattr(sft, "GPU", True)
    config = sft.parse(["--task", task])
    text = (ROOT / f"{script}.py").read_text()
    assert ".BASE_MODEL if GPU" in text and config.model.partition("/")[2] in text and config.data == data
    assert sft.parse(["--task", task, "--model", "tiny", "--data", "x"]).data == "x"
    monkeypatch.setattr(sft, "GPU", False)
    assert (sft.parse(["--task", task]).model, sft.parse(["--task", task]).data) == ("tiny", "builtin")


@pytest.mark.parametrize("script, config", [("sft.py", sft.Config), ("grpo_medmcqa.py", grpo.Config)])
def test_help_lists_every_knob(script, config):
    text = command(script, "--help").stdout
    assert all(f"--{field.name}" in text for field in fields(config))


# --- heads side by side -------------------------------------------------------------------------------------


def heads(*arguments):
    try:
        with one_line_errors():
            evaluation.main(evaluation.tyro.cli(evaluation.Config, args=list(map(str, arguments)),
                                                use_underscores=True))
    except SystemExit as end:
        return end.code
    return 0


def test_heads_on_one_base_are_the_models_by_themselves(sft_run, grpo_run, tmp_path, capsys):
    flags = ["--task", "medmcqa", "--eval_size", 12, "--max_completion_length", 24, "--mode", "both"]
    assert heads(*flags, "--out", tmp_path / "all", "--models", "base=tiny", f"a=tiny+{sft_run}/model",
                 f"v1.2=tiny+{grpo_run}/model") == 0  # names that are no good to peft
    assert capsys.readouterr().out.count("model: tiny") == 1  # the base is loaded once
    lines = [json.loads(line) for line in (tmp_path / "all" / "results.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert len(lines) == 12 and list(summary["heads"]) == ["base", "a", "v1.2"]
    assert len(summary["paired"]) == 6
    assert {"generated", "loglikelihood"} == {test["mode"] for test in summary["paired"]}
    assert (tmp_path / "all" / "report.html").read_text().startswith("<!")
    for name, model in (("base", "tiny"), ("a", sft_run / "model"), ("v1.2", grpo_run / "model")):
        assert heads(*flags, "--model", model, "--out", tmp_path / name) == 0
        alone = [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        assert [line["answers"][name]["completion"]
                for line in lines] == [record["completion"] for record in alone]
        likelihood = json.loads((tmp_path / name / "summary.json").read_text())["loglikelihood"]
        assert likelihood == summary["heads"][name]["loglikelihood"]
    completions = [[line["answers"][name]["completion"] for line in lines]
                   for name in ("base", "a", "v1.2")]
    assert completions[0] != completions[1]  # the adapter does something


ABSTRACTS = {str(i): {  # the official form; abstracts of one to three parts, in all classes
    "QUESTION": f"Does drug {i} help after day {i * 7}?", "final_decision": pubmedqa.CLASSES[i % 3],
    "CONTEXTS": [f"Part {k} of trial {i}:  {i * k + 3} of {90 - i} patients." for k in range(i % 3 + 1)]}
    for i in range(9)}


def asked(task, folder, n):
    """([(row, [])] of a task, [(context, answers)] that the harness makes of the same questions)."""
    if task == "medmcqa":
        rows = medmcqa.builtin_rows()[1][:n]
        items = [(row["extra"]["question"], *row["extra"]["options"]) for row in rows]
        form, answers = "Question: {}\nChoices:\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:", ["A", "B", "C", "D"]
    else:
        (folder / "official.json").write_text(json.dumps(dict(list(ABSTRACTS.items())[:n])))
        train, heldout, _ = pubmedqa.load_rows(str(folder / "official.json"), maybe=True)
        rows = train + heldout
        items = [ABSTRACTS[row["id"].removeprefix("pubmedqa:")] for row in rows]
        items = [("\n".join(item["CONTEXTS"]), item["QUESTION"]) for item in items]
        form, answers = "Abstract: {}\nQuestion: {}\nAnswer:", ["yes", "no", "maybe"]
    assert len(rows) == n
    return [(row, []) for row in rows], [(form.format(*item), answers) for item in items]


@pytest.mark.parametrize("task", ["medmcqa", "pubmedqa"])
def test_option_likelihoods_follow_the_harness_rule(task, family, family_folder, tmp_path):
    """log P(" A" | prompt) ... written here from lm-evaluation-harness's rule, a plain forward an answer."""
    model, tokenizer, compute = evaluation.load_model(family_folder(family), "fp32")
    rows, asks = asked(task, tmp_path, 7)
    for longest in (4096, 30):  # positions that the model has: what is longer loses its beginning
        model.config.max_position_embeddings = longest
        records = evaluation.option_likelihoods(model, tokenizer, rows, compute, batch_size=3)
        for (row, _), (context, answers), record in zip(rows, asks, records):
            expected = []
            for answer in answers:
                whole = tokenizer(context + " " + answer).input_ids
                tokens = whole[len(tokenizer(context).input_ids):]
                ids = torch.tensor([whole[-longest - 1:]])
                logps = model(ids[:, :-1]).logits.log_softmax(-1)[0, -len(tokens):]
                expected.append(logps.gather(1, torch.tensor(tokens)[:, None]).sum().item())
            assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
            assert record["answer"] == answers[expected.index(max(expected))]
            assert record["accuracy"] == float(record["answer"] == row["ground_truth"])
        assert any(len(tokenizer(context).input_ids) > longest for context, _ in asks) == (longest == 30)


@pytest.mark.parametrize("task", ["medmcqa", "pubmedqa"])
def test_option_likelihoods_are_lm_evals(task, sft_run, tmp_path):
    """lm-evaluation-harness itself, where it is installed (0.4.13 was), on the base with the adapter merged.
    """
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.medmcqa import utils_medmcqa
    from lm_eval.tasks.pubmedqa import preprocess_pubmedqa
    model, tokenizer, compute = evaluation.load_model(str(sft_run / "model"))
    model = model.merge_and_unload()
    rows, asks = asked(task, tmp_path, 40 if task == "medmcqa" else 9)
    records = evaluation.option_likelihoods(model, tokenizer, rows, compute, batch_size=7)
    harness, requests = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), []
    for i, ((row, _), (_, answers)) in enumerate(zip(rows, asks)):
        if task == "medmcqa":
            options = {"op" + letter: option for letter, option in zip("abcd", row["extra"]["options"])}
            context = utils_medmcqa.doc_to_text({"question": row["extra"]["question"], **options})
        else:
            context = preprocess_pubmedqa.doc_to_text(ABSTRACTS[row["id"].removeprefix("pubmedqa:")])
        requests += [Instance("loglikelihood", {}, (context, " " + answer), i) for answer in answers]
    theirs = iter([value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)])
    for record, (_, answers) in zip(records, asks):
        values = [next(theirs) for _ in answers]
        assert record["loglikelihoods"] == pytest.approx(values, abs=1e-4)
        assert record["answer"] == answers[values.index(max(values))]


def test_pubmedqa_likelihoods_compare_three_classes_with_maybe_and_without(tmp_path, capsys):
    (tmp_path / "official.json").write_text(json.dumps(ABSTRACTS))
    data = ["--task", "pubmedqa", "--data", tmp_path / "official.json", "--split", "all"]
    flags = [*data, "--mode", "loglikelihood"]
    assert heads(*flags, "--maybe", "--out", tmp_path / "three") == 0
    assert "counts as wrong" not in capsys.readouterr().out
    assert heads(*flags, "--models", "a=tiny", "b=tiny", "--out", tmp_path / "two") == 0
    assert "without --maybe no right answer is maybe, so it counts as wrong" in capsys.readouterr().out
    three = [json.loads(line) for line in (tmp_path / "three" / "eval.jsonl").read_text().splitlines()]
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    two = [json.loads(line)["loglikelihood"]["a"] for line in lines]
    assert [len(record["loglikelihoods"]) for record in three + two] == [3] * 15
    three = [record for record in three if record["ground_truth"] != "maybe"]
    assert [(one["id"], one["answer"]) for one in two] == [(other["id"], other["answer"]) for other in three]
    for one, other in zip(two, three):  # in batches of other widths
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
    assert (tmp_path / "two" / "report.html").read_text().startswith("<!")


def test_a_maybe_counts_as_wrong_where_no_row_is_maybe():
    records = [{"ground_truth": truth, "answer": answer, "accuracy": float(truth == answer)}
               for truth, answer in (("yes", "yes"), ("yes", "maybe"), ("no", "maybe"), ("yes", "no"))]
    summary = evaluation.summarize(records)
    assert summary["accuracy"] == 0.25 and summary["majority_accuracy"] == 0.75
    assert summary["answers"] == {"maybe": 2, "yes": 1, "no": 1}
    assert summary["macro_f1"] == pytest.approx((2 * 1 / (3 + 1) + 0) / 2)  # of the rows' two classes


def test_prepared_pubmedqa_rows_without_their_abstract_end_before_anything_is_loaded(tmp_path, capsys):
    rows = pubmedqa.builtin_rows(3)
    del rows[1]["extra"]["context"]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--task", "pubmedqa", "--data", tmp_path / "old.jsonl", "--split", "all"]
    assert heads(*data, "--mode", "both", "--out", tmp_path / "e") == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "model: " not in out and not (tmp_path / "e").exists()
    assert all(word in error for word in (rows[1]["id"], "`extra`", "`context`", "data.prepare"))


@pytest.mark.parametrize("arguments, words", [
    (["--models", "tiny"], ["NAME=MODEL"]),
    (["--models", "a=tiny", "a=tiny"], ["same name"]),
    (["--models", "a=tiny+nowhere"], ["nowhere", "no adapter folder"]),
    (["--mode", "loglikelihood", "--task", "ecg"], ["--mode loglikelihood", "ecg", "--mode generated"]),
])
def test_bad_heads(arguments, words, capsys, tmp_path):
    assert heads("--task", "medmcqa", "--out", tmp_path / "e", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
