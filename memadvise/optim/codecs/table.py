"""The table of codecs, by the name a plan gives them."""

from __future__ import annotations

from memadvise.optim.codecs.bf16 import BFloat16
from memadvise.optim.codecs.codec import Codec
from memadvise.optim.codecs.dynamic8 import Dynamic8
from memadvise.optim.codecs.int4 import Int4
from memadvise.optim.codecs.int8 import Int8

CODECS: dict[str, Codec] = {codec.name: codec for codec in (BFloat16(), Int8(), Dynamic8(), Int4())}
