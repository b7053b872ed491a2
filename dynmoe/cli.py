"""How the command-line tools report errors."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from dynmoe.errors import UserError
from dynmoe.launched import failure_to_repeat, record_failure

EXIT_USER_ERROR = 2
_TIME_TO_SPEAK_S = 3.0


def run_tool(main: Callable[[], None]) -> None:
    """Runs ``main``; a :class:`UserError` becomes one line on stderr and exit status 2.

    Launchers stop every rank as soon as one exits. So the first rank of each host reports the error at once, and the
    other ranks report it only if they are not stopped meanwhile, because then only they have failed. Each failure is
    also recorded for the launcher, which prints the first one last.
    """
    try:
        if (failure := failure_to_repeat()) is not None:
            raise UserError(failure)
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # main may have replaced it; SIGTERM must end the wait
            time.sleep(_TIME_TO_SPEAK_S)
        record_failure(str(error), by_user=True)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    except Exception:
        record_failure(traceback.format_exc().rstrip(), by_user=False)
        raise
