import pytest
import torch


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """The tests must never ask the hub, and results must not depend on the number of threads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
