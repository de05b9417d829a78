"""Adapters come and go at run time, from below one folder and from nowhere else."""

import os
import shutil
import threading

import pytest
from starlette.testclient import TestClient

from mlx_rsgwm.serving.app import make_app
from mlx_rsgwm.serving.library import Pair
from mlx_rsgwm.serving.settings import ServerSettings
from tests.serving.conftest import SECONDS
from tests.serving.test_app import GREEDY, refused


@pytest.fixture
def shelf(tmp_path, make_adapter, make_engine):
    """A folder with adapters in it, something beside it, and a client of a server that may load from it."""
    folder = tmp_path / "adapters"
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(seed).save(folder / name)
    make_adapter(3).save(tmp_path / "outside")
    engine = make_engine({"kept": 9})
    with TestClient(make_app(engine, ServerSettings(adapter_dir=folder)), base_url="http://localhost") as client:
        client.engine = engine
        yield folder, client


def load(client, path, name="new", **more):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def said(client, model):
    return client.post("/v1/chat/completions", json={**GREEDY, "model": model}).json()["choices"][0]["message"][
        "content"
    ]


def test_load_replace_and_unload(shelf):
    _, client = shelf
    loaded = load(client, "a").json()
    assert (loaded["id"], loaded["root"], loaded["x_rsgwm"]["kind"]) == ("new", "a", "adapter")
    first = said(client, "new")
    assert first != said(client, "kept")
    refused(load(client, "b"), 400, "already_loaded", "lora_name")
    assert load(client, "b", load_inplace=True).status_code == 200
    assert said(client, "new") != first
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).json()["deleted"]
    refused(client.post("/v1/chat/completions", json={**GREEDY, "model": "new"}), 404, "model_not_found", "model")
    refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}), 404, "model_not_found", "model")
    assert load(client, "a").status_code == 200
    assert said(client, "new") == first
    assert client.delete("/v1/models/new").json() == {"id": "new", "object": "model", "deleted": True}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]][1:] == ["kept"]
    base = client.get("/v1/models").json()["data"][0]["id"]
    refused(client.delete(f"/v1/models/{base}"), 400, "base_model", "lora_name")
    refused(load(client, "a", name=base), 400, "name_taken", "lora_name")
    refused(load(client, "a", lora_int_id=3), 400, "unsupported_parameter", "lora_int_id")


def test_verified_pairs_stay_and_names_mean_one_thing(shelf):
    """A name that promises checked answers is not given to an adapter, nor one that stands for another."""
    folder, client = shelf
    pair = Pair(folder / "a", [folder / "b"])
    client.engine.call(lambda library: library.add_pair("checked", pair)).result(SECONDS)
    base = client.get("/v1/models").json()["data"][0]["id"]
    for name in ("checked", f"{base}:checked", f"{base}:kept", f"{base}:new"):
        for replace in (False, True):
            refused(load(client, "a", name=name, load_inplace=replace), 400, "name_taken", "lora_name")
    for name in ("checked", f"{base}:checked"):
        refused(client.post("/v1/unload_lora_adapter", json={"lora_name": name}), 400, "name_taken", "lora_name")
        refused(client.delete(f"/v1/models/{name}"), 400, "name_taken", "lora_name")
    for name in ("", "x" * 201, "a\n"):
        refused(load(client, "a", name=name), 400, "invalid_name", "lora_name")
    assert client.get("/v1/models/checked").json()["x_rsgwm"]["kind"] == "verified"
    assert said(client, f"{base}:kept") == said(client, "kept")


def test_nothing_outside_the_folder_is_read(shelf):
    folder, client = shelf
    os.symlink(folder.parent / "outside", folder / "link")
    shutil.copytree(folder / "a", folder / "inner")
    (folder / "inner" / "adapters.safetensors").unlink()
    os.symlink(folder.parent / "outside" / "adapters.safetensors", folder / "inner" / "adapters.safetensors")
    os.symlink("loop", folder / "loop")
    os.symlink("a", folder / "alias")
    outside = ["../outside", "a/../../outside", str(folder / "a"), "link", "inner", ".", "", " ", "a/..", "hf://owner/name",
               "http://evil.example/a", "a\0b", "link/adapters.safetensors"]  # fmt: skip
    for path in outside:
        refused(load(client, path), 403, "path_outside_adapter_dir", "lora_path")
    for path in ("nothing", "owner/name", "~/a", "x" * 5000):
        refused(load(client, path), 404, "adapter_not_found", "lora_path")
    assert load(client, "loop").status_code in (403, 404)
    assert load(client, "alias").status_code == 200  # a link that stays inside


def test_what_is_no_adapter_of_the_base_is_refused_and_nothing_changes(shelf, make_adapter):
    folder, client = shelf
    before = client.get("/v1/models").json()
    (folder / "empty").mkdir()
    message = refused(load(client, "empty"), 400, "adapter_unreadable", "lora_path")
    assert str(folder) not in message
    other = make_adapter(4)
    other.manifest["base"]["fingerprint"] = "weights-0000000000000000"
    other.save(folder / "other")
    refused(load(client, "other"), 400, "adapter_mismatch", "lora_path")
    damaged = folder / "b" / "adapters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    refused(load(client, "b"), 400, "adapter_unreadable", "lora_path")
    assert client.get("/v1/models").json() == before


def test_answers_are_the_same_while_adapters_come_and_go(shelf):
    _, client = shelf
    load(client, "a", name="steady")
    expected = said(client, "steady")
    wrong = []

    def ask():
        for _ in range(15):
            if said(client, "steady") != expected:
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert load(client, "b").status_code == 200
        assert load(client, "a", load_inplace=True).status_code == 200  # shares a slot with steady
        assert said(client, "new") == expected
        assert client.delete("/v1/models/new").status_code == 200
    assert not wrong


def test_without_a_folder_nothing_is_loaded(make_engine):
    engine = make_engine({"a": 1})
    with TestClient(make_app(engine, ServerSettings()), base_url="http://localhost") as client:
        refused(load(client, "a"), 403, "adapter_loading_disabled")
        refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}), 403, "adapter_loading_disabled")
        refused(client.delete("/v1/models/a"), 403, "adapter_loading_disabled")


def test_no_more_adapters_than_may_be(shelf):
    _, client = shelf
    client.app.state.server.library.most = 2
    assert load(client, "a", name="second").status_code == 200
    refused(load(client, "b", name="third"), 400, "too_many_adapters")
    assert load(client, "b", name="second", load_inplace=True).status_code == 200
