"""Contract suites: a third party's tier, policy or manager is checked by subclassing one class.

They need pytest, and the asynchronous ones pytest-asyncio (in either of its modes).
"""

from .manager import ManagerContract as ManagerContract
from .namespace import NamespaceContract as NamespaceContract
from .policy import PolicyContract as PolicyContract
from .remote_tier import RemoteTierContract as RemoteTierContract
from .tier import TierContract as TierContract

__all__ = (
    "ManagerContract",
    "NamespaceContract",
    "PolicyContract",
    "RemoteTierContract",
    "TierContract",
)
