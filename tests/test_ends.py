"""Nothing that a backend does ends a run: what would is that backend's error, the others are judged, and no run that is
cut short or has compared nothing exits with 0. Real processes, real ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from judging import judged
from typer.testing import CliRunner, Result

from lyra.cli import application
from lyra.conformance.session import PROFILES, Profile
from lyra.conformance.supervisor import MOST_CASES

EXAMPLES = Path(__file__).parents[1] / "examples"
ABSENT = "order::absent_stages_leave_no_trace"
EQUAL = "order::layer_equals_oracle"
TWO = "absent_stages or layer_equals_oracle"


def throw(error: type[BaseException]) -> None:
    raise error


def recurse() -> None:
    recurse()


BACKENDS = """
import ctypes, os, signal, sys, time
from zlib import crc32
from numpy_backend import NumpyBackend

class Exit(NumpyBackend):
    "Ends its process in one of the cases of layer_equals_oracle."
    name = "exit"

    def attention(self, spec, weights):
        if crc32(weights["q_proj.weight"].tobytes()) % 5 == 3:
            self.end()
        return super().attention(spec, weights)

    def end(self):
        os._exit(0)

class Abort(Exit):
    name = "abort"

    def end(self):
        os.abort()

class Fault(Exit):
    name = "fault"

    def end(self):
        ctypes.string_at(0)

class Loop(Exit):
    name = "loop"

    def end(self):
        while True:
            time.sleep(0.01)

class Group(Exit):
    name = "group"

    def end(self):
        os.killpg(0, signal.SIGKILL)

class Forks(Exit):
    "Goes on in a copy of its process, which ends."
    name = "forks"

    def end(self):
        if os.fork():
            os._exit(0)

class Always(NumpyBackend):
    name = "always"

    def attention(self, spec, weights):
        os._exit(7)

class Loading(NumpyBackend):
    name = "never seen"

    def __init__(self):
        os._exit(0)

class Hangs(NumpyBackend):
    name = "never there"

    def __init__(self):
        time.sleep(1000)

class Quits(NumpyBackend):
    def __init__(self):
        sys.exit(0)

class Leaves(NumpyBackend):
    "Ends its process with 3 when everything is done."
    name = "leaves"

    def __init__(self):
        import atexit
        atexit.register(os._exit, 3)

