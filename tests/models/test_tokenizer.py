"""A base's tokenizer against its embedding, tokenizers that lose text, and chat templates that fail."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.models.base import load_base

ROWS = 320  # of the tiny base's embedding


@pytest.fixture
def folder(tiny_base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    return copy


def edit(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def vocabulary(first):
    """A change that gives a word of the vocabulary proper the id ``first``."""
    return lambda value: value["model"]["vocab"].update({"strange": first})


def added(token, index):
    def change(value):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        value["added_tokens"].append({"id": index, "content": token, "special": True, **flags})

    return change


@pytest.mark.parametrize("first", [ROWS, 10**7])
def test_a_vocabulary_beyond_the_embedding_is_refused(folder, first):
    edit(folder, "tokenizer.json", vocabulary(first))
    with pytest.raises(RsgwmError, match=f"beyond the {ROWS} rows.*'strange'"):
        load_base(str(folder))


def test_an_added_token_without_a_row_is_told_and_its_use_refused(folder):
    for index in range(262, ROWS + 1):  # added tokens have ids without a gap
        edit(folder, "tokenizer.json", added(f"<t{index}>", index))
    notes = []

    class Told(Progress):
        def message(self, text):
            notes.append(text)

    base = load_base(str(folder), progress=Told())
    assert f"1 added tokens have no row in the base's embedding ('<t{ROWS}>' ({ROWS}))" in notes[-1]
    assert base.tokenizer.encode("a <t319>")
    for use in (
        lambda: base.tokenizer.encode(f"a <t{ROWS}>"),
        lambda: base.tokenizer.apply_chat_template([{"role": "user", "content": f"<t{ROWS}>"}]),
        lambda: base.tokenizer([f"<t{ROWS}>", "a"]),
        lambda: TEMPLATES["plain"].draft_prompt(base.tokenizer, f"<t{ROWS}>"),
    ):
        with pytest.raises(RsgwmError, match=f"is number {ROWS}, and the base's embedding has {ROWS} rows"):
            use()


def test_an_end_of_text_without_a_row_is_refused(folder):
    for index in range(262, ROWS + 1):
        edit(folder, "tokenizer.json", added(f"<t{index}>", index))
    edit(folder, "tokenizer_config.json", lambda value: value.update(eos_token=f"<t{ROWS}>"))
    with pytest.raises(RsgwmError, match="end of text"):
        load_base(str(folder))


def test_a_tokenizer_that_cuts_to_nothing_is_refused(folder):
    from tokenizers import Regex, Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(RsgwmError, match="cuts text to nothing"):
        load_base(str(folder))


@pytest.mark.parametrize("length", ["512", "1e30", 512, 1e30, None])
def test_a_length_may_be_a_text(folder, length):
    edit(folder, "tokenizer_config.json", lambda value: value.update(model_max_length=length))
    assert load_base(str(folder)).tokenizer.encode("abc")


def test_a_length_that_is_no_number_is_one_line(folder):
    edit(folder, "tokenizer_config.json", lambda value: value.update(model_max_length="long"))
    with pytest.raises(RsgwmError, match="model_max_length must be a number, found 'long'"):
        load_base(str(folder))


def test_the_end_of_text_comes_from_the_configuration(folder):
    edit(folder, "tokenizer_config.json", lambda value: value.pop("eos_token"))
    assert load_base(str(folder)).tokenizer.eos_token_id == 0


BROKEN = {
    "raises": "{{ raise_exception('only user and assistant') }}",
    "raises with a line": "{{ raise_exception('two\nlines') }}",
    "syntax": "{% for m in messages %}",
    "unknown tag": "{% frobnicate %}",
    "unclosed": "{{ messages",
    "undefined attribute": "{{ nothing.at.all }}",
    "undefined call": "{{ nothing() }}",
    "undefined filter": "{{ messages | nosuchfilter }}",
    "index": "{{ messages[7].content }}",
    "text and number": "{{ messages[0].content + 1 }}",
    "number and text": "{{ 1 + messages[0].content }}",
    "division": "{{ 1 // 0 }}",
    "range": "{% for i in range(100000000) %}{% endfor %}",
    "import": "{% import 'other' as other %}",
    "include": "{% include 'other.jinja' %}",
    "extends": "{% extends 'base' %}",
    "unsafe": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "changes a list": "{{ messages.append(1) }}",
    "int of a text": "{{ messages | sum }}",
    "unpack": "{% for a, b, c in messages %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "strftime": "{{ strftime_now(messages) }}",
    "tojson": "{{ strftime_now | tojson }}",
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_chat_template_that_fails_is_one_line(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RsgwmError) as caught:
        TEMPLATES["chat"].draft_prompt(load_base(str(folder)).tokenizer, "How many?")
    assert "\n" not in str(caught.value)
    assert "chat template" in str(caught.value)


def test_a_base_without_a_chat_template_says_so(folder):
    (folder / "chat_template.jinja").unlink()
    base = load_base(str(folder))
    with pytest.raises(RsgwmError, match="has no chat template; use a template without chat"):
        TEMPLATES["chat"].draft_prompt(base.tokenizer, "How many?")


def test_a_command_that_renders_ends_with_2(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(BROKEN["raises"])
    rows = [{"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(
        rsgwm, ["adapter", "loss", "--corpus", str(tmp_path / "rows.jsonl"), "--base", str(folder)]
    )
    assert result.exit_code == 2, result.output
    assert "its chat template fails: TemplateError: only user and assistant" in result.output


def test_the_tokenizer_is_still_mlx_lms(base):
    from mlx_lm import generate

    assert isinstance(generate(base.model, base.tokenizer, "abc", max_tokens=2), str)
    assert mx.array(base.tokenizer.encode("abc")).dtype == mx.int32
    assert len(base.tokenizer) == len(base.tokenizer.get_vocab())
