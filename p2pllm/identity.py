"""Identity: the Ed25519 key of one peer, what it signs, and how others check it.

The key file is libp2p's own format, so p2pd reads the same file. A peer id of an Ed25519 key holds the public
key itself: whoever knows the id can check a signature without asking anybody. What does not live here: what
is signed (manifests and member records build their own bytes) and anything that imports hivemind.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pllm.errors import StateError

"""Length of every signature."""

PUBLIC_KEY_BYTES = 32
"""Length of a raw public key."""

_PRIVATE_HEADER = b"\x08\x01\x12\x40"
"""libp2p's PrivateKey message: type 1 (Ed25519), then a field of 64 bytes: the seed and the public key."""

_PEER_HEADER = b"\x00\x24\x08\x01\x12\x20"
"""Identity multihash of 36 bytes: libp2p's PublicKey message of type 1 with a field of 32 bytes."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}
_LONGEST_PEER_ID = 64


class Identity:
    """The private key of one peer."""

    def __init__(self, key: Ed25519PrivateKey, path: Path | None = None) -> None:
        self._key = key
        self.path = path
        self.public_key = key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A new key that is in no file."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key in the file `path`; without one, a new key is made and written (mode 0600, folder 0700).

        Raises StateError: the file is damaged, others may read it, or it cannot be read or written.
        """
        path = path.absolute()
        try:
            if not path.exists():
                _create(path, Ed25519PrivateKey.generate())
            return cls(_read(path), path)
        except OSError as error:
            raise StateError(
                f"The key file {path} cannot be used: {error.strerror or error}; mend that or choose --home."
            ) from None

    def sign(self, domain: str, data: bytes) -> bytes:
        """Sign `data` for one purpose; a signature made for another `domain` does not verify. Returns 64
        bytes.
        """
        return self._key.sign(_message(domain, data))


def verify(peer_id: str, domain: str, data: bytes, signature: bytes) -> bool:
    """Whether the peer signed `data` for `domain`. False, never an exception, for malformed ids and
    signatures.
    """
    try:
        key = public_key_of(peer_id)
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _message(domain, data))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id, base58, of a raw Ed25519 public key of 32 bytes. Raises ValueError for other
    lengths.
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"a public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    # the multihash starts with exactly one zero byte, which base58 writes as one "1"
    number = int.from_bytes(_PEER_HEADER + public_key, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    return "1" + "".join(reversed(digits))


def public_key_of(peer_id: str) -> bytes:
    """The raw public key, 32 bytes, inside an Ed25519 peer id. Raises ValueError for anything else."""
    if not isinstance(peer_id, str) or not peer_id.startswith("12D3Koo") or len(peer_id) > _LONGEST_PEER_ID:
        raise ValueError("not the id of an Ed25519 peer")
    return _decoded(peer_id)


@functools.lru_cache(maxsize=16384)  # the same few hundred ids are checked thousands of times a second
def _decoded(peer_id: str) -> bytes:
    number = 0
    for character in peer_id[1:]:
        digit = _DIGITS.get(character)
        if digit is None:
            raise ValueError("a peer id has a character that base58 does not have")
        number = number * 58 + digit
    length = len(_PEER_HEADER) + PUBLIC_KEY_BYTES
    if number >= 1 << (8 * length):
        raise ValueError("a peer id is too long")
    raw = number.to_bytes(length, "big")
    if not raw.startswith(_PEER_HEADER):
        raise ValueError("not the id of an Ed25519 peer")
    return raw[len(_PEER_HEADER) :]


def is_peer_id(peer_id: object) -> bool:
    """Whether this is the well-formed id of an Ed25519 peer."""
    try:
        public_key_of(peer_id)  # type: ignore[arg-type]  # checks the type itself
    except ValueError:
        return False
    return True


def _message(domain: str, data: bytes) -> bytes:
    """What is really signed. A domain has no zero byte, so no two (domain, data) pairs make the same message."""
    if "\0" in domain:
        raise ValueError("a domain has no zero byte")
    return b"p2pllm/" + domain.encode() + b"\0" + blake3(data).digest()


def _create(path: Path, key: Ed25519PrivateKey) -> None:
    """Write the key so that a crash leaves no half file and a second creator at the same time wins or yields."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_PRIVATE_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
        # a link fails where the name is taken, which a rename would overwrite; who loses reads the winner's key
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> Ed25519PrivateKey:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        data = file.read(len(_PRIVATE_HEADER) + 65)
    if stat.S_IMODE(mode) & 0o077:
        raise StateError(f"The key file {path} may be read by others; run `chmod 600 {path}`.")
    seed, public = data[4:36], data[36:]
    if len(data) != 68 or not data.startswith(_PRIVATE_HEADER):
        raise _damaged(path)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    if key.public_key().public_bytes_raw() != public:
        raise _damaged(path)
    return key


def _damaged(path: Path) -> StateError:
    return StateError(f"The key file {path} is damaged; restore it from a copy, or delete it to get a new identity.")
