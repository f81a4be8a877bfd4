"""The card of a training run: what was made, from what and how well, in README.md, README_CN.md and
card.json. Training writes it; `python -m mindrlhf.card` adds results to it and verifies it.
"""
