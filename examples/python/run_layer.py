"""Runs layer 0 of the model named on the command line on four tokens: run_layer.py MODEL"""

import sys

import ml_dtypes
import numpy as np

import fourfold

checkpoint = fourfold.open_checkpoint(sys.argv[1])
layer = checkpoint.make_layer(0, activations="bf16")
x = np.random.default_rng(0).normal(size=(4, layer.config.hidden)).astype(ml_dtypes.bfloat16)
topk_ids, topk_weights = checkpoint.load_router(0).route(x)
y = layer.forward(x, topk_ids, topk_weights)
print(f"{layer.backend}: y {y.shape} {y.dtype}, norm {np.linalg.norm(y.astype(np.float32)):.3f}")
