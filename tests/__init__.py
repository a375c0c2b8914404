"""The tests. This file gives them precedence over packages that install a `tests` of their own."""
