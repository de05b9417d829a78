"""Loss and gradients of one batch against torch + PEFT on the same rows, float32."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.data.batching import make_batch
from mlx_rsgwm.data.corpus import tokenize
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.layers import lora_layers, trainable
from mlx_rsgwm.training.losses import batch_loss

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def torch_batch(rows):
    """Right-padded ids, attention mask and labels in Hugging Face's manner: -100 where nothing is trained."""
    length = max(len(row.tokens) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        ids[index, : len(tokens)] = tokens
        mask[index, : len(tokens)] = 1
        labels[index, row.prompt_length : len(tokens)] = tokens[row.prompt_length :]
    return ids, mask, labels


@pytest.mark.parametrize("role", ["draft", "verify"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradients_are_those_of_peft(base, corpus, config, tiny_base, kind, role):
    from transformers import AutoModelForCausalLM

    settings = config(keys=("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"), fine_tune_type=kind)
    rows, _ = tokenize(corpus, base.tokenizer, 512)
    chosen = [row for row in rows if row.role == role][:5]
    assert len({len(row.tokens) for row in chosen}) > 1, "no padding in this batch"
    rng = np.random.default_rng(5)
    with lora_layers(base.model, settings.spec(), 0):
        weights = {
            name: mx.array((np.array(value) * (1 if name.endswith("_a") else 1.1)).astype(np.float32))
            if not name.endswith("lora_b")
            else mx.array((rng.standard_normal(value.shape) * 0.1).astype(np.float32))
            for name, value in trainable(base.model).items()
        }
        base.model.load_weights(list(weights.items()), strict=False)
        hidden, head = split_head(base.model)
        loss, found = nn.value_and_grad(base.model, lambda _, b: batch_loss(hidden, head, b))(
            base.model, make_batch(chosen)
        )
        gradients = {name: np.array(value) for name, value in tree_flatten(found)}
        loss = loss.item()

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="eager")
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=kind == "dora"
    )
    model = peft.get_peft_model(model, lora)
    names = {
        "lora_a": ("lora_A.default.weight", lambda array: array.T),
        "lora_b": ("lora_B.default.weight", lambda array: array.T),
        "m": ("lora_magnitude_vector.default.weight", lambda array: array),
    }
    parameters = dict(model.named_parameters())

    def theirs(name):
        module, _, leaf = name.rpartition(".")
        their_leaf, turn = names[leaf]
        return parameters[f"base_model.model.{module}.{their_leaf}"], turn

    with torch.no_grad():
        for name, value in weights.items():
            parameter, turn = theirs(name)
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(turn(np.array(value)))))
    ids, mask, labels = torch_batch(chosen)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert len(trained) == len(gradients) == len(weights)
    for name, gradient in gradients.items():
        parameter, turn = theirs(name)
        reference = turn(parameter.grad.numpy())
        difference = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
        assert difference < 1e-4, f"{name}: {difference:.1e}"


def test_padding_is_never_trained(base, corpus):
    """Whatever stands in the padding, loss and gradients stay the same, and no position there is picked."""
    from dataclasses import replace

    rows, _ = tokenize(corpus, base.tokenizer, 512)
    chosen = [row for row in rows if row.role == "draft"][:5]
    batch = make_batch(chosen, length_step=32)
    inputs = np.array(batch.inputs)
    lengths = np.array([len(row.tokens) - 1 for row in chosen])
    padding = np.arange(inputs.shape[1])[None] >= lengths[:, None]
    assert padding.any()
    noisy = replace(batch, inputs=mx.array(np.where(padding, 77, inputs).astype(np.int32)))
    hidden, head = split_head(base.model)
    assert batch_loss(hidden, head, noisy).item() == batch_loss(hidden, head, batch).item()
    picked = np.array(batch.positions)[np.array(batch.weights) > 0]
    assert not padding.reshape(-1)[picked].any()
    assert len(picked) == sum(len(row.tokens) - row.prompt_length for row in chosen)
