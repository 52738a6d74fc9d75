"""Flower ServerApp: stock FedAvg over one float32 array; it reports each round's end."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

from bench_events import emit_values, first_model
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Reporting(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            raise RuntimeError(f"round {server_round} gave no aggregate")
        emit_values("round_end", arrays["w"].numpy(), round=int(server_round))
        return arrays, metrics


@app.main()
def main(grid, context):
    clients = int(context.run_config["clients"])
    strategy = Reporting(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=clients,
        min_evaluate_nodes=0,
        min_available_nodes=clients,
    )
    first = first_model(int(context.run_config["floats"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(first)}),
        num_rounds=int(context.run_config["rounds"]),
    )
