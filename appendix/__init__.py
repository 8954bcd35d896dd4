"""What the chapters stand on or are measured by, one concept per file. See README.md here.

Scripts import this package before torch, so that Ctrl-C ends them in one line from the beginning.
"""
import sys


def on_uncaught(kind, error, traceback):
    """Print one line for a Ctrl-C that nobody caught, and a traceback for every other error."""
    cause = error                       # an import that Ctrl-C broke may raise an error of its own
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print("\nerror: interrupted", file=sys.stderr)


sys.excepthook = on_uncaught
