"""A running `loramux serve`, and what transformers + peft would answer in its place."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from byte_tokenizer import byte_level_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

MESSAGES = [{"role": "user", "content": "Hello world, how is the quick brown fox?"}]
OPTIONS = ["--kv-memory", "64MiB", "--page-memory", "8MiB", "--num-threads", "1", "--device", "cpu", "--port", "0"]
OPTIONS += ["--encoder", "none", "--shutdown-timeout", "100"]  # however slow the machine is on which streams are to end


class Served:
    """A server process with its own data folder. `key` goes with every request of `client`."""

    def __init__(self, model: Path, data_dir: Path, *options: str, key: str = "none") -> None:
        command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model), "--data-dir", str(data_dir)]
        self.process = subprocess.Popen([*command, *OPTIONS, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+/v1", line)
        assert found, line
        self.base_url = found[0]
        self.url = self.base_url.removesuffix("/v1")
        self.key = key

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def engine_pid(self) -> int:
        return self.engine_pids[0]

    @property
    def engine_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = []
        for pid in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end while one looks
                if b"engine.loop" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    def kill_engine(self) -> None:
        """Returns when another one serves."""
        killed = self.engine_pid
        os.kill(killed, signal.SIGKILL)
        # The new one is started after the death was noticed, so that `/ready` speaks of it.
        self.until(lambda: any(pid != killed for pid in self.engine_pids))
        self.until(lambda: self.get("/ready").status_code == 200)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=120)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=120)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line))

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail("waited in vain")
            time.sleep(0.05)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End the process and return its exit code."""
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        """The exit code of a process that was told to end. Told twice, it can die of the second signal."""
        code = self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def reference_text(
    model: Path,
    adapters: dict[str, Path],
    weights: dict[str, float],
    count: int,
    messages: Sequence[dict[str, Any]] = MESSAGES,
) -> str:
    """Greedy answer by transformers + peft; a mixture as peft's concatenation."""
    tokenizer = byte_level_tokenizer()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if weights:
        first, *others = weights
        loaded = PeftModel.from_pretrained(loaded, str(adapters[first]), adapter_name=first)
        for name in others:
            loaded.load_adapter(str(adapters[name]), adapter_name=name)
        if others:
            loaded.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
        loaded.set_adapter("mix" if others else first)
        loaded.eval()
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer: list[int] = []
    fed, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(count):
            step = loaded(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            answer.append(int(step.logits[0, -1].argmax()))
            fed = torch.tensor([answer[-1:]])
    return tokenizer.decode(answer, skip_special_tokens=True)
