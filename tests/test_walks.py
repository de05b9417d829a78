"""How many files a question and an evaluation run pass through, and how often they come back: not more than they do."""

import sys
from pathlib import Path

import pytest

import mlx_rsgwm
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation.runner import evaluate

ROOT = str(Path(mlx_rsgwm.__file__).parent)
READING = "evaluation/answers.py"
QUESTIONS = generate("change", 3, 1, "test")
# Rooms, and returns. One room and five returns of each are the step that rows of ask and of a server take alike.
WALKS = {
    "answer_many": (lambda loop: loop.answer_many([question.question for question in QUESTIONS], 4), 11, 35),
    "evaluate": (lambda loop: evaluate(loop, QUESTIONS, 1, 4), 17, 57),
}


def walk(run):
    """Files of inference and evaluation that run, and the different calls from one of them into another.

    What answers.py calls depends on what a draft says, and does not count.
    """
    rooms, calls = set(), set()

    def room(frame):
        name = frame.f_code.co_filename.removeprefix(ROOT + "/")
        return name if name.startswith(("inference/", "evaluation/")) else None

    def watch(frame, event, _):
        here = room(frame) if event == "call" else None
        if here is None:
            return
        caller = frame.f_back
        while caller is not None and room(caller) is None:
            caller = caller.f_back
        inside = caller
        while inside is not None and room(inside) != READING:
            inside = inside.f_back
        if inside is not None:
            return
        rooms.add(here)
        if caller is not None and room(caller) != here:
            calls.add((room(caller), here, frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return rooms, calls


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_passes_few_rooms_and_comes_back_seldom(make_loop, name):
    run, most_rooms, most_returns = WALKS[name]
    loop = make_loop(2, 4)
    rooms, calls = walk(lambda: run(loop))
    returns = len(calls) - (len(rooms) - 1)
    print(f"{name}: {len(rooms)} rooms, {returns} returns: {', '.join(sorted(rooms))}")
    assert "inference/loop.py" in rooms
    assert len(rooms) <= most_rooms
    assert returns <= most_returns
