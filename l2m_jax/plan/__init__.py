"""What a run needs on hardware that one does not own: its programs compiled ahead of time, and read.

`l2m plan --config configs/gpt2_small.py --target a100_80gb --devices 4 --json out.json`
"""
