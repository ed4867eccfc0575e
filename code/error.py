"""A user's mistake is answered with one line on stderr and exit status 2, never with a traceback."""
import sys


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""


def run(main):
    """Runs `main()` of an entry script and exits with its status."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:  # before training has its own handler, or a second Ctrl-C
        sys.exit(130)


def fail(error):
    print(f"error: {error}", file=sys.stderr)
    return 2
