"""The two sides that tests of converted vocabularies and heads compare, and the commands between them."""

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.models.base import load_base


def invoke(*arguments):
    """What a command of ``rsgwm`` gives."""
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


def run(*arguments):
    """Run a command that must not fail."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output


def torch_base(folder, rows=None, kind="AutoModelForCausalLM"):
    """The base as transformers loads it, with its vocabulary resized to ``rows``."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = getattr(transformers, kind).from_pretrained(str(folder), **options).eval()
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def torch_logits(model, ids):
    """(tokens, vocabulary) of one sequence, float32."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def mlx_logits(folder, ids):
    """As :func:`torch_logits`, of the model in ``folder``."""
    return np.array(load_base(str(folder), "float32").model(mx.array([ids]))[0])
