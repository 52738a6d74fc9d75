"""Flower ClientApp: add a step to the model, send it back in full."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

from bench_events import emit_values, trained
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    model = message.content["arrays"]["w"].numpy()
    number = int(message.content["config"]["server-round"])
    emit_values("received", model, round=number - 1)
    index = int(context.node_config["partition-id"])
    update = trained(model, index)
    emit_values("sent", update, client=index, round=number - 1)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(update)}),
            "metrics": MetricRecord({"num-examples": 1}),  # equal weights
        }
    )
    return Message(content=content, reply_to=message)
