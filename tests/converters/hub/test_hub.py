"""Push and pull against a local server that speaks the Hub's endpoints; what is staged; what never leaves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm as rsgwm_command
from mlx_rsgwm.converters.hub.hub import stage, without_paths
from mlx_rsgwm.converters.parity.certificate import sign
from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.hub_files import redacted

REPO, BASE, TOKEN = "someone/drafter", "owner/tiny-base", "hf_secretsecretsecret"


class Hub:
    """A server with one repository; ``requests`` lists (method, path, token given)."""

    def __init__(self):
        self.files, self.blobs, self.requests, self.created = {}, {}, [], []
        self.token = TOKEN
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self, b"")

            do_HEAD = do_GET

            def do_POST(self):
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            do_PUT = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.running = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        if self.running:
            self.running = False
            self.server.shutdown()
            self.server.server_close()

    @property
    def commit(self):
        return hashlib.sha1(json.dumps(sorted(self.files)).encode()).hexdigest()

    def answer(self, request, body):
        path = request.path.partition("?")[0]
        given = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.requests.append((request.command, path, given))
        if path.startswith("/lfs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return self.send(request, 200, {})
        if given != self.token:
            return self.send(request, 401, {"error": f"token {given} is not valid"})
        routes = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda _: {"errors": [], "warnings": []},
            f"/api/models/{REPO}/preupload/main": self.preupload,
            f"/{REPO}.git/info/lfs/objects/batch": self.batch,
            f"/api/models/{REPO}/commit/main": self.commit_files,
        }
        if request.command == "POST" and path in routes:
            return self.send(request, 200, routes[path](body))
        if path.startswith(f"/api/models/{REPO}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(self.files.items())
            ]
            return self.send(request, 200, entries)
        if path.startswith(f"/api/models/{REPO}") and self.files:
            siblings = [{"rfilename": name} for name in sorted(self.files)]
            found = {"id": REPO, "modelId": REPO, "sha": self.commit, "private": True, "tags": [], "siblings": siblings}
            return self.send(request, 200, found)
        prefix = f"/{REPO}/resolve/"
        if path.startswith(prefix):
            name = path[len(prefix) :].partition("/")[2]
            if name in self.files:
                return self.send_file(request, self.files[name])
            return self.send(request, 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        return self.send(request, 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})

    def create(self, body):
        self.created.append(json.loads(body))
        return {"url": f"{self.url}/{REPO}", "id": REPO}

    def preupload(self, body):
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
        }

    def batch(self, body):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit_files(self, body):
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        return {"commitUrl": f"{self.url}/{REPO}/commit/{self.commit}", "commitOid": self.commit}

    def send(self, request, status, value, headers=None):
        body = json.dumps(value).encode()
        more = {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
        self.respond(request, status, more, body)

    def send_file(self, request, data):
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"Content-Length": len(data), "ETag": tag, "X-Repo-Commit": self.commit}
        self.respond(request, 200, headers, data)

    def respond(self, request, status, headers, body):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def rsgwm(hub, tmp_path):
    """Runs the command in a process of its own whose Hub is the local server."""

    def run(*arguments, **more):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            **more,
        }
        command = [sys.executable, "-c", "from mlx_rsgwm.cli.main import main; main()", *map(str, arguments), "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def last(result):
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def folder(make_adapter, tmp_path):
    return make_adapter(3).save(tmp_path / "adapter")


def test_there_and_back_through_the_hub(hub, rsgwm, folder, tiny_base, tmp_path):
    pushed = rsgwm("hub", "push", folder, REPO, "--base", BASE, "--mlx")
    assert pushed.returncode == 0, pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr
    created = hub.created[0]  # newer clients say it the second way
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, path, token in hub.requests if not path.startswith("/lfs/")} == {TOKEN}
    assert last(pushed)["files"] == {name: len(data) for name, data in hub.files.items()}
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mlx/adapters.safetensors"}
    assert expected <= hub.files.keys()
    assert hub.files["mlx/adapters.safetensors"] == (folder / "adapters.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    everything = b"".join(data for name, data in hub.files.items() if not name.endswith(".safetensors"))
    assert str(tmp_path.parent).encode() not in everything

    pulled = rsgwm("hub", "pull", REPO, "--out", tmp_path / "pulled", "--base", tiny_base)
    assert pulled.returncode == 0, pulled.stderr
    assert last(pulled)["modules"] == 4
    before, after = Adapter.load(folder), Adapter.load(tmp_path / "pulled")
    for group in ("weights", "importance", "init"):
        one, other = getattr(before, group), getattr(after, group)
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[name], other[name]) for name in one)

    hub.stop()  # what was fetched once needs no network
    offline = rsgwm("hub", "pull", REPO, "--out", tmp_path / "again", "--keep-peft", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    found = from_peft(tmp_path / "again")
    assert all(mx.array_equal(found.weights[name], value) for name, value in before.weights.items())
    unsent = rsgwm("hub", "push", folder, REPO, "--base", BASE)
    assert unsent.returncode == 2
    assert len([line for line in unsent.stderr.splitlines() if line.startswith("rsgwm: error:")]) == 1
    assert f"{REPO} could not be written to the Hub" in unsent.stderr
    assert TOKEN not in unsent.stdout + unsent.stderr
    never = rsgwm("hub", "pull", "someone/else", "--out", tmp_path / "never", "--keep-peft")
    assert never.returncode == 2
    assert "rsgwm: error: someone/else could not be fetched from the Hub" in never.stderr
    assert not (tmp_path / "never").exists()


def test_a_repository_of_mlx_lm_is_fetched_as_it_is(hub, rsgwm, folder, tmp_path):
    hub.files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapters.safetensors")}
    pulled = rsgwm("hub", "pull", REPO, "--out", tmp_path / "pulled")
    assert pulled.returncode == 0, pulled.stderr
    assert (last(pulled)["layout"], last(pulled)["modules"]) == ("mlx", 4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pulled").iterdir()} == hub.files
    kept = rsgwm("hub", "pull", REPO, "--out", tmp_path / "kept", "--keep-peft")
    assert kept.returncode == 2
    assert "has mlx-lm's layout, not PEFT's" in kept.stderr


def test_pull_reads_as_from_peft_does(monkeypatch, folder, tiny_base, tmp_path):
    to_peft(Adapter.load(folder), "b", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": [*config["target_modules"], "down_proj", "qkv"]})
    )
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tower = {f"base_model.model.visual.blocks.0.attn.qkv.lora_{side}.weight": mx.ones((4, 4)) for side in "AB"}
    monkeypatch.setattr("mlx_rsgwm.converters.hub.hub.fetch_adapter", lambda *_: tmp_path / "peft")

    def pull(out, *options):
        return CliRunner().invoke(
            rsgwm_command, ["hub", "pull", REPO, "--out", str(tmp_path / out), "--base", str(tiny_base), *options]
        )

    told = pull("told")
    assert told.exit_code == 0, told.output
    assert "note: selected, but without arrays, so left as in the base: " in told.output
    assert "mlp.down_proj" in told.output
    refused = pull("refused", "--strict")
    assert (refused.exit_code, (tmp_path / "refused").exists()) == (2, False)
    mx.save_safetensors(str(path), mx.load(str(path)) | tower)
    assert "--language-only converts the language model's part" in pull("refused").output
    assert pull("language", "--language-only").exit_code == 0
    contrary = pull("refused", "--keep-peft", "--strict")
    assert contrary.exit_code == 2
    assert "--keep-peft keeps the adapter as it is" in str(contrary.exception) + contrary.output


def test_a_dry_run_sends_nothing_and_shows_everything(hub, rsgwm, folder):
    result = rsgwm("hub", "push", folder, REPO, "--base", BASE, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    found = last(result)
    assert found["private"] is True
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mlx_rsgwm/manifest.json"}
    assert expected <= set(found["files"])
    assert all(name in result.stderr for name in found["files"])
    assert "dry run: nothing was sent" in result.stderr
    assert f"# {REPO.rpartition('/')[2]}" in found["card"]


def test_a_refused_token_is_one_line_without_it(hub, rsgwm, folder):
    hub.token = "another"
    result = rsgwm("hub", "push", folder, REPO, "--base", BASE)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("rsgwm: error:")]
    assert len(lines) == 1
    assert "could not be written to the Hub" in lines[0]
    assert TOKEN not in result.stdout + result.stderr
    assert hub.files == {}


# --- staging ----------------------------------------------------------------------------------------------------


def rate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}


def test_the_card_says_what_how_well_and_how(folder, tmp_path):
    found = {
        "passed": True,
        "max_abs_logit": 3e-6,
        "effect_torch": 4.2,
        "tokens": 61,
        "dtype": "float32",
        "greedy": {"tokens": 48, "agree": 48},
        "adapter": str(folder),
        "base": "/home/someone/base",
    }
    (tmp_path / "parity.json").write_text(json.dumps(sign(found, Adapter.load(folder), "f")))
    report = {"drafter": {"accuracy": rate(0.5)}, "draft_verify": {"accuracy": rate(0.6)}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    staged = stage(
        folder,
        REPO,
        tmp_path / "repo",
        base=BASE,
        licence="mit",
        with_mlx=True,
        certificate=tmp_path / "parity.json",
        report=tmp_path / "report.json",
    )
    card = (staged.folder / "README.md").read_text()
    for text in (
        f'base_model: "{BASE}"',
        'license: "mit"',
        "| Accuracy | 0.500 [0.400, 0.600], n = 50 | 0.600 [0.500, 0.700], n = 50 |",
        "logits differ by at most 3.0e-06 over 61 tokens",
        f'PeftModel.from_pretrained(model, "{REPO}")',
        f"mlx_lm.generate --model {BASE} --adapter-path mlx",
        "rank 4, alpha 8",
    ):
        assert text in card, text
    embedded = json.loads((staged.folder / "mlx_rsgwm" / "parity.json").read_text())
    assert (embedded["base"], embedded["adapter"]) == (BASE, REPO)
    import yaml

    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lora", "peft", "mlx", "mlx-rsgwm"]


def test_what_is_staged_is_what_peft_loads(folder, tiny_base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    staged = stage(folder, REPO, tmp_path / "repo", base=BASE, with_mlx=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_base))
    model = peft.PeftModel.from_pretrained(base, str(staged.folder))
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", {})]
    assert len(adapted) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repo": "drafter"}, "is not a repository's name"),
        ({"repo": "../a/b"}, "is not a repository's name"),
        ({"base": "somewhere"}, "which is not on the Hub"),
        ({"base": None}, "which is not on the Hub; give --base"),
    ],
)
def test_what_cannot_be_published_is_said(folder, tmp_path, options, expected):
    settings = {"repo": REPO, "base": BASE, **options}
    with pytest.raises(RsgwmError, match=expected):
        stage(folder, settings["repo"], tmp_path / "repo", base=settings["base"])
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"passed": False}, "says that the check failed"),
        ({"adapter_sha256": "0"}, "of another adapter"),
        ({"format": "x"}, "is no certificate"),
    ],
)
def test_only_its_own_good_certificate_is_published(folder, tmp_path, change, expected):
    proof = {**sign({"passed": True}, Adapter.load(folder), "f"), **change}
    (tmp_path / "parity.json").write_text(json.dumps(proof))
    with pytest.raises(RsgwmError, match=expected):
        stage(folder, REPO, tmp_path / "repo", base=BASE, certificate=tmp_path / "parity.json")


def test_staging_changes_no_array(folder, tmp_path):
    staged = stage(folder, REPO, tmp_path / "repo", base=BASE)
    plain = to_peft(Adapter.load(folder), BASE, tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (staged.folder / name).read_bytes() == (plain / name).read_bytes()
    assert from_peft(staged.folder).manifest["base"]["name"] == BASE


def test_paths_and_tokens_are_cut():
    value = {"a": ["/home/me/data.jsonl", "C:\\data\\x", "~/x/y/", "plain/relative"], "b": {"c": 1}}
    assert without_paths(value) == {"a": ["data.jsonl", "x", "y", "plain/relative"], "b": {"c": 1}}
    assert redacted("Bearer hf_abcdefghijk is wrong") == "Bearer (token) is wrong"
