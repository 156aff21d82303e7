"""Prints MLX's own logits with an adapter, in MLX's environment: FOLDER ADAPTER TOKEN_ID ..."""

import json
import sys

import mlx.core as mx
from mlx_lm import load

model, _ = load(sys.argv[1], adapter_path=sys.argv[2])
logits = model(mx.array([[int(token_id) for token_id in sys.argv[3:]]])).astype(mx.float32)
print(json.dumps(logits[0].tolist()))
