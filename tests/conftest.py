"""Fixtures that several test files share, and how the whole suite is run."""
import json
import os
import sys
import tempfile

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


WHOLE_RUNS = "test_run_", "test_ab_page", "test_fronts", "test_studies"  # their files share finished runs


class Notes:
    """What a second process tells the first one: the report of every phase of its tests, a line each."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps([report.nodeid, report.location, told]), file=self.file, flush=True)


def run_items(session, items):
    for item, following in zip(items, [*items[1:], None]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:
            raise session.Interrupted(session.shouldfail or session.shouldstop)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """The whole suite in two processes: one takes the tests of whole runs. Parts of the suite, and a machine
    with one core, have one."""
    config = session.config
    apart = [item for item in session.items if item.path.name.startswith(WHOLE_RUNS)]
    others = [item for item in session.items if not item.path.name.startswith(WHOLE_RUNS)]
    if (min(len(apart), len(others)) < 300 or (os.cpu_count() or 1) < 2 or config.option.collectonly
            or config.option.usepdb or config.option.maxfail or session.testsfailed):
        return None  # the usual loop
    config._tmp_path_factory.getbasetemp()  # one for both
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        child = os.fork()
        if not child:
            captured = config.pluginmanager.getplugin("capturemanager")
            captured.stop_global_capturing()  # its files are those of the first process
            captured.start_global_capturing()
            config.pluginmanager.unregister(name="terminalreporter")
            config.pluginmanager.register(Notes(config, file))
            code = 1
            try:
                run_items(session, apart)
                code = 0
            finally:
                os._exit(code)
        try:
            run_items(session, others)
        except BaseException:
            os.kill(child, 15)
            raise
        finally:
            _, status = os.waitpid(child, 0)
        file.seek(0)
        for line in file:
            nodeid, location, told = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=told)
            if report.when == "setup":
                config.hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
            config.hook.pytest_runtest_logreport(report=report)
    if status:
        pytest.exit(f"the process with the tests of whole runs ended early (status {status})", returncode=1)
    return True


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
