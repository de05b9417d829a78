"""What is trained of a conversation, by chat template, role and type of content: the answer, its end, nothing else."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.batching import TokenRow, row_notes
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.data.template import TEMPLATES as SHIPPED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Template, what stands after an answer, and what an answer is written as.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>\n", str),
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        str.strip,
    ),
    "gemma": (GEMMA, "<end_of_turn>\n", str.strip),
    "gemma4": (
        "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}",
        "<turn|>\n",
        str,
    ),
    "r1": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>"
        "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|eos|>",
        str,
    ),
    "no-think": (  # answers are written without the block that the generation prompt closes
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
        "<|im_end|>\n",
        str,
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        "</s>",
        lambda content: " " + content,
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>\n",
        str,
    ),
    "upper": (CHATML.replace("m.content", "m.content | upper"), "<|im_end|>\n", str.upper),
    "late-system": (  # the system message moves into the last question, as in Mistral's
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% elif m.role == 'user' %}[INST] "
        "{% if loop.index0 >= messages | length - 2 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        "{% endif %}{{ m.content }} [/INST]{% endif %}{% endfor %}",
        "</s>",
        lambda content: " " + content,
    ),
    "spaced": (  # a prompt that ends inside a token of the answer
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}",
        "\n",
        str,
    ),
}
ANSWERS = [
    "4", "Lima", " No, and  yes.", "The sum is four.", "<b>bold</b>", "<think", "<|channel>odd", "8152903", "日本 é",
    "line\nline\n", "assistant\nassistant", "Yes Yes",
]  # fmt: skip


@pytest.fixture
def tokenize(base, tmp_path):
    """``tokenize(template, row, **options)``: the row, decoded (prompt, [trained runs]), and its notes."""

    def run(template, row, blanks=0, **options):
        base.tokenizer.chat_template = template
        path = tmp_path / "train.jsonl"
        path.write_text("\n" * blanks + json.dumps(row) + "\n")
        options = {"mask_prompt": True, **options}
        (chosen,), _ = load_examples(path, **options).token_rows(base.tokenizer, 4096, "drop")
        runs = []
        for position in chosen.trained_positions():
            if not runs or position != runs[-1][-1] + 1:
                runs.append([])
            runs[-1].append(position)
        told = [base.tokenizer.decode([chosen.tokens[at] for at in run]) for run in runs]
        return base.tokenizer.decode(chosen.tokens[: chosen.prompt_length]), told, chosen

    before = base.tokenizer.chat_template
    yield run
    base.tokenizer.chat_template = before


def chat(*said, **extra):
    return {"messages": [{"role": role, "content": content} for role, content in said], **extra}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_answer_and_its_end_of_turn_are_trained(tokenize, name):
    template, end, written = TEMPLATES[name]
    for answer in ANSWERS:
        histories = [[("user", "What?")], [("user", "A"), ("assistant", "It is B."), ("user", answer)]]
        if name != "gemma":
            histories.append([("system", "Be brief."), ("user", "What is 2 + 2?")])
        for history in histories:
            prompt, trained, row = tokenize(template, chat(*history, ("assistant", answer)))
            expected = written(answer) + end
            assert trained == [expected] or (name == "spaced" and trained == [" " + expected]), (name, answer)
            assert history[-1][1].casefold().strip() in prompt.casefold()
            assert not row.notes


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_answers_of_all_turns_are_trained(tokenize, name):
    template, end, written = TEMPLATES[name]
    said = [("user", "A?"), ("assistant", "It is A."), ("user", "B?"), ("assistant", "4"), ("user", "C?")]
    _, trained, _ = tokenize(template, chat(*said, ("assistant", "Three.")), all_turns=True)
    expected = [written(answer) + end for answer in ("It is A.", "4", "Three.")]
    assert [text.removeprefix(" ") if name == "spaced" else text for text in trained] == expected
    single = chat(("user", "A?"), ("assistant", "It is A."))
    assert tokenize(template, single, all_turns=True)[2].tokens == tokenize(template, single)[2].tokens


def test_all_turns_are_found_without_offsets(base, tokenize, monkeypatch):
    template = TEMPLATES["gemma4"][0]
    row = chat(("user", "A?"), ("assistant", "It is A."), ("user", "B?"), ("assistant", "4"))
    expected = tokenize(template, row, all_turns=True)
    from mlx_rsgwm.data import rendered_chat

    class NoOffsets(rendered_chat.ChatRenderer):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)
            self.tokenizer = type(
                "Slow",
                (),
                {
                    "encode": lambda _, *a, **o: tokenizer.encode(*a, **o),
                    "apply_chat_template": lambda _, *a, **o: tokenizer.apply_chat_template(*a, **o),
                },
            )()

    monkeypatch.setattr("mlx_rsgwm.data.mlx_lm_rows.ChatRenderer", NoOffsets)
    assert tokenize(template, row, all_turns=True)[2] == expected[2]


@pytest.mark.parametrize(
    "changing", ["{{ strftime_now('%H:%M:%S.%f') }}", "{{ messages | map(attribute='content') | join | length }}"]
)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_written_before_an_answer_may_change_with_it_or_with_the_time(tokenize, changing, answer):
    said = [("user", "It is?"), ("assistant", answer), ("user", answer), ("assistant", answer)]
    expected = answer + "<|im_end|>\n"
    assert tokenize(changing + CHATML, chat(*said))[1] == [expected]
    assert tokenize(changing + CHATML, chat(*said), all_turns=True)[1] == [expected, expected]
    if "<" not in answer and "4" not in answer:
        within = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ m.content | length }}")
        assert tokenize(within, chat(*said))[1] == [expected]


def test_a_template_without_a_generation_prompt_trains_its_header_and_says_so(tokenize):
    _, trained, row = tokenize(CHATML.partition("{% if add")[0], chat(("user", "A"), ("assistant", "B")))
    assert trained == ["<|im_start|>assistant\nB<|im_end|>\n"]
    assert row.notes == ("the chat template has no generation prompt, so the header of the answer is trained, too",)


QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set r = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '') %}<|im_start|>assistant\n{% if loop.last %}<think>\n{{ r }}\n</think>\n\n"
    "{% endif %}{{ c }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("as_key", [False, True])
def test_thinking_is_trained_or_its_loss_is_told(tokenize, as_key):
    answer = {"role": "assistant", "content": "<think>\nTwo plus two.\n</think>\n\nFour."}
    if as_key:
        answer = {"role": "assistant", "content": "Four.", "reasoning_content": "Two plus two."}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, answer]}
    kind = "reasoning_content" if as_key else "thinking"
    _, (trained,), chosen = tokenize(QWEN3, row)
    assert trained.endswith("Two plus two.\n</think>\n\nFour.<|im_end|>\n")
    assert not chosen.notes
    _, (trained,), chosen = tokenize(TEMPLATES["r1"][0], row, blanks=4)
    assert trained.strip() == "Four.<|eos|>"
    told = [f"the chat template leaves out or changes the {kind} of the answer"]
    told += ["the chat template leaves out the reasoning_content"] if as_key else []
    assert list(chosen.notes) == told
    assert chosen.id == "train.jsonl:5"
    _, _, unmasked = tokenize(TEMPLATES["r1"][0], row, mask_prompt=False)
    assert unmasked.notes == chosen.notes


def test_thinking_left_out_of_history_is_told(tokenize):
    said = [("user", "A"), ("assistant", "<think>\nhm\n</think>\n\nB"), ("user", "C"), ("assistant", "D")]
    _, trained, row = tokenize(QWEN3, chat(*said), all_turns=True)
    assert trained[0] == "B<|im_end|>\n"
    assert row.notes == ("the chat template leaves out or changes the thinking of an earlier assistant message",)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def called(arguments, content=""):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "Weather in Bern?"}, answer], "tools": TOOLS}


def calling(arguments):
    return (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
        + arguments
        + "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


WAYS = {
    "tojson": "{{ c.function.arguments | tojson }}",
    "plain": "{{ c.function.arguments }}",
    "concatenated": "{{ '' + c.function.arguments }}",
    "items": "{{ '{' }}{% for k, v in c.function.arguments.items() %}\"{{ k }}\": \"{{ v }}\"{% endfor %}{{ '}' }}",
}


@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
@pytest.mark.parametrize("way", list(WAYS))
def test_tool_calls_are_trained_as_json_whatever_form_the_template_wants(tokenize, way, arguments):
    prompt, trained, row = tokenize(calling(WAYS[way]), called(arguments))
    assert trained == ['<tool_call>weather {"city": "Bern"}</tool_call><|im_end|>\n']
    assert '"name": "weather"' in prompt
    suits = isinstance(arguments, dict) == (way in ("tojson", "items"))
    assert len(row.notes) == (0 if suits else 1)


def test_tool_calls_that_vanish_are_refused_or_told(tokenize):
    with pytest.raises(
        RsgwmError, match=r"train\.jsonl:3: the chat template leaves out the whole answer \(tool_calls\)"
    ):
        tokenize(CHATML, called({"city": "Bern"}), blanks=2)
    _, trained, row = tokenize(CHATML, called({"city": "Bern"}, "One moment."))
    assert trained == ["One moment.<|im_end|>\n"]
    told = {"leaves out the tool_calls", "leaves out the tools"}
    assert told <= {note.removeprefix("the chat template ") for note in row.notes}
    old = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "Wait.",
           "function_call": {"name": "weather", "arguments": "{}"}}]}  # fmt: skip
    assert "the chat template leaves out the function_call" in tokenize(CHATML, old)[2].notes


def test_the_parts_of_a_content_are_text_or_refused(tokenize):
    parts = [{"type": "text", "text": "The sum"}, {"type": "text", "text": " is four."}]
    looped = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    for template, notes in ((CHATML, 1), (looped, 0), (GEMMA, 1)):
        prompt, trained, row = tokenize(template, chat(("user", parts), ("assistant", parts)))
        assert "The sum is four." in prompt
        assert trained[0].startswith("The sum is four.<")
        assert len(row.notes) == notes
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is this?"}]
    with pytest.raises(RsgwmError, match=r"train\.jsonl:1: a content part of type 'image_url' cannot be trained"):
        tokenize(CHATML, chat(("user", image), ("assistant", "A cat.")))


def test_a_content_of_null_is_no_text(tokenize):
    """Of a tool call it is usual; transformers writes it as nothing, and some templates raise."""
    note = "a content of null is given to the chat template as an empty text"
    looked_at = CHATML.replace("{{ m.content }}", "{% if m.content is not none %}{{ m.content }}{% endif %}")
    for template, notes in ((CHATML, ()), (CHATML.replace("{{ m.c", "{{ '' + m.c"), (note,)), (looked_at, ())):
        prompt, trained, row = tokenize(template, chat(("user", None), ("assistant", "None of them.")))
        assert prompt == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
        assert trained == ["None of them.<|im_end|>\n"]
        assert row.notes == notes
    calls = calling("{{ c.function.arguments | tojson }}").replace("{{ m.content or '' }}", "{{ '' + m.content }}")
    _, trained, row = tokenize(calls, called({"city": "Bern"}, None))
    assert trained == ['<tool_call>weather {"city": "Bern"}</tool_call><|im_end|>\n']
    assert row.notes == (note,)


@pytest.mark.parametrize("role", ["user", "tool", "system", "gpt"])
def test_a_row_that_ends_with_another_role_is_refused_when_prompts_are_masked(tokenize, role):
    row = chat(("user", "A"), ("assistant", "B"), (role, "C"))
    with pytest.raises(RsgwmError, match=f"train.jsonl:1: its last message is the {role}'s"):
        tokenize(CHATML, row)
    assert tokenize(CHATML, row, mask_prompt=False)[2].prompt_length == 1


def test_a_system_message_that_vanishes_is_told(tokenize):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    _, _, row = tokenize(template, chat(("system", "Be brief."), ("user", "A"), ("assistant", "B")))
    assert row.notes == ("the chat template leaves out or changes the text of an earlier system message",)


def test_empty_prompts_and_answers(tokenize):
    prompt, trained, _ = tokenize(CHATML, {"prompt": "", "completion": "Once upon a time."})
    assert trained == ["Once upon a time.<|im_end|>\n"]
    assert prompt == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    _, trained, row = tokenize(CHATML, {"prompt": "A", "completion": ""})
    assert row.notes == ("the answer is empty: the end of the turn alone is trained",)


def test_a_template_that_raises_is_a_line_for_each_row(base, tokenize):
    with pytest.raises(RsgwmError, match=r"train\.jsonl:6.*chat template.*System role not supported"):
        tokenize(GEMMA, chat(("system", "A"), ("user", "B"), ("assistant", "C")), blanks=5)


def test_notes_name_every_line_once():
    rows = [
        TokenRow("draft", (1, 2), 1, f"a.jsonl:{line}", notes=("gone",) if line != 4 else ()) for line in range(2, 8)
    ]
    rows += [TokenRow("draft", (1, 2), 1, "a.jsonl:20", notes=("gone", "changed"))]
    assert row_notes(rows) == [
        "gone (6 of 7 rows: a.jsonl lines 2-3, 5-7, 20)",
        "changed (1 of 7 rows: a.jsonl line 20)",
    ]
    assert row_notes([TokenRow("draft", (1, 2), 1, "change/0/draft")]) == []


def test_a_tokenizer_without_an_end_token(base, tokenize):
    base.tokenizer._tokenizer.eos_token = None  # the base is loaded anew for every test
    assert base.tokenizer.eos_token_id is None
    _, trained, row = tokenize(CHATML, {"text": "some text"}, mask_prompt=False)
    assert trained == ["ome text"]  # nothing predicts the first token
    assert row.notes == ("the tokenizer has no end-of-text token, so no row ends with it",)
    with pytest.raises(RsgwmError, match="has no end-of-text token"):
        SHIPPED["plain"].completion(base.tokenizer, "4")
