"""The exceptions a user is meant to see."""


class UserError(Exception):
    """What is wrong, where (file, row, key) and what to do, in one line.

    The command line prints it as it is and exits with its code; anything else that
    escapes is a bug.
    """

    exit_code = 2


class TryAgain(UserError):
    """Nothing is wrong with the job: it was preempted, a peer was lost, a host does not answer.

    The same command, run again, goes on. The code is EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75
