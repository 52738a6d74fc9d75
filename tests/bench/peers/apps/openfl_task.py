"""OpenFL's two plug-ins: a task that adds a step to the model, and a loader that has no data."""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

from bench_events import emit_values, first_model, trained
from openfl.federated.data.loader import DataLoader
from openfl.federated.task.runner import TaskRunner
from openfl.utilities import TensorKey


class NoData(DataLoader):
    def get_feature_shape(self):
        return None

    def get_train_data_size(self):
        return 1  # equal weights

    def get_valid_data_size(self):
        return 1


class AddRunner(TaskRunner):
    """Keeps no model between rounds: what comes in goes out again, a little larger."""

    def __init__(self, data_loader, floats=25_000_000, **kwargs):
        super().__init__(data_loader, **kwargs)
        self.floats = floats

    def get_tensor_dict(self, with_opt_vars=False):
        return {"w": first_model(self.floats)}

    def get_required_tensorkeys_for_function(self, func_name, **kwargs):
        return [TensorKey("w", "GLOBAL", 0, False, ("model",))]

    def train_task(self, col_name, round_num, input_tensor_dict, **kwargs):
        emit_values("received", input_tensor_dict["w"], round=int(round_num))
        index = int(col_name.removeprefix("col")) - 1
        update = trained(input_tensor_dict["w"], index)
        emit_values("sent", update, client=index, round=int(round_num))
        return {TensorKey("w", col_name, round_num, False, ("trained",)): update}, {}

    def set_tensor_dict(self, tensor_dict, with_opt_vars=False):
        """The interface wants it; there is no model object to set."""

    def initialize_tensorkeys_for_functions(self, with_opt_vars=False):
        """The interface wants it; the keys never change."""

    def reset_opt_vars(self):
        """The interface wants it; there is no optimizer."""
