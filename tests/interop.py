"""Other engines on our rows and rewards, for real: each in an environment of its own, run by hand on CPU.

    python3 -m venv verlenv && verlenv/bin/pip install verl==0.9.0 TransferQueue==0.1.8 torch==2.13.0 tyro
    verlenv/bin/python tests/interop.py verl   data/README.md's commands validate; rows, reward function and
                                               manager, also in Ray workers
    python3 -m venv trlenv && trlenv/bin/pip install -r requirements.txt trl==1.16.0
    trlenv/bin/python tests/interop.py trl    the loss in 504 settings; two steps of TRL's own command, in one
                                               process and in two
    python3 -m venv lmenv && lmenv/bin/pip install -r requirements.txt "lm_eval[hf]==0.4.13"
    lmenv/bin/python tests/interop.py lm_eval     eval.py --mode loglikelihood beside our task files, and
                                                  its own pubmedqa on the real rows of GRPO_TEST_DATA
    python3 -m venv negenv && negenv/bin/pip install medspacy==1.3.1
    GRPO_TEST_DATA=... negenv/bin/python tests/interop.py negation    statuses of findings, by medspaCy

Each prints versions, rows compared and the largest difference, and ends with exit code 1 if that is more than
rounding.
"""
import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
               "TOKENIZERS_PARALLELISM": "false"}

import rewards

TASKS = ("pubmedqa", "medmcqa", "ecg", "medical_o1")
NEEDS = {"verl": ("verl==0.9.0 TransferQueue==0.1.8 torch==2.13.0 tyro",
                  ("verl", "transformers", "torch", "ray", "tensordict", "datasets")),
         "trl": ("-r requirements.txt trl==1.16.0",
                 ("trl", "transformers", "torch", "accelerate", "datasets")),
         "negation": ("medspacy==1.3.1", ("medspacy", "spacy")),
         "lm_eval": ('-r requirements.txt "lm_eval[hf]==0.4.13"',
                     ("lm_eval", "transformers", "torch", "datasets"))}
MEDICAL_O1 = [{"Question": f"Which drug helps in case {i}?",
               "Complex_CoT": f"Case {i} shows sign {i * 7 % 31}.",
               # it has no built-in rows
               "Response": f"Drug {i % 13} lowers sign {i * 7 % 31} within {i % 5 + 2} days."}
              for i in range(500)]


def attempts(rows):
    """A completion for each row, of six kinds: right, another row's, something behind it, a tag missing, the
    bare answer, two answers.
    """
    made = []
    for i, row in enumerate(rows):
        own, other, answer = row["target"], rows[i - 1]["target"], row["ground_truth"]
        made.append((own, other, own + "\nI hope this helps.", own.partition("\n")[2], answer,
                     own.replace(answer, f"{answer} {answer}"))[i % 6])
    return made


def run(*command, **environment):
    """stdout of a command in the repository's root; its output is shown, and all ends, where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:500]}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def prepare(task, folder, *flags):
    """Rows of a task, (train, heldout), as data.prepare writes them into a folder."""
    source = "builtin"
    if task == "medical_o1":
        source = folder.parent / "medical_o1.json"
        source.write_text(json.dumps(MEDICAL_O1))
    run(sys.executable, "-m", "data.prepare", task, source, "--out", folder, *flags)
    return [[json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]
            for side in ("train", "heldout")]


def check(what, rows, difference, limit):
    """Prints a comparison; ends the program where the difference is too large."""
    print(f"{what}: {rows} compared, largest difference {difference:.2g}")
    if not difference <= limit:
        sys.exit(f"{what}: more than {limit:g}")


def largest(ours, theirs):
    """The largest difference of two lists of numbers, of the same length."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


# === verl ===================================================================================================


