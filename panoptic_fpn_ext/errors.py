"""The error that a person can act on."""


class UserError(ValueError):
    """Something the user can put right: a missing file, a wrong key, a faulty record.

    The message is one line that says what is wrong, where, and what to do. Command line tools
    print it without a traceback and exit with status 2.
    """
