"""Jobs in processes of their own: results, crashes, hangs; and the command end to end."""

import json

import pytest
from click.testing import CliRunner

from effc.benchmarks import command, session, suites
from effc.benchmarks.archive import Results
from effc.benchmarks.work import work_of
from effc.cli import cli
from effc.ir import EffcError

JOB = {"name": "a", "threads": 1}


def worker(tmp_path, monkeypatch, body):
    """A worker module whose events are what `body` tells."""
    (tmp_path / "planted_worker.py").write_text(
        "import json, os, signal, sys, time\n"
        "job, out = json.load(sys.stdin), os.fdopen(int(sys.argv[1]), 'w', buffering=1)\n"
        "def tell(**event):\n    out.write(json.dumps(event) + '\\n')\n" + body
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plain = session.events
    monkeypatch.setattr(
        session, "events", lambda job, patience, _: plain(job, patience, "planted_worker")
    )


def test_events_and_the_entry_come_back(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, "tell(event='cost')\ntell(event='entry', entry=job)")
    told = []
    assert session.run_job(JOB, told.append) == {**JOB, "skip": {}}
    assert told == [{"event": "cost"}]


def test_a_way_that_crashes_is_tried_no_more_and_the_reason_is_kept(tmp_path, monkeypatch):
    body = """
if 'bad' not in job['skip']:
    tell(event='prepare', way='bad')
    print('so it ends', flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
tell(event='entry', entry=job['skip'])
"""
    worker(tmp_path, monkeypatch, body)
    assert session.run_job(JOB, lambda e: None) == {"bad": "ended by SIGSEGV: so it ends"}


def test_a_way_that_hangs_is_given_up(tmp_path, monkeypatch):
    body = """
if 'slow' not in job['skip']:
    tell(event='prepare', way='slow')
    time.sleep(60)
tell(event='entry', entry=job['skip'])
"""
    worker(tmp_path, monkeypatch, body)
    found = session.run_job(JOB, lambda e: None, patience=1.5)
    assert found == {"slow": "not ready after 2 s"}


def test_a_crash_outside_a_way_is_not_hidden(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, "tell(event='cost')\nsys.exit(3)")
    with pytest.raises(session.Ended, match="exit code 3"):
        session.run_job(JOB, lambda e: None)


# ------------------------------------------------------------------ the command


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model"], "no suite 'model'"),
        (["models", "--only", "lama"], "no case 'lama'"),
        (["kernels", "--peers", "efc"], "no peer 'efc'"),
        (["kernels", "--precision", "fp8"], "no precision 'fp8'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, said):
    error = bench(*arguments).exception
    assert isinstance(error, EffcError) and said in str(error)


def test_one_operator_end_to_end_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_limits_of", lambda options, console: {})
    arguments = [
        "kernels",
        "--only",
        "linear-1x1024x4096",
        "--peers",
        "effc",
        "--rounds",
        2,
        "--out",
        tmp_path,
    ]
    done = bench(*arguments, "--precision", "fp32")
    assert done.exit_code == 0, done.output
    (entry,) = Results.load(tmp_path / "kernels.json").entries
    assert {w: found["status"] for w, found in entry["ways"].items()} == {
        "eager": "timed",
        "effc": "timed",
    }
    assert entry["work"]["flops"] >= 2 * 1024 * 4096
    assert len(entry["ways"]["effc"]["samples"]) == 2
    assert entry["ways"]["effc"]["error"] < 1e-5
    before = (tmp_path / "kernels.json").read_text()
    monkeypatch.setattr(command, "run_job", None)  # nothing is left to run
    assert bench(*arguments, "--precision", "fp32", "--resume").exit_code == 0
    assert (
        json.loads((tmp_path / "kernels.json").read_text())["entries"]
        == json.loads(before)["entries"]
    )


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_limits_of", lambda options, console: {})

    def run(job, tell, patience, worker):
        if job["name"] != "gelu":
            raise KeyboardInterrupt
        way = {"status": "timed", "ms": 1.0, "low": 1.0, "high": 1.0, "spread": 0.0}
        return {
            "name": "gelu",
            "precision": job["precision"],
            "threads": 1,
            "group": "memory",
            "work": {},
            "ways": {"eager": way},
        }

    monkeypatch.setattr(command, "run_job", run)
    done = bench("kernels", "--only", "gelu,bias-gelu", "--precision", "fp32", "--out", tmp_path)
    assert done.exit_code == 130
    assert "stopped" in done.output
    assert [e["name"] for e in Results.load(tmp_path / "kernels.json").entries] == ["gelu"]


# ------------------------------------------------------------------ cases


def test_names_of_cases_are_unique():
    for suite in suites.SUITES:
        names = [c.name for c in suites.cases(suite)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["matmul-1024", "depthwise3x3-256", "pointwise-chain"])
def test_work_is_counted_at_the_boundary(name):
    model, args = suites.case("kernels", name).build()
    found = work_of(model, args)
    tensors = [*args, *model.parameters(), model(*args)]
    assert found.bytes == sum(t.nbytes for t in tensors)
    assert found.flops > 0
    assert found.in_precision("bf16").bytes == found.bytes // 2
