"""Shared fixtures: a tiny real Llama with a byte-level tokenizer, and the guards that stand in for Metal."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from packaging.requirements import Requirement

CPU_STREAMS = (repr(mx.cpu), repr(mx.Device(mx.cpu)), repr(mx.default_stream(mx.cpu)))
LINALG = ("svd", "qr", "inv", "tri_inv", "cholesky", "cholesky_inv", "eigh", "eigvalsh", "eig", "eigvals", "pinv", "lu",
          "lu_factor", "solve", "solve_triangular")  # fmt: skip


def not_for_this_machine(extra: str) -> set[str]:
    """Distributions of an extra that its markers leave out here, as there are none for this system or Python."""
    requirements = map(Requirement, metadata.requires("mlx-rsgwm") or ())
    return {
        wanted.name
        for wanted in requirements
        if wanted.marker
        and f'extra == "{extra}"' in str(wanted.marker)
        and not wanted.marker.evaluate({"extra": extra})
    }


def require_peer(name, *arguments, _importorskip=pytest.importorskip, **options):
    """``pytest.importorskip`` where every peer must be there: it skips only what does not exist for this machine."""
    if name.partition(".")[0] in not_for_this_machine("test"):
        return _importorskip(name, *arguments, **options)
    return import_module(name)


def missing_requirements(extra: str) -> list[str]:
    """Distributions that an extra of this package asks for here and that are not installed."""
    extras, missing = {extra}, set()
    for _ in range(3):  # an extra may name others of this package
        for text in metadata.requires("mlx-rsgwm") or ():
            wanted = Requirement(text)
            if wanted.marker is None or not any(wanted.marker.evaluate({"extra": name}) for name in extras):
                continue
            if wanted.name == "mlx-rsgwm":
                extras |= wanted.extras
                continue
            try:
                metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                missing.add(wanted.name)
    return sorted(missing)


def pytest_configure(config):
    """`make test` and .ci/run compare with every peer: there a missing one is an error, elsewhere its tests skip."""
    if not os.environ.get("RSGWM_ALL_PEERS"):
        return
    pytest.importorskip = require_peer
    if missing := missing_requirements("test"):
        raise pytest.UsageError(f"peers to compare with are missing: {', '.join(missing)}; pip install -e '.[test]'")


@pytest.fixture(autouse=True)
def metal_rules(monkeypatch):
    """On Metal these run on the CPU stream only; here everything does, so the rule is enforced by name."""

    def guarded(name, function):
        def call(*arguments, **options):
            assert repr(options.get("stream")) in CPU_STREAMS, f"mx.linalg.{name} needs stream=mx.cpu on Metal"
            return function(*arguments, **options)

        return call

    for name in LINALG:
        if hasattr(mx.linalg, name):
            monkeypatch.setattr(mx.linalg, name, guarded(name, getattr(mx.linalg, name)))
    for name in ("array", "zeros", "ones", "full", "arange"):
        function = getattr(mx, name)

        def checked(*arguments, _function=function, **options):
            made = _function(*arguments, **options)
            assert not isinstance(made, mx.array) or made.dtype != mx.float64, "float64 does not exist on Metal"
            return made

        if name != "array":  # mx.array is a type that code checks instances against
            monkeypatch.setattr(mx, name, checked)


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(0)
    np.random.seed(0)


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, with an end-of-text token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{symbol: index for index, symbol in enumerate(alphabet, start=1)}}
    # The verdicts " Yes" and " No" must differ in their first token.
    merges = [("Ġ", "Y"), ("ĠY", "e"), ("ĠYe", "s"), ("Ġ", "N"), ("ĠN", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def make_base(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """A random Llama of hidden size 32 as a Hugging Face folder."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True)
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    weights = {name: value * 2 if "proj" in name else value for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer(folder)
    return folder


def make_torch_base(folder: Path, seed: int = 0, layers: int = 2, vocabulary: int = 96) -> Path:
    """A random Llama of hidden size 64 with grouped queries, saved by transformers, and a word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_torch_llama():
    """Maker of tiny bases that transformers loads too: ``make_torch_llama(folder, seed, layers, vocabulary)``."""
    return make_torch_base


@pytest.fixture(scope="module")
def one_torch_thread():
    """More threads cost more than they give on models this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def byte_level():
    """Writer of the byte-level tokenizer: ``byte_level(folder)``."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny base model."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tiny_base):
    """The tiny base, loaded."""
    from mlx_rsgwm.models.base import load_base

    return load_base(str(tiny_base), dtype="float32")


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, as ``tests/browser.py`` drives it."""
    from tests.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it with: apt-get install chromium")
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


@pytest.fixture
def make_adapter(base):
    """A random adapter on the tiny base, with importance for every signal and a shared initialisation."""
    from mlx_rsgwm.data.template import TEMPLATES
    from mlx_rsgwm.models.adapter import SIGNALS, Adapter, LoraSpec
    from mlx_rsgwm.models.fit_check import linear_shape
    from mlx_rsgwm.training.layers import initial_factors

    linear = {
        name: linear_shape(module)
        for name, module in base.model.named_modules()
        if name.startswith("model.layers") and hasattr(module, "weight") and module.weight.ndim == 2
    }

    def make(seed, rank=4, scale=2.0, keys=("self_attn.q_proj", "self_attn.v_proj"), init_seed=0, size=0.1):
        spec = LoraSpec(rank, scale, 0.0, tuple(keys), len(base.model.layers))
        shapes = {name: shape for name, shape in linear.items() if name.endswith(tuple(keys))}
        rng = np.random.default_rng(seed)

        def random(shape, spread):
            return mx.array((rng.standard_normal(shape) * spread).astype(np.float32))

        init = initial_factors(shapes, rank, init_seed)
        weights = {}
        for module, (_, outputs) in shapes.items():
            name = f"{module}.lora_a"
            weights[name] = init[name] + random(init[name].shape, size / 4)
            weights[f"{module}.lora_b"] = random((rank, outputs), size)
        importance = {
            f"{signal}/{name}": mx.abs(random(value.shape, 1.0))
            for signal in SIGNALS
            for name, value in weights.items()
        }
        manifest = {"kind": "trained", "base": base.describe(), "template": TEMPLATES["plain"].describe()}
        return Adapter(spec, weights, importance, {}, init, manifest)

    return make


@pytest.fixture(scope="session")
def data_folder():
    """The folder with real data slices, or a skip that says how to name it."""
    folder = Path(os.environ.get("RSGWM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set RSGWM_DATA")
    return folder


@pytest.fixture
def make_loop(base, make_adapter):
    """Maker of draft–verify loops of two random adapters: ``make_loop(attempts, max_tokens)``."""
    from mlx_rsgwm.data.template import TEMPLATES
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.policy import LoopConfig
    from mlx_rsgwm.inference.sampling import Sampling
    from mlx_rsgwm.models.slots import AdapterSlots

    def make(attempts, max_tokens):
        slots = AdapterSlots(base)
        slots.load("drafter", make_adapter(1))
        slots.load("verifier", make_adapter(2))
        config = LoopConfig(attempts, threshold=0.5, score="yesno", sampling=Sampling(max_tokens=max_tokens))
        return DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier", config)

    return make


@pytest.fixture
def pool(make_adapter, tmp_path):
    """Folders of two adapters that say what they were trained on: change and compare."""
    folders = []
    for seed, task in enumerate(("change", "compare")):
        adapter = make_adapter(seed)
        adapter.manifest["task"] = task
        folders.append(adapter.save(tmp_path / "pool" / task))
    return tuple(folders)


@pytest.fixture(scope="session")
def start_two():
    """Starts a command of ours in two local processes of mlx.launch: ``start_two("eval", …)``, a ``Popen``."""

    def start(*arguments):
        launcher = (sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()", "-n", "2", "--")
        ours = (sys.executable, "-c", "from mlx_rsgwm.cli.main import main; main()")
        command = [*launcher, *ours, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture(scope="session")
def launch(start_two):
    """What both processes of :func:`start_two` say; mlx.launch ends with 0 whatever became of them."""

    def run(*arguments):
        with start_two(*arguments) as process:
            told, _ = process.communicate(timeout=240)
        return told

    return run


@pytest.fixture
def make_base_of(tmp_path):
    """Maker of other tiny bases than ``tiny_base``: ``make_base_of(seed)``."""
    return lambda seed: make_base(tmp_path / f"base-{seed}", seed)


@pytest.fixture
def adapter_sources(make_adapter, tiny_base, tmp_path, monkeypatch):
    """Maker of one random adapter in every form: ``adapter_sources(seed)``, a source by kind.

    The Hub is a cache on disk, and nothing else can be reached. ``sidecar``: whether PEFT's folders keep what PEFT has
    no place for.
    """
    from mlx_rsgwm.converters.base_layers import read_base_layers
    from mlx_rsgwm.converters.gguf.adapter import to_gguf
    from mlx_rsgwm.converters.peft.convert import to_peft

    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def in_cache(folder, repo):
        place = cache / f"models--{repo.replace('/', '--')}"
        commit = hashlib.sha1(repo.encode()).hexdigest()
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        for name in ("main", "v1"):
            (place / "refs" / name).write_text(commit)

    def make(seed, sidecar=True, **options):
        adapter = make_adapter(seed, **options)
        root = tmp_path / f"{seed}"
        ours = adapter.save(root / f"adapter-{seed}")
        layers = read_base_layers(str(tiny_base), tiny_base)
        forms = {"ours": ours, "mlx_lm": root / "mlx", "peft": root / "peft", "gguf": root / "adapter.gguf"}
        forms["mlx_lm"].mkdir()
        shutil.copyfile(ours / "adapters.safetensors", forms["mlx_lm"] / "adapters.safetensors")
        config = {**adapter.spec.to_config(), "model": str(tiny_base)}
        (forms["mlx_lm"] / "adapter_config.json").write_text(json.dumps(config))
        to_peft(adapter, str(tiny_base), forms["peft"])
        if not sidecar:
            shutil.rmtree(forms["peft"] / "mlx_rsgwm")
        to_gguf(adapter, layers, forms["gguf"])
        in_cache(forms["peft"], f"owner/adapter-{seed}")
        return {**forms, "hub": f"owner/adapter-{seed}", "hub_revision": f"hf://owner/adapter-{seed}@v1"}

    return make
