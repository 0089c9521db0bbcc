"""An encoder in the test's own process."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routing.encoder import EncoderUnavailable
from routing.encoder_model import EncoderModel


class InProcess:
    """Stands for the encoder's process and for the encoder; waits while `gate` is cleared, and notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = EncoderModel.load(folder).plain()
        self.id, self.width = self.model.id, self.model.width
        self.calls: list[tuple[int, bool]] = []
        self.tenants: list[str] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: str | None = None

    def plain_encoder(self) -> "InProcess":
        return self

    async def embed(
        self,
        texts: Sequence[str],
        *,
        tenant: str = "",
        bulk: bool = False,
    ) -> np.ndarray:
        self.calls.append((len(texts), bulk))
        self.tenants.append(tenant)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise EncoderUnavailable(self.failure)
        return self.model.embed(texts)
