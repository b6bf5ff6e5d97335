"""Random wrong values (seeded) for every field of model and data: always one line that names the field."""

import random

import pytest
from tiny_run import TINY, error_line

NUMBERS = ["-1", "-7", "-1e9", ".nan", ".inf", "-.inf", "nan", "1e400", "-0.5"]
NOT_NUMBERS = ["true", "[]", "[1, 2]", "{a: 1}", "word", "''", "null", "2026-01-01"]
HUGE = ["9223372036854775808", "100000000000000000000000000"]

SIZES = ["d_model", "n_heads", "n_layers", "mlp_hidden_dim", "num_experts", "top_k", "max_new_tokens"]
COEFFICIENTS = ["dropout", "rope_theta", "balance_coef", "z_coef", "temperature"]
OPTIMIZER = ["learning_rate", "weight_decay", "beta1", "beta2", "min_lr_ratio"]
DATA = ["seq_len", "batch_size", "num_workers"]

FIELDS = {
    **{f"model.{name}": [*NUMBERS, *NOT_NUMBERS, *HUGE, "0", "1.5"] for name in SIZES},
    **{f"model.{name}": [*NUMBERS, *NOT_NUMBERS] for name in COEFFICIENTS},
    **{f"model.optimizer.{name}": [*NUMBERS, *NOT_NUMBERS] for name in OPTIMIZER},
    "model.optimizer.warmup_steps": [*NUMBERS, *NOT_NUMBERS, "1.5"],
    "model.optimizer.decay_steps": [*NUMBERS, *(value for value in NOT_NUMBERS if value != "null"), "0", "1.5"],
    "model.activation": [*NUMBERS, *NOT_NUMBERS, "0"],
    "model.experts": [*NUMBERS, *NOT_NUMBERS, "0"],
    "model.tie_embeddings": [*NUMBERS, *(value for value in NOT_NUMBERS if value not in ("true", "null")), "2"],
    "model.compile": [*NUMBERS, *(value for value in NOT_NUMBERS if value not in ("true", "null")), "2"],
    **{f"data.{name}": [*NUMBERS, *NOT_NUMBERS, *HUGE, "1.5"] for name in DATA},
    "data.seed": [*NUMBERS, *NOT_NUMBERS, "1.5"],
    "data.max_val_tokens": [*NUMBERS, *(value for value in NOT_NUMBERS if value != "null"), "0", "1.5"],
    "data.tokenizer": [*NUMBERS, *NOT_NUMBERS],
    "data.vocab_size": [*NUMBERS, *(value for value in NOT_NUMBERS if value != "null"), *HUGE, "0", "1.5"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values_name_their_field(folder, capsys, monkeypatch, request, field):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: pytest.fail("accepted"))
    values = random.Random(request.node.nodeid).sample(FIELDS[field], 4)
    wrong = []
    for value in values:
        try:
            line = error_line(capsys, "fit", f"--{field}={value}", tiny=TINY)
        except Exception as error:
            wrong.append(f"{value}: {type(error).__name__} {str(error)[:100]}")
            continue
        except pytest.fail.Exception:
            wrong.append(f"{value}: accepted")
            continue
        if field.rpartition(".")[2] not in line.partition("Namespace(")[0]:
            wrong.append(f"{value}: {line[:100]}")
    assert wrong == []
