from __future__ import annotations

import hashlib
from collections import Counter
from itertools import islice

from kvoffload.workload import TraceRequest, chat_requests, chat_workload


def first(number: int, seed: int = 0) -> list[TraceRequest]:
    return list(islice(chat_requests(seed), number))


def test_one_seed_is_one_workload_and_a_longer_one_begins_with_a_shorter_one() -> None:
    workload = chat_workload(300, seed=5)
    assert workload.requests == first(400, seed=5)[:300]
    assert workload.name == "generated-chat-5"
    assert workload.requests != first(300, seed=6)


def test_the_workload_of_a_seed_is_the_same_in_every_version() -> None:
    text = repr([(r.timestamp_ms, r.hash_ids) for r in first(500)])
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "398265f84427cbd69befad99fc55ebf02fd7f54b1edbdd82a798daaf4314009c"
    )


def test_requests_are_in_order_and_every_block_has_one_parent() -> None:
    requests = first(2000)
    times = [request.timestamp_ms for request in requests]
    assert times == sorted(times)
    parents: dict[int, int | None] = {}
    for request in requests:
        assert len(set(request.hash_ids)) == len(request.hash_ids)
        parent: int | None = None
        for hash_id in request.hash_ids:
            assert parents.setdefault(hash_id, parent) == parent
            parent = hash_id
        assert request.input_length == 512 * len(request.hash_ids)
        assert request.output_length >= 512


def test_conversations_grow_by_their_last_answer_and_a_question() -> None:
    turns: Counter[str] = Counter()
    last: dict[tuple[int, ...], TraceRequest] = {}
    for request in first(2000):
        for cut in range(len(request.hash_ids) - 1, 0, -1):
            if (before := last.pop(request.hash_ids[:cut], None)) is not None:
                answer = before.output_length // 512
                assert len(request.hash_ids) > cut + answer
                assert request.timestamp_ms >= before.timestamp_ms + 2000
                turns["later"] += 1
                break
        else:
            turns["first"] += 1
        last[request.hash_ids] = request
    # Five turns a conversation on average, less those that have not come yet.
    assert 3.0 < turns["later"] / turns["first"] < 4.5


def test_system_prompts_are_shared_by_popularity() -> None:
    popularity = Counter(request.hash_ids[0] for request in first(5000))
    assert len(popularity) == 16
    ranked = [count for _, count in popularity.most_common()]
    # Zipf with exponent 1 over 16: the first has 30 % and the last 2 %.
    assert 0.22 < ranked[0] / 5000 < 0.38
    assert ranked[-1] / 5000 < 0.04


def test_most_blocks_were_seen_before() -> None:
    workload = chat_workload(1000)
    assert 0.15 < workload.num_distinct_blocks / workload.num_blocks < 0.25
