"""Request traces, a generator of chat traffic, and a driver that checks every byte it loads."""

from .chat import chat_requests as chat_requests
from .chat import chat_workload as chat_workload
from .driver import Latency as Latency
from .driver import ReplayReport as ReplayReport
from .driver import TierReport as TierReport
from .driver import replay as replay
from .payload import PayloadBuffer as PayloadBuffer
from .payload import PayloadCodec as PayloadCodec
from .recorder import TraceRecorder as TraceRecorder
from .simulation import Simulated as Simulated
from .simulation import least_capacity as least_capacity
from .simulation import policy_for as policy_for
from .simulation import simulate as simulate
from .trace import TraceRequest as TraceRequest
from .trace import Workload as Workload
from .trace import read_trace as read_trace

__all__ = (
    "Latency",
    "PayloadBuffer",
    "PayloadCodec",
    "ReplayReport",
    "Simulated",
    "TierReport",
    "TraceRecorder",
    "TraceRequest",
    "Workload",
    "chat_requests",
    "chat_workload",
    "least_capacity",
    "policy_for",
    "read_trace",
    "replay",
    "simulate",
)
