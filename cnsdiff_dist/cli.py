"""The ``cnsdiff`` command: parse the command line, run a subcommand, turn an error into one line.

Exit codes: 0 done; 2 the user can fix it, and one line says how; 75 run it again (preempted, a peer
lost, a host that does not answer); 130 interrupted; 1 a bug.
"""

import argparse
import logging
import os
import signal
import sys
import textwrap
import threading
import warnings
from typing import NoReturn

from cnsdiff_dist import logs
from cnsdiff_dist.commands import (
    calibrate,
    compare,
    evaluate,
    export,
    launch,
    plan,
    prepare,
    recommend,
    report,
    status,
    train,
)
from cnsdiff_dist.distributed.orphans import end_with_the_agent
from cnsdiff_dist.errors import UserError, exit_code_of

# In the order of `cnsdiff --help`.
_COMMANDS = (
    prepare,
    plan,
    train,
    status,
    evaluate,
    calibrate,
    export,
    recommend,
    report,
    compare,
    launch,
)

_EPILOG = """\
a whole job:
  cnsdiff prepare data/demo --synthetic
  cnsdiff train configs/demo.yaml run.dir=runs/demo
  cnsdiff evaluate runs/demo --split test_ood
  cnsdiff recommend runs/demo out/recommendations --k 20

several processes: PET_NPROC_PER_NODE=2 launch/torchrun.sh train configs/demo.yaml
"""


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    quiet()
    try:
        return exit_code_of(lambda: _run(words))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(words: list[str] | None) -> None:
    args = _parse(words)
    if "cleans_up" in args and threading.current_thread() is threading.main_thread():
        # A batch system stops a job by SIGTERM: clean up as for Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if logs.chosen() not in logs.FORMATS:
        raise UserError(f"{logs.VARIABLE}={logs.chosen()}: text or json")
    args.run(args)


def entry() -> None:
    """Run the command line and end the process: the console script.

    After an error it ends at once, since a failed rank must not wait for its peers.
    """
    end_with_the_agent()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    if "torch.distributed" in sys.modules:  # else importing it to leave would cost seconds
        from cnsdiff_dist.distributed.world import leave_world

        leave_world()


def _parse(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line; KEY=VALUE may also follow options, which argparse does not allow."""
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    if rest and not ("overrides" in args and all(w[0] != "-" and "=" in w for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors as UserError, so that they are one line as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cnsdiff",
        description="Train recommenders that keep working when the data shifts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.register(subparsers)
    for subparser in subparsers.choices.values():
        # argparse wraps nothing here, since the epilogs are laid out by hand; so wrap the prose.
        subparser.description = textwrap.fill(subparser.description or "", 80)
    return parser


def quiet() -> None:
    """Silence the notices that libraries print for their developers; errors still show."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    for name in ("torchrec", "torch.distributed", "torch.fx", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
