"""A minimal W&B server for runs that log rows; it can vanish and come back."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Serves at ``url`` in its context or until :meth:`vanish`; without support for artifacts."""

    def __init__(self) -> None:
        self._lines: dict[int, str] = {}  # lines of the history, by number
        self._start(0)
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The received rows of the history."""
        return [json.loads(self._lines[number]) for number in sorted(self._lines)]

    def vanish(self) -> None:
        """Refuses connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def come_back(self) -> None:
        """Serves again at the same address, without the received rows."""
        self._lines.clear()
        self._start(self._port)

    def _start(self, port: int) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if not outer._thread.is_alive():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = json.dumps(outer._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self._lines |= {history["offset"] + number: line for number, line in enumerate(history["content"])}
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        given = request.get("variables") or {}
        match request.get("operationName"):
            case "UpsertBucket":
                project = {"id": "p", "name": "dynmoe", "entity": {"id": "e", "name": "us"}}
                bucket = {"id": "b", "name": given["name"], "displayName": "run", "project": project}
                return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in given["files"]]
                return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            case "Viewer":
                viewer = {
                    "id": "u",
                    "entity": "us",
                    "username": "us",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
                return {"data": {"viewer": viewer}}
        return {"data": {}}
