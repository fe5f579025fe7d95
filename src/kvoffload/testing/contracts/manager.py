"""What every manager has to do, as tests: subclass and supply `make_manager`."""

from __future__ import annotations

from .manager_cancel import CancelSuite
from .manager_evict import EvictSuite
from .manager_expiry import ExpirySuite
from .manager_forget import ForgetSuite
from .manager_lifecycle import LifecycleSuite
from .manager_load import LoadSuite
from .manager_observe import ObserveSuite
from .manager_prepare import PrepareSuite
from .manager_request import RequestSuite
from .manager_store import StoreSuite


class ManagerContract(
    StoreSuite,
    EvictSuite,
    LoadSuite,
    PrepareSuite,
    ExpirySuite,
    RequestSuite,
    ForgetSuite,
    ObserveSuite,
    LifecycleSuite,
    CancelSuite,
):
    """Tests of the `OffloadingManager` protocol, collected where a subclass is named `Test...`.

    For instance::

        class TestMyManager(ManagerContract):
            lower_blocks = 16

            def make_manager(
                self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
            ) -> MyManager:
                return MyManager(
                    MemoryTier(hot_blocks, block_bytes),
                    DiskTier(tmp_path / "cold", 16, block_bytes),
                    clock=clock,
                )

    Needs pytest and pytest-asyncio. Each test ends with a check that no slot leaked and nothing
    is left pinned or pending. Managers differ legitimately in what the attributes say.

    Attributes:
        hot_blocks: Slots that the suite asks for in the tier that `store` fills first.
        lower_blocks: Slots of all tiers below it.
        durable_blocks: Slots of the tier that survives a restart; 0 if none does.
        block_bytes: Bytes of a slot.
        exact_lru: Whether nothing but recency decides which block leaves. A policy that weighs
            more still has to evict a chain tail first, and is tested for that.
        is_remote: Whether it only speaks to a manager elsewhere, so that every call has to wait.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        settle_s: Real seconds that background work may go on after a test's last call.
        deadline_s: Real seconds after which a test counts as hanging.
    """
