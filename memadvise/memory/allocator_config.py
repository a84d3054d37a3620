"""The settings of torch's CUDA caching allocator, read from the text that ``PYTORCH_CUDA_ALLOC_CONF`` would hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from memadvise.errors import UsageError

MIB = 2**20
_MIN_BLOCK = 512  # kMinBlockSize of c10/core/AllocatorConfig.h
_INTERVALS = 16  # powers of two from 1 MiB to 64 GiB, each with its own number of divisions
_MEGABYTES = {
    "max_split_size_mb": "max_split_bytes",
    "max_non_split_rounding_mb": "max_non_split_rounding_bytes",
    "large_segment_size_mb": "large_segment_bytes",
}
# What an environment may hold beside them and changes no size here.
_IGNORED = (
    "backend", "pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb", "release_lock_on_cudamalloc", "throw_on_cudamalloc_oom",
)  # fmt: skip
_HINT = "for example expandable_segments:True or max_split_size_mb:128,garbage_collection_threshold:0.8"


@dataclass(frozen=True)
class AllocatorConfig:
    """Settings with torch's defaults; sizes in bytes, None = no limit.

    ``roundup_power2_divisions`` has one entry for each power of two from 1 MiB on, 0 = not rounded. ``capacity_bytes``
    is no setting but the device: what the process may reserve.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * MIB
    large_segment_bytes: int = 20 * MIB
    roundup_power2_divisions: tuple[int, ...] = (0,) * _INTERVALS
    garbage_collection_threshold: float = 0.0
    capacity_bytes: int | None = None

    @property
    def settings(self) -> str:
        """The settings that differ from the defaults in torch's own spelling, "default" if none does."""
        default = AllocatorConfig(capacity_bytes=self.capacity_bytes)
        changed = []
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value == getattr(default, name):
                continue
            spelled = next((key for key, attribute in _MEGABYTES.items() if attribute == name), name)
            if name == "roundup_power2_divisions":
                intervals = ",".join(f"{1 << i}:{d}" for i, d in enumerate(value))
                value = f"[{intervals}]"
            changed.append(f"{spelled}:{value // MIB if spelled in _MEGABYTES else value}")
        return ",".join(changed) or "default"

    def rounded(self, num_bytes: int) -> int:
        """Bytes of the block that serves a request: whole multiples of 512 or, if so set, parts of a power of two."""
        if num_bytes < _MIN_BLOCK:
            return _MIN_BLOCK
        interval = min(max(num_bytes.bit_length() - 1 - 20, 0), _INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions > 1 and num_bytes > _MIN_BLOCK * divisions:
            part = (1 << (num_bytes.bit_length() - 1)) // divisions
            return -(-num_bytes // part) * part
        return -(-num_bytes // _MIN_BLOCK) * _MIN_BLOCK


def parse_allocator_config(text: str) -> AllocatorConfig:
    """``"max_split_size_mb:128,roundup_power2_divisions:[256:1,>:4]"`` as settings; "" gives the defaults.

    Raises:
        UsageError: an option torch does not know, or a value it would refuse.
    """
    config = AllocatorConfig()
    for item in re.split(r",(?![^\[]*\])", "".join(text.split())):
        if not item:
            continue
        key, _, value = item.partition(":")
        config = replace(config, **_setting(key, value))
    return config


def _setting(key: str, value: str) -> dict[str, Any]:
    if key == "expandable_segments":
        if value not in ("True", "False"):
            raise UsageError(f"expandable_segments is '{value}', not True or False", hint=_HINT)
        return {key: value == "True"}
    if key in _MEGABYTES:
        number = int(value) if value.isdecimal() else 0
        if number < 20:
            raise UsageError(f"{key} is '{value}', not a whole number of at least 20", hint=_HINT)
        return {_MEGABYTES[key]: number * MIB}
    if key == "garbage_collection_threshold":
        if not re.fullmatch(r"0?\.\d+", value) or not 0 < float(value) < 1:
            raise UsageError(f"garbage_collection_threshold is '{value}', not between 0 and 1", hint=_HINT)
        return {key: float(value)}
    if key == "roundup_power2_divisions":
        return {key: _divisions(value)}
    if key in _IGNORED:
        return {}
    raise UsageError(f"the allocator has no option '{key}'", hint=_HINT)


def _divisions(value: str) -> tuple[int, ...]:
    """One number for all, or ``[256:1,512:2,>:4]``: from which size in MiB on into how many parts."""
    if value.isdecimal():
        return (_power(value),) * _INTERVALS
    if not (value.startswith("[") and value.endswith("]")):
        raise UsageError(f"roundup_power2_divisions is '{value}', not a number or [SIZE:NUMBER,...]", hint=_HINT)
    divisions = [0] * _INTERVALS
    last, first = 0, True
    for item in value[1:-1].split(","):
        size, _, number = item.partition(":")
        parts = 0 if number == "0" else _power(number)
        if size == ">":
            beyond = 0 if first else last + 1
            divisions[beyond:] = [parts] * (_INTERVALS - beyond)
            continue
        last = min(_power(size).bit_length() - 1, _INTERVALS - 1)
        if first:
            divisions[:last] = [parts] * last
            first = False
        divisions[last] = parts
    return tuple(divisions)


def _power(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1 or number & (number - 1):
        raise UsageError(f"roundup_power2_divisions: '{text}' is not a power of two", hint=_HINT)
    return number
