from protocols.gen import accounting_pb2 as _accounting_pb2
from protocols.gen import rounds_pb2 as _rounds_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InviteRequest(_message.Message):
    __slots__ = ("institution", "valid_hours")
    INSTITUTION_FIELD_NUMBER: _ClassVar[int]
    VALID_HOURS_FIELD_NUMBER: _ClassVar[int]
    institution: str
    valid_hours: int
    def __init__(self, institution: _Optional[str] = ..., valid_hours: _Optional[int] = ...) -> None: ...

class InviteResponse(_message.Message):
    __slots__ = ("token", "expires_at_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_at_ms: int
    def __init__(self, token: _Optional[str] = ..., expires_at_ms: _Optional[int] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeFacts(_message.Message):
    __slots__ = ("node", "status", "enrolled_at_ms", "certificate_until_ms", "last_seen_ms", "state", "agent_version", "progress", "signing_key", "capability")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_UNTIL_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    node: str
    status: str
    enrolled_at_ms: int
    certificate_until_ms: int
    last_seen_ms: int
    state: str
    agent_version: str
    progress: _containers.RepeatedCompositeFieldContainer[_rounds_pb2.Progress]
    signing_key: bytes
    capability: str
    def __init__(self, node: _Optional[str] = ..., status: _Optional[str] = ..., enrolled_at_ms: _Optional[int] = ..., certificate_until_ms: _Optional[int] = ..., last_seen_ms: _Optional[int] = ..., state: _Optional[str] = ..., agent_version: _Optional[str] = ..., progress: _Optional[_Iterable[_Union[_rounds_pb2.Progress, _Mapping]]] = ..., signing_key: _Optional[bytes] = ..., capability: _Optional[str] = ...) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeFacts]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeFacts, _Mapping]]] = ...) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("plan", "snapshot", "request", "request_signature")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    snapshot: bytes
    request: bytes
    request_signature: bytes
    def __init__(self, plan: _Optional[bytes] = ..., snapshot: _Optional[bytes] = ..., request: _Optional[bytes] = ..., request_signature: _Optional[bytes] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunFacts]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunFacts, _Mapping]]] = ...) -> None: ...

class ShowRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RunFacts(_message.Message):
    __slots__ = ("run", "title", "status", "plan_digest", "submitted_at_ms", "rounds_planned", "rounds", "plan", "privacy", "prices")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_PLANNED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    PRICES_FIELD_NUMBER: _ClassVar[int]
    run: str
    title: str
    status: str
    plan_digest: str
    submitted_at_ms: int
    rounds_planned: int
    rounds: _containers.RepeatedCompositeFieldContainer[RoundFacts]
    plan: bytes
    privacy: _containers.RepeatedCompositeFieldContainer[SpendFacts]
    prices: _accounting_pb2.Prices
    def __init__(self, run: _Optional[str] = ..., title: _Optional[str] = ..., status: _Optional[str] = ..., plan_digest: _Optional[str] = ..., submitted_at_ms: _Optional[int] = ..., rounds_planned: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[RoundFacts, _Mapping]]] = ..., plan: _Optional[bytes] = ..., privacy: _Optional[_Iterable[_Union[SpendFacts, _Mapping]]] = ..., prices: _Optional[_Union[_accounting_pb2.Prices, _Mapping]] = ...) -> None: ...

