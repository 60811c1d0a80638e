"""Fixtures that several test files share."""
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Networks of this size are many times slower on several threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
