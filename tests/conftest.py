import os

import pytest

# No test asks a hub for anything: what is not on this machine is not there.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, in float32."""
    from laid_eval.models.load import describe, load
    from laid_eval.models.source import resolve

    return load(describe(resolve("smollm2"), device="cpu"))
