"""Facts about the code of a checkout, for the table in tests/README.md:

    python tests/facts.py            of this one
    python tests/facts.py FOLDER     of another, such as a clone of an older commit

Lines, bytes and the longest line of each file; what a script takes from eval.py and the run folder, its
knobs; how the three scripts differ outside of their fence; and how many functions of ours one training step
calls, counted on a tiny run.
"""
import ast
import difflib
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = ("grpo_pubmedqa", "grpo_medmcqa", "grpo_ecg")
FILES = (*(f"{script}.py" for script in SCRIPTS), "sft.py", "eval.py", "rewards.py", "data/run.py",
         "data/__init__.py")
STEP = """
import sys
import grpo_pubmedqa as script

called, steps = set(), []

def watch(frame, event, argument):
    code = frame.f_code
    ours = code.co_filename.startswith({folder!r}) and "/.venv/" not in code.co_filename
    if event != "call" or not ours or code.co_name.startswith("<"):
        return
    if code.co_name == "rollout":
        steps.append(1)
    if len(steps) == 2:
        called.add((code.co_filename, code.co_name))

sys.setprofile(watch)
flags = "--steps 3 --prompts_per_step 2 --group_size 2 --eval_size 2 --eval_every 0 --save_every 0"
flags += " --max_completion_length 8 --model tiny --data builtin --limit 40 --ref_every 3 --out"
script.main(script.parse([*flags.split(), {out!r}]))
sys.setprofile(None)
print(len(called))
"""


def outside(text):
    """The lines of a script outside of its fence."""
    before, _, rest = text.partition("# === shared")
    return (before + rest.partition("# === end shared")[2].partition("\n")[2]).splitlines()


def names_of(tree, module):
    """Attributes of `module` that a script uses."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == module}


def main(folder):
    """Prints the facts."""
    for file in FILES:
        path = folder / file
        if path.exists():
            text = path.read_text()
            print(f"{file}: {len(text.splitlines())} lines, {len(text.encode())} bytes, "
                  f"longest line {max(map(len, text.splitlines()))}")
    texts = {script: (folder / f"{script}.py").read_text() for script in SCRIPTS}
    for script, text in texts.items():
        tree = ast.parse(text)
        [config] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
        knobs = sum(isinstance(node, ast.AnnAssign) for node in config.body)
        print(f"{script}: {len(names_of(tree, 'evaluation'))} names of evaluation, "
              f"{len(names_of(tree, 'run'))} of run; {knobs} knobs; "
              f"{len(text.splitlines()) - len(outside(text))} lines in the fence")
    for one, two in itertools.combinations(SCRIPTS, 2):
        different = [line for line in difflib.unified_diff(outside(texts[one]), outside(texts[two]), n=0)
                     if line[0] in "+-" and not line.startswith(("+++", "---"))]
        print(f"{one} and {two}: {len(different)} lines differ outside of the fence")
    with tempfile.TemporaryDirectory() as out:
        code = STEP.format(folder=str(folder), out=f"{out}/run")
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                              check=True)
    print(f"functions of ours behind one step of grpo_pubmedqa: {done.stdout.splitlines()[-1]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve())
