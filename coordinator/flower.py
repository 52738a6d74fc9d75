"""A Flower ``Grid`` whose messages are rounds of a Minga federation.

    grid = MingaGrid(federation, RoundTerms(name="credit", app="bank.client:app", roster=(...)))
    result = run_strategy(FedAdam(fraction_evaluate=0.0), grid, arrays, rounds=10, state=path)

Runs wherever an operator's certificate is, not in the coordinator. Sending the messages of one
round submits a run (flower_rounds.py): the sites' unmodified ClientApps train on the messages'
arrays, and what comes back is ONE reply for all of them, the weighted mean of their models, since
above a secure sum there is nothing else. infra/runs/flower.py connects a Grid to a coordinator.

What a Grid promises beyond that: the same round sent again, by this process or the next, is the
same run and gives the same reply. Flower keeps the identity of a run in the process, so a process
serves one Grid at a time. Importing this module imports flwr, some seconds: import it lazily.
"""

from __future__ import annotations

import os

# Before any import of flwr: it phones home by default.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from coordinator.flower_private import empty_run, identify, name_message
from coordinator.flower_rounds import (
    Begun,
    Federation,
    RoundResult,
    Rounds,
    RoundTerms,
    Scalar,
    node_number,
)
from coordinator.flower_strategies import (
    StrategyResult,
    check_strategy,
    plain,
    record_of,
    run_strategy,
)
from protocols.errors import PlanRefusedError

__all__ = ["MingaGrid", "RoundTerms", "StrategyResult", "run_strategy"]

_ARRAYS: Final = "arrays"
_CONFIG: Final = "config"


@dataclass(slots=True)
class _Sent:
    """Messages of one call, and whether their reply was given out."""

    begun: Begun
    first: Any  # the message that the reply answers: the one to the node of the lowest number
    pulled: bool = False


