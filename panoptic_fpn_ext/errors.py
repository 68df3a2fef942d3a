"""The error that a person can act on."""


class UserError(ValueError):
    """Something the user can put right: a missing file, a wrong key, a faulty record.

    The message is one line that says what is wrong, where, and what to do. Command line tools
    print it without a traceback and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        """
        Args:
            message: the line; or the traceback of a UserError, of which its line is kept. PyTorch
                raises the errors of its worker processes anew, with their traceback as message.
        """
        if "Traceback (most recent call last)" in message:
            _, _, message = message.strip().splitlines()[-1].partition("UserError: ")
        super().__init__(" ".join(message.splitlines()))
