"""NVIDIA FLARE Client API script: add 1e-3 to the model, send it back in full."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import numpy as np
import nvflare.client as flare
from bench_events import emit_values


def main():
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        emit_values("received", model.params["w"], round=int(model.current_round))
        update = {"w": model.params["w"] + np.float32(1e-3)}
        emit_values("sent", update["w"], round=int(model.current_round))
        flare.send(
            flare.FLModel(
                params=update,
                params_type=flare.ParamsType.FULL,
                meta={"NUM_STEPS_CURRENT_ROUND": 1},  # equal weights
            )
        )


if __name__ == "__main__":
    main()
