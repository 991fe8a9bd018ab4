"""Render the planted world, or train CLIP, an SAE or a probe.

python train.py CONFIG.yaml [key=value ...]
python train.py --help
"""

from clipattr.main import train

if __name__ == "__main__":
    train()
