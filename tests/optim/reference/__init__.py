"""Slow float64 references, written from the papers: plain loops over blocks of element numbers, no code of ours."""
