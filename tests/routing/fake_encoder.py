"""An encoder that a test steers through files in its folder; encoder processes import it by name."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WIDTH = 8
LOADER = "fake_encoder:FakeEncoder.load"


def identify(folder: Path, change: Path | None = None) -> tuple[str, int]:
    """Id and width, as the files say now."""
    said = (folder / "weights").read_text() + (str(change) if change else "")
    return hashlib.sha256(said.encode()).hexdigest()[:16], WIDTH


def vector(identity: str, text: str) -> np.ndarray:
    """The embedding of `text`: different for every text and encoder."""
    digest = hashlib.sha256(f"{identity}/{text}".encode()).digest()
    numbers = np.frombuffer(digest, dtype=np.uint32).astype(np.float64) - 2**31
    return (numbers / np.linalg.norm(numbers)).astype(np.float32)


class Panic(BaseException):
    """As where a tokenizer in Rust panics."""


class FakeEncoder:
    """Notes in `log` what it loads and embeds, and waits in every pass while there is a file `hold`."""

    max_tokens = 256
    width = WIDTH

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.id = folder, identity

    @classmethod
    def load(cls, folder: Path, change: Path | None = None, *, device: str = "cpu") -> "FakeEncoder":
        encoder = cls(folder, identify(folder, change)[0])
        encoder.note({"load": None if change is None else str(change), "device": device})
        encoder.wait("hold-load")
        if (folder / "fail").exists():
            raise RuntimeError((folder / "fail").read_text())
        return encoder

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.note({"pass": list(texts), "encoder": self.id})
        self.wait("hold")
        if "die" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "bad" in texts:
            raise ValueError("this text is\nbad")
        if "panic" in texts:
            raise Panic("at this text")
        if "nan" in texts:
            return np.full((len(texts), WIDTH), np.nan, dtype=np.float32)
        return np.stack([vector(self.id, text) for text in texts])

    def plain(self) -> "FakeEncoder":
        from routing.encoder_model import plain_id  # with torch, which takes a second of each process that imports it

        return FakeEncoder(self.folder, plain_id(self.id))

    def note(self, line: object) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def wait(self, name: str) -> None:
        while (self.folder / name).exists():
            time.sleep(0.005)
