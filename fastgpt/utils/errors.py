"""What a person can mend: the command line prints it as one line and exits with 2."""


class UsageError(Exception):
    """Wrong input: the message says what was wrong, where, and what to do about it."""
