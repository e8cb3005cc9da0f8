"""The one exception type that users are meant to read."""


class OsjaxError(Exception):
    """A mistake the user can mend.

    The message is a single line: what is wrong, then what to do about it. The command line prints it
    without a traceback and exits with status 2.
    """
