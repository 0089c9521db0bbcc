"""API keys that are stored: how they look, what is kept of them, and whether a given one is right."""

import asyncio
import base64
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable

from adapters_store.registry import KeyRow
from server.errors import Unavailable

PATTERN = re.compile(r"lm-([a-z0-9]{12})-[A-Za-z0-9_-]{43}")
MAX_REFUSED = 10_000
"""Wrong keys that are remembered."""
MAX_CHECKS = 256
"""Keys that wait for their first check: with two at a time the last one waits about two seconds."""
CONCURRENT_CHECKS = 2

HashSecret = Callable[[bytes, bytes], bytes]


def scrypt(key: bytes, salt: bytes) -> bytes:
    """What is stored of a key: 32 bytes by RFC 7914.

    A fourth of the parameters usual for passwords, 4 MiB and about 15 ms: a key has 256 random bits, which no guessing
    finds however cheap a guess is, while every key is checked once after each start.
    """
    return hashlib.scrypt(key, salt=salt, n=2**12, r=8, p=1, dklen=32)


def make_key(
    tenant: str, label: str, token_bytes: Callable[[int], bytes], hash_key: HashSecret = scrypt
) -> tuple[KeyRow, str]:
    """A new key, `lm-<id>-<secret>`, and what to store of it. `token_bytes(n)` gives n bytes that nobody can guess."""
    key_id = base64.b32encode(token_bytes(8)).decode().lower()[:12]
    secret = base64.urlsafe_b64encode(token_bytes(32)).decode().rstrip("=")
    key, salt = f"lm-{key_id}-{secret}", token_bytes(16)
    return KeyRow(key_id, tenant, label, salt, hash_key(key.encode(), salt)), key


def looks_stored(key: str) -> bool:
    """Whether this has the form of a stored key."""
    return PATTERN.fullmatch(key) is not None


class KeyRing:
    """The stored keys that are not revoked.

    The first use of a key is checked in a thread, as long as scrypt takes; from then on its sha256 is known, and both
    the key and what differs from it are told apart in microseconds.
    """

    def __init__(self, hash_key: HashSecret = scrypt) -> None:
        self._hash_key = hash_key
        self._rows: dict[str, KeyRow] = {}
        self._verified: dict[str, bytes] = {}  # sha256 of the right key by its id
        self._refused: OrderedDict[bytes, None] = OrderedDict()  # sha256 of wrong keys, the latest last
        self._checks: dict[bytes, asyncio.Task[bool]] = {}
        self._turn = asyncio.Semaphore(CONCURRENT_CHECKS)

    def replace(self, rows: Iterable[KeyRow]) -> None:
        """These keys are valid from now on, and no others."""
        old, self._rows = self._rows, {row.id: row for row in rows}
        self._verified = {
            key_id: digest
            for key_id, digest in self._verified.items()
            if key_id in self._rows and self._rows[key_id] == old[key_id]
        }

    def put(self, row: KeyRow) -> None:
        """Another valid key."""
        self._rows[row.id] = row
        self._verified.pop(row.id, None)

    def drop(self, key_id: str) -> None:
        """This key is not valid any more."""
        self._rows.pop(key_id, None)
        self._verified.pop(key_id, None)

    def drop_tenant(self, tenant: str) -> None:
        """Nor are those of this tenant."""
        for row in [row for row in self._rows.values() if row.tenant == tenant]:
            self.drop(row.id)

    async def owner(self, key: str) -> str | None:
        """The tenant whose key this is; None if it is nobody's.

        Raises Unavailable when too many keys wait for their first check.
        """
        match = PATTERN.fullmatch(key)
        row = self._rows.get(match[1]) if match is not None else None
        if row is None:
            return None
        digest = hashlib.sha256(key.encode()).digest()
        if row.id in self._verified:
            is_right = hmac.compare_digest(self._verified[row.id], digest)
        else:
            is_right = await self._first_check(row, key, digest)
        # Looked up again: it may have been revoked during the check.
        return row.tenant if is_right and row.id in self._rows else None

    async def _first_check(self, row: KeyRow, key: str, digest: bytes) -> bool:
        """Requests that come with the same key at once share one check."""
        if digest in self._refused:
            return False
        if digest not in self._checks:
            if len(self._checks) >= MAX_CHECKS:
                raise Unavailable("too many keys are being checked; please retry", code="busy")
            check = asyncio.create_task(self._check(row, key, digest))
            check.add_done_callback(lambda _: self._checks.pop(digest))
            self._checks[digest] = check
        return await asyncio.shield(self._checks[digest])

    async def _check(self, row: KeyRow, key: str, digest: bytes) -> bool:
        async with self._turn:
            if row.id in self._verified:  # by another one of its keys' turns: all but that key are wrong
                return hmac.compare_digest(self._verified[row.id], digest)
            computed = await asyncio.to_thread(self._hash_key, key.encode(), row.salt)
        if hmac.compare_digest(computed, row.hash):
            if self._rows.get(row.id) == row:
                self._verified[row.id] = digest
            return True
        self._refused[digest] = None
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return False
