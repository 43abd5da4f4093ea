"""Print parameters and GFLOPs of every model: python benchmarks/model_sizes.py [--image-size 256]

GFLOPs are multiply-adds of one forward pass of one image, attention included, as the DiT paper counts them; torch's own
counter counts each multiply-add as two operations. Nothing is computed: the models live on the meta device.
"""

import pathlib
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from models import SiT_models  # noqa: E402
from utils import command_line

LATENT_CHANNELS, DOWNSAMPLING = 4, 8


def measure(name, input_size):
    """(parameters, multiply-adds of one forward pass) of a model on latents of input_size x input_size."""
    with torch.device("meta"):
        model = SiT_models[name](input_size=input_size)
        x, t, y = (
            torch.empty(1, LATENT_CHANNELS, input_size, input_size),
            torch.empty(1),
            torch.empty(1, dtype=torch.long),
        )
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def main():
    parser = command_line.Parser(description="Print parameters and GFLOPs of every model.")
    add = command_line.flag_group(parser, "images")
    add("--image-size", command_line.integer(1), "PIXELS", "image size; latents are an eighth of it", default=256)
    args = parser.parse_args()
    if args.image_size % (DOWNSAMPLING * 8):
        parser.error(f"--image-size {args.image_size} does not divide: it must be a multiple of {DOWNSAMPLING * 8}")
    print("| model | hidden size | depth | heads | parameters | GFLOPs |")
    print("|---|---|---|---|---|---|")
    for name, constructor in SiT_models.items():
        parameters, multiply_adds = measure(name, args.image_size // DOWNSAMPLING)
        size = constructor.keywords
        print(
            f"| {name} | {size['hidden_size']} | {size['depth']} | {size['num_heads']} "
            f"| {parameters:,} | {multiply_adds / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
