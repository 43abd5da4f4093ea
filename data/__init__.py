"""Labelled images: where they come from, how they become tensors, and the order in which a run sees them."""

from data.images import ImageDataset, center_crop
from data.sources import open_source
