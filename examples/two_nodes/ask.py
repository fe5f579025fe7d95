"""Ask a model that caches on one of the nodes; the README beside it says how."""

from __future__ import annotations

import argparse
import asyncio

from examples.toy_engine import Answer, Prompt, answer

from kvoffload.client import AsyncLRUClient


async def ask(url: str, tokens: int) -> Answer:
    """Answer a prompt of so many tokens, computing only what no node began with before."""
    async with AsyncLRUClient(url) as kv:
        return await answer(Prompt(token_ids=list(range(tokens))), kv)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the node's service: http://host:port or unix:/path")
    parser.add_argument("tokens", type=int, help="length of the prompt")
    arguments = parser.parse_args()
    print(asyncio.run(ask(arguments.url, arguments.tokens)).model_dump_json())
