"""The one exception a user is meant to see."""


class UserError(Exception):
    """What is wrong, where (file, row, key) and what to do, in one line.

    The command line prints it as it is and exits with code 2; anything else that
    escapes is a bug.
    """
