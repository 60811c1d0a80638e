"""Fixtures that several test files share."""
import sys

import pytest
import torch

from common import evaluate
from tests import run_helpers
from tests.run_helpers import SMALL, Finished


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


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
    monkeypatch.setattr(evaluate, "draw", lambda *args, **named: None)


@pytest.fixture
def no_evaluation(monkeypatch, no_pictures):
    """Training alone."""
    scripts = [sys.modules[name] for name in map("{}_motion".format, SMALL) if name in sys.modules]
    for module in (evaluate, *scripts):
        if hasattr(module, "final_tables"):
            monkeypatch.setattr(module, "final_tables", lambda *args, **named: {})


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """name of run_helpers.SMALL -> its Finished run, made once. Scripts with the same data share a cache."""
    made, caches = {}, {}

    def of(name):
        if name not in made:
            data = SMALL[name].flags.partition("--iterations")[0]
            cache = caches.setdefault(data, tmp_path_factory.mktemp("cache"))
            made[name] = Finished(name, tmp_path_factory.mktemp(f"finished_{name}"), cache)
        return made[name]
    yield of
    run_helpers.stop_server()