class SpendFacts(_message.Message):
    __slots__ = ("node", "dataset", "unit", "rounds", "epsilon", "delta", "budget", "rounds_left", "why")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    node: str
    dataset: str
    unit: str
    rounds: int
    epsilon: str
    delta: str
    budget: str
    rounds_left: int
    why: str
    def __init__(self, node: _Optional[str] = ..., dataset: _Optional[str] = ..., unit: _Optional[str] = ..., rounds: _Optional[int] = ..., epsilon: _Optional[str] = ..., delta: _Optional[str] = ..., budget: _Optional[str] = ..., rounds_left: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class PhaseTime(_message.Message):
    __slots__ = ("phase", "entered_at_ms")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ENTERED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    entered_at_ms: int
    def __init__(self, phase: _Optional[str] = ..., entered_at_ms: _Optional[int] = ...) -> None: ...

class NodeTraffic(_message.Message):
    __slots__ = ("node", "bytes_up", "bytes_down", "confirmed")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_FIELD_NUMBER: _ClassVar[int]
    node: str
    bytes_up: int
    bytes_down: int
    confirmed: str
    def __init__(self, node: _Optional[str] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., confirmed: _Optional[str] = ...) -> None: ...

class RoundFacts(_message.Message):
    __slots__ = ("round", "phase", "why", "model_root_in", "times", "traffic", "metrics", "next_snapshot", "index", "transcript", "resources")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROOT_IN_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    round: _rounds_pb2.RoundRef
    phase: _rounds_pb2.PhaseView
    why: str
    model_root_in: str
    times: _containers.RepeatedCompositeFieldContainer[PhaseTime]
    traffic: _containers.RepeatedCompositeFieldContainer[NodeTraffic]
    metrics: _containers.ScalarMap[str, int]
    next_snapshot: bytes
    index: int
    transcript: str
    resources: _containers.RepeatedCompositeFieldContainer[_accounting_pb2.NodeResources]
    def __init__(self, round: _Optional[_Union[_rounds_pb2.RoundRef, _Mapping]] = ..., phase: _Optional[_Union[_rounds_pb2.PhaseView, _Mapping]] = ..., why: _Optional[str] = ..., model_root_in: _Optional[str] = ..., times: _Optional[_Iterable[_Union[PhaseTime, _Mapping]]] = ..., traffic: _Optional[_Iterable[_Union[NodeTraffic, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, int]] = ..., next_snapshot: _Optional[bytes] = ..., index: _Optional[int] = ..., transcript: _Optional[str] = ..., resources: _Optional[_Iterable[_Union[_accounting_pb2.NodeResources, _Mapping]]] = ...) -> None: ...

class PlanRunRequest(_message.Message):
    __slots__ = ("plan", "coordinates")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    coordinates: int
    def __init__(self, plan: _Optional[bytes] = ..., coordinates: _Optional[int] = ...) -> None: ...

class SiteOutlook(_message.Message):
    __slots__ = ("node", "before", "after", "delta", "budget", "rounds", "rule", "why")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    node: str
    before: str
    after: str
    delta: str
    budget: str
    rounds: int
    rule: str
    why: str
    def __init__(self, node: _Optional[str] = ..., before: _Optional[str] = ..., after: _Optional[str] = ..., delta: _Optional[str] = ..., budget: _Optional[str] = ..., rounds: _Optional[int] = ..., rule: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class PlanRunResponse(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[SiteOutlook]
    def __init__(self, sites: _Optional[_Iterable[_Union[SiteOutlook, _Mapping]]] = ...) -> None: ...

class WatchRunRequest(_message.Message):
    __slots__ = ("run", "after")
    RUN_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    run: str
    after: int
    def __init__(self, run: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("id", "at_ms", "round", "transaction", "phase", "why", "node")
    ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    id: int
    at_ms: int
    round: _rounds_pb2.RoundRef
    transaction: str
    phase: str
    why: str
    node: str
    def __init__(self, id: _Optional[int] = ..., at_ms: _Optional[int] = ..., round: _Optional[_Union[_rounds_pb2.RoundRef, _Mapping]] = ..., transaction: _Optional[str] = ..., phase: _Optional[str] = ..., why: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class WhyRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: _rounds_pb2.RoundRef
    def __init__(self, round: _Optional[_Union[_rounds_pb2.RoundRef, _Mapping]] = ...) -> None: ...

class WhyResponse(_message.Message):
    __slots__ = ("phase", "why", "waiting_for", "progress")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    phase: _rounds_pb2.PhaseView
    why: str
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    progress: _containers.RepeatedCompositeFieldContainer[_rounds_pb2.Progress]
    def __init__(self, phase: _Optional[_Union[_rounds_pb2.PhaseView, _Mapping]] = ..., why: _Optional[str] = ..., waiting_for: _Optional[_Iterable[str]] = ..., progress: _Optional[_Iterable[_Union[_rounds_pb2.Progress, _Mapping]]] = ...) -> None: ...

class StopRunRequest(_message.Message):
    __slots__ = ("run", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    reason: str
    def __init__(self, run: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
