"""A drafter and a verifier that do not belong together: refused by name, or said before anything is drafted.

Whole commands on tiny models: swapped, of two pools, of two templates, of two bases of the same shape, without a
record, and one of them alone beside a finished run.
"""

import json
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm

COMMANDS = {
    "ask": ["ask", "What is 2 + 2?"],
    "chat": ["chat"],
    "eval": ["eval", "--task", "change", "--items", 2, "--timed", 0],
    "calibrate": ["calibrate", "--task", "change", "--items", 2],
}
SHORT = ["--max-tokens", 2, "--attempts", 1, "--quiet"]


def run(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments], input="What is 2 + 2?\n\n")


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """Pairs of four pools, one of them in ``runs/demo``, and two adapters as mlx-lm leaves them."""
    top = tmp_path_factory.mktemp("pairs")
    bases = {"base": tiny_base, "twin": shutil.copytree(tiny_base, top / "twin")}
    weights = mx.load(str(bases["twin"] / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    mx.save_safetensors(str(bases["twin"] / "model.safetensors"), weights, {"format": "pt"})
    pools = (("runs/demo", "base", "plain", 1), ("later", "base", "plain", 2), ("chat", "base", "chat", 1),
             ("twins", "twin", "plain", 1))  # fmt: skip
    for name, base, template, seed in pools:
        out = top / name
        steps = (
            ("data", "build", "--task", "change", "--draft-rows", 4, "--verify-rows", 0, "--template", template,
             "--out", out / "data"),
            ("train", "--base", bases[base], "--data", out / "data", "--out", out / "change", "--rank", 2,
             "--steps", 1, "--seed", seed),
            *(("merge", out / "change", out / "change", "--method", "linear", "--role", role, "--out", out / place)
              for role, place in (("draft", "drafter"), ("verify", "verifier"))),
        )  # fmt: skip
        for step in steps:
            made = run(*step)
            assert made.exit_code == 0, made.output
    for name, source, base in (("foreign", "later", "base"), ("foreign-twin", "twins", "twin")):
        (top / name).mkdir()
        shutil.copy(top / source / "change" / "adapters.safetensors", top / name)
        config = json.loads((top / source / "change" / "adapter_config.json").read_text())
        (top / name / "adapter_config.json").write_text(json.dumps({**config, "model": str(bases[base])}))
    return top


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


DEMO = ("--drafter", "runs/demo/drafter", "--verifier", "runs/demo/verifier")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("--drafter", "runs/demo/verifier", "--verifier", "runs/demo/drafter"), "drafter and verifier are swapped"),
        (("--drafter", "runs/demo/drafter", "--verifier", "later/drafter"), "later/drafter was merged to draft, not"),
        (("--drafter", "runs/demo/drafter", "--verifier", "chat/verifier"), "verifier was trained with another prompt"),
        ((*DEMO, "--template", "chat"), "the drafter was trained with another prompt template than 'chat'"),
        (("--drafter", "runs/demo/drafter", "--verifier", "twins/verifier"), "and twins/verifier for "),
        ((*DEMO, "--base", "twin"), "runs/demo/drafter was made for "),
        (("--drafter", "foreign-twin", "--verifier", "runs/demo/verifier", "--template", "plain"),
         "runs/demo/verifier was made for "),
        (("--drafter", "foreign", "--verifier", "runs/demo/verifier"), "foreign does not say which prompt template"),
        (("--drafter", "foreign"), "--drafter foreign without --verifier; give both"),
        (("--verifier", "later/verifier"), "without --drafter; give both (there is later/drafter)"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_pair_is_refused(folder, command, pair, message):
    before = sorted(folder.rglob("*"))
    made = run(*COMMANDS[command], *pair, *SHORT)
    assert made.exit_code == 2
    assert message in made.stderr
    assert made.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("--drafter", "runs/demo/drafter", "--verifier", "later/verifier"), "come from different pools"),
        (("--drafter", "foreign", "--verifier", "runs/demo/verifier", "--template", "plain"),
         "foreign has no record of training or merging"),
        (("--drafter", "runs/demo/drafter", "--verifier", "foreign-twin"), "foreign-twin says that it was trained on "),
        (("--drafter", "runs/demo/change", "--verifier", "runs/demo/verifier"), "runs/demo/change was not merged"),
        (("--drafter", "later/change", "--verifier", "later/change"), "are the same adapter"),
    ],
)  # fmt: skip
def test_what_is_odd_about_a_pair_is_told_first_and_even_when_quiet(command, pair, message):
    made = run(*COMMANDS[command], *pair, *SHORT)
    warnings = [line for line in made.stderr.splitlines() if line.startswith("warning: ")]
    assert any(message in line for line in warnings[:2]), made.stderr
    assert made.stderr.startswith("warning: ")
    # With two untrained drafts there is nothing right to calibrate on.
    assert (made.exit_code, "none of 2 drafts" in made.stderr) == ((2, True) if command == "calibrate" else (0, False))


def test_a_pair_that_belongs_together_is_passed_without_a_word():
    for command in COMMANDS.values():
        made = run(*command, *SHORT)
        assert "warning" not in made.stderr
        assert "record" not in made.stderr
