"""Errors that users can fix; the command line prints them as one line and exits with code 2."""


class UsageError(Exception):
    """Raised for invalid input; the message names the problem, where it is, and what to do."""