def verl_configs(readme):
    """{experiment name: config} of the verl commands of a README: the blocks are run by bash as they stand,
    but with --cfg job.
    """
    import yaml
    from omegaconf import OmegaConf
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if "verl.trainer.main_ppo" in block]
    if not blocks:
        sys.exit(f"{readme} has no command with verl.trainer.main_ppo")
    configs = {}
    for block in blocks:
        lines = [line for line in block.splitlines()
                 if not line.startswith(("python -m data", "python eval.py", "python sft.py", "pip"))]
        command = "python -m verl.trainer.main_ppo"
        script = "\n".join(lines).replace(command, "echo '--- # config'; "
                                                   f"{command.replace('python', sys.executable)} --cfg job")
        printed = run("bash", "-euc", script).split("--- # config\n")[1:]
        for text in printed:
            config = OmegaConf.create(yaml.safe_load(text[text.index("actor_rollout_ref:"):]))
            configs[config.trainer.experiment_name] = config
    if set(configs) != set(TASKS):
        sys.exit(f"{readme} has verl commands for {', '.join(configs)}; needed are {', '.join(TASKS)}")
    return configs


def verl(arguments, folder):
    import numpy
    import ray
    import torch
    from omegaconf import open_dict
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager
    from verl.trainer.ppo.metric_utils import process_validation_metrics
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    from verl.workers.reward_manager.naive import NaiveRewardManager

    os.chdir(ROOT)
    configs = verl_configs(arguments.readme)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    for name, config in configs.items():
        checked = config.copy()
        try:
            import vllm  # noqa: F401
        except ImportError:
            checked.actor_rollout_ref.model.lora_rank = 0  # verl asks vLLM which ranks it takes
        validate_config(checked, use_reference_policy=need_reference_policy(config),
                        use_critic=need_critic(config))
        for part in (config.algorithm, config.actor_rollout_ref.rollout):
            omega_conf_to_dataclass(part)
        assert config.algorithm.adv_estimator == "grpo" and config.actor_rollout_ref.actor.use_kl_loss
        assert not need_critic(config)
        assert config.actor_rollout_ref.model.lora_rank
        assert config.reward.custom_reward_function.path == str(ROOT / "rewards.py")
        assert Path(config.data.train_files).parts[-3:] == ("processed", name, "train.parquet")
        print(f"{name}: --cfg job, and verl's own validation, pass")

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder / "ray"),
             runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    for task, config in configs.items():
        train, heldout = prepare(task, folder / task, "--export", "verl")
        path = folder / task / "val.parquet"
        with open_dict(config):
            config.actor_rollout_ref.model.path = str(ROOT / "data" / "tiny")
            config.reward.num_workers, config.data.cache_dir = 2, str(folder / "cache")
        data = RLHFDataset(str(path), tokenizer, config.data)
        rows = heldout[:200]
        assert len(data) == len(heldout)
        assert len(RLHFDataset(str(folder / task / "train.parquet"), tokenizer, config.data)) == len(train)
        items = [data[i] for i in range(200)]
        assert [item["raw_prompt"] for item in items] == [row["prompt"] for row in rows]

        # a batch as after a rollout: prompts padded on the left, responses on the right
        prompts = [tokenizer.apply_chat_template(item["raw_prompt"], add_generation_prompt=True,
                                                 return_dict=False) for item in items]
        responses = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in attempts(rows)]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        left, right = max(map(len, prompts)), max(map(len, responses))
        tensors = {"prompts": torch.tensor([[0] * (left - len(ids)) + ids for ids in prompts]),
                   "responses": torch.tensor([ids + [0] * (right - len(ids)) for ids in responses]),
                   "attention_mask": torch.tensor([[0] * (left - len(p)) + [1] * (len(p) + len(r))
                                                   + [0] * (right - len(r))
                                                   for p, r in zip(prompts, responses)])}
        others = {key: value for key, value in collate_fn(items).items()
                  if not isinstance(value, torch.Tensor)}
        batch = DataProto.from_dict(tensors, non_tensors=others)
        ours = [rewards.compute_score(row["data_source"], text, row["ground_truth"], row["extra"])
                for row, text in zip(rows, texts)]
        scores = [one["score"] for one in ours]
        assert len(set(scores)) > 3

        def compare(where, tensor, info):
            """verl's rewards (each at its response's last token) and what it keeps beside them, against ours.
            """
            assert all((row[:len(ids) - 1] == 0).all() for row, ids in zip(tensor, responses))
            numbers = [key for key in ours[0] if key != "answer"]
            difference = max(largest(scores, tensor.sum(dim=1).tolist()),
                             *(largest([one[key] for one in ours], info[key]) for key in numbers))
            assert [str(answer) for answer in info["answer"]] == [one["answer"] for one in ours]
            assert set(info) == set(ours[0])
            check(f"{task}, {where}", len(rows), difference, 1e-6)

        if task == "pubmedqa":  # knobs go through verl's configuration, and change scores
            with_knobs = config.copy()
            with open_dict(with_knobs):
                with_knobs.reward.custom_reward_function.reward_kwargs = {"tag_weight": 0.5}
            function = get_custom_reward_fn(with_knobs)
            assert function(data_source=task, solution_str=rows[0]["target"],
                            ground_truth=rows[0]["ground_truth"], extra_info={})["score"] == 4.0
        function = get_custom_reward_fn(config)
        result = NaiveRewardManager(tokenizer, 0, function)(batch, return_dict=True)
        compare("naive manager", result["reward_tensor"], result["reward_extra_info"])
        manager = RewardLoopManager(config)
        result = manager.compute_rm_score(batch)
        compare("naive manager in 2 Ray workers", result.batch["rm_scores"],
                {key: result.non_tensor_batch[key] for key in result.meta_info["reward_extra_keys"]})
        metrics = process_validation_metrics([row["data_source"] for row in rows],
                                             [row["id"] for row in rows],
                                             {key: list(values)
                                              for key, values in result.non_tensor_batch.items()})
        [logged] = metrics.values()
        check(f"{task}, verl's validation metric", len(rows),
              abs(logged["accuracy"]["mean@1"] - numpy.mean([one["accuracy"] for one in ours])), 1e-6)
        for worker in manager.reward_loop_workers:
            ray.kill(worker)
    ray.shutdown()


