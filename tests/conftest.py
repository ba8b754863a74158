"""The tests run in one process per core, at most four; the one that you started prints what they report."""

import ast
import os
import subprocess
import sys
import tempfile
from queue import Queue
from threading import Thread

CLAIMS = os.environ.get("CLAIMS")  # in those processes: a folder where they note which tests they took
PROCESSES = min(4, os.cpu_count() or 1)


def work(session):
    """Take and run one group after another that no other process has taken: the tests of one file about one folder."""
    reports, groups = os.fdopen(int(os.environ["REPORTS"]), "w"), {}
    for item in session.items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        groups.setdefault((item.path, name or item.nodeid), []).append(item)

    class Reporter:
        @staticmethod
        def pytest_runtest_logreport(report):
            data = session.config.hook.pytest_report_to_serializable(config=session.config, report=report)
            print(repr(data), file=reports, flush=True)

    session.config.pluginmanager.register(Reporter)
    for i, group in enumerate(groups.values()):
        try:
            os.close(os.open(f"{CLAIMS}/{i}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        for item, after in zip(group, [*group[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)


def follow(config, claims, queue):
    """Start one such process, and put its reports into the queue, None at the end."""
    out, into = os.pipe()
    more = {"CLAIMS": claims, "REPORTS": str(into), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES))}
    command, place = [sys.executable, "-m", "pytest", *config.invocation_params.args], config.invocation_params.dir
    process = subprocess.Popen(command, env=os.environ | more, pass_fds=[into], cwd=place, stdout=subprocess.DEVNULL)
    os.close(into)
    with open(out) as reports:
        for line in reports:
            queue.put(ast.literal_eval(line))
    queue.put(process.wait())


def pytest_runtestloop(session):
    options = session.config.option
    if CLAIMS:
        work(session)
        return True
    if len(session.items) < 20 or PROCESSES == 1 or options.collectonly or options.maxfail or options.usepdb:
        return None  # the usual loop, in this process
    queue, running, seen = Queue(), PROCESSES, set()
    with tempfile.TemporaryDirectory() as claims:
        for _ in range(PROCESSES):
            Thread(target=follow, args=(session.config, claims, queue), daemon=True).start()
        while running:
            if isinstance(data := queue.get(), dict):
                report = session.config.hook.pytest_report_from_serializable(config=session.config, data=data)
                session.config.hook.pytest_runtest_logreport(report=report)
                seen.add(report.nodeid)
            else:
                running -= 1
    if missing := [item.nodeid for item in session.items if item.nodeid not in seen]:
        raise session.Failed(f"{len(missing)} tests were not run to their end, the first of them {missing[0]}")
    return True
