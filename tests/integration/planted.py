"""Plants memory regressions, and harmless edits, in an example and checks it as ``memadvise check`` does.

``python tests/integration/planted.py`` prints what was said of each. An edit is a list of (old, new) texts, each of
which is there exactly once; ``before`` edits make the version that the regression is planted in.
"""

# ruff: noqa: E501  # edits are lines of the example as they are

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memadvise.check import Result, compare
from memadvise.check_run import Lane, check_target

EXAMPLES = Path(__file__).parents[2] / "examples"
Edits = tuple[tuple[str, str], ...]

# Half as deep and a quarter as wide: the same step in a fraction of the time.
SMALL: Edits = ((" = 256, 64, 256, 8, 4  #", " = 256, 64, 128, 4, 3  #"),)
LOOP = "        for block in self.blocks:\n            x = block(x)\n"
HEAD = "        return self.head(self.norm(x))\n"
GELU = "class Block(nn.Module):"
STEP_FUNCTION = "def validation_loss("
PLAN = """version: 1
rules:
  - {match: "blocks.*.mlp.*.weight", method: METHOD}
  - {match: "**", method: adamw}
"""
OWN_STEP = """def train_step(model, batch, optimizer):
    if not hasattr(model, "optimizer"):
        object.__setattr__(model, "optimizer", torch.optim.AdamW(model.parameters(), OPTIONS))
    compute_loss(model, batch).backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def validation_loss("""
STEP = """def train_step(model, batch, optimizer):
    compute_loss(model, batch).backward()
    CLIPPED
    optimizer.step()
    optimizer.zero_grad()


def validation_loss("""


@dataclass(frozen=True)
class Planted:
    """A regression: what is edited, and the category and module that must be named for it."""

    name: str
    category: str
    module: str
    edits: Edits
    before: Edits = ()
    plans: tuple[str, str] | None = None


REGRESSIONS = (
    Planted(
        "an fp32 upcast",
        "activations",
        "blocks.*.mlp.1",
        (
            ("nn.GELU()", "Gelu()"),
            (GELU, "class Gelu(nn.Module):\n    def forward(self, x):\n"
                   "        return F.gelu(x.float()).to(x.dtype)\n\n\n" + GELU),
        ),
        before=(("    return GPT()\n", "    return GPT().bfloat16()\n"), ("128, 4, 3  #", "128, 4, 8  #")),
    ),
    Planted(
        "a lost checkpoint",
        "activations",
        "blocks.*",
        (("x = checkpoint(block, x, use_reentrant=False)", "x = block(x)"),),
        before=(
            (LOOP, LOOP.replace("block(x)", "checkpoint(block, x, use_reentrant=False)")),
            ("from torch import nn\n", "from torch import nn\nfrom torch.utils.checkpoint import checkpoint\n"),
        ),
    ),
    Planted(
        "a retained output list",
        "buffers",
        "head",
        (
            (HEAD, "        logits = self.head(self.norm(x))\n        self.kept.append(logits)\n        return logits\n"),
            ("        super().__init__()\n        self.tokens", "        super().__init__()\n        self.kept = []\n        self.tokens"),
        ),
    ),
    Planted(
        "foreach instead of fused",
        "temporaries",
        "(optimizer)",
        (("fused=True", "foreach=True"),),
        before=((STEP_FUNCTION, OWN_STEP.replace("OPTIONS", "fused=True")), ("BATCH_SIZE = 8", "BATCH_SIZE = 1")),
    ),
    Planted(
        "a second gradient copy",
        "temporaries",
        "(optimizer)",
        (("    pass\n", "    kept = [p.grad.clone() for p in model.parameters()]\n"),),
        before=((STEP_FUNCTION, STEP.replace("CLIPPED", "pass")), ("BATCH_SIZE = 8", "BATCH_SIZE = 1")),
    ),
    Planted(
        "a bigger head",
        "weights",
        "head",
        (("self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)",
          "self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * VOCABULARY, bias=False)"),),
    ),
    Planted(
        "a buffer kept alive",
        "buffers",
        "blocks.*.attention",
        (
            ("        self.value = nn", "        self.register_buffer('table', torch.zeros(512, 512))\n        self.value = nn"),
        ),
    ),
    Planted(
        "a mask materialised",
        "activations",
        "blocks.*.attention",
        (
            ("F.scaled_dot_product_attention(q, k, v, is_causal=True)",
             "(q @ k.transpose(-2, -1) + torch.full((time, time), -1e9).triu(1)).softmax(-1) @ v"),
        ),
    ),
    Planted(
        "a plan edited to full state",
        "optimizer_state",
        "blocks.*.mlp.*",
        (),
        plans=(PLAN.replace("METHOD", "slimadam, axes: [1]"), PLAN.replace("METHOD", "adamw")),
    ),
    Planted("doubled batch", "activations", "blocks.*", (("BATCH_SIZE = 8", "BATCH_SIZE = 16"),)),
)  # fmt: skip