# === trl ====================================================================================================


def trl_losses():
    """grpo_loss against TRL's own _compute_loss, loss and gradient by token, in every setting that both have.
    """
    import torch
    from trl import GRPOTrainer

    import grpo_pubmedqa

    fixture = json.loads((ROOT / "tests" / "trl_loss.json").read_text())
    mask = torch.tensor(fixture["completion_mask"])
    values = {name: torch.tensor(fixture[name])
              for name in ("per_token_logps", "old_per_token_logps", "ref_per_token_logps")}
    gather = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
                             gather_for_metrics=lambda x: x)
    settings = itertools.product(
        ("grpo", "dapo", "dr_grpo", "cispo"), ("token", "sequence"), (True, False), (None, 0.28, 5.0),
        ("group", "batch", "none"),
        (True, False), (0.0, 0.04))
    compared, worst, sequence_kl = 0, 0.0, 0.0
    for loss_type, level, corrected, epsilon_high, scale, old_given, beta in settings:
        advantages = torch.tensor(fixture["advantages"][scale])
        theirs = values["per_token_logps"].clone().requires_grad_()
        trainer = SimpleNamespace(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=beta,
            args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1),
            loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.2 if epsilon_high is None else epsilon_high,
            use_vllm=False,
            max_completion_length=fixture["max_completion_length"], current_gradient_accumulation_steps=1,
            accelerator=gather,
            model=SimpleNamespace(training=True), _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *_, **__: (theirs, torch.zeros_like(theirs), None))
        inputs = {"prompt_ids": torch.tensor(fixture["prompt_mask"]),
                  "prompt_mask": torch.tensor(fixture["prompt_mask"]),
                  "completion_ids": mask, "completion_mask": mask, "advantages": advantages,
                  "ref_per_token_logps": values["ref_per_token_logps"],
                  "num_items_in_batch": torch.tensor(float(mask.sum())),
                  "old_per_token_logps": values["old_per_token_logps"] if old_given else None}
        their_loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        their_loss.backward()
        ours = values["per_token_logps"].clone().requires_grad_()
        our_loss, _ = grpo_pubmedqa.grpo_loss(
            ours, values["old_per_token_logps"] if old_given else ours.detach(),
            values["ref_per_token_logps"], advantages,
            mask.bool(), num_sequences=len(mask), num_tokens=int(mask.sum()),
            max_completion_length=fixture["max_completion_length"],
            epsilon=0.2, epsilon_high=trainer.epsilon_high, beta=beta, loss_type=loss_type,
            importance_level=level,
            kl_estimator="unbiased" if corrected else "k3")
        our_loss.backward()
        difference = max(abs(our_loss.item() - their_loss.item()),
                         (ours.grad - theirs.grad).abs().max().item())
        if level == "sequence" and corrected and beta:
            # the stated difference: the token's ratio, not the sequence's
            sequence_kl = max(sequence_kl, difference)
        else:
            compared, worst = compared + 1, max(worst, difference)
    check("TRL's _compute_loss, loss and gradient by token, by settings", compared, worst, 1e-6)
    print("sequence level with the corrected KL, where ours takes the token's ratio on purpose: largest "
          f"difference {sequence_kl:.2g}")


