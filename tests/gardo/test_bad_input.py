"""What users get wrong: one message, exit code 2, no traceback, nothing written or lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import gardo.plan
import gardo.report
import gardo.train
import gardo_kernels.__main__
import tools.tiny.build
from gardo import cli
from gardo.rewards.serve import cli as serve
from tests.support import bad_places
from tests.support.forked import SMALLEST, arguments

ENTRIES = {
    "train": lambda argv: cli.run(gardo.train.main),
    "plan": lambda argv: cli.run(gardo.plan.main),
    "build": lambda argv: cli.run(tools.tiny.build.main),
    "report": lambda argv: sys.exit(gardo.report.main(argv)),
    "serve": serve.main,
    "kernels": lambda argv: sys.exit(gardo_kernels.__main__.main(argv)),
}


@dataclass(frozen=True)
class Case:
    """A command line, and what its message says: the thing, what was expected, what came."""

    entry: str
    argv: str
    says: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        variables = " ".join(f"{k}={v}" for k, v in self.environment.items())
        return f"{variables} {self.entry} {self.argv}".strip()


def train(argv, *says, **environment):
    return Case("train", argv, says, environment)


def other(entry, argv, *says, **environment):
    return Case(entry, argv, says, environment)


SERVER = "--rewards.servers={count:|http://127.0.0.1:9} --rewards.client.retries=0"
"""Nobody listens there. A bar stands for a space within a word of the command line."""

CONFIGURATION = [
    # keys
    train("--epochz=3", "unknown key 'epochz'", "did you mean 'epochs'?"),
    train("--model.lora.ranc=3", "unknown key 'model.lora.ranc'", "'model.lora.rank'?"),
    train("--train.lr=1e-4", "unknown key 'train.lr'", "'train.learning_rate'?"),
    train("--learning_rate=1e-4", "unknown key 'learning_rate'", "'train.learning_rate'?"),
    train("--a..b=1", "unknown key 'a'"),
    train("--=3", "unknown key ''"),
    train("number.yaml", "unknown key '1'"),
    # the command line itself
    train("nosuch", "unknown recipe 'nosuch'", "built in: ", "tiny"),
    train("tinny", "unknown recipe 'tinny'", "did you mean 'tiny'?"),
    train("tiny extra", "unrecognized arguments: extra"),
    train("--config", "argument --config", "expected one argument"),
    train("--seed", "--seed: expected a value, got none"),
    train("--print-config=yes", "--print-config", "'yes'"),
    # types and ranges
    train("--epochs=abc", "epochs", "expected a valid integer", "'abc'"),
    train("--epochs=1.5", "epochs", "expected a valid integer", "1.5"),
    train("--epochs=true", "epochs", "expected a valid integer", "True"),
    train("--epochs=-1", "epochs", "expected greater than or equal to 0", "-1"),
    train("--seed=[1]", "seed", "expected a valid integer", "[1]"),
    train("--seed.x=1", "seed", "expected a valid integer", "{'x': 1}"),
    train("--threads=1000000", "threads", "less than or equal to 1024", "1000000"),
    train("--model=3", "model: expected a section with keys", "3"),
    train("null.yaml", "algorithm: expected a section with keys", "None"),
    train("--model.lora.targets=[]", "model.lora.targets", "at least 1", "[]"),
    train("--train.learning_rate=nan", "train.learning_rate", "expected a valid number", "'nan'"),
    train("--train.learning_rate=.inf", "train.learning_rate", "expected a finite number", "inf"),
    train("--train.learning_rate=0", "train.learning_rate", "expected greater than 0", "got 0"),
    train("--precision=fp64", "precision: expected 'fp32', 'fp16' or 'bf16', got 'fp64'"),
    train("--algorithm.name=ppo", "algorithm.name: expected 'grpo' or 'nft', got 'ppo'"),
    train("--algorithm.clip_range=[0.1,-1]", "algorithm.clip_range", "pair", "[0.1, -1]"),
    train("--algorithm.gate.fraction=2", "algorithm.gate.fraction", "less than or equal to 1"),
    train("--sampling.noise_level=0", "sampling.noise_level", "expected greater than 0"),
    train("--trackers=tensorbord", "trackers: expected 'tensorboard' or 'wandb'", "'tensorbord'"),
    # files
    train("missing.yaml", "config file 'missing.yaml' does not exist"),
    train("./split", "config file 'split' cannot be read", "directory"),
    train("list.yaml", "config file 'list.yaml'", "expected a mapping of keys", "list"),
    train("tab.yaml", "config file 'tab.yaml' is not valid YAML", "line 2"),
    train("latin.yaml", "config file 'latin.yaml' cannot be read", "utf-8"),
    train("object.yaml", "config file 'object.yaml' is not valid YAML", "python/object"),
    train("deep.yaml", "config file 'deep.yaml' cannot be read", "recursion"),
    train("circle1.yaml", "each other's base", "'circle1.yaml' -> 'circle2.yaml'"),
    train("orphan.yaml", "unknown recipe 'tinny'", "did you mean 'tiny'?"),
    train("based.yaml", "base: expected a recipe's name or path in 'based.yaml'", "3"),
]
SPLITS = [
    train("--train.updates_per_epoch=500", "train.updates_per_epoch", "at most", "= 4", "got 500"),
    train("--prompts.group_size=1", "prompts.group_size", "greater than or equal to 2", "got 1"),
    train("--prompts.per_epoch=41", "prompts.per_epoch", "at most the 40 distinct", "got 41"),
    train("--sampling.batch_size=0", "sampling.batch_size", "greater than or equal to 1", "got 0"),
    train("--evaluation.samples_per_prompt=1", "evaluation.samples_per_prompt", "got 1"),
    other("plan", "--gpus=100000", "--gpus", "at most the 64 samples of an update", "got 100000"),
]
CONTRADICTIONS = [
    train("--rewards.aux=[]", "algorithm.gate.mode: 'paper'", "at least one auxiliary reward"),
    train("--rewards.aux=count", "rewards.aux: 'count' is the proxy"),
    train("--rewards.aux=clean,clean", "rewards.aux: expected different rewards", "'clean' twice"),
    train("--rewards.features=null", "algorithm.diversity", "needs rewards.features"),
    train("--algorithm.gate.fraction=0.5", "algorithm.gate.fraction", "[0.02, 0.2]", "got 0.5"),
    train("--algorithm.name=nft", "sampling.same_latent", "expected false"),
    train("--sampling.solver=dpm2", "sampling.solver", "expected euler", "got dpm2"),
    train("--sampling.sde_window_range=[3,1]", "sampling.sde_window_range", "got [3, 1]"),
    train("--checkpoint.keep_best=evaluation/x --evaluation.every=3", "checkpoint.keep_best"),
    train("--precision=fp16", "precision: fp16 needs a GPU", "use fp32 or bf16"),
    train("--sampling.cuda_graph=on", "sampling.cuda_graph"),
    train("--resume --overwrite=true", "--resume", "--overwrite true would delete"),
    train("--prompts.generator=null", "expected prompts.path, prompts.dataset or", "got none"),
]
HEALTH = [
    train("--health.kll=1", "unknown key 'health.kll'", "did you mean 'health.kl'?"),
    train("--health.max_skipped_in_a_row=0", "health.max_skipped_in_a_row", "equal to 1", "got 0"),
    train("--health.patience=1.5", "health.patience", "expected a valid integer", "1.5"),
    train("--health.kl=0", "health.kl", "expected greater than 0", "got 0"),
    train("--health.grad_norm=.inf", "health.grad_norm", "expected a finite number", "inf"),
    train("--health.diversity=1.2", "health.diversity", "less than or equal to 1", "1.2"),
    train("--health.stop_on=divesity", "health.stop_on: expected 'ratio'", "'divesity'"),
    train("--health.stop_on=kl --health.kl=null", "health.stop_on: 'kl' is off", "health.kl"),
    train("--health.stop_on=kl --algorithm.kl_coef=0", "'kl' is not measured", "kl_coef"),
    train(
        "--health.stop_on=diversity --rewards.features=null --algorithm.diversity=false",
        *("health.stop_on: 'diversity' needs rewards.features",),
    ),
    train(
        "--health.stop_on=ratio --algorithm.name=nft --sampling.same_latent=false",
        *("health.stop_on: nft has no ratio", "'ratio'"),
    ),
    train("--health=3", "health: expected a section with keys", "3"),
]
PROMPTS = [
    train("--prompts.path=missing.txt", "prompt file 'missing.txt' does not exist"),
    train("--prompts.path=empty.txt", "prompt file 'empty.txt'", "at least one prompt", "empty"),
    train("--prompts.path=blank.txt", "'blank.txt', line 2: expected a prompt, got an empty line"),
    train("--prompts.path=latin.txt", "'latin.txt', line 1: expected UTF-8 text"),
    train("--prompts.path=one.txt", "prompts.per_epoch", "at most the 1 distinct", "got 2"),
    train("--prompts.path=cat.txt", 'cat.txt, line 1 "a cat": count: ', "line 2"),
    train("--prompts.path=table.csv", "'table.csv': expected a .txt or .jsonl file"),
    train("--prompts.path=array.jsonl", "'array.jsonl', line 1: expected a JSON object"),
    train("--prompts.path=cut.jsonl", "'cut.jsonl', line 2: expected a JSON object (", "column"),
    train("--prompts.path=nameless.jsonl", "'nameless.jsonl', line 1", 'string "prompt"'),
    train("--prompts.path=deep.jsonl", "'deep.jsonl', line 1", "nested too deeply"),
    train("--prompts.path=surrogate.jsonl", "'surrogate.jsonl', line 1", "Unicode"),
    train("--prompts.path=split", "prompt folder 'split'", "train.txt", "prompts.split 'train'"),
    train("--prompts.generator=shape", "prompts.generator: expected 'shapes'", "got 'shape'"),
    train("--prompts.split=test", "prompts.parameters", "split: expected 'train', got 'test'"),
    train("--prompts.parameters={n:|1}", "prompts.parameters", "'shapes' has no 'n'"),
]
MODELS = [
    train("--model.path=./missing", "model.path './missing': no such folder", "builtin:tiny"),
    train("--model.path=./split", "model.path './split'", "with model_index.json, found none"),
    train("--model.path=./other-class", "expected a StableDiffusion3Pipeline or FluxPipeline"),
    train("--model.family=flux", "expected a FluxPipeline, got a StableDiffusion3Pipeline"),
    train("--model.path=./cut-index", "'./cut-index': malformed model_index.json"),
    train("--model.path=./no-class", "'./no-class': malformed model_index.json"),
    train("--model.path=./no-parts", "'./no-parts' cannot be loaded", "transformer"),
    train("--model.path=./evil-part", "'./evil-part' cannot be loaded", "Evil"),
    train("--model.path=no|such/model", "'no such/model': no such folder"),
    train("--model.path=nobody-/nothing", "'nobody-/nothing': no such folder"),
    train("--model.lora.targets=nothing", "model.lora.targets: no module of SD3", "['nothing']"),
    train("--sampling.resolution=25", "sampling.resolution: expected a multiple of 4", "got 25"),
    train("--model.attention_backend=nope", "model.attention_backend", "'nope'"),
    train("--model.embedding_cache=file", "model.embedding_cache 'file': cannot be made"),
    other("plan", "--model.path=./missing", "model.path './missing': no such folder"),
    other("plan", "--model.path=./other-class", "got a StableDiffusionPipeline"),
    other("plan", "--gpu=h10", "--gpu: unknown GPU 'h10'; did you mean 'h100'?"),
    other("plan", "--memory=nan", "--memory: expected a positive number, got 'nan'"),
]
REWARDS = [
    train("--rewards.proxy=cuont", "unknown reward 'cuont'", "did you mean 'count'?"),
    train("--rewards.proxy=", "rewards.proxy: expected a reward's name", "got None"),
    train("--rewards.proxy={count:|0}", "rewards.proxy: expected a weight other than 0"),
    train("--rewards.proxy=no.module:fn", "'no.module:fn': no module named 'no.module'"),
    train("--rewards.proxy=.relative:fn", "unknown reward '.relative:fn'", "module:attribute"),
    train("--rewards.proxy=bad_rewards:nope", "module 'bad_rewards' has no 'nope'"),
    train("--rewards.proxy=bad_rewards:value", "module 'bad_rewards' cannot call its 'value'"),
    train("--rewards.proxy=bad_rewards:two", "'bad_rewards:two': cannot be built", "argument"),
    train("--rewards.proxy=bad_rewards:picky", "rewards.parameters.bad_rewards:picky", "threshold"),
    train("--rewards.proxy=bad_rewards:NoReward", "expected a gardo.rewards.base.Reward"),
    train("--rewards.proxy=bad_rewards:Angry", "'bad_rewards:Angry': threshold: expected > 0"),
    train("--rewards.features=jugde", "unknown feature extractor 'jugde'", "'judge'?"),
    train("--rewards.parameters={cuont:|{a:|1}}", "rewards.parameters: 'cuont' is not among"),
    train("--rewards.parameters.count.nope=1", "rewards.parameters.count", "'nope'"),
    train("--rewards.servers={count:|ftp://x}", "rewards.servers.count", "http://HOST:PORT"),
    train("--rewards.servers={cuont:|http://h:1}", "rewards.servers: 'cuont' is not among"),
    train(SERVER, "reward 'count': no server is ready", "http://127.0.0.1:9: Connect"),
    other("serve", "", "required: --rewards"),
    other("serve", "--rewards=count,count", "--rewards: expected different names"),
    other("serve", "--rewards=count --port=99999", "--port: expected 0 to 65535, got 99999"),
    other("serve", "--rewards=count --host=0.0.0.0", "--host: '0.0.0.0'", "bearer token is needed"),
    other("serve", "--rewards=count --set=x", "--set: expected NAME.KEY=VALUE, got 'x'"),
    other("serve", "--rewards=count --set=clean.a=1", "--set: 'clean' is not among", "(count)"),
    other("serve", "--rewards=count --max-body-mb=inf", "--max-body-mb: expected > 0, got inf"),
    other("serve", "--rewards=count --max-wait-ms=inf", "--max-wait-ms: expected >= 0, got inf"),
    other("serve", "--rewards=count --token-file=missing", "token file 'missing' cannot be read"),
    other("serve", "--rewards=count --token-file=token", "token file 'token'", "one word"),
]
FOLDERS = [
    train("--output_dir=file", "output_dir 'file': expected a folder", "is a file"),
    train("--output_dir=file/run", "output_dir 'file/run': expected a folder", "is a file"),
    train("--output_dir=thesis", "output_dir 'thesis': expected an empty or new folder"),
    train("--output_dir=thesis --overwrite=true", "output_dir 'thesis': not a run folder"),
    train("--output_dir=run", "output_dir 'run'", "--resume", "--overwrite true"),
    train("--output_dir=", "output_dir: expected the path of a folder, got ''"),
    train("--output_dir=/proc/gardo", "output_dir '/proc/gardo': "),
    train(f"--output_dir={'a' * 300}", "output_dir 'aaa", "File name too long"),
    train("--output_dir=a\0b", "output_dir: expected the path of a folder", r"'a\x00b'"),
    train("--output_dir=~nobody-here/run", "output_dir '~nobody-here/run'", "home directory"),
    train("--output_dir=runs/{run}", "output_dir: expected no placeholder but {recipe}", "'{run}'"),
    other("report", "", "required: RUN"),
    other("report", "run --nope", "unrecognized arguments: --nope"),
    other("report", "missing", "missing: no such folder"),
    other("report", "file", "file: not a folder"),
    other("report", "split", "split: not a run: neither config.yaml nor metrics.jsonl"),
    other("report", "bad-metrics", "metrics.jsonl, line 2: not a JSON object"),
    other("report", "no-epoch", "metrics.jsonl, object 1: no integer 'epoch'"),
    other("report", "bad-config", "config.yaml: not YAML"),
    other("report", "bad-summary", "summary.json: expected an object, got list"),
    other("report", "bad-images", "index.json, entry 0: file must be a plain name"),
    other("report", "run --out=file/report.html", "cannot write file/report.html"),
    other("kernels", "--device=tpu", "--device: invalid choice: 'tpu'"),
    other("kernels", "extra", "unrecognized arguments: extra"),
    other("build", "--steps=0", "--steps: expected at least 1, got 0"),
    other("build", "--out=file/model", "--out: expected a folder that can be made"),
]
CHECKPOINTS = [
    train("--resume=missing", "--resume 'missing': no such run folder or checkpoint"),
    train("--resume=split", "--resume 'split': no checkpoint in this folder"),
    train("--resume=run-version", "epoch_0002': expected format version 1, got 99"),
    train("--resume=run-flipped", "no checkpoint is whole", "do not match their hash"),
    train(
        "--resume=run-cut/checkpoints/epoch_0002",
        *("epoch_0002': optimizer.safetensors: expected ", "bytes, got 10"),
    ),
    train("--resume=run-gone/checkpoints/epoch_0002", "policy.safetensors is missing"),
    train("--resume=run-manifest/checkpoints/epoch_0002", "manifest.json is not JSON"),
    train("--resume=run-escape/checkpoints/epoch_0002", "malformed manifest.json"),
    train("--resume=run-shapes", "adapter 'policy'", "expected shape (", "got (3, 3)"),
    train("--resume=run-names", "adapter 'policy'", "tensors missing and", "not expected"),
    train("--resume=run-optimizer", "optimizer: ", "expected", "got"),
    train("--resume=run-metrics", "the run cannot be continued", "metrics.jsonl"),
    train("--resume=run-short", "the run cannot be continued", "expected the epochs 0 to 1"),
    train("--resume=run --seed=7", "'run' is a run with other settings: seed (42 there, 7 asked"),
    train("--resume=run --model.lora.rank=2", "model.lora.rank (1 there, 2 asked for)"),
    train("--resume=run --epochs=1", "epochs", "has done 2 epochs", "got 1"),
    train("--resume --output_dir=run-finished", "--resume: the run in 'run-finished' is finished"),
]
ENVIRONMENT = [
    train("", "environment variable WORLD_SIZE", "a whole number", "'two'", WORLD_SIZE="two"),
    train("", "RANK below WORLD_SIZE", "RANK 3", "WORLD_SIZE 2", WORLD_SIZE="2", RANK="3"),
    train("", "variable LOCAL_RANK: expected a value", "torchrun", WORLD_SIZE="2", RANK="0"),
    train(
        "",
        *("variable ACCELERATE_USE_FSDP", "expected true or false", "'perhaps'"),
        ACCELERATE_USE_FSDP="perhaps",
    ),
    train(SERVER, "$GARDO_REWARD_TOKEN: expected one word", GARDO_REWARD_TOKEN="two words"),
    other("serve", "--rewards=count", "$GARDO_REWARD_TOKEN: expected one", GARDO_REWARD_TOKEN="é"),
    train(
        "--rewards.proxy=unifiedreward --rewards.parameters="
        "{unifiedreward:|{url:|'http://h',model:|m,api_key_env:|NO_SUCH_KEY}}",
        *("reward 'unifiedreward'", "the environment variable NO_SUCH_KEY is not set"),
    ),
]
CASES = [
    *(*CONFIGURATION, *SPLITS, *CONTRADICTIONS, *HEALTH, *PROMPTS, *MODELS, *REWARDS),
    *(*FOLDERS, *CHECKPOINTS, *ENVIRONMENT),
]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that is wrong, and what is in it."""
    folder = tmp_path_factory.mktemp("place")
    bad_places.fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments("run", "-m", epochs=2, checkpoint__every=1))
        patch.chdir(folder)
        sys.argv[0] = "gardo.train"
        with pytest.raises(SystemExit) as ended:
            cli.run(gardo.train.main)
    assert ended.value.code == 0
    bad_places.damage_runs(folder / "run")
    return folder, contents(folder)


