"""The one exception type that users are meant to read, and how JAX says that memory is full."""


class OsjaxError(Exception):
    """A mistake the user can mend.

    The message is a single line: what is wrong, then what to do about it. The command line prints it
    without a traceback and exits with status 2.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX's runtime is a device's or a host's memory that is full."""
    return "RESOURCE_EXHAUSTED" in str(error)