def trl(arguments, folder):
    import pandas
    trl_losses()
    steps, completions = 2, 8
    for task in TASKS:
        train, _ = prepare(task, folder / task)
        by_prompt = {row["prompt"][-1]["content"]: row for row in train}
        launchers = [("one process", [sys.executable], completions)]
        if task == "pubmedqa":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
                        29617]
            launchers.append(("torchrun, 2 processes", torchrun, completions // 2))
        for name, launcher, own in launchers:
            out = folder / f"{task}-{len(launcher)}"
            run(*launcher, "-m", "trl.scripts.grpo", "--model_name_or_path", ROOT / "data" / "tiny",
                "--dataset_name", folder / task,
                "--reward_funcs", "rewards.trl_reward", "--output_dir", out, "--max_steps", steps,
                "--per_device_train_batch_size", own,
                "--num_generations", 4, "--max_completion_length", 64, "--beta", 0.01, "--learning_rate",
                1e-4, "--logging_steps", 1,
                "--log_completions", "--save_steps", steps, "--report_to", "none", "--use_cpu", "--bf16",
                "False", "--dtype", "float32",
                HF_HOME=str(folder / "hf"), OMP_NUM_THREADS="1")
            tables = [pandas.read_parquet(file) for file in sorted((out / "completions").glob("*.parquet"))]
            [state] = out.glob("checkpoint-*/trainer_state.json")
            logged = [entry["reward"] for entry in json.loads(state.read_text())["log_history"]
                      if "reward" in entry]
            assert len(tables) == len(logged) == steps and all(len(table) == completions for table in tables)
            ours = [[rewards.compute_score(row["data_source"], completion[-1]["content"], row["ground_truth"],
                                           row["extra"])["score"]
                     for row,
                     completion in zip((by_prompt[prompt[-1]["content"]] for prompt in table.prompt),
                                       table.completion)] for table in tables]
            theirs = [list(table.trl_reward) for table in tables]
            difference = max(largest(sum(ours, []), sum(theirs, [])),
                             largest([sum(own) / len(own) for own in ours], logged))
            check(f"{task}, TRL, {name}, {steps} steps: rewards of completions and the logged means",
                  sum(map(len, ours)), difference, 1e-6)


# === lm-evaluation-harness ==================================================================================


def harness_samples(arguments, config, folder):
    """({id: log-likelihoods of the row's answers}, accuracy) of the first --rows rows of a harness's task.

    config: the fields of its task file.
    """
    task, out = config["task"], folder / f"{config['task']}-out"
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{task}.yaml").write_text(json.dumps(config))  # JSON is YAML
    run(sys.executable, "-m", "lm_eval", "--include_path", folder / "tasks", "--tasks", task, "--model", "hf",
        "--model_args", f"pretrained={arguments.model.resolve()},dtype=float32", "--device", "cpu",
        "--limit", arguments.rows, "--log_samples", "--output_path", out, HF_HOME=str(folder / "hf"),
        OMP_NUM_THREADS="1")
    [file], [samples] = out.rglob("results*.json"), out.rglob("samples*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    values = {record["doc"]["id"]: [float(answer[0]) for answer in record["filtered_resps"]]
              for record in records}
    assert len(records) == len(values) == arguments.rows
    return values, json.loads(file.read_text())["results"][task]["acc,none"]


def compare_likelihoods(arguments, config, folder, *flags):
    """eval.py --mode loglikelihood beside harness_samples: log-likelihoods, picks and accuracy."""
    theirs, accuracy = harness_samples(arguments, config, folder)
    task, out = config["task"], folder / f"{config['task']}-ours"
    run(sys.executable, "eval.py", "--model", arguments.model.resolve(), "--mode", "loglikelihood",
        "--out", out, "--dtype", "fp32", "--eval_batch_size", 8, *flags, OMP_NUM_THREADS="1")
    ours = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    own = json.loads((out / "summary.json").read_text())["accuracy"]
    pairs = [(record["loglikelihoods"], theirs[record["id"]]) for record in ours]
    same = sum(one.index(max(one)) == other.index(max(other)) for one, other in pairs)
    print(f"{task}: {same} of {len(ours)} picks as in eval.py; accuracy {accuracy:.3f}, ours {own:.3f}")
    check(f"{task}, log-likelihoods of the {len(pairs[0][0])} answers", len(ours),
          max(largest(one, other) for one, other in pairs), 1e-4)
    assert same == len(ours) == len(theirs) and abs(own - accuracy) < 1e-9


def lm_eval(arguments, folder):
    import yaml
    for task in ("medmcqa", "pubmedqa"):
        prepare(task, folder / task)
        config = yaml.safe_load((ROOT / "data" / "lm_eval" / f"{task}_prepared.yaml").read_text())
        # the rest as it is
        config["dataset_kwargs"]["data_files"] = {"test": str(folder / task / "heldout.jsonl")}
        compare_likelihoods(arguments, config, folder, "--task", task, "--data", folder / task,
                            "--eval_size", arguments.rows)

    real = Path(os.environ.get("GRPO_TEST_DATA", "")) / "pubmedqa_ori_pqal_500.json"
    if not real.exists():
        print(f"the harness's own pubmedqa is left out: GRPO_TEST_DATA names no folder with {real.name}")
        return
    items = dict(list(json.loads(real.read_text(encoding="utf-8")).items())[:arguments.rows])
    (folder / "official.json").write_text(json.dumps(items))
    fields = ("QUESTION", "CONTEXTS", "final_decision")  # the hub's bigbio/pubmed_qa calls them so too
    documents = [{"id": f"pubmedqa:{pmid}", **{field: item[field] for field in fields}}
                 for pmid, item in items.items()]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    own_task = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks/pubmedqa/pubmedqa.yaml"
    data_files = {"test": str(folder / "documents.jsonl")}
    config = {"include": str(own_task), "task": "pubmedqa_real",  # its prompt and rule on these rows
              "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data_files},
              "training_split": None, "validation_split": None, "test_split": "test"}
    compare_likelihoods(arguments, config, folder, "--task", "pubmedqa", "--data", folder / "official.json",
                        "--split", "all", "--maybe", "--max_prompt_length", 4096)


# === negation ===============================================================================================

# What a disagreement comes from: the first of its status there whose pattern the sentence has
CLASSES = {
    "possible": (("\"suggestive of\", \"concerning for\", \"rule out\", \"possible\": other literals or "
                  "another scope",
                  r"\brul(?:e|es|ed|ing) out|suspect|suspicio|possib|probabl|suggestive|concern|worri|doubt"),
                 ("\"may be\" is uncertainty there, the way to state a fact here",
                  r"\b(?:may|might|could|can) be\b|\bmaybe\b")),
    "negated": (
        ("the scope ends here at a comma, \"and\", a verb or a link, there at the end of the sentence",
         r"\b(?:no|not|without|absence|lack|cannot|free|negative|any other|rather than|test for)\b"),),
    "affirmed": (("\"absent\", \"lacks\", \"no longer\", \"has resolved\": no literal there",
                  r"\b(?:absent|lacks|no longer|neither|has resolved|have resolved)\b"),
         ("\"possibly\", \"suspected\", \"concern for\": no literal there",
          r"\b(?:possibly|possible|suspected|suspicion|concern for|probable)\b"),
         ("\"not\" with a scope or window that differs", r"\b(?:no|not|without)\b"))}


def negation(arguments, folder):
    """Statuses of rewards.key_findings against those of medspaCy's ConText, of each finding of each sentence
    of the real rows.
    """
    from loguru import logger
    logger.remove()
    import medspacy
    from medspacy.ner import TargetRule
    from test_rewards_real import real_rows
    phrases = {phrase.strip(): name for name, text in rewards.FINDINGS.items() for phrase in text.split(";")}
    nlp = medspacy.load(medspacy_enable=["medspacy_target_matcher", "medspacy_context"])
    nlp.add_pipe("sentencizer", first=True)
    nlp.get_pipe("medspacy_target_matcher").add([TargetRule(phrase, name)
                                                 for phrase, name in phrases.items()])
    texts = {row["ground_truth"] for row in real_rows("all", os.environ["GRPO_TEST_DATA"])}
    sentences = sorted({sentence.strip() for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text)})
    counts, examples = {}, {}
    for sentence in sentences:
        ours = {item[0]: status for item, status in rewards.key_findings(sentence).items()
                if item[1] == "finding"}
        if not ours:
            continue
        theirs = {}
        for entity in nlp(sentence.lower().replace("-", " ")).ents:
            status = "possible" if entity._.is_uncertain else "negated" if entity._.is_negated else "affirmed"
            theirs.setdefault(entity.label_, set()).add(status)
        for name in ours.keys() & theirs.keys():
            if len(theirs[name]) > 1 or not ours[name]:
                kind = ("both ways", "", "")
            else:
                [status] = theirs[name]
                kind = ("same", status, "") if status == ours[name] else (
                    "different", f"{ours[name]} here, {status} there",
                    next((what for what, pattern in CLASSES[status] if re.search(pattern, sentence, re.I)),
                         "another"))
            counts[kind] = counts.get(kind, 0) + 1
            examples.setdefault(kind, []).append(f"{name}: {sentence[:260]}")
    total = sum(count for kind, count in counts.items() if kind[0] != "both ways")
    same = sum(count for kind, count in counts.items() if kind[0] == "same")
    print(f"{total} findings in the sentences of real answers, {same} with the same status "
          f"({same / total:.1%})")
    for kind, count in sorted(counts.items(), key=lambda entry: -entry[1]):
        print(f"| {count} | {kind[0]} | {kind[1]} | {kind[2]} |")
        for example in examples[kind][:arguments.examples] if kind[0] == "different" else ():
            print(f"    {example}")
    check("share of statuses that differ", total, 1 - same / total, 0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=NEEDS)
    parser.add_argument("--readme", type=Path, default=ROOT / "data" / "README.md",
                        help="whose commands to check (verl)")
    parser.add_argument("--model", type=Path, default=ROOT / "data/tiny", help="a model's folder (lm_eval)")
    parser.add_argument("--rows", type=int, default=60, help="of each task (lm_eval)")
    parser.add_argument("--examples", type=int, default=0,
                        help="sentences to show of each disagreement (negation)")
    arguments = parser.parse_args()
    packages, shown = NEEDS[arguments.what]
    try:
        print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown))
    except importlib.metadata.PackageNotFoundError as error:
        print(f"error: {error.name} is not installed here; in an environment of its own: pip install "
              f"{packages}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory(prefix="interop-") as temporary:
        globals()[arguments.what](arguments, Path(temporary))
    print(f"{arguments.what}: all checks passed")
