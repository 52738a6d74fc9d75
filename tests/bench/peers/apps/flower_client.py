"""Flower ClientApp: add 1e-3 to the model, send it back in full."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import numpy as np
from bench_events import emit_values
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    model = message.content["arrays"]["w"].numpy()
    number = int(message.content["config"]["server-round"])
    emit_values("received", model, round=number - 1)
    update = model + np.float32(1e-3)
    emit_values("sent", update, round=number - 1)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(update)}),
            "metrics": MetricRecord({"num-examples": 1}),  # equal weights
        }
    )
    return Message(content=content, reply_to=message)
