from pathlib import Path

import pytest
import torch

INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Daemons share one process of ``make test`` and run one after the other, beside the unit tests in another."""
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.xdist_group("integration"))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """The tests must never ask the hub, and results must not depend on the number of threads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
