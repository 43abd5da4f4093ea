"""The monitor of training, under its earlier name until train.py imports it from evaluation.metrics."""

from evaluation.metrics import Monitor as Monitor
