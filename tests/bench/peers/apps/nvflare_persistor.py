"""The server's model: one float32 array, written to disk after each round.

Writing with ``np.savez`` is what FLARE's own numpy persistor does with ``np.save``.
"""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

from pathlib import Path

import numpy as np
from bench_events import emit_values, first_model
from nvflare.app_common.abstract.model import (
    ModelLearnableKey,
    make_model_learnable,
)
from nvflare.app_common.abstract.model_persistor import (
    ModelPersistor,
)


class BenchPersistor(ModelPersistor):
    def __init__(self, floats=25_000_000):
        super().__init__()
        self.floats = floats

    def load_model(self, fl_ctx):
        weights = {"w": first_model(self.floats)}
        return make_model_learnable(weights=weights, meta_props={})

    def save_model(self, model_learnable, fl_ctx):
        folder = Path(fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id()))
        folder.mkdir(parents=True, exist_ok=True)
        weights = model_learnable[ModelLearnableKey.WEIGHTS]
        np.savez(folder / "server.npz", **weights)
        emit_values("round_end", weights["w"])
