"""Which KV may be shared: the root of the prefix cache."""

import hashlib
import struct

from adapters_store.types import Mix


def cache_key(fingerprint: str, mix: Mix, salt: bytes) -> bytes:
    """Root of the prefix-cache hash chain: sha256 over tagged, length-prefixed parts, so that none run together.

    Weights count by their exact value; the composition counts, since it changes the forward pass.
    """
    parts = [(b"model", fingerprint.encode()), (b"composition", mix.composition.encode())]
    for digest, weight in mix.entries:
        parts += [(b"adapter", digest.encode()), (b"weight", struct.pack("<d", weight))]
    parts.append((b"salt", salt))
    key = hashlib.sha256()
    for tag, part in parts:
        for data in (tag, part):
            key.update(len(data).to_bytes(8, "little"))
            key.update(data)
    return key.digest()
