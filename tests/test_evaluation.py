"""Statistics of an evaluation: what several sampled answers show, and the trivial baselines beside every accuracy."""
import itertools
import json

import pytest

import eval as evaluation
import time
t=time.time()
import sys; sys.path.insert(0,'.')
import eval as ev, grpo_pubmedqa as g, grpo_ecg
print('import',time.time()-t)
for a in (["--steps","-3","--model","tiny"],["--steps","3","--model","tiny"]):
    t=time.time(); c=g.parse(a); print('parse',time.time()-t)
t=time.time(); c=ev.tyro.cli(ev.Config,args=["--samples","3"],use_underscores=True); print('eval parse',time.time()-t)
for i in range(2):
    t=time.time(); m=ev.load_model("tiny"); print('load',time.time()-t)
t=time.time(); r=ev.load_task(g.pubmedqa,c); print('task',time.time()-t, len(r[0]),len(r[1]))
t=time.time(); e=ev.encode_rows(m[1],r[0][:200],1000,'x'); print('enc 200',time.time()-t)
import math
t=time.time(); x=math.comb(20000,9900)/2**20000; print('comb',time.time()-t)
t=time.time(); x=math.comb(180000,89000)/2**180000; print('comb180k',time.time()-t)
import numpy
a=numpy.random.default_rng(0).integers(0,45001,(20,45001))
gg=numpy.random.default_rng(0); b=numpy.concatenate([gg.integers(0,45001,(k,45001)) for k in (3,7,10)])
print((a==b).all())
try: c=g.parse(["--seed","9"*5000])
except SystemExit as e: print(e.code)
try: c=g.parse(["--seed","nan"])
except SystemExit as e: print(e.code)


def test_the_page_shows_pass_at_k_with_guessing_beside_it():
    summaries = {"base": 2, "sft": 5, "grpo <b>": 8}
    heads = {}
    for name, right in summaries.items():
        records = [{"ground_truth": truth, "answer": truth, "accuracy": 1.0, "sampled_answers": ["yes"] * 8,
                    "sampled_accuracy": [1.0] * right + [0.0] * (8 - right)} for truth in ("yes", "no", "maybe")]
        heads[name] = {"generated": evaluation.summarize(records)}
    page = evaluation.report_html("t", heads, [])
    assert page.count("<svg") == 2 and page.count('class="line line') == 3 and page.count('class="majority line"') == 1
    assert "Sampled answers (8 a question)" in page and "pass@4" in page and "maj@8" in page and "<td>62.5%</td>" in page
    assert '<th scope="row">guessing</th><td>33.3%</td>' in page and "always yes" in page and "<b>" not in page


def test_eval_command_reports_pass_at_k_and_majority(tmp_path, capsys):
    out = tmp_path / "e"
    evaluation.main(evaluation.Config(out=str(out), eval_size=4, samples=3, max_completion_length=40))
    summary = json.loads((out / "summary.json").read_text())
    record = json.loads((out / "eval.jsonl").read_text().splitlines()[0])
    assert summary["samples"] == 3 and list(summary["pass_at_k"]) == ["1", "2", "3"] and 0 <= summary["maj_at_n"] <= 1
    assert len(record["sampled_answers"]) == len(record["sampled_accuracy"]) == 3
    printed = capsys.readouterr().out
    assert "3 samples each: mean accuracy" in printed and "maj@3" in printed and "(always '" in printed