def command(case):
    words = [word.replace("|", " ") for word in case.argv.split(" ") if word]
    if case.entry != "train":
        return words
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if any(word.startswith("--resume=") for word in words):
        return words
    defaults = {**SMALLEST, "epochs": 1, "output_dir": "out"}
    return [*(f"--{k}={v}" for k, v in defaults.items() if f"--{k}" not in given), *words]


def run(case, monkeypatch, capfd):
    """Exit code, standard output and standard error of a case."""
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    argv = command(case)
    monkeypatch.setattr(sys, "argv", [case.entry, *argv])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        ENTRIES[case.entry](argv)
    return ended.value.code, *capfd.readouterr()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:80])
def test_mistakes_are_one_message_and_leave_everything_as_it_was(case, place, monkeypatch, capfd):
    folder, before = place
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    try:
        code, out, err = run(case, monkeypatch, capfd)
        after = contents(folder)
    finally:  # the next case starts afresh, whatever this one did
        shutil.rmtree(folder / "out", ignore_errors=True)
    assert code == 2
    assert err.startswith("error: "), err
    assert err.count("error: ") == err.count("\nerror: ") + 1
    assert "Traceback" not in err
    assert out == ""
    for fragment in case.says:
        assert fragment in err
    assert after == before


def test_the_table_is_long_enough_and_has_no_case_twice():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.entry for case in CASES} == set(ENTRIES)


