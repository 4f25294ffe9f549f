from pathlib import Path

import pytest
from hub.stand_in import build_hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A stand-in hub whose rerankers are the base of the miniature."""
    return build_hub(tmp_path_factory.mktemp("hub"))
