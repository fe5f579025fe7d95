"""For test suites: faults on demand, time by hand, small managers, and the contracts as tests.

Clock and waiting: `ManualClock`, `eventually`. Tiers: `FaultyTier`, `CountingTier`,
`RestartableTier`, `DictRemoteTier`. The disk below a `DiskTier`, given as its `file_layer`:
`FaultyFileLayer`, `PowerLoss`. Managers: `small_manager`, `payload_for`, `DictSource`.
Cancellation: `cancel_everywhere`, `count_suspensions`. They need nothing but kvoffload.

Contracts: `TierContract`, `PolicyContract`, `ManagerContract`, `NamespaceContract`,
`RemoteTierContract` check a tier, a policy or a manager of your own; subclass one and supply its
factory method. They need pytest and pytest-asyncio, and are imported on first use, so that the
rest works without.
"""

import sys
from typing import TYPE_CHECKING

from .cancellation import cancel_everywhere as cancel_everywhere
from .cancellation import count_suspensions as count_suspensions
from .clock import ManualClock as ManualClock
from .clock import eventually as eventually
from .counting_tier import CountingTier as CountingTier
from .counting_tier import TierCall as TierCall
from .dict_remote_tier import DictRemoteTier as DictRemoteTier
from .dict_remote_tier import RemoteHang as RemoteHang
from .faults import Fault as Fault
from .faults import Hang as Hang
from .faulty_files import FaultyFileLayer as FaultyFileLayer
from .faulty_tier import FaultyTier as FaultyTier
from .file_faults import FileFault as FileFault
from .file_faults import FileHang as FileHang
from .managers import small_manager as small_manager
from .payloads import DictSource as DictSource
from .payloads import payload_for as payload_for
from .power_loss import PowerLoss as PowerLoss
from .power_loss import Unsynced as Unsynced
from .power_loss import keep_all as keep_all
from .power_loss import keep_changes as keep_changes
from .power_loss import keep_nothing as keep_nothing
from .power_loss import keep_only as keep_only
from .power_loss import keep_sectors as keep_sectors
from .restartable_tier import RestartableTier as RestartableTier

if TYPE_CHECKING:
    from .contracts import ManagerContract as ManagerContract
    from .contracts import NamespaceContract as NamespaceContract
    from .contracts import PolicyContract as PolicyContract
    from .contracts import RemoteTierContract as RemoteTierContract
    from .contracts import TierContract as TierContract

__all__ = (
    "CountingTier",
    "DictRemoteTier",
    "DictSource",
    "Fault",
    "FaultyFileLayer",
    "FaultyTier",
    "FileFault",
    "FileHang",
    "Hang",
    "ManagerContract",
    "ManualClock",
    "NamespaceContract",
    "PolicyContract",
    "PowerLoss",
    "RemoteHang",
    "RemoteTierContract",
    "RestartableTier",
    "TierCall",
    "TierContract",
    "Unsynced",
    "cancel_everywhere",
    "count_suspensions",
    "eventually",
    "keep_all",
    "keep_changes",
    "keep_nothing",
    "keep_only",
    "keep_sectors",
    "payload_for",
    "small_manager",
)

_CONTRACTS = (
    "ManagerContract",
    "NamespaceContract",
    "PolicyContract",
    "RemoteTierContract",
    "TierContract",
)


def __getattr__(name: str) -> object:
    if name in _CONTRACTS:
        import pytest

        if f"{__name__}.contracts" not in sys.modules:
            # Or a failing contract would not show the values that it compared.
            pytest.register_assert_rewrite(f"{__name__}.contracts")
        from . import contracts

        return getattr(contracts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
