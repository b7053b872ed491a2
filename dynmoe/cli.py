"""What the command-line tools share: their help, and how they end."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

from dynmoe.errors import UserError
from dynmoe.launched import failure_to_repeat, record_failure

EXIT_USER_ERROR = 2
_TIME_TO_SPEAK_S = 3.0


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of each option to its help, apart from None, which the help explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def run_tool(main: Callable[[], None]) -> None:
    """Runs ``main``; a :class:`UserError` becomes one line on stderr and exit status 2.

    Launchers stop every rank as soon as one exits. So the first rank of each host reports the error at once, and the
    other ranks report it only if they are not stopped meanwhile, because then only they have failed. Each failure is
    also recorded for the launcher, which prints the first one last.

    If the reader of standard output ends first, as in ``... | head``, the tool ends without a message, with the status
    that a shell gives to programs that SIGPIPE ends.
    """
    try:
        if (failure := failure_to_repeat()) is not None:
            raise UserError(failure)
        main()
        sys.stdout.flush()  # here rather than while Python shuts down, where an error cannot be handled
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # main may have replaced it; SIGTERM must end the wait
            time.sleep(_TIME_TO_SPEAK_S)
        record_failure(str(error), by_user=True)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    except Exception as error:
        record_failure(traceback.format_exc().rstrip(), by_user=False)
        if isinstance(error, BrokenPipeError) and _output_has_no_reader():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it ends
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise


def _output_has_no_reader() -> bool:
    """Whether standard output is a pipe that nobody reads; other pipes and sockets break too."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported in any case
    return any(event & select.POLLERR for _, event in poll.poll(0))
