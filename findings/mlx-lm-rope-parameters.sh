#!/usr/bin/env bash
# mlx-lm reads a Llama's or Qwen2's rotary base and scaling only where transformers 4 wrote them.
#
# Versions:  mlx-lm 0.32.2, mlx 0.32.4 (mlx-cpu)
# Expected:  transformers 5 writes them into `rope_parameters` of config.json, and mlx-lm depends on
#            transformers 5: the model computes with them, or loading it fails.
# Seen:      the key is ignored without a word. The model computes with rope_theta 10000 (Qwen2:
#            1000000) and without scaling. Qwen3 reads the key. (2026-11-30)
# Matters:   an adapter that mlx-lm trains on a folder that transformers 5 has saved is trained on
#            another model, and answers worse everywhere else. A rope_theta beside it mends that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
install --force-reinstall --no-deps mlx==0.32.4 # mlx-cpu's files must not be the last ones
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
THETA = 500000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def logits(model_type: str, **keys: object) -> mx.array:
    model_class, args_class = _get_classes({"model_type": model_type})
    model = model_class(args_class.from_dict(CONFIG | {"model_type": model_type} | keys))
    mx.random.seed(0)
    model.update(tree_map(lambda p: mx.random.normal(p.shape), model.parameters()))
    return model(TOKENS)


def differ(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


seen = {}
for model_type in ("llama", "qwen2"):
    old = logits(model_type, rope_theta=THETA, rope_scaling=LLAMA3)
    new = logits(model_type, rope_parameters={"rope_theta": THETA, **LLAMA3})
    neither = logits(model_type)
    seen[model_type] = differ(old, new) > 0.01, differ(neither, new) == 0.0
    print(
        f"{model_type}: with rope_parameters the logits differ by {differ(old, new):.3g} from those "
        f"with rope_theta and rope_scaling, and by {differ(neither, new):.3g} from those without"
    )
if set(seen.values()) != {(True, True)}:
    sys.exit("changed: this finding no longer holds")
PYTHON
