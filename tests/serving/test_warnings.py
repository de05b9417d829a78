"""What is told beside a verified answer: what is odd about the pair, and what its calibration was not made for."""

import json
from dataclasses import replace

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.inference.calibration import Calibration, save_calibration
from mlx_rsgwm.inference.identity import pipeline_identity
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.serving.library import Pair
from tests.serving.test_verified import LENGTH, QUESTIONS, SECONDS, ask


def test_warnings_tell_adapters_by_name_and_not_where_they_are(start_pairs, pair, tmp_path):
    client, engine = start_pairs()
    said = []

    class Kept(Progress):
        def warning(self, text):
            said.append(text)

    engine.call(lambda library: library.add_pair("twice", Pair(pair[0], [pair[0]]), Kept())).result(SECONDS)
    engine.call(lambda library: library.add_pair("pool twice", Pair(pair[0], [pair[1], pair[1]]), Kept())).result(
        SECONDS
    )
    assert all(str(tmp_path) in text for text in said)  # at the terminal where it was started
    for model, warning in (("twice", "same adapter, drafter"), ("pool twice", "verifier and verifier are the same")):
        told = ask(client, QUESTIONS[0], model).json()
        assert warning in told["verification"]["warnings"][0]
        assert str(tmp_path) not in json.dumps({**told, "model": ""})


def test_another_calibration_is_told_of_the_request_that_differs(start_pairs, pair):
    pipeline = open_pipeline(pair[0], [pair[1]], max_tokens=LENGTH, attempts=3, temperature=0.5)
    calibration = Calibration("yesno", 0.4, None, {}, {}, {}, {}, 6, 12, 5, made_for=pipeline_identity(pipeline))
    save_calibration(pair[1], calibration)
    client, _ = start_pairs()

    def warned(**more):
        return ask(client, QUESTIONS[0], verify={}, **more).json()["verification"]["warnings"]

    assert warned(temperature=0.5) == []
    (told,) = warned()
    assert "calibrated with another temperature (0.5, now 0.7);" in told
    (told,) = warned(temperature=0.5, max_completion_tokens=7)
    assert f"calibrated with another max_tokens ({LENGTH}, now 7);" in told
    body = {"model": "pair", "question": QUESTIONS[0], "answers": ["4"]}
    assert client.post("/v1/verifications", json=body).json()["warnings"] == []
    changed = {**calibration.made_for, "drafter": "0" * 64}
    save_calibration(pair[1], replace(calibration, made_for=changed))
    client, _ = start_pairs()
    (told,) = warned(temperature=0.5)
    assert "calibrated with another drafter;" in told
    assert client.post("/v1/verifications", json=body).json()["warnings"] == [told]
