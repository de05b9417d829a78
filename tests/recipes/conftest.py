"""A small recipe on the tiny base."""

import pytest
import yaml


@pytest.fixture
def recipe_file(tiny_base, tmp_path):
    def write(**changes):
        values = {
            "name": "tiny",
            "base": str(tiny_base),
            "data": {"tasks": ["change", "groups"], "rows": 24, "verify_share": 0.5, "calibration_items": 2},
            "merge": {"method": "rsgwm"},
            "train": {"rank": 4, "alpha": 8, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
            "loop": {"attempts": 2, "max_tokens": 6, "threshold": "auto"},
            "evaluate": {"items": 3, "timed": 2},
            "export": {"parity": False},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write
