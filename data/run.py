"""The folder of a training run: what it holds, how a stopped run goes on, what is done when a step goes
wrong.

    config.json        the settings at launch, the fingerprints of the rows; locked while a process works
    metrics.jsonl      a line a step
    samples.jsonl      a question, its completions and their rewards, every few steps
    eval_before.jsonl  a line a held-out example; eval_after.jsonl the same after training
    checkpoint/        all that a resumed run needs to come to the same weights
    model/             what was trained, written at the end
    bad_batch_N.json   what step N was trained on, where its update was not finite
    curves.png         the metrics as pictures
    summary.json       before and after; its being there says that the run is finished

Nothing in here ends the process but a signal that comes outside of the steps, or after the last was saved:
scripts ask `run.stop_signal` and end themselves, and what else is wrong is raised as an InputError.
"""
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from data import WRITTEN, InputError, check_out, out_of_memory, printable, synced

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
MAY_CHANGE = {"resume", "out", "steps", "save_every", "eval_every", "eval_batch_size",
              "completions_per_forward",
              "wandb", "wandb_project"}  # on --resume
BAD_STEPS = 3  # so many in a row whose update had to be skipped end the run


class Run:
    """The folder of one run, opened by one process at a time.

    folder: its path. settings: the configuration as a dict, launched: that of the first launch, with script
    and rows. finished: whether it has a summary.json. stop_signal: the SIGINT or SIGTERM that came during a
    step, or None. saved: the last step in checkpoint/. history: metrics of this launch. skipped: {step:
    updates left out}.
    """

    def __init__(self, script, config, panels=GRPO_PANELS):
        """config: the script's dataclass; panels: of curves.png, [(title, unit, {label: metric})].

        A dry run gets a folder that is gone when the process ends. Raises InputError where --out holds
        another run, or another configuration.
        """
        if config.resume and not config.out:
            raise InputError("--resume needs --out DIR: the folder of the run to continue")
        self.script = script
        self.panels = panels
        self.settings = asdict(config)
        self.folder = Path(config.out or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        self.temporary = None
        if config.dry_run:
            self.temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self.temporary.name)
            self.settings |= {"resume": False, "wandb": "disabled"}
        self.lock = None
        self.wandb = None
        self.stop_signal = None
        self.in_steps = False  # between the first step and the last
        self.saved = 0
        self.history = []
        self.warned = set()  # names of warnings
        self.skipped = Counter()
        self.bad_step = None  # the last with an update left out, the search for fp16's scale aside
        self.bad_in_a_row = 0
        self.identity = None  # of the run, whose checkpoints carry it
        check_out(self.folder, may_hold=WRITTEN)  # is it a file?
        self.launched = self._read_config()
        self.finished = bool(self.launched) and (self.folder / "summary.json").exists()
        if self.launched:
            self._check_launch(config)
        else:
            check_out(self.folder, may_hold=("config.json",))  # an empty one, of a run killed making it
            self.launched = self.settings
        self.schedule_steps = self.launched.get("steps")  # of the learning rate: fixed at launch

    def _read_config(self):
        """What config.json holds, {} where there is none or a run was killed making it. Raises InputError."""
        file = self.folder / "config.json"
        try:
            text = file.read_text() if file.exists() else ""
            launched = json.loads(text or "{}")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}), so nobody can tell what run "
                             "this was: take another --out") from None
        if text and (not isinstance(launched, dict) or "script" not in launched):
            raise InputError(f"--out {self.folder} holds a config.json of no run: take another folder")
        return launched

    def _check_launch(self, config):
        """Locks an unfinished run; raises InputError unless this launch goes on with what the folder holds.
        """
        if not self.finished:
            self._lock()
        if not config.resume:
            raise InputError(f"--out {self.folder} holds another run: add --resume to continue it, or take "
                             "another folder")
        if self.launched["script"] != self.script:
            raise InputError(f"--out {self.folder} holds a run of {self.launched['script']}.py: take another "
                             "folder")
        changed = []
        for key, value in json.loads(json.dumps(self.settings)).items():  # as the file has them
            if key not in MAY_CHANGE and self.launched.get(key, value) != value:
                changed.append(f"--{key} ({self.launched[key]!r} at launch)")
        if changed:
            raise InputError(f"--resume with another value of {', '.join(changed)} would be another run: "
                             "give the values of the launch")

    def open(self, train=(), heldout=()):
        """Called once the input is known to be good: makes the folder, catches signals, starts wandb if
        asked.

        train, heldout: the rows that are used; their fingerprint goes into config.json. Raises InputError
        where --resume comes with others.
        """
        rows = {"training": fingerprint(train), "held-out": fingerprint(heldout)}
        if self.lock:  # a run to go on with, locked by _check_launch
            self._check_rows(rows)
        else:
            self.launched = {**self.settings, "script": self.script, "rows": rows}
        if "rows" in self.launched:  # else a run from before there were fingerprints
            fixed = {key: value for key, value in self.launched.items() if key not in MAY_CHANGE}
            self.identity = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.lock:
                self._lock()
                self._write_config()
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be written ({error.strerror})") from None
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if self.settings["wandb"] != "disabled":
            self._start_wandb()

    def _check_rows(self, rows):
        """Raises InputError where the launch had rows with other fingerprints."""
        at_launch = self.launched.get("rows", rows)
        if at_launch != rows:
            at_launch = at_launch if isinstance(at_launch, dict) else {}
            other = " and ".join(side for side in rows if at_launch.get(side) != rows[side])
            raise InputError(f"--resume with other {other} rows than at launch would be another run: give "
                             "the launch's --data as it was then, or take another --out")

    def _write_config(self):
        """Writes config.json through the lock's file."""
        if (self.folder / "config.json").stat().st_size:  # another process was first, after _read_config
            raise InputError(f"--out {self.folder} holds another run: add --resume to continue it, or take "
                             "another folder")
        try:
            self.lock.write((json.dumps(self.launched, indent=1) + "\n").encode())
        except OSError:
            self.lock.truncate(0)  # half of it would block the folder
            raise

    def _start_wandb(self):
        import wandb  # seconds to import, and only when asked for
        identity = self.folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        self.wandb = wandb.init(
            project=self.settings["wandb_project"], mode=self.settings["wandb"], dir=str(self.folder),
            config=self.settings, name=self.folder.name, id=identity.read_text(), resume="allow")

    def _lock(self):
        """Locks config.json while this process lives: the kernel lets go of it, however the process ends."""
        try:
            self.lock = open(self.folder / "config.json", "ab", buffering=0)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {self.folder}: another run is at work in it: wait for its end or stop "
                             "it, or take another folder") from None
        except OSError as error:
            if not self.lock:  # it was open that failed, not flock
                raise InputError(f"--out {self.folder} cannot be written ({error.strerror})") from None
            print(f"{self.folder} has no file locks ({error.strerror}): see to it yourself that no second "
                  "run works in it")

    def close(self):
        """Lets go of the lock and of the signals, and deletes the folder of a dry run."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.lock:
            self.lock.close()
        if self.temporary:
            self.temporary.cleanup()

    # --- signals

    def steps(self, first, last):
        """The numbers first to last. While they run a SIGINT or SIGTERM waits in `stop_signal` for the end of
        the step; before and after, in an evaluation say, it ends the process at once.
        """
        self.in_steps = True
        yield from range(first, last + 1)
        self.in_steps = False
        if self.stop_signal:  # came after the last step was saved
            sys.exit(self.stopped(last))

    def _on_signal(self, number, frame):
        self.stop_signal = number
        if not self.in_steps:
            sys.exit(self.stopped(self.saved))
        signal.signal(number, signal.SIG_DFL)  # a second one quits at once
        tqdm.write("stopping: this step is finished and saved first (again to quit at once)", file=sys.stderr)

    def stopped(self, step):
        """Closes a run that a signal ends after `step`, says how to go on, and returns the exit code, 128 +
        signal.
        """
        if self.in_steps:  # elsewhere the signal came in the middle of something
            self.curves()
        go_on = f"to go on, repeat the command with --out {self.folder} --resume"
        if self.temporary:
            go_on = "a dry run leaves nothing"
        self.close()
        print(f"stopped after step {step}; {go_on}")
        return 128 + self.stop_signal

    # --- logs

    def log(self, name, record):
        """Appends a line to NAME.jsonl; metrics go to wandb too, and those with an evaluation are drawn."""
        with self._writing(f"{name}.jsonl"), open(self.folder / f"{name}.jsonl", "a",
                                                  encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if name == "metrics":
            self.history.append(record)
            if self.wandb:
                self.wandb.log(record, step=record["step"])
            if any(key.startswith("eval_") for key in record):
                self.curves()  # a long run can be looked at while it goes on

    def report(self, bar, metrics, group):
        """One GRPO step: metrics.jsonl, the bar and new warnings always; now and then a line, samples.jsonl,
        and a completion to read. group: one of the step's, as the scripts' rollout makes them.
        """
        step = metrics["step"]
        steps = self.settings["steps"]
        self.log("metrics", metrics)
        self.warn_once(bar, step, collapse_warnings(self.history, self.settings))
        bar.set_postfix_str(f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.2f}, "
                            f"kl {metrics['kl']:.3f}, {metrics['completion_length']:.0f} tokens")
        if step == 1 or step % max(1, steps // 20) == 0:
            heldout = f"  held-out {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else ""
            bar.write(f"step {step:4}  reward {metrics['reward']:.3f}  accuracy "
                      f"{metrics['accuracy']:.3f}{heldout}  kl {metrics['kl']:.4f}  entropy "
                      f"{metrics['entropy']:.3f}  tokens {metrics['completion_length']:.0f}  "
                      f"{pace(self.history, steps)}")
            row = group["row"]
            self.log("samples", {
                "step": step, "id": row["id"], "prompt": row["prompt"], "ground_truth": row["ground_truth"],
                "completions": group["texts"], "rewards": [score["score"] for score in group["scores"]]})
        if step == 1 or step % max(1, steps // 4) == 0:
            question, truth = group["row"]["extra"]["question"], group["row"]["ground_truth"]
            text = f"{question} ({truth})\n{group['texts'][0][:600]}"
            reward = group["scores"][0]["score"]
            bar.write(printable(text).replace("\n", "\n    | ") + f"\n    reward {reward:.1f}")

    def warn_once(self, bar, step, warnings):
        """Writes those of the warnings, {name: text}, whose name was not warned of before."""
        for name in warnings.keys() - self.warned:
            bar.write(f"WARNING: step {step}: {warnings[name]}")
            self.warned.add(name)

    def write_records(self, name, records):
        """NAME.jsonl at once, a line a record."""
        self._write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def read_records(self, name):
        """The records of NAME.jsonl."""
        text = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def read_before(self, heldout, summarize):
        """(records, summary) of eval_before.jsonl; raises InputError unless the records can be summarized and
        are about the questions of heldout, [(row, ...)].
        """
        file = self.folder / "eval_before.jsonl"
        wrong = "is about other questions than the run's"
        try:
            records = self.read_records("eval_before")
            summary = summarize(records)
            if [record["id"] for record in records] == [row["id"] for row, *_ in heldout]:
                return records, summary
        except (OSError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
            wrong = f"is damaged ({type(error).__name__})" if file.exists() else "is missing"
        raise InputError(f"{file} {wrong}, so before and after cannot be compared: put back a copy, or "
                         f"delete {self.folder}/checkpoint to start again from the first step")

    def _write(self, name, text):
        """Writes a file aside and renames it: whenever the process is killed, the file is the old or the new
        one.
        """
        with self._writing(name):
            (self.folder / f"{name}.new").write_text(text, encoding="utf-8")
            synced(self.folder / f"{name}.new").rename(self.folder / name)

    @contextmanager
    def _writing(self, name):
        """Within it a full disk and the like end in one line, an InputError: what is lost, what is not, what
        to do.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of the former
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0][:200]
            kept = "there was no checkpoint yet"
            if self.saved:
                kept = f"the checkpoint of step {self.saved} is whole, make room and go on with --resume"
            raise InputError(f"{self.folder / name} cannot be written ({reason}): {kept}") from error

    # --- checkpoints

    def save_checkpoint(self, state):
        """Replaces checkpoint/ by `state`, a dict of tensors and numbers; the old one stays until the new one
        is whole and on the disk. Raises InputError.
        """
        new, current, old = (self.folder / name
                             for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        try:
            with self._writing("checkpoint.new"):
                new.mkdir()
                with open(new / "state.pt", "wb") as file:
                    torch.save({**state, "run": self.identity}, file)
                for path in (new / "state.pt", new, *self.folder.glob("*.jsonl")):
                    # a full disk may only say so now
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
        """The last whole checkpoint, or None; lines of the logs that belong to later steps are cut off.

        Raises InputError for a checkpoint that cannot be read or is another run's.
        """
        state = self._read_checkpoint() if self.settings["resume"] else None
        if state:
            self.saved = state["step"]
            print(f"resumed: {self.folder} after step {self.saved}")
            size = self.settings.get("completions_per_forward")
            if size != self.launched.get("completions_per_forward"):
                state["completions_per_forward"] = size  # the user's word beats what was halved
        for name in ("metrics", "samples"):
            if (self.folder / f"{name}.jsonl").exists():
                self.write_records(name, self._records_until(name, self.saved))
        return state

    def _read_checkpoint(self):
        broken = []
        for file in (self.folder / name / "state.pt" for name in ("checkpoint", "checkpoint.old")):
            if not file.exists():
                continue
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                # cut short or damaged: torch, zip and pickle have a dozen types for it
                if out_of_memory(error):
                    raise
                broken.append(file)
                print(f"{file} cannot be read, it is cut short or damaged ({type(error).__name__})")
                continue
            if not (isinstance(state, dict) and "step" in state and state.get("run") == self.identity):
                raise InputError(f"{file} is no checkpoint of this run: put back its own, or delete "
                                 f"{file.parent} to start again from the first step")
            for damaged in broken:
                # so that the whole one, checkpoint.old, is kept until the next is complete
                shutil.rmtree(damaged.parent)
            return state
        if broken:
            raise InputError(f"{broken[0]} cannot be read, and no other checkpoint is there: delete "
                             f"{broken[0].parent} to start again from the first step, or put back a copy")
        return None

    def _records_until(self, name, step):
        """The records of a log up to a step; half a line, of a run that was killed, and what follows are cut.
        """
        records = []
        text = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                break
            if record["step"] <= step:
                records.append(record)
        return records

    # --- a step that goes wrong

    def skip_update_or_give_up(self, step, bad, numbers, groups, scaler):
        """Counts an update that is left out because `bad`, see not_finite, is not finite; the batch is then
        in bad_batch_STEP.json, for the first ten. Raises InputError at the third such step in a row.

        An infinite gradient in fp16 is no fault: the scaler is still looking for its scale, and lowers it.
        """
        self.skipped[step] += 1
        looking = scaler.is_enabled() and scaler.get_scale() > 1
        if (bad == ["gradient"] and looking) or step == self.bad_step:
            return
        self.bad_in_a_row = self.bad_in_a_row + 1 if self.bad_step == step - 1 else 1
        self.bad_step = step
        file = self.folder / f"bad_batch_{step}.json"
        if len(list(self.folder.glob("bad_batch_*.json"))) < 10:
            batch = [{key: value.tolist() if isinstance(value, torch.Tensor) else value
                      for key, value in group.items()} for group in groups]
            record = {"step": step, "not_finite": bad, **numbers, "batch": batch}
            self._write(file.name, json.dumps(record) + "\n")
        words = (f"step {step}: {' and '.join(bad).replace('_', ' ')} not finite (NaN or infinite), the "
                 "update is skipped")
        if file.exists():
            words += f"; the batch is in {file}"
        tqdm.write(f"WARNING: {words}", file=sys.stderr)
        if self.bad_in_a_row == BAD_STEPS:
            advice = "lower --learning_rate or --max_grad_norm, or try --dtype bf16 or fp32"
            if bad[0] == "rewards":
                advice = "look there for what the reward function made of the texts"
            kept = f"; the checkpoint of step {self.saved} is kept" if self.saved else ""
            raise InputError(f"{words}, as in the {BAD_STEPS - 1} steps before it: {advice}{kept}")

    # --- the end

    def curves(self):
        """Draws curves.png from metrics.jsonl, see draw_curves."""
        records = self.read_records("metrics") if (self.folder / "metrics.jsonl").exists() else []
        if not records:
            return
        heldout = [(record["step"], record["eval_accuracy"]) for record in records
                   if "eval_accuracy" in record]
        for name, step in (("eval_before", 0), ("eval_after", records[-1]["step"])):
            if (self.folder / f"{name}.jsonl").exists():
                heldout.append((step, fmean(record["accuracy"] for record in self.read_records(name))))
        for record in records:
            if "zero_std_groups" in record:
                record["zero_std_share"] = record["zero_std_groups"] / self.settings["prompts_per_step"]
        figure = draw_curves(self.panels, records, sorted(heldout))
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


def pace(history, steps):
    """The seconds of the last step, and the minutes that the steps to come take at the pace of the last ten.

    history: metrics of the steps of this launch. steps: of the whole run.
    """
    seconds = [record.get("generate_seconds", 0) + record["update_seconds"] for record in history[-10:]]
    left = median(seconds) * (steps - history[-1]["step"])
    return f"{seconds[-1]:.1f} s, {left / 60:.0f} min left"


def draw_curves(panels, records, heldout):
    """A matplotlib figure of metrics: a panel each, faint as they are and bold as running means.

    panels as in Run. records: of metrics.jsonl. heldout: [(step, greedy accuracy)], dots in the panel
    "Accuracy".
    """
    from matplotlib.figure import Figure  # a second to import

    answers = [key for key in records[-1] if key.startswith("label_share_")
               and any(record.get(key) for record in records)]
    parts = [key for key in records[0] if key.startswith("reward_") and key != "reward_std"]
    panels = [panel for panel in panels if panel[0] != "Answers" or answers]
    columns = min(len(panels), 3 if len(panels) % 3 == 0 else 4)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    for axis, (title, unit, series) in zip(axes, panels):
        if title == "Reward":
            series = series | {key.removeprefix("reward_"): key for key in parts}
        if title == "Answers":
            series = {key.removeprefix("label_share_"): key for key in answers}
        for name, key in series.items():
            steps = [record["step"] for record in records if key in record]
            values = [record[key] for record in records if key in record]
            window = max(1, len(values) // 20)
            smooth = [fmean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]
            [faint] = axis.plot(steps, values, alpha=0.25, linewidth=1)
            axis.plot(steps, smooth, color=faint.get_color(), linewidth=2, label=name)
        if title == "Accuracy" and heldout:
            axis.plot(*zip(*heldout), "ko-", markersize=5, linewidth=1, label="held out, greedy")
        if title in ("Accuracy", "Answers"):
            axis.set_ylim(0, 1.02)
        if title == "Reward":
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


# === guards: what they find, for the script to act on =======================================================


def not_finite(numbers, groups):
    """Names of what an update hangs on and is not finite, in the order in which it came about; [] if all is.

    numbers: {"loss": ..., "gradient": norm}. groups: dicts of what was trained on.
    """
    tensors = ("rewards", "advantages", "ref_logps", "old_logps")
    bad = [name for name in tensors
           if any(name in group and not group[name].isfinite().all() for group in groups)]
    return bad + [name for name, value in numbers.items() if not math.isfinite(value)]


def retry_with_less_memory(config, optimizer, attempt):
    """attempt(), again with config.completions_per_forward halved each time memory runs out: slower, but the
    same gradient. Raises InputError where it runs out with 1 too.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        size = min(config.completions_per_forward or config.group_size, config.group_size)
        if size == 1:
            smaller = "a smaller --model"
            if hasattr(config, "load_in_4bit"):
                smaller = f"take --load_in_4bit, {smaller}"
            raise InputError("out of memory with --completions_per_forward 1 too: lower "
                             f"--max_completion_length or --max_prompt_length, {smaller}, or --beta 0, which "
                             "needs no reference")
        optimizer.zero_grad()  # here, behind the except block, the failed attempt's tensors are free
        torch.cuda.empty_cache()
        config.completions_per_forward = size // 2
        words = f"--completions_per_forward {size // 2} (slower, the same gradient)"
        tqdm.write(f"out of memory: going on with {words}", file=sys.stderr)


def collapse_warnings(history, settings, window=10):
    """{name: text} of what is wrong in the last steps: the policy leaves its reference, stops trying, finds
    nothing to learn from, or always says the same. Each text names the knob to turn.

    history: metrics of all steps of this launch. settings: the run's, as a dict.
    """
    last = history[-window:]
    without_variance = [record["zero_std_groups"] == settings["prompts_per_step"] for record in last]
    if len(history) == 3 and all(without_variance):
        return {"reward": (
            "in the first 3 steps all completions of a group earned the same (reward "
            f"{last[-1]['reward']:.2f}, accuracy {last[-1]['accuracy']:.2f}), so there was nothing to "
            f"learn: type --group_size {2 * settings['group_size']} --temperature "
            f"{settings['temperature'] + 0.2:.1f}, take questions that are neither too easy nor too hard, "
            "or a warm start by sft.py")}
    if len(last) < window:
        return {}
    warnings = {}
    entropy, accuracy = (fmean(record[key] for record in last) for key in ("entropy", "accuracy"))
    median_kl = sorted(record["kl"] for record in last)[window // 2]
    if median_kl > 0.5:
        warnings["kl"] = (f"the policy has left its reference (KL {median_kl:.2f} nats per token): raise "
                          "--beta, lower --learning_rate, or renew the reference more often (--ref_every)")
    at_first = fmean(record["entropy"] for record in history[:window])
    if entropy < min(0.1 * at_first, 0.05) and accuracy < 0.8:
        warnings["entropy"] = (f"the entropy has collapsed ({entropy:.3f} nats): the policy says the same "
                               f"again and again, at accuracy {accuracy:.2f}; lower --learning_rate, raise "
                               "--temperature, --epsilon_high or --beta")
    if all(without_variance):
        warnings["reward"] = (f"in {window} steps no group had two different rewards, so there was nothing "
                              "to learn: raise --group_size or --temperature, or take questions that are "
                              "neither too easy nor too hard")
    labels = [key.removeprefix("gold_share_") for key in last[-1] if key.startswith("gold_share_")]
    given = {label: fmean(record[f"label_share_{label}"] for record in last) for label in labels}
    commonest = max(given, key=given.get, default="")
    parsed = sum(given.values())
    if parsed >= 0.1 and given[commonest] > 0.95 * parsed:
        right = fmean(record[f"gold_share_{commonest}"] for record in last)
        if right < 0.9:
            warnings["labels"] = (
                f"answers are nearly all {commonest!r}: {given[commonest] / parsed:.1%} of those that could "
                f"be read in {window} steps, while it is right for {right:.1%} of the questions; raise "
                "--prompts_per_step or --beta, or lower --learning_rate")
    return warnings


def gaming_warnings(records, window=20):
    """{"gamed": text} where, from one window of steps to the next, the learned reward rose and the rules'
    fell; else {}.

    records: of metrics.jsonl, with reward_learned and reward_rule.
    """
    records = records[-2 * window:]
    if len(records) < 2 * window:
        return {}

    def rise(name):
        return fmean(r[name] for r in records[window:]) - fmean(r[name] for r in records[:window])

    learned, rule = rise("reward_learned"), rise("reward_rule")
    if not (learned > 0.02 and rule < -0.02):
        return {}
    return {"gamed": (
        f"over the last {window} steps the reward model's score rose by {learned:.3f} while the rules' fell "
        f"by {-rule:.3f}: it is being gamed. Lower --learned_weight, raise --beta, or train the reward model "
        "on such answers")}
