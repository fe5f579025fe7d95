"""The model, loaded once, and a watch on what kvoffload does on the event loop."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx
from examples.smollm.demo import load_model
from examples.smollm.gguf import GGUFFile, find_weights
from examples.smollm.model import Model
from examples.smollm.tiny import write_tiny
from examples.smollm.tokenizer import Tokenizer

Loaded = tuple[Tokenizer, Model]


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail where kvoffload blocks the event loop; the example's own start may."""
    with blockbuster_ctx("kvoffload"):
        yield


@pytest.fixture(scope="session")
def smollm() -> Loaded:
    """Return the real tokenizer and model; skip where the weights are not installed."""
    if find_weights() is None:
        message = "the model's weights are not installed; scripts/test installs them"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return load_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Return a model of the same kind that takes no time and talks nonsense."""
    with GGUFFile(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")) as file:
        return Tokenizer(file), Model(file)
