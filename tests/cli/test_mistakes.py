"""Natural mistakes of somebody new: one line that says what to type instead, exit 2, nothing written.

A row is a command and what its line must hold. The line was written down before the command was run: it is what a
person who made that mistake wants to read.
"""

import json
import os
import shlex
import shutil

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm

PAIR = "--drafter drafter --verifier verifier"
TRAIN = "train --base tiny --corpus corpus --out o"
MISTAKES = {
    "names of commands": """
        merg a b --out o                  | no command 'merg'; did you mean 'merge'?
        caht --adapter a                  | did you mean 'chat'?
        evaluate --task change            | did you mean 'eval'?
        mergekit a b                      | did you mean 'merge'?
        generate --adapter a              | did you mean 'ask'?
        lora --base tiny                  | did you mean 'train'?
        server --adapter a                | `mlx_lm.server --adapter-path ADAPTER` serves an adapter
        to-peft a --out o                 | did you mean 'rsgwm convert to-peft'?
        convert to-pefft a --out o        | did you mean 'to-peft'?
        hub download owner/x              | did you mean 'pull'?
        bench latncy                      | did you mean 'latency'?
        recipe sums.jsonl                 | did you mean 'rsgwm recipe init sums.jsonl'?
        help mrge                         | did you mean 'merge'?
    """,
    "names of options": f"""
        merge a b -out o                  | no option -out; did you mean --out?
        merge a b --output o              | did you mean --out?
        merge a b --weights 0.5           | did you mean --weight?
        merge a b --density 0.5 --out o   | no option --density; did you mean --set density=VALUE?
        {TRAIN} --lr 1e-4                 | no option --lr; did you mean --learning-rate?
        {TRAIN} --learning_rate 1e-4      | did you mean --learning-rate?
        {TRAIN} --target-modules q_proj   | did you mean --key?
        {TRAIN} --lora-alpha 16           | did you mean --alpha?
        {TRAIN} --iters 10                | did you mean --steps?
        {TRAIN} --r 8                     | did you mean --rank?
        {TRAIN} --dora                    | did you mean --type?
        {TRAIN} --task change             | rsgwm data build --task TASK --out corpus
        ask x --adapter a --temp 0        | did you mean --temperature?
        ask x --adapter a --max_tokens 10 | did you mean --max-tokens?
        ask x --adapter a --max-new-tokens 9 | did you mean --max-tokens?
        ask x --model tiny                | did you mean --base?
        ask x --adapter-path a            | did you mean --adapter?
        ask --prompt x --adapter a        | the question stands alone: rsgwm ask
        chat --adaptor a                  | did you mean --adapter?
        eval {PAIR} --task change --num-samples 3 | did you mean --items?
    """,
    "words that stand alone": """
        ask What is 2 + 2? --adapter a    | a question of several words needs quotes: rsgwm ask 'What is 2 + 2?'
        ask sums.jsonl --adapter a        | sums.jsonl is a file; what it asks is answered with --file sums.jsonl
        chat drafter verifier             | did you mean --drafter drafter --verifier verifier?
        ask                               | give either a question or --file
        chat a                            | did you mean --adapter a?
        train sums.jsonl --out o          | did you mean --corpus sums.jsonl?
        merge --out o                     | name at least two adapter folders
        merge a,b --out o                 | write several with spaces between them
        merge a b o                       | no --out folder given; did you mean --out o?
        version                           | `rsgwm --version` prints it
        demo --base tiny                  | the recipe names it: --set base=MODEL
        merge a b                         | no --out folder given; name one
        fuse a                            | missing option --out
        recipe init                       | for example: rsgwm recipe init my_questions.jsonl
        hub push a                        | missing argument 'REPO'; for example: rsgwm hub push
        compare a                         | missing argument 'RUN_B'; for example: rsgwm compare
    """,
    "values": f"""
        merge a b --method dare --out o           | did you mean 'dare_ties'?
        merge a b --method ties-merging --out o   | did you mean 'ties'?
        merge a b --method TIES --out o           | did you mean 'ties'?
        merge a b --method average --out o        | did you mean 'linear'?
        merge a b --method task-arithmetic --out o | did you mean 'task_arithmetic'?
        merge a b --role drafter --out o          | much like one of the pipeline's; did you mean 'draft'?
        merge a b --role verifier --out o         | did you mean 'verify'?
        merge a b --weight 0.5,0.5 --out o        | write --weight 0.5 --weight 0.5
        merge a b --weight 1 --out o              | 1 weights for 2 adapters; give one for each
        merge a b --weight nan --out o            | 'nan' is not a finite number
        merge a b --method ties --set densty=0.5 --out o | ties has no parameter 'densty'; did you mean 'density'?
        merge a b --method ties --set density=5 --out o  | density must be in (0, 1], found 5
        merge a b --method ties --set density --out o    | wants NAME=VALUE, found 'density'
        merge a b --method ties --at q_prj density=1 --out o | 'q_prj' finds no module; did you mean 'q_proj'?
        merge a b --rank 0 --out o                | 0 is not in the range x>=1
        {TRAIN} --key q_proj                      | no layer has a module q_proj; write self_attn.q_proj
        {TRAIN} --key q_prj                       | write self_attn.q_proj
        {TRAIN} --learning-rate 0,001             | '0,001' is not a finite number; write 0.001
        {TRAIN} --learning-rate -1                | not in the range 0<x<1
        {TRAIN} --epochs 2.5                      | '2.5' is not a whole number
        {TRAIN} --rank 64                         | k_proj (32→16) and of 7 more layers; take 16 or less
        {TRAIN} --layers 3                        | num_layers is 3, but the model has 2 layers
        {TRAIN} --optimizer adamw8                | did you mean 'adamw'?
        {TRAIN} --type qlora                      | did you mean 'lora'?
        {TRAIN} --config typo.yaml                | rnak
        ask x {PAIR} --threshold 1.5              | 1.5 is not in [0, 1]
        ask x {PAIR} --score combine              | did you mean 'combined'?
        ask x --adapter a --top-p 90%             | '90%' is not a finite number; write 0.9
        ask x --adapter a --template chatml       | did you mean 'chat'?
        ask x --adapter a --temperature -1        | not in the range x>=0
        chat --adapter a --history lst            | did you mean 'last'?
        data build --task chnge --out o           | unknown task 'chnge'; did you mean 'change'?
        pool train --base tiny --task gsm8 --out o | did you mean 'gsm8k'?
    """,
    "who is who": f"""
        ask x --drafter verifier --verifier drafter | drafter and verifier are swapped: verifier was merged to verify
        chat --drafter verifier --verifier drafter  | drafter and verifier are swapped
        ask x --drafter drafter                   | give both (there is verifier)
        ask x --adapter a {PAIR}                  | --adapter answers alone
        ask x --adapter a --threshold 0.5         | --threshold: only a drafter with a verifier takes it
        ask x                                     | nobody to ask: name an adapter (--adapter)
        ask x --adapter tiny                      | tiny is a base model, not an adapter
        merge a tiny --out o                      | tiny is a base model, not an adapter
        ask x --base a                            | a is an adapter, not a base model; --adapter takes it
        train --base a --corpus corpus --out o    | a is an adapter, not a base model
        ask x --adapter a --base other            | a was made for tiny
        merge a x --out o                         | x was made for another base than a (other, not tiny)
        merge a b --base other --out o            | a was made for tiny
        convert from-peft a --out o               | a is an mlx-lm adapter already; rsgwm convert to-peft
        fuse tiny --out o                         | tiny is a base model, not an adapter
    """,
    "files and folders": f"""
        ask x --adapter drafte                    | adapter folder drafte does not exist; did you mean 'drafter'?
        merge a nowhere --out o                   | adapter folder nowhere does not exist
        merge a sums.jsonl --out o                | sums.jsonl is a file, not an adapter
        merge a pipe --out o                      | pipe is a pipe, not an adapter
        parity pipe --out o                       | pipe is a pipe, not an adapter
        parity a --out pipe                       | 'pipe' is a pipe; name a file or folder
        eval a --task change --out pipe           | 'pipe' is a pipe; name a file or folder
        merge a b --out drafter                   | drafter already holds a finished adapter; choose another folder
        merge a b --out sums.jsonl                | sums.jsonl is a file, and a folder is to be there
        merge a b --out sums.jsonl/               | 'sums.jsonl/' names a folder, and there is a file; leave the /
        probe report x --html sums.jsonl/         | 'sums.jsonl/' names a folder, and there is a file; leave the /
        eval {PAIR} --task sums.jsonl --split all --score yesno --max-tokens 9999 --out o | takes 20 tokens
        blindspot drafter --task sums.jsonl --split all --max-tokens 9999 --out o | beyond the model's context of
        ask --file sums.jsonl --adapter a --max-tokens 9999 --out x.jsonl | question 1 takes 20 tokens, and with 9999
        audit a b --html /                        | '/' is a folder; name a file
        audit a b --html corpus                   | 'corpus' is a folder; name a file
        audit a b --html new/                     | 'new/' is a folder; name a file
        pool sweep a b --task change --weight 1 --out o | 1 weights for 2 adapters; give one for each
        ask x --base tny                          | base 'tny' does not exist; did you mean 'tiny'?
        ask x --base smollm-135m                  | did you mean 'smollm2-135m'?
        ask x --base sums.jsonl                   | base sums.jsonl is a file, and no .gguf file
        fuse a --out tiny                         | tiny exists and is not an empty folder
        train --base tiny --corpus corpse --out o | corpse does not exist; did you mean 'corpus'?
        train --base tiny --corpus corpus --out a | a already holds a finished adapter
        train --base tiny --corpus corpus --out tiny   | tiny holds a base model; choose another folder
        train --base tiny --corpus corpus --out corpus | corpus holds something else than an adapter (mlx-rsgwm/corpus)
        pool train --base tiny --corpus corpus --out tiny | tiny holds a base model; choose another folder
        pool train --base tiny --corpus corpus --out a | a holds an adapter; choose another folder
        run good.yaml --out a                     | a is an adapter folder; give a recipe a folder of its own
        run good.yaml --out tiny                  | tiny holds a base model; choose another folder
        merge a b --out tiny                      | tiny holds a base model; choose another folder
        ask --file sum.jsonl --adapter a          | sum.jsonl does not exist; did you mean 'sums.jsonl'?
        ask --file corpus --adapter a             | corpus is a folder, not a file
        ask --file sums.jsonl --adapter a --out corpus | corpus is a folder; name a file for the answers
        ask --file sums.jsonl --adapter a --out pc.csv | pc.csv is there already, and no unfinished run beside it
        recipe init sum.jsonl                     | sum.jsonl does not exist; did you mean 'sums.jsonl'?
        recipe init sums.jsonl --out good.yaml    | good.yaml exists already; edit it, remove it
        recipe init sums.jsonl --out own.json     | give --out a name that ends in .yaml
        run good.yml                              | good.yml does not exist; did you mean 'good.yaml'?
        run demmo                                 | no recipe 'demmo'; did you mean 'demo'?
        run sums.jsonl                            | rsgwm recipe init sums.jsonl
        compare nowhere a                         | nowhere holds no report.json; give the folder of a finished
    """,
    "what stands in files": f"""
        train --base tiny --corpus sums.json --out o | rsgwm data build --task sums.json
        train --base tiny --corpus qa.csv --out o    | rsgwm data build --task qa.csv
        ask --file fa.csv --adapter a                | found frage, antwort; rename 'frage' to question
        eval {PAIR} --task fa.csv                    | a header with question and answer, found frage, antwort; rename
        eval {PAIR} --task questions.csv             | found questions, answers; rename
        ask --file empty.csv --adapter a             | empty.csv holds no question
        eval {PAIR} --task empty.csv                 | empty.csv is empty
        eval {PAIR} --task ragged.csv                | 3 cells where the header has 2
        ask --file utf16.csv --adapter a             | not UTF-8 text but UTF-16; save it as UTF-8
        ask --file broken.jsonl --adapter a          | line 1: not valid JSON
        eval {PAIR} --task table.jsonl               | table.jsonl is a table, not JSON lines; name it table.csv
        data build --task qa.csv --out o             | none of its 1 rows falls into its train share; give more rows
        run typo.yaml                                | unknown key 'rnak'
        run typo2.yaml                               | unknown key 'train.epoch', did you mean 'epochs'?
        run tabs.yaml                                | line 3 is indented with a tab; use spaces
        run twice.yaml                               | base is given twice, the second time in line 2
        run demo --set epochs=3                      | unknown key 'epochs', did you mean 'train.epochs'?
        run demo --set train.lr=1e-4                 | unknown key 'train.lr', did you mean 'learning_rate'?
        run demo --set train.epochs=three            | train.epochs: input should be a valid integer
        run demo --set data.tasks=[chnge]            | unknown task 'chnge'; did you mean 'change'?
    """,
}  # fmt: skip
FILES = {
    "fa.csv": "Frage,Antwort\nx,y\n",
    "questions.csv": "questions,answers\nx,y\n",
    "ragged.csv": "question,answer\nHow many, in all?,4\n",
    "pc.csv": "prompt,completion\nWhat is 2+2?,4\n",
    "qa.csv": "\ufeffQuestion;Answer\nWhat is 2+2?;4\n",
    "table.jsonl": "question,answer\nx,y\n",
    "broken.jsonl": '{"question": "x"\n',
    "empty.csv": "",
    "typo.yaml": "base: tiny\nrnak: 8\n",
    "typo2.yaml": "base: tiny\ndata:\n  tasks: [change]\ntrain:\n  epoch: 3\n",
    "tabs.yaml": "base: tiny\ntrain:\n\tepochs: 3\n",
    "twice.yaml": "base: tiny\nbase: other\n",
    "good.yaml": "base: tiny\ndata: {tasks: [change]}\n",
}


