"""Fixtures that several test files share."""
import pytest
import torch

from common import reports


@pytest.fixture(scope="module")
def one_thread():
    """Networks of this size are many times slower on several threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder without data/: real data in the repository play no part. Threads are put back."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is most of a small run."""
    monkeypatch.setattr(reports, "draw", lambda *args, **named: None)