SCORES = [
    ("missing", "could not score 4 of 4 images (100.0%)", "rewards.max_missing_share"),
    ("none", "expected 2 scores, one per image", "NoneType"),
    ("empty", "expected 2 scores", "shape [0]"),
    ("words", "expected 2 scores", "a list with 'good'"),
    ("square", "expected 2 scores", "shape [2, 2]"),
    ("integers", "expected 2 scores", "torch.int64"),
]


@pytest.mark.parametrize(("name", "message", "detail"), SCORES, ids=[s[0] for s in SCORES])
def test_wrong_scores_end_the_run_with_a_message(
    name, message, detail, place, tmp_path, monkeypatch, capfd
):
    monkeypatch.syspath_prepend(str(place[0]))
    monkeypatch.chdir(tmp_path)
    case = train(f"--rewards.proxy=bad_rewards:{name}")
    code, _, err = run(case, monkeypatch, capfd)
    assert code == 2
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: reward 'bad_rewards:{name}': {message}")
    assert detail in last


PROCESSES = {
    "gardo.train": (["--epochz", "3"], "did you mean 'epochs'?"),
    "gardo.plan": (["--gpu", "h10"], "did you mean 'h100'?"),
    "gardo.report": (["missing"], "missing: no such folder"),
    "gardo.rewards.serve": (["--rewards", "count", "--port", "x"], "--port"),
    "tools.tiny.build": (["--steps", "0"], "--steps: expected at least 1"),
    "experiments.mixture": (["--jobs", "0"], "--jobs: expected at least 1"),
    "gardo_kernels": (["--nope"], "unrecognized arguments: --nope"),
}


@pytest.mark.parametrize("module", PROCESSES)
def test_a_process_ends_with_one_line_and_code_2(module, tmp_path):
    argv, message = PROCESSES[module]
    # tools and experiments run from a checkout, which is not the working directory here
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-m", module, *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission(tmp_path, monkeypatch, capfd):
    # asked for rather than tried: root may write everywhere
    monkeypatch.setattr("gardo.run.folder.os.access", lambda path, mode: False)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(train("--output_dir=new/run"), monkeypatch, capfd)
    assert (code, out) == (2, "")
    message = f"error: output_dir 'new/run': no permission to write in '{tmp_path}'\n"
    assert err == message
    assert list(tmp_path.iterdir()) == []
