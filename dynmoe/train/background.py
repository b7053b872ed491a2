"""A job beside the training steps."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

Job = Callable[[], Any]


class BackgroundJob:
    """A job on a thread of low priority, so that it does not slow down the training step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.result: Any = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: priority of this thread only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self.result = self._job()
        except Exception as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
