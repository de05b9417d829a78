"""Templates: hashes that say what was trained, stop texts, the chat template's own switches."""

from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES, Template

PLAIN = TEMPLATES["plain"]
# Recorded before stop and thinking existed: adapters made then still have to match.
PLAIN_HASH = "26f5895036756feafc47274ecbe445429908d97c5dfbb90ae006a8a91b5119ea"


def test_unset_fields_do_not_change_a_hash():
    assert PLAIN.hash == PLAIN_HASH
    assert replace(PLAIN, stop=("x",)).hash != PLAIN.hash
    assert replace(TEMPLATES["chat"], thinking=False).hash != TEMPLATES["chat"].hash
    assert replace(PLAIN, name="other").hash == PLAIN.hash


@pytest.mark.parametrize("template", [*TEMPLATES.values(), replace(PLAIN, stop=("!", "?"))], ids=lambda t: t.name)
def test_a_description_gives_the_template_back(template):
    import json

    assert Template.from_description(json.loads(json.dumps(template.describe()))) == template
    old = {key: value for key, value in template.describe().items() if key not in ("stop", "thinking")}
    if not template.stop:
        assert Template.from_description(old) == template


def test_stop_texts_are_single_tokens(base):
    ids = replace(PLAIN, stop=("!",)).stop_ids(base.tokenizer)
    assert ids == frozenset(base.tokenizer.encode("!", add_special_tokens=False))
    assert PLAIN.stop_ids(base.tokenizer) == frozenset()
    with pytest.raises(RsgwmError, match="must be one token each, not 'two words'"):
        replace(PLAIN, stop=("two words",)).stop_ids(base.tokenizer)


def test_thinking_reaches_the_chat_template():
    class Recorder:
        eos_token_id = 0

        def apply_chat_template(self, conversation, **options):
            self.options = options
            return [1] if options["tokenize"] else str(conversation)

    recorder = Recorder()
    TEMPLATES["chat"].draft_prompt(recorder, "q")
    assert "enable_thinking" not in recorder.options
    replace(TEMPLATES["chat"], thinking=False).draft_prompt(recorder, "q")
    assert recorder.options["enable_thinking"] is False


WRITES = "{% for m in messages %}{{ m.role }}: {{ m.content CHANGED }}{% endfor %}"


@pytest.mark.parametrize("change", ["", "| trim", "| upper", "| e", ".split('</think>')[-1]", "| tojson"])
def test_a_chat_template_that_writes_the_question_is_used(base, change):
    base.tokenizer.chat_template = WRITES.replace("CHANGED", change)
    ids = TEMPLATES["chat"].draft_prompt(base.tokenizer, "How many?")
    assert "many?" in base.tokenizer.decode(ids).casefold()


@pytest.mark.parametrize(
    "template",
    ["hello", "{{ bos_token or '' }}", "{{ 5 }}",
     "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
     "{% for m in messages %}{{ m.text }}{% endfor %}"],
)  # fmt: skip
def test_a_chat_template_that_leaves_out_the_question_is_refused(base, template):
    base.tokenizer.chat_template = template
    for made in (
        lambda: TEMPLATES["chat"].draft_prompt(base.tokenizer, "How many?"),
        lambda: replace(TEMPLATES["chat"], system="Be brief.").verify_prompt(base.tokenizer, "How many?", "4"),
    ):
        with pytest.raises(RsgwmError, match="chat template leaves out the question"):
            made()


def test_a_system_prompt_needs_a_chat_template():
    with pytest.raises(RsgwmError, match="a system prompt needs a chat template"):
        replace(PLAIN, system="Be brief.")
