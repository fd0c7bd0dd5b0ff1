"""TOML files that people write, and one sentence for whatever keeps us from reading them.

What does not live here: what a file may say (`manifest`, and scenarios in `p2pllm_peers.lab`); settings, which
pydantic reads itself.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from p2pllm.errors import UsageError


def read_toml(path: Path, kind: type[UsageError], *, missing: str, no_text: str) -> dict[str, Any]:
    """What a TOML file says. Raises `kind`.

    missing: what to do if there is no such file, as a clause. no_text: what is wrong if it is not UTF-8, a predicate.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise kind(f"There is no file {path}; {missing}.") from None
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise kind(f"{path} {no_text}.") from None
    except tomllib.TOMLDecodeError as error:
        raise kind(f"{path} is not valid TOML: {error}.") from None
