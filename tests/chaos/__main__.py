"""Breaks trainings on purpose and checks that nothing is lost: ``python -m tests.chaos --help``."""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.chaos.invariants import check, retrained
from tests.chaos.job import Job, Stuck
from tests.chaos.lab import Lab
from tests.chaos.scenarios import ALL, Scenario

_EPILOG = """\
faults:
{faults}

examples:
  python -m tests.chaos --faults kill-rank --kills 50 --out report.json
  python -m tests.chaos --faults sigterm damage --seed 3 --keep
  python -m tests.chaos                      # all of them; nodes and disk-full need root

Every run is compared with one that was left alone: the rows of every step and stream, where each
process began, the lines of metrics.jsonl, every tensor of the last checkpoint.
"""


def main(words: list[str] | None = None) -> int:
    args = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = Path(args.work or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder, random.Random(args.seed), args.kills, args.exports)
    results = []
    try:
        for name in args.faults:
            results.append(_run(ALL[name](), lab))
            report = {"seed": args.seed, "kills": args.kills, "scenarios": results}
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    finally:
        if args.keep or not all(result["ok"] for result in results):
            print(f"logs and traces are in {folder}", flush=True)
        elif not args.work:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(result["ok"] for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    faults = "\n".join(f"  {name:20} {kind.__doc__}" for name, kind in ALL.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Break trainings on purpose, and check that what they learn is the same.",
        epilog=_EPILOG.format(faults=faults),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--faults", nargs="+", choices=list(ALL), default=list(ALL), metavar="FAULT")
    add("--kills", type=int, default=50, help="random kills of ranks; at most so many other faults")
    add("--seed", type=int, default=0)
    add("--out", help="the report as JSON")
    add("--work", help="folder to work in; a temporary one by default")
    add("--keep", action="store_true", help="keep that folder even if all is well")
    add("--exports", action="store_true", help="compare what `cnsdiff export` writes as well")
    return parser


def _run(scenario: Scenario, lab: Lab) -> dict[str, Any]:
    calm = lab.calm(scenario.epochs_of(lab))
    started = time.monotonic()
    with ExitStack() as stack:
        job = scenario.job(lab, stack)
        stack.callback(job.stop)
        job.environment["CHAOS_STEP_SECONDS"] = str(scenario.step_seconds)
        try:
            job.start()
            job.until_first_step()
            scenario.disturb(lab, job, calm)
            job.finish()
            job.watcher.look_once()
            if job.disturbances < scenario.count(lab):
                job.problems.append("the training ended before all faults: it needs more epochs")
            job.problems += check(job, calm, scenario.exact)
        except Exception as error:  # a broken scenario must not end the others
            job.problems.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, Stuck):
                traceback.print_exc()
        result = _result(scenario, job, time.monotonic() - started)
        result["retrained_steps"] = _spread(retrained(job, calm))
    _print(result)
    return result


def _result(scenario: Scenario, job: Job, seconds: float) -> dict[str, Any]:
    return {
        "fault": scenario.name,
        "ok": not job.problems,
        "problems": job.problems,
        "notes": job.notes,
        "disturbances": job.disturbances,
        "processes": len(job.watcher.attempts()),
        "launches": job.launches,
        "exit_codes": job.exit_codes,
        "recovery_seconds": _spread(job.recoveries),
        "seconds": round(seconds, 1),
    }


def _spread(values: list[Any]) -> dict[str, Any]:
    if not values:
        return {"count": 0}
    median, most = statistics.median(values), max(values)
    return {"count": len(values), "median": round(median, 2), "max": round(most, 2)}


def _print(result: dict[str, Any]) -> None:
    recovery = result["recovery_seconds"]
    print(
        f"{result['fault']:20} {'ok' if result['ok'] else 'FAILED':7}"
        f"{result['disturbances']:4} faults {result['processes']:4} processes  "
        f"recovery median {recovery.get('median', '-')} s, max {recovery.get('max', '-')} s"
        f"  ({result['seconds']:.0f} s)"
    )
    for line in result["notes"]:
        print(f"    {line}")
    for line in result["problems"]:
        print(f"    PROBLEM: {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
