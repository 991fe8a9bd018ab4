"""Measure trained models against the truth and write the report.

python evaluate.py CONFIG.yaml [key=value ...]
python evaluate.py --help
"""

from clipattr.main import evaluate

if __name__ == "__main__":
    evaluate()
