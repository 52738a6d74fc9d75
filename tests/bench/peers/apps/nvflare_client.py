"""NVIDIA FLARE Client API script: add a step to the model, send it back in full."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import nvflare.client as flare
from bench_events import emit_values, trained


def main():
    flare.init()
    index = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        emit_values("received", model.params["w"], round=int(model.current_round))
        update = {"w": trained(model.params["w"], index)}
        emit_values("sent", update["w"], client=index, round=int(model.current_round))
        flare.send(
            flare.FLModel(
                params=update,
                params_type=flare.ParamsType.FULL,
                meta={"NUM_STEPS_CURRENT_ROUND": 1},  # equal weights
            )
        )


if __name__ == "__main__":
    main()