HARMLESS: dict[str, Edits] = {
    "a comment": (("def build_model()", "# Builds the model.\n\n\ndef build_model()"),),
    "a docstring": (('"""Pre-norm transformer block."""', '"""A block.\n\n    With its norms first.\n    """'),),
    "empty lines on top": (("from __future__", "\n\n\n\nfrom __future__"),),
    "a class renamed": (
        ("class Attention(nn.Module)", "class CausalAttention(nn.Module)"),
        ("self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()",
         "self.attention_norm, self.attention = nn.LayerNorm(WIDTH), CausalAttention()"),
    ),
    "a module renamed": (
        ("self.norm, self.head =", "self.final_norm, self.head ="),
        ("self.head(self.norm(x))", "self.head(self.final_norm(x))"),
    ),
    "the list of blocks renamed": (
        ("self.blocks = nn.ModuleList", "self.layers = nn.ModuleList"),
        ("for block in self.blocks:", "for block in self.layers:"),
    ),
    "an attribute of every block renamed": (
        ("self.mlp = nn.Sequential", "self.feed_forward = nn.Sequential"),
        ("self.mlp(self.mlp_norm(x))", "self.feed_forward(self.mlp_norm(x))"),
    ),
    "a local variable renamed": (("y = F.scaled", "mixed = F.scaled"), ("self.output(y.transpose", "self.output(mixed.transpose")),
    "a loop variable renamed": ((LOOP, LOOP.replace("block", "layer").replace("self.layers", "self.blocks")),),
    "submodules created in another order": (
        ("        self.query = nn.Linear(WIDTH, WIDTH, bias=False)\n        self.key = nn.Linear(WIDTH, WIDTH, bias=False)\n",
         "        self.key = nn.Linear(WIDTH, WIDTH, bias=False)\n        self.query = nn.Linear(WIDTH, WIDTH, bias=False)\n"),
    ),
    "the head created first": (
        ("        self.tokens, self.positions", "        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)\n        self.tokens, self.positions"),
        ("self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)", "self.norm = nn.LayerNorm(WIDTH)"),
    ),
    "functions in another order": (
        ("def build_model() -> nn.Module:\n    torch.manual_seed(0)\n    return GPT()\n\n\n", ""),
        ("def validation_loss(", "def build_model() -> nn.Module:\n    torch.manual_seed(0)\n    return GPT()\n\n\ndef validation_loss("),
    ),
    "an import added": (("import itertools\n", "import itertools\nimport math  # noqa: F401\n"),),
    "a function added": (("def build_model()", "def unused(x):\n    return x * 2\n\n\ndef build_model()"),),
    "another seed": (("torch.manual_seed(0)", "torch.manual_seed(17)"),),
    "another initialisation": (("std=0.02", "std=0.01"),),
    "an assertion": (("        batch, time, _ = x.shape\n", "        batch, time, _ = x.shape\n        assert time > 0\n"),),
    "a print": (("        batch, time, _ = x.shape\n", "        batch, time, _ = x.shape\n        print(batch, time)\n"),),
    "a helper function": (
        ("        return x + self.mlp(self.mlp_norm(x))\n",
         "        return self._mixed(x)\n\n    def _mixed(self, x):\n        return x + self.mlp(self.mlp_norm(x))\n"),
    ),
    "an expression written otherwise": (
        ("y.transpose(1, 2).reshape(batch, time, WIDTH)", "y.transpose(1, 2).flatten(2)"),
    ),
}  # fmt: skip


def plant(source: str, edits: Edits) -> str:
    """``source`` with every edit made."""
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


class Field:
    """A folder with the example in it, where versions are checked against each other."""

    def __init__(self, folder: Path, example: str = "gpt_text.py", edits: Edits = SMALL) -> None:
        self.folder, self.example = folder, example
        shutil.copy(EXAMPLES / "example_support.py", folder)
        self.source = plant((EXAMPLES / example).read_text(encoding="utf-8"), edits)

    def observe(self, edits: Edits, plan: str | None = None):
        """What the example takes with these edits."""
        file = self.folder / self.example
        file.write_text(plant(self.source, edits), encoding="utf-8")
        plan_file = self.folder / "plan.yaml"
        if plan is not None:
            plan_file.write_text(plan, encoding="utf-8")
        observation, _ = check_target(str(file), Lane(plan=str(plan_file) if plan else None), root=self.folder)
        return observation

    def verdict(self, before, edits: Edits, plan: str | None = None) -> Result:
        """The version with ``edits`` against an observation made before."""
        return compare(self.observe(edits, plan), before.entry)

    def planted(self, case: Planted, plain=None) -> Result:
        """A regression against the version it is planted in; ``plain`` is the example as it stands."""
        plans = case.plans or (None, None)
        start = (
            plain if plain is not None and not case.before and not case.plans else self.observe(case.before, plans[0])
        )
        source = self.source
        self.source = plant(source, case.before)
        try:
            return self.verdict(start, case.edits, plans[1])
        finally:
            self.source = source


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # lines are named relative to here
        field = Field(Path(name))
        plain = field.observe(())
        for case in REGRESSIONS:
            print(f"{case.name}:\n    {field.planted(case, plain).headline}")
        for name, edits in HARMLESS.items():
            result = field.verdict(plain, edits)
            print(f"{name}: {result.status}{f'; renamed {result.renamed}' if result.renamed else ''}")


if __name__ == "__main__":
    main()