def rows():
    for kind, text in MISTAKES.items():
        for line in text.strip().splitlines():
            command, _, told = line.strip().partition(" | ")
            yield pytest.param(command.strip(), told.strip(), id=f"{kind}: {command.strip()}")


def run(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments], input="")


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """Two bases, adapters of each, a merged pair, and files that somebody has."""
    top = tmp_path_factory.mktemp("mistakes")
    tiny, other = (shutil.copytree(tiny_base, top / name) for name in ("tiny", "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    question = [{"question": f"What is {n} + 3?", "answer": str(n + 3)} for n in range(9)]
    (top / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in question))
    (top / "sums.json").write_text(json.dumps(question))
    os.mkfifo(top / "pipe")
    (top / "utf16.csv").write_bytes("question\nHi?\n".encode("utf-16"))
    for name, text in FILES.items():
        (top / name).write_text(text)
    made = [("data", "build", "--task", "change", "--draft-rows", 4, "--verify-rows", 4, "--out", "corpus")]
    made += [("train", "--base", base.name, "--corpus", "corpus", "--out", name, "--rank", 2, "--steps", 1)
             for base, name in ((tiny, "a"), (tiny, "b"), (other, "x"))]  # fmt: skip
    made[2] += ("--seed", 1)
    made += [("merge", "a", "b", "--method", "linear", "--role", role, "--out", out)
             for role, out in (("draft", "drafter"), ("verify", "verifier"))]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        for command in made:
            done = run(*command, "--quiet")
            assert done.exit_code == 0, done.output
    return top


def files_of(folder):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "told"), list(rows()))
def test_a_mistake_is_one_line_that_says_what_to_type(folder, monkeypatch, command, told):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = files_of(folder)
    made = run(*shlex.split(command))
    after = files_of(folder)
    shutil.rmtree(folder / "o", ignore_errors=True)
    assert made.exit_code == 2, made.output
    assert made.stdout == ""
    lines = [line for line in made.stderr.splitlines() if line != "loading tiny"]
    assert len(lines) == 1, made.stderr
    assert lines[0].startswith("rsgwm: error: ")
    assert told in lines[0]
    assert len(lines[0]) < 400
    assert after == before


def test_there_are_sixty_and_more():
    assert len(list(rows())) >= 60
