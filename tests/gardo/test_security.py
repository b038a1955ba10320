"""What comes from outside is data: nothing of it is executed, leaves its folder or becomes HTML."""

from __future__ import annotations

import ast
import hashlib
import html.parser
import io
import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import httpx
import pytest
import torch
import yaml

import gardo.report
import gardo.train
from gardo import cli
from gardo.config import load_config
from gardo.config.schema import RewardClientConfig
from gardo.data.files import read_prompts
from gardo.models.embeddings import EmbeddingCache
from gardo.rewards.base import RewardUnavailable
from gardo.rewards.chat import ChatClient
from gardo.rewards.pretrained import load_part, load_shards, load_weights
from gardo.rewards.remote import RemoteReward
from gardo.rewards.serve import protocol
from gardo.run.report import write_report
from gardo.tiny import pipeline_path
from gardo.types import UserError
from tests.rewards import toys
from tests.rewards.test_remote import Stub, batch
from tests.rewards.toys import toy
from tests.run.synthetic_run import evaluation_row, make_run, metrics_row
from tests.support.forked import arguments

ROOT = Path(__file__).parents[2]

# --- no way to code in data: what the sources say

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
REFUSED_CALLS = {
    *("torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("os.system", "os.popen", "shutil.unpack_archive", "tempfile.mktemp"),
    *("dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def constant(call: ast.Call, name: str):
    """Value of a keyword: a constant, ... for any other expression, None where it is not given."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def dangers(source: str) -> list[str]:
    """What of a module may run what it reads; an entry per place."""
    tree = ast.parse(source)
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    safe_loaders |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {dotted(b) for b in node.bases} & safe_loaders
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = {a.name for a in node.names}
            # the name of an exception is no way to unpickle
            if (node.module or "").split(".")[0] in UNPICKLERS and names != {"UnpicklingError"}:
                found.append(f"{node.module}: {names}")
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in REFUSED_CALLS or name in BUILTINS or name.endswith(".extractall"):
                found.append(name)
            if name == "torch.load" and constant(node, "weights_only") is not True:
                found.append("torch.load without weights_only=True")
            if constant(node, "allow_pickle") not in (None, False):
                found.append("allow_pickle")
            if name in ("yaml.load", "yaml.load_all"):
                given = [dotted(a) for a in node.args[1:2]]
                given += [dotted(k.value) for k in node.keywords if k.arg == "Loader"]
                if not set(given) & safe_loaders:
                    found.append("yaml.load with an unsafe loader")
            if constant(node, "shell") not in (None, False):
                found.append("shell")
            if constant(node, "trust_remote_code") not in (None, False):
                found.append("trust_remote_code")
    # also where it is set by name, as in options["trust_remote_code"] = True
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            key, value = node.targets[0].slice, node.value
            if isinstance(key, ast.Constant) and key.value in ("trust_remote_code", "allow_pickle"):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(key.value)
    return found


SOURCES = sorted(p for folder in ("gardo", "kernels") for p in (ROOT / folder).rglob("*.py"))


def test_no_source_runs_what_it_reads():
    assert len(SOURCES) > 100
    found = {str(p.relative_to(ROOT)): dangers(p.read_text(encoding="utf-8")) for p in SOURCES}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "import dill as d", "from joblib import load", "import marshal"),
        *("from pickle import UnpicklingError, loads", "import torch; torch.load(f)"),
        *("torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)"),
        *("torch.save(x, f)", "np.load(f, allow_pickle=True)", "yaml.load(t, yaml.Loader)"),
        *("yaml.load(t, Loader=yaml.FullLoader)", "yaml.load(t)", "yaml.unsafe_load(t)"),
        *("eval(t)", "exec(t)", "compile(t, 'f', 'exec')", "__import__(t)", "os.system(t)"),
        *("subprocess.run(t, shell=True)", "archive.extractall()"),
        *("M.from_pretrained(p, trust_remote_code=True)", "f(trust_remote_code=config.trust)"),
        *("options['trust_remote_code'] = True", "class L(yaml.Loader): ...\nyaml.load(t, L)"),
    ],
)
def test_the_check_of_sources_sees(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        *("from pickle import UnpicklingError", "torch.load(f, weights_only=True)"),
        *("yaml.load(t, yaml.SafeLoader)", "class L(yaml.SafeLoader): ...\nyaml.load(t, L)"),
        *("model.eval()", "torch.compile(f)", "np.load(f)", "f(trust_remote_code=False)"),
    ],
)
def test_the_check_of_sources_lets_pass(source):
    assert not dangers(source)


# --- no way to code in data: malicious files and answers


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The file that a bomb makes; must not be there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def bombs(marker) -> dict[str, bytes]:
    """Pickles in the forms in which weights are published."""
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Bomb(marker)}, archive)
    torch.save({"weight": Bomb(marker)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "plain": pickle.dumps(Bomb(marker)),
        "text": pickle.dumps(Bomb(marker), protocol=0),
        "archive": archive.getvalue(),
        "legacy": legacy.getvalue(),
    }


FORMS = ("plain", "text", "archive", "legacy")


def test_the_bombs_work(tmp_path):
    for form in FORMS:
        marker = tmp_path / form
        data = bombs(marker)[form]
        if form in ("plain", "text"):
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        assert marker.exists()


def run(argv, monkeypatch, capfd) -> tuple[int, str]:
    """Exit code and everything that a run of `gardo.train` printed."""
    monkeypatch.setattr(sys, "argv", ["gardo.train", *argv])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(gardo.train.main)
    return ended.value.code, "".join(capfd.readouterr())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("form", FORMS)
def test_weights(tmp_path, marker, form, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(bombs(marker)[form])
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_weights(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a checkpoint after each of its two epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["gardo.train", *arguments(folder, epochs=2, checkpoint__every=1)]
        )
        with pytest.raises(SystemExit) as ended:
            cli.run(gardo.train.main)
    assert ended.value.code == 0
    return folder


@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint(tmp_path, finished, marker, form, file, monkeypatch, capfd):
    shutil.copytree(finished, tmp_path / "run")
    data = bombs(marker)[form]
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / file).write_bytes(data)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][file] = entry  # so that its hash is right
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    code, said = run(["--resume", str(tmp_path / "run")], monkeypatch, capfd)
    assert code == 2
    assert said.startswith("error: checkpoint '")
    assert file in said


@pytest.mark.parametrize("form", ["plain", "archive"])
def test_a_model_with_pickled_weights(tmp_path, marker, form, monkeypatch, capfd):
    model = tmp_path / "model"
    shutil.copytree(pipeline_path(), model)
    (weights,) = (model / "vae").glob("*.safetensors")
    weights.with_suffix(".bin").write_bytes(bombs(marker)[form])
    weights.unlink()
    argv = arguments(tmp_path / "run", epochs=1, model__path=model)
    code, said = run(argv, monkeypatch, capfd)
    assert code == 2
    assert f"error: model.path '{model}' cannot be loaded" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["evil", "evil.py", "os"])
def test_a_model_with_code_of_its_own(tmp_path, marker, library, monkeypatch, capfd):
    model = tmp_path / "model"
    shutil.copytree(pipeline_path(), model)
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    for folder in (model, model / "transformer"):
        (folder / "evil.py").write_text(code)
    index = json.loads((model / "model_index.json").read_text())
    index["transformer"] = [library, "Evil"]
    (model / "model_index.json").write_text(json.dumps(index))
    ended, said = run(arguments(tmp_path / "run", model__path=model), monkeypatch, capfd)
    assert ended == 2
    assert "error: model.path" in said


def test_a_reward_s_checkpoint_with_code_of_its_own(tmp_path, marker):
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    (tmp_path / "evil.py").write_text(code)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="AutoConfig cannot be loaded"):
        load_part("AutoConfig", str(tmp_path))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts(tmp_path, marker, form, suffix, monkeypatch, capfd):
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(bombs(marker)[form])
    argv = arguments(tmp_path / "run", prompts__path=file, epochs=1)
    code, said = run(argv, monkeypatch, capfd)
    assert code == 2
    assert str(file) in said  # as prompts, or as what cannot be read
    assert not (tmp_path / "run").exists()


def test_yaml(tmp_path, marker, monkeypatch, capfd):
    path = f"!!python/object/apply:pathlib.Path ['{marker}']"
    text = f"seed: !!python/object/apply:pathlib.Path.touch [{path}]\n"
    (tmp_path / "evil.yaml").write_text(text)
    code, said = run([str(tmp_path / "evil.yaml")], monkeypatch, capfd)
    assert code == 2
    assert "is not valid YAML: could not determine a constructor" in said
    code, said = run(["--seed", text.removeprefix("seed: ").strip()], monkeypatch, capfd)
    assert code == 2
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    assert gardo.report.main([str(folder)]) == 2
    assert "not YAML" in capfd.readouterr().err


def test_a_cache_of_embeddings(tmp_path, marker):
    cache = EmbeddingCache(tmp_path, model="m")
    for data in bombs(marker).values():
        cache.path("a prompt").write_bytes(data)
        assert cache.load("a prompt") is None  # damaged: it is encoded again


def remote(server: str, **changes) -> RemoteReward:
    config = {"timeout": 5.0, "connect_timeout": 2.0, "retries": 0, "backoff": 0.05, **changes}
    return RemoteReward(toy("corner"), [server], RewardClientConfig(**config))


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_server_s_answer(marker, form, caplog):
    with Stub(bombs(marker)[form]) as stub:
        with caplog.at_level(logging.WARNING):
            output = remote(stub.url).score(batch(2), ["a"] * 2, [{}] * 2)
    assert output.scores.isnan().all()  # missing, which ends a run
    assert "unexpected answer: not JSON" in caplog.text


def test_a_request_to_a_reward_server(marker):
    for data in bombs(marker).values():
        for kind in (protocol.SAFETENSORS, protocol.JSON):
            with pytest.raises(protocol.ProtocolError) as refused:
                protocol.decode_request(data, kind, protocol.Limits())
            assert refused.value.status == 400


# --- secrets

SECRET = "s3cr3t-0123456789abcdef"


def test_no_secret_reaches_files_or_the_terminal(tmp_path, monkeypatch, capfd, caplog):
    for name in ("GARDO_REWARD_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    settings = load_config("tiny").rewards.parameters["count"]
    options = [f"--set=count.{key}={value}" for key, value in settings.items()]
    with toys.serving("count", *options, env={"GARDO_REWARD_TOKEN": SECRET}) as server:
        argv = arguments(
            tmp_path / "run",
            epochs=1,
            rewards__servers=f"{{count: {server.url}}}",
        )
        code, said = run(argv, monkeypatch, capfd)
        assert code == 0, said
        wrong = httpx.get(f"{server.url}/v1/rewards", headers={"Authorization": "Bearer other"})
        server.stop()
    assert wrong.status_code == 403
    assert SECRET not in said + caplog.text + wrong.text + "".join(server.log)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "report.html", "summary.json"} <= names
    assert [p for p in files if SECRET.encode() in p.read_bytes()] == []


def test_a_token_file_is_named_but_not_shown(tmp_path, monkeypatch, capfd):
    (tmp_path / "token").write_text(f"{SECRET} second-word")
    argv = arguments(
        tmp_path / "run",
        rewards__servers="{count: http://127.0.0.1:9}",
        rewards__client__token_file=tmp_path / "token",
    )
    code, said = run(argv, monkeypatch, capfd)
    assert code == 2
    assert f"token file '{tmp_path / 'token'}'" in said
    assert SECRET not in said


@pytest.mark.parametrize("status", [400, 503])
def test_a_server_that_repeats_the_token(monkeypatch, caplog, status):
    monkeypatch.setenv("GARDO_REWARD_TOKEN", SECRET)

    def repeat(request):
        if request.url.path == "/v1/rewards":
            rewards = {toy("corner"): Stub.SPEC}
            answer = {"rewards": rewards, "limits": {"images": 9, "body_bytes": 10**6}}
            return httpx.Response(200, json=answer)
        text = f"who is {request.headers['authorization']}? \x1b[31m"
        return httpx.Response(status, json={"error": text})

    original = httpx.Client
    monkeypatch.setattr(
        httpx,
        "Client",
        lambda **options: original(**options, transport=httpx.MockTransport(repeat)),
    )
    reward = remote("http://127.0.0.1:9")
    with pytest.raises((UserError, RewardUnavailable)) as refused:
        reward.score(batch(1), ["a"], [{}])
    assert "who is Bearer ***?" in str(refused.value)
    assert SECRET not in str(refused.value) + caplog.text
    assert "\x1b" not in str(refused.value)


def test_an_endpoint_that_repeats_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    answers = iter([httpx.Response(401, text=f"bad {SECRET}"), httpx.Response(200, text=SECRET)])
    original = httpx.Client
    transport = httpx.MockTransport(lambda request: next(answers))
    monkeypatch.setattr(httpx, "Client", lambda **options: original(**options, transport=transport))
    chat = ChatClient("hpsv3", url="http://h/v1", model="m", retries=0, api_key_env="MY_KEY")
    for message in ("refuses with status 401: bad ***", "got '***'"):
        with pytest.raises(UserError) as refused:
            chat.ask("?", b"png", 4)
        assert message in str(refused.value)
        assert SECRET not in str(refused.value)
    with pytest.raises(ValueError, match="no user and password"):
        ChatClient("hpsv3", url=f"http://me:{SECRET}@h/v1", model="m")


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(UserError) as refused:
        load_config("tiny", overrides=[("rewards.servers", f"{{count: 'http://me:{SECRET}@h:1'}}")])
    assert "rewards.servers.count" in str(refused.value)
    assert "http://***@h:1" in str(refused.value)
    assert SECRET not in str(refused.value)


# --- HTML

EVIL = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></title></pre></svg><script src=//evil.example/x.js></script>",
    "javascript:alert(1)",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "]]><svg onload=alert(1)>",
]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser takes them apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.comments = set(), [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.comments.append(data)


@pytest.mark.parametrize("evil", EVIL)
def test_text_of_a_run_is_text_in_its_report(tmp_path, evil):
    folder = make_run(tmp_path / "run", epochs=3)
    reward = f"count{evil}"
    rewards = {"proxy": reward, "aux": [f"shape{evil}"], "eval": [f"strict{evil}"]}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"recipe": evil, "rewards": rewards, "prompts": {"path": evil, evil: evil}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def rewarded(row):
        row = {k.replace("/count/", f"/{reward}/"): v for k, v in row.items()}
        return row | {evil: 1.0, f"reward/{evil}/missing": 0.5, f"time/{evil}": 1.0}

    rows = [rewarded(metrics_row(epoch)) for epoch in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [rewarded(evaluation_row(epoch, evil)) | {"weights": evil} for epoch in (0, 3)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    index = json.loads((folder / "images" / "index.json").read_text())
    for entry in index:
        entry["title"] = f"three red circles {evil}"  # where a prompt may stand
    (folder / "images" / "index.json").write_text(json.dumps(index))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {k: f"{v}{evil}" for k, v in summary.items() if isinstance(v, str) and ":" not in v}
    (folder / "summary.json").write_text(json.dumps(summary | {"versions": {evil: evil}}))
    named = tmp_path / f"run {evil.replace('/', '_')}"
    folder.rename(named)

    single = write_report([named], tmp_path / "single.html").read_text(encoding="utf-8")
    other = make_run(tmp_path / "other", epochs=3)
    several = write_report([named, other], tmp_path / "all.html").read_text(encoding="utf-8")
    clean = make_run(tmp_path / "clean", epochs=3)
    for text, runs in ((single, [clean]), (several, [clean, other])):
        harmless = Page(write_report(runs, tmp_path / "x.html").read_text(encoding="utf-8"))
        page = Page(text)
        assert page.tags <= harmless.tags, page.tags - harmless.tags
        assert "script" not in page.tags
        assert page.comments == harmless.comments
        assert evil in page.text
        for name, value in page.attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "formaction"):
                assert value.startswith(("data:image/png;base64,", "#")), value
    assert "Content-Security-Policy" in single
    assert "default-src 'none'" in single


# --- paths


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "/etc", "a\\b", "a\nb", "{recipe}"])
def test_names_of_recipes_stay_names(name):
    with pytest.raises(UserError, match="recipe: expected a plain name"):
        load_config("tiny", overrides=[("recipe", json.dumps(name) if "\n" in name else name)])


@pytest.mark.parametrize("template", ["{recipe.__class__}", "runs/{0}", "{run}/{recipe}", "{}"])
def test_folders_have_one_placeholder(template):
    with pytest.raises(UserError, match="output_dir: expected no placeholder but {recipe}"):
        load_config("tiny", overrides=[("output_dir", template)])


@pytest.mark.parametrize("name", ["../admin", "..", "a/b", "a b", "a?b", "a#b", "a%2fb", ""])
@pytest.mark.parametrize("key", ["rewards.proxy", "rewards.aux", "rewards.eval"])
def test_names_of_rewards_stay_names(key, name):
    value = json.dumps([name]) if key != "rewards.proxy" else json.dumps({name: 1.0})
    with pytest.raises(UserError, match=f"{key}: expected names of letters"):
        load_config("tiny", overrides=[(key, value)])


def test_a_server_knows_only_its_rewards():
    with toys.serving("count") as server:
        for path in (
            "../health",
            "..%2fhealth",
            "%2e%2e/rewards",
            "count%00",
            "os:system",
            "Count",
        ):
            request = httpx.Request("POST", f"{server.url}/v1/score/x", content=b"{}")
            request.url = request.url.copy_with(raw_path=f"/v1/score/{path}".encode())
            with httpx.Client() as client:
                status = client.send(request).status_code
            assert status in (404, 405), path


@pytest.mark.parametrize("split", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_splits_stay_in_their_folder(tmp_path, split):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "secret.txt").write_text("one red circle\n")
    with pytest.raises(UserError, match=r"prompts\.split"):
        read_prompts(tmp_path / "prompts", split)


def test_parts_of_weights_stay_in_their_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="expected names of files beside it"):
        load_shards(folder)


def test_overwriting_a_run_follows_no_links(tmp_path, finished, monkeypatch, capfd):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(precious)
    shutil.rmtree(tmp_path / "run" / "images")
    (tmp_path / "run" / "images").symlink_to(precious)
    argv = arguments(tmp_path / "run", epochs=0, overwrite="true")
    code, said = run(argv, monkeypatch, capfd)
    assert code == 0, said
    assert [p.name for p in precious.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "run" / "link").exists()
