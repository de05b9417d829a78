"""Torch stays out of commands that do not compute with it: each a process, through the script's entry point."""

import subprocess
import sys

import pytest

CODE = """
import sys
from mlx_rsgwm.cli.main import main
sys.argv[0] = "rsgwm"
try:
    main()
except SystemExit as stop:
    print(stop.code, *sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def run(*arguments):
    """Exit code and the top-level packages that the command had loaded when it ended."""
    command = [sys.executable, "-c", CODE, *(str(argument) for argument in arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    code, *loaded = ran.stderr.splitlines()[-1].split()
    assert code == "0", ran.stderr
    return set(loaded)


@pytest.fixture
def pair(make_adapter, tmp_path):
    for seed, name in ((1, "drafter"), (2, "verifier")):
        make_adapter(seed).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ask", "--help"], ["convert", "--help"], ["merge", "--list"]], ids=" ".join
)
def test_what_needs_no_model_loads_none(arguments):
    loaded = run(*arguments)
    assert loaded.isdisjoint({"torch", "transformers", "mlx_lm", "scipy", "sklearn", "datasets", "matplotlib", "rich"})


def test_a_merge_loads_neither_mlx_lm_nor_torch(pair):
    loaded = run("merge", pair / "drafter", pair / "verifier", "--method", "linear", "--out", pair / "merged")
    assert loaded.isdisjoint({"torch", "transformers", "mlx_lm"})


def test_ask_without_torch(pair, tiny_base):
    options = ("--drafter", pair / "drafter", "--verifier", pair / "verifier", "--base", tiny_base)
    loaded = run("ask", "What is 2 + 2?", *options, "--attempts", 1, "--max-tokens", 2, "--score", "yesno")
    assert "transformers" in loaded
    assert loaded.isdisjoint({"torch", "datasets", "peft", "sklearn"})


def test_a_low_limit_of_open_files_does_not_stop_mlx_lm(pair, tiny_base):
    """mlx-lm asks for 4,096 when it is imported, which nobody without privileges gets where fewer are allowed."""
    code = (
        "import resource\nfrom mlx_rsgwm.cli.startup import keep_limits\nbefore = resource.setrlimit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\nkeep_limits()\nimport mlx_lm.utils\n"
        "assert resource.setrlimit is before\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout in ("(256, 256)\n", "(2048, 4096)\n")  # the second for who may raise it


def test_convert_without_torch(pair, tiny_base):
    loaded = run("convert", "to-peft", pair / "drafter", "--out", pair / "peft", "--base", tiny_base)
    assert loaded.isdisjoint({"torch", "peft", "datasets"})


def test_torch_is_hidden_only_while_transformers_asks():
    """Who imports it afterwards gets it: the answer is transformers' own, and no other library's."""
    code = (
        "from mlx_rsgwm.cli.startup import hide_torch\nimport sys\nhide_torch(['ask', 'x'])\n"
        "from transformers import AutoTokenizer\nfrom transformers.utils import is_torch_available\n"
        "assert not is_torch_available() and 'torch' not in sys.modules\nimport torch\n"
        "print(torch.ones(2).sum().item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ran.stdout == "2.0\n", ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["parity", "x"],
        ["run", "demo"],
        ["bench", "--json", "latency"],
        ["lm-eval"],
        ["report", "tables"],
        ["tables", "1"],
    ],
)
def test_commands_that_compute_with_torch_see_it(arguments, monkeypatch):
    from mlx_rsgwm.cli import startup

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    startup.hide_torch(arguments)
    assert len(sys.meta_path) == before
