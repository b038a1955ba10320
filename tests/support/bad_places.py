"""Files that are wrong in one way each, and runs with damaged checkpoints, for `test_bad_input`."""

from __future__ import annotations

import hashlib
import json
import shutil

TEXTS = {
    "file": "a file",
    # configurations
    "list.yaml": "- epochs\n",
    "tab.yaml": "epochs:\n\t- 1\n",
    "latin.yaml": b"output_dir: caf\xe9\n",
    "object.yaml": "seed: !!python/object/apply:os.system ['touch pwned']\n",
    "number.yaml": "1: 2\n",
    "null.yaml": "base: tiny\nalgorithm:\n",
    "deep.yaml": "seed: " + "[" * 5000 + "\n",
    "circle1.yaml": "base: circle2.yaml\n",
    "circle2.yaml": "base: circle1.yaml\n",
    "orphan.yaml": "base: tinny\n",
    "based.yaml": "base: 3\n",
    # prompts
    "empty.txt": "",
    "blank.txt": "one red circle\n\ntwo red circles\n",
    "latin.txt": b"one red caf\xe9\n",
    "one.txt": "one red circle\n",
    "cat.txt": "a cat\na dog\n",
    "table.csv": "prompt\none red circle\n",
    "array.jsonl": "[1]\n",
    "cut.jsonl": '{"prompt": "one red circle"}\n{"prompt": "two\n',
    "nameless.jsonl": '{"text": "one red circle"}\n',
    "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "\n",
    "surrogate.jsonl": '{"prompt": "one red \\ud800"}\n{"prompt": "two"}\n',
    "split/test.txt": "one red circle\n",
    # models
    "other-class/model_index.json": '{"_class_name": "StableDiffusionPipeline"}',
    "cut-index/model_index.json": '{"_class_name": ',
    "no-class/model_index.json": "[]",
    "no-parts/model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}',
    "evil-part/model_index.json": json.dumps(
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "Evil"]}
    ),
    # runs for the report
    "bad-metrics/metrics.jsonl": '{"epoch": 0}\nnonsense\n{"epoch": 1}\n',
    "no-epoch/metrics.jsonl": '{"kl": 0.1}\n',
    "bad-config/config.yaml": "a: [\n",
    "bad-summary/metrics.jsonl": '{"epoch": 0}\n',
    "bad-summary/summary.json": "[1]",
    "bad-images/metrics.jsonl": '{"epoch": 0}\n',
    "bad-images/images/index.json": '[{"file": "../../file", "epoch": 0, "title": "x"}]',
    "thesis/thesis.tex": "precious",
    # rewards
    "token": "two words\n",
    "bad_rewards.py": """
import torch
def missing(images, prompts, metadata): return torch.full((len(images),), torch.nan)
def none(images, prompts, metadata): return None
def empty(images, prompts, metadata): return []
def words(images, prompts, metadata): return ["good"] * len(images)
def square(images, prompts, metadata): return torch.zeros(len(images), 2)
def integers(images, prompts, metadata): return torch.zeros(len(images), dtype=torch.int64)
def two(images, prompts): return torch.zeros(len(images))
def picky(images, prompts, metadata, threshold): return torch.zeros(len(images))
class NoReward:
    def __init__(self, device): pass
class Angry:
    def __init__(self, device): raise ValueError("threshold: expected > 0, got 0")
value = 3
""",
}


def fill(folder) -> None:
    """Write all of `TEXTS`."""
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def damage_runs(run) -> None:
    """Copies of a run of two epochs with checkpoints of both, each copy wrong in one way."""
    import torch
    from safetensors.torch import load_file, save_file

    def copy(name):
        target = run.with_name(name)
        shutil.copytree(run, target)
        return target

    def last(name):
        return copy(name) / "checkpoints" / "epoch_0002"

    def rewrite(checkpoint, file, change):
        """Change tensors, and the manifest with them, as another program would."""
        tensors = load_file(checkpoint / file)
        save_file(change(tensors), checkpoint / file)
        data = (checkpoint / file).read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(checkpoint, lambda manifest: manifest["files"].update({file: entry}))

    def edit(checkpoint, change):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        change(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    edit(last("run-version"), lambda m: m.update(version=99))
    edit(
        last("run-escape"),
        lambda m: m["files"].update({"../../config.yaml": m["files"]["state.json"]}),
    )
    for checkpoint in (copy("run-flipped") / "checkpoints").iterdir():
        data = bytearray((checkpoint / "policy.safetensors").read_bytes())
        data[-1] ^= 1
        (checkpoint / "policy.safetensors").write_bytes(data)
    (last("run-cut") / "optimizer.safetensors").write_bytes(b"\0" * 10)
    (last("run-gone") / "policy.safetensors").unlink()
    (last("run-manifest") / "manifest.json").write_text("[")
    rewrite(
        last("run-shapes"),
        "policy.safetensors",
        lambda t: {k: torch.zeros(3, 3) for k in t},
    )
    rewrite(last("run-names"), "policy.safetensors", lambda t: {f"x.{k}": v for k, v in t.items()})
    rewrite(
        last("run-optimizer"),
        "optimizer.safetensors",
        lambda t: {k: v for k, v in t.items() if "exp_avg_sq" not in k},
    )
    (copy("run-metrics") / "metrics.jsonl").unlink()
    (copy("run-short") / "metrics.jsonl").write_text('{"epoch": 0}\n')
    shutil.rmtree(copy("run-finished") / "checkpoints")
