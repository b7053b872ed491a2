"""One way for every tool of the project to fail."""

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

    Under a launcher the first rank of each host speaks first. Launchers end every rank as soon as one exits: the others
    wait for that, and speak only where it does not come, as the error is then theirs alone. What ended a rank is left
    for its launcher, which shows the first of them last.
    """
    try:
        if (failure := failure_to_repeat()) is not None:
            raise UserError(failure)
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(
                signal.SIGTERM, signal.SIG_DFL
            )  # whatever main has made of it: the launcher's word ends the wait
            time.sleep(_TIME_TO_SPEAK_S)
        record_failure(str(error), by_user=True)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    except Exception:
        record_failure(traceback.format_exc().rstrip(), by_user=False)
        raise
