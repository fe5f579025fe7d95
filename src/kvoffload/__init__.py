"""Awaitable hot, warm and cold storage for the KV-cache blocks of language models."""

from .clock import SystemClock as SystemClock
from .config import ManagerSettings as ManagerSettings
from .errors import AccessDeniedError as AccessDeniedError
from .errors import BlockNotFoundError as BlockNotFoundError
from .errors import CapacityError as CapacityError
from .errors import ClosedError as ClosedError
from .errors import ConfigError as ConfigError
from .errors import CorruptBlockError as CorruptBlockError
from .errors import DerivedViewWarning as DerivedViewWarning
from .errors import LoadTimeoutError as LoadTimeoutError
from .errors import NotPinnedError as NotPinnedError
from .errors import OffloadError as OffloadError
from .errors import TierError as TierError
from .errors import TierLockedError as TierLockedError
from .errors import TierTimeoutError as TierTimeoutError
from .errors import TierUnavailableError as TierUnavailableError
from .errors import WrongLoopError as WrongLoopError
from .events import EventKind as EventKind
from .events import OffloadingEvent as OffloadingEvent
from .keys import hash_blocks as hash_blocks
from .lru_entry import LRUEntry as LRUEntry
from .managers.async_lru_manager import AsyncLRUManager as AsyncLRUManager
from .managers.async_lru_manager import NamespaceView as NamespaceView
from .managers.lru_manager_factory import LRUManagerFactory as LRUManagerFactory
from .managers.lru_offload_manager import LRUOffloadManager as LRUOffloadManager
from .managers.prefetching_lru_manager import PrefetchingLRUManager as PrefetchingLRUManager
from .managers.tiered_lru_manager import TieredLRUManager as TieredLRUManager
from .managers.weighted_lru_manager import WeightedLRUManager as WeightedLRUManager
from .metrics import ManagerStats as ManagerStats
from .metrics import TierStats as TierStats
from .policy.arc import ARCPolicy as ARCPolicy
from .policy.fifo import FIFOPolicy as FIFOPolicy
from .policy.lru import LRUPolicy as LRUPolicy
from .policy.s3fifo import S3FIFOPolicy as S3FIFOPolicy
from .policy.weighted import WeightedPolicy as WeightedPolicy
from .remote.engines import remote_tier as remote_tier
from .remote.mooncake import MooncakeTier as MooncakeTier
from .remote.object_store import ObjectStoreTier as ObjectStoreTier
from .remote.protocol import RemoteOutcome as RemoteOutcome
from .remote.protocol import RemoteTier as RemoteTier
from .remote.valkey import ValkeyTier as ValkeyTier
from .retention import Retention as Retention
from .shares import NamespaceShare as NamespaceShare
from .tiers.disk import DiskTier as DiskTier
from .tiers.memory import MemoryTier as MemoryTier
from .types import BlockHash as BlockHash
from .types import BlockLocation as BlockLocation
from .types import BlockSource as BlockSource
from .types import BlockState as BlockState
from .types import Buffer as Buffer
from .types import Clock as Clock
from .types import EvictionPolicy as EvictionPolicy
from .types import FlushResult as FlushResult
from .types import ForecastingPolicy as ForecastingPolicy
from .types import Key as Key
from .types import Lease as Lease
from .types import LoadPlan as LoadPlan
from .types import LoadStoreSpec as LoadStoreSpec
from .types import Medium as Medium
from .types import OffloadingManager as OffloadingManager
from .types import PrepareStoreOutput as PrepareStoreOutput
from .types import RejectReason as RejectReason
from .types import Request as Request
from .types import SlotEntry as SlotEntry
from .types import StoredBlock as StoredBlock
from .types import StoreResult as StoreResult
from .types import Tier as Tier
from .types import TierState as TierState

__all__ = (
    "ARCPolicy",
    "AccessDeniedError",
    "AsyncLRUManager",
    "BlockHash",
    "BlockLocation",
    "BlockNotFoundError",
    "BlockSource",
    "BlockState",
    "Buffer",
    "CapacityError",
    "Clock",
    "ClosedError",
    "ConfigError",
    "CorruptBlockError",
    "DerivedViewWarning",
    "DiskTier",
    "EventKind",
    "EvictionPolicy",
    "FIFOPolicy",
    "FlushResult",
    "ForecastingPolicy",
    "Key",
    "LRUEntry",
    "LRUManagerFactory",
    "LRUOffloadManager",
    "LRUPolicy",
    "Lease",
    "LoadPlan",
    "LoadStoreSpec",
    "LoadTimeoutError",
    "ManagerSettings",
    "ManagerStats",
    "Medium",
    "MemoryTier",
    "MooncakeTier",
    "NamespaceShare",
    "NamespaceView",
    "NotPinnedError",
    "ObjectStoreTier",
    "OffloadError",
    "OffloadingEvent",
    "OffloadingManager",
    "PrefetchingLRUManager",
    "PrepareStoreOutput",
    "RejectReason",
    "RemoteOutcome",
    "RemoteTier",
    "Request",
    "Retention",
    "S3FIFOPolicy",
    "SlotEntry",
    "StoreResult",
    "StoredBlock",
    "SystemClock",
    "Tier",
    "TierError",
    "TierLockedError",
    "TierState",
    "TierStats",
    "TierTimeoutError",
    "TierUnavailableError",
    "TieredLRUManager",
    "ValkeyTier",
    "WeightedLRUManager",
    "WeightedPolicy",
    "WrongLoopError",
    "hash_blocks",
    "remote_tier",
)
