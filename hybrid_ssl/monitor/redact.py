"""Keep credentials out of logs and trackers.

A recipe has no field for a token, but a source may be an address with a password in it, and an error may quote one.
Values are recognised by what they look like, mapping entries also by their key; `cls_token: false` stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[redacted]"

_VALUES = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat)_\w{16,}"),  # GitHub
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),  # AWS access key
    re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"),  # https://user:password@host
    re.compile(r"(?<=[?&;])((?:X-Amz-|X-Goog-)?(?:Signature|Credential|Security-Token|sig|token|key))=[^&\s]+", re.I),
)
_KEYS = re.compile(r"(?:^|[._-])(?:(?:api|access|secret|private)[_-]?key|(?:hf|auth|access|bearer)[_-]?token|password"
                   r"|passwd|secret|credentials?)$|^token$", re.I)  # fmt: skip


def redact(text: str) -> str:
    """`text` with everything that looks like a credential replaced."""
    for pattern in _VALUES:
        text = pattern.sub(rf"\1={HIDDEN}" if pattern.groups else HIDDEN, text)
    return text


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """A nested configuration as `section.key` -> plain value: lists and null become text, credentials are replaced."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (bool, int, float)):
            flat[name] = value
        elif isinstance(value, str) and _KEYS.search(str(key)):
            flat[name] = HIDDEN
        else:
            items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            flat[name] = redact(", ".join("null" if item is None else str(item) for item in items))
    return flat