class Waits(NumpyBackend):
    name = "waits"

    def attention(self, spec, weights):
        open("asked", "w").close()
        import time
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _found(empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder with these backends, which processes of a run find where this one does."""
    Path("ends.py").write_text(BACKENDS)
    monkeypatch.setitem(PROFILES, "smoke", Profile("smoke", examples=4, sizes=2))
    for folder in (EXAMPLES, Path.cwd()):
        monkeypatch.syspath_prepend(folder)


def conform(*arguments: str) -> Result:
    """A run whose report is in report.json. Its backends are in processes of their own."""
    options = ["conform", *arguments, "--json", "report.json"]
    return CliRunner().invoke(application(), options, env={"COLUMNS": "200", "NO_COLOR": "1"})


def report() -> Any:
    return json.loads(Path("report.json").read_text())


def tallies(prop: str) -> Any:
    return next(found["backends"] for found in report()["properties"] if found["name"] == prop)


def status(name: str) -> dict[str, str]:
    return {prop["name"]: prop["backends"][name]["status"] for prop in report()["properties"]}


ENDED = {
    "abort": "the process was killed by SIGABRT while the backend was asked",
    "exit": "the process ended by itself (exit status 0) while the backend was asked",
    "fault": "the process was killed by SIGSEGV while the backend was asked",
    "forks": "the process ended by itself (exit status 0) while the backend was asked",
    "group": "the process was killed by SIGKILL (as the system does where memory runs out) while the backend was asked",
    "loop": "the process was ended after 3 s (--case-limit) while the backend was asked",
}


def test_a_process_that_ends_within_a_case_costs_that_case_and_nothing_else() -> None:
    mine = [f"--backend=ends:{name.capitalize()}" for name in ENDED]
    options = ("--junit", "junit.xml", "--report", "report.html", "--case-limit", "3")
    done = conform("--only", TWO, *mine, "--backend=numpy_backend:NumpyBackend", *options)
    assert done.exit_code == 1, done.output
    cases = {name: tally["cases"] for name, tally in tallies(EQUAL).items()}
    for name in ENDED:
        assert status(name) == {ABSENT: "passed", EQUAL: "errored"}
        assert f"{name}: does not conform. 1 passed, 0 failed, 1 errored" in done.stdout
        assert cases[name] == cases["numpy"] - 1 > 0
    assert set(status("numpy").values()) == {"passed"}
    found = {failure["backend"]: failure for failure in report()["failures"]}
    assert {name: failure["message"] for name, failure in found.items()} == ENDED
    assert len({json.dumps(failure["case"]) for failure in found.values()}) == 1
    assert report()["finished"] == report()["planned"] == 2
    assert report()["complete"]
    assert (report()["isolated"], report()["case_limit"]) == (True, 3.0)
    assert "at most 3 s a case" in done.stdout
    assert "at most 3 s; where a case ends its process, another process goes on" in Path("report.html").read_text()
    junit = Path("junit.xml").read_text()
    assert (junit.count("<testcase "), junit.count("<error "), junit.count("<failure ")) == (2, len(ENDED), 0)
    again = conform("--backend", "ends:Abort", "--replay", found["abort"]["replay"])
    assert again.exit_code == 1
    assert [failure["message"] for failure in report()["failures"]] == [ENDED["abort"]]


def test_without_isolation_the_run_ends_and_its_message_names_the_option() -> None:
    done = conform("--only", TWO, "--backend=ends:Loop", "--no-isolate", "--case-limit", "2")
    assert done.exit_code == 1
    (failure,) = report()["failures"]
    assert failure["message"].startswith("the process was ended after 2 s (--case-limit) while the backend was asked")
    assert "with --isolate another process would go on" in failure["message"]
    assert not report()["complete"]
    assert report()["isolated"] is False
    assert "Cut short: 1 of 2 properties ran" in done.stdout


def test_a_backend_that_ends_every_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 3
    monkeypatch.setattr("lyra.conformance.supervisor.MOST_ENDS", most)
    done = conform("--only", "order", "--backend", "ends:Always")
    assert done.exit_code == 1
    found = [verdict for verdict in status("always").values() if verdict != "unsupported"]
    assert len(found) > 4
    assert set(found) == {"errored"}
    messages = [failure["message"] for failure in report()["failures"]]
    first = [message for message in messages if "(exit status 7) while the backend was asked" in message]
    assert len(first) == -(-most // MOST_CASES)
    given_up = [message for message in messages if f"given up: it has cost {most} processes in a row" in message]
    assert len(given_up) == len(found) - len(first)
    assert done.stdout.count("given up") == 1
    assert f"the same in {len(given_up) - 1} more: order::" in done.stdout


def test_a_backend_that_ends_the_process_while_it_is_loaded_has_erred_in_everything() -> None:
    mine = [f"--backend=ends:{name}" for name in ("Loading", "Quits", "Hangs")]
    done = conform("--only", TWO, *mine, "--case-limit", "2")
    assert done.exit_code == 1, done.output
    for backend, words in (
        ("ends:Loading", "the process ended by itself (exit status 0) while the backend was loaded"),
        ("ends:Quits", "cannot be made: SystemExit: 0 (ends.py, line "),
        ("ends:Hangs", "the process was ended after 2 s (--case-limit) while the backend was loaded"),
    ):
        assert set(status(backend).values()) == {"errored"}
        assert all(words in one["message"] for one in report()["failures"] if one["backend"] == backend)
    assert report()["planned"] == len(report()["properties"]) == 2


def test_a_process_that_ends_badly_once_all_is_said_has_done_its_work() -> None:
    done = conform("--only", TWO, "--backend", "ends:Leaves")
    assert done.exit_code == 0, done.output
    assert "leaves: conforms. 2 passed" in done.stdout


def test_fail_fast_ends_with_the_first_process_that_does() -> None:
    done = conform("--fail-fast", "--only", "order", "--backend", "ends:Always")
    assert done.exit_code == 1
    assert len(report()["failures"]) == 1
    assert report()["finished"] == 1 < report()["planned"]


def test_ctrl_c_cuts_a_run_short_and_its_report_is_written() -> None:
    arguments = ["conform", "--only", "order", "--backend", "ends:Waits", "--json", "report.json"]
    code = f"import sys; sys.path[:0] = {sys.path[:2]}; from lyra.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while not Path("asked").exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        shown = running.communicate(timeout=60)[0]
    assert running.returncode == 1
    assert "Cut short: 0 of" in shown
    assert not report()["ok"]
    assert not report()["complete"]
    assert not report()["failures"]


def test_a_worker_of_pytest_that_ends_leaves_no_pass() -> None:
    """What the page on CI says of pytest, whose own process nothing survives."""
    pytest.importorskip("xdist")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "lyra.conformance"]
    arguments += ["--lyra-backend", "ends:Exit", "--lyra-only", TWO, "-n", "1", "--lyra-json", "report.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, env=environment)
    assert done.returncode == 1, done.stdout
    assert b"crashed while running" in done.stdout
    assert b"`lyra conform` (--isolate) names the backend and the case" in done.stdout
    assert not report()["ok"]
    assert not report()["complete"]
    assert report()["finished"] < report()["planned"]


ENDINGS: dict[str, Callable[[], Any]] = {
    "SystemExit": lambda: sys.exit(0),
    "KeyboardInterrupt": lambda: throw(KeyboardInterrupt),
    "GeneratorExit": lambda: throw(GeneratorExit),
    "Skipped": lambda: pytest.skip("not today"),
    "Exit": lambda: pytest.exit("enough", returncode=0),
    "Failed": lambda: pytest.fail("no"),
    "UnsatisfiedAssumption": hypothesis.reject,
    "RecursionError": recurse,
    "MemoryError": lambda: throw(MemoryError),
}


def test_what_would_end_more_than_a_call_is_that_backends_error() -> None:
    """In this process too, as `lyra faults` and pytest run it, whether a layer raises it or one of its methods."""
    from numpy_backend import NumpyAttention, NumpyBackend

    class Early(NumpyBackend):
        def __init__(self, ending: str) -> None:
            self.name, self.end = f"early {ending}", ENDINGS[ending]

        def attention(self, spec: Any, weights: Any) -> Any:
            self.end()

    class Layer(NumpyAttention):
        def reorder(self, cache: Any, rows: Any) -> Any:
            self.end()  # type: ignore[attr-defined]

    class Late(NumpyBackend):
        def __init__(self, ending: str) -> None:
            self.name, self.end = f"late {ending}", ENDINGS[ending]

        def attention(self, spec: Any, weights: Any) -> Any:
            layer = super().attention(spec, weights)
            changed = Layer(layer.spec, layer.weights)
            object.__setattr__(changed, "end", self.end)
            return changed

    backends = [kind(ending) for ending in ENDINGS for kind in (Early, Late)]
    outcome = judged(*backends, NumpyBackend(), only="absent_stages or reordering_the_cache", shrink=False)
    record = outcome.record
    assert record.complete
    assert not record.ok
    found = {name: prop.tallies for name, prop in record.properties.items()}
    for tallies in found.values():
        assert tallies["numpy"].status == "passed"
        assert {tallies[f"early {ending}"].status for ending in ENDINGS} == {"errored"}
    assert {found["batch::reordering_the_cache"][f"late {ending}"].status for ending in ENDINGS} == {"errored"}
    assert all(backend.partition(" ")[2] in failure.message for (_, backend), failure in record.failures.items())