class MingaGrid(Grid):  # type: ignore[misc]  # flwr has no types for us
    """See the module's docstring.

    Args:
        federation: the coordinator, called as an operator.
        terms: of every round.
        rounds: the rounds themselves; another one in tests.
    """

    def __init__(
        self,
        federation: Federation,
        terms: RoundTerms,
        *,
        rounds: Callable[..., Rounds] = Rounds,
    ) -> None:
        self.terms = terms
        self._rounds = rounds(federation=federation, terms=terms)
        self._numbers = {node_number(node): node for node in terms.nodes}
        self._run = empty_run(node_number(terms.name))
        self._admitted = False
        self._sent: dict[str, _Sent] = {}  # by message id

    def admit(self, strategy: Any) -> str:
        """Check a strategy and let it send; returns its name.

        Without it nothing is sent: a strategy that needs single replies would take the mean of
        all models for the model of one site.

        Raises:
            PlanRefusedError: see ``check_strategy``.
        """
        name = check_strategy(strategy, nodes=len(self._numbers))
        identify(self._run.run_id)
        self._admitted = True
        return name

    # -- Flower's interface ----------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Take a run's id from Flower; before the first message."""
        if self._sent:
            raise ValueError("messages of this Grid's run were sent already")
        self._run = run
        if self._admitted:
            identify(run.run_id)

    @property
    def run(self) -> Any:
        """The run as Flower sees it: one, whatever number of runs the federation makes of it."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this Grid's run."""
        identify(self._run.run_id)
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The roster's numbers, ascending. Whether a node is there shows in the round."""
        return list(self._numbers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Begin a round with the train messages to all nodes.

        Returns:
            One id for each message, in order.

        Raises:
            PlanRefusedError: ``flower.admit``, ``flower.message``, ``flower.cohort``,
                ``flower.records``, ``flower.same`` or ``flower.config``: nothing was sent.
            RefusedError, NotReadyError: see ``Rounds.begin``.
        """
        asked = list(messages)
        if not asked:
            return []
        if not self._admitted:
            raise PlanRefusedError(
                "this Grid serves no strategy yet: call run_strategy, or grid.admit(strategy)",
                rule="flower.admit",
            )
        arrays, config = self._read(asked)
        begun = self._rounds.begin(plain(arrays), config)
        asked_in_order = sorted(asked, key=lambda message: int(message.metadata.dst_node_id))
        sent = _Sent(begun, asked_in_order[0])
        names = []
        for message in asked:
            name = f"{begun.run}.{message.metadata.dst_node_id}"
            name_message(message, name)
            self._sent[name] = sent
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply of each round among the messages that is done; each is given once.

        Raises:
            NotFoundError, RoundFailedError, RefusedError, IntegrityError: see ``Rounds.result``.
        """
        replies = []
        for sent in self._of(message_ids):
            result = None if sent.pulled else self._rounds.result(sent.begun)
            if result is not None:
                sent.pulled = True
                replies.append(_reply(sent.first, result))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the messages of one round and wait for the one reply; none if time runs out.

        Raises:
            FederationError: see ``push_messages`` and ``Rounds.wait``.
        """
        replies = []
        for sent in self._of(self.push_messages(messages)):
            result = self._rounds.wait(sent.begun, timeout)
            if result is not None:
                sent.pulled = True
                replies.append(_reply(sent.first, result))
        return replies

    # -- inside ----------------------------------------------------------------------------------

    def _of(self, message_ids: Iterable[str]) -> list[_Sent]:
        """The rounds of messages, each once; ids that this Grid did not give are ignored."""
        found = [self._sent[name] for name in message_ids if name in self._sent]
        return list({id(sent): sent for sent in found}.values())

    def _read(self, messages: list[Any]) -> tuple[Any, dict[str, Scalar]]:
        """What all messages say alike: arrays and config."""
        for message in messages:
            if message.metadata.message_type != MessageType.TRAIN:
                raise PlanRefusedError(
                    f"only train messages become rounds, not {message.metadata.message_type}",
                    rule="flower.message",
                )
            if message.metadata.run_id != self._run.run_id:
                raise PlanRefusedError(
                    "the message was made for another Grid: a process serves one at a time",
                    rule="flower.message",
                )
        asked = sorted(int(message.metadata.dst_node_id) for message in messages)
        if asked != list(self._numbers):
            raise PlanRefusedError(
                f"{len(messages)} messages do not address each of the roster's"
                f" {len(self._numbers)} nodes once; who takes part is for the federation to say",
                rule="flower.cohort",
            )
        first = messages[0].content
        arrays, config = _records(first)
        for message in messages[1:]:
            if message.content is not first and _records(message.content) != (arrays, config):
                raise PlanRefusedError(
                    "the messages of one round carry different arrays or configs; a round has one"
                    " starting model and one plan",
                    rule="flower.same",
                )
        return arrays, _scalars(config)


def _records(content: Any) -> tuple[Any, Any]:
    """The one ArrayRecord and the one ConfigRecord of a message, by the names that apps expect."""
    found = {*content.array_records, *content.config_records, *content.metric_records}
    if (
        set(content.array_records) != {_ARRAYS}
        or not set(content.config_records) <= {_CONFIG}
        or content.metric_records
    ):
        raise PlanRefusedError(
            f"a message holds the records {_ARRAYS} and {_CONFIG}, not"
            f" {', '.join(sorted(found)) or 'nothing'}",
            rule="flower.records",
        )
    return content[_ARRAYS], content.config_records.get(_CONFIG, ConfigRecord())


def _scalars(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """The config as plan fields: numbers and texts."""
    for key, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise PlanRefusedError(
                f"config {key} is a {type(value).__name__}: a plan takes numbers and texts only",
                rule="flower.config",
            )
    return dict(config)


def _reply(first: Any, result: RoundResult) -> Any:
    """One reply for all nodes. It answers the first message, as some reply must."""
    content = RecordDict(
        {_ARRAYS: record_of(result.arrays), "metrics": MetricRecord(dict(result.metrics))}
    )
    return Message(content, reply_to=first)
