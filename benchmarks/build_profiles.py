"""Build the profiles of profiles/models/: what compression does to models of seven families that train here.

    python benchmarks/build_profiles.py [--families gpt llama ...] [--seeds 2] [--width 96] [--out profiles/models]

Every family is scanned with a probe of 60 steps for every seed; the scores of a role, relative depth and kind of
candidate are averaged. The file says how it was made; a line on stdout says how alike the seeds are (rank correlation
of their scores over tensors and candidates of tier 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advice_quality import agreement, probed
from bench_support.output import machine

from memadvise.advise.profile import Profile, profile_from_scans
from memadvise.ledger import Scan, write_whole

FAMILIES = ("gpt", "llama", "encoder", "vit", "resnet", "lstm", "gnn")
LEARNING_RATE = 3e-3  # scores hardly depend on it
ROOT = Path(__file__).parents[1]


def evidence(scans: list[Scan], width: int | None) -> dict[str, Any]:
    """How the profile was made."""
    probes = [scan.probe for scan in scans if scan.probe is not None]
    return {
        "command": "python benchmarks/build_profiles.py",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": scans[0].environment,
        "parameters": sum(p.numel for p in scans[0].parameters if p.trainable),
        "width": width or "the family's own",
        "seeds": len(scans),
        "steps": [probe.num_steps for probe in probes],
        "recorded_steps": [list(probe.recorded_steps) for probe in probes],
        "lr": LEARNING_RATE,
        "losses": [[round(probe.losses[0], 3), round(probe.losses[-1], 3)] for probe in probes],
        "batch": list(scans[0].memory[0].batch),
    }


def document(profile: Profile) -> str:
    """JSON with a line for every value, so that differences can be read."""
    record = dataclasses.asdict(profile)
    values = record.pop("values")
    head = json.dumps(record, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(value) for value in values)
    return f'{head},\n "values": [\n{lines}\n ]\n}}\n'


def main() -> int:
    """Scan, average and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--width", type=int, help="of every family, instead of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "profiles" / "models")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    for family in options.families:
        scans = [probed(family, seed, LEARNING_RATE, width=options.width) for seed in range(options.seeds)]
        profile = profile_from_scans(family, scans, evidence(scans, options.width))
        path = options.out / f"{family}.json"
        write_whole(path, document(profile))
        alike = f"; seeds agree to {agreement(*scans[:2]):.2f}" if len(scans) > 1 else ""
        print(f"{path.name}: {len(profile.values)} values{alike}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
