"""A fresh process: continue every saved run and save the weights. Called by test_contract."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cases import all_settings
from toy import Toy, optimizer_for, train, weights


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, (_, setting) in enumerate(all_settings()):
        for dtype in (torch.float32, torch.bfloat16):
            path = folder / f"{number}-{str(dtype).removeprefix('torch.')}"
            model = Toy(seed=7).to(dtype)
            optimizer = optimizer_for(model, setting, lr=123.0)  # the checkpoint brings its own
            saved = torch.load(path.with_suffix(".pt"), weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            train(model, optimizer, 5, first=5)
            torch.save(weights(model), path.with_suffix(".out"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
