"""The table of codecs, by the name a plan gives them."""

from __future__ import annotations

from memadvise.optim.codecs.bf16 import BFloat16
from memadvise.optim.codecs.codec import Codec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (BFloat16(),)}
