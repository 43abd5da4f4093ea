"""Print parameters and GFLOPs of every model: python benchmarks/model_sizes.py [--image-size 256]

GFLOPs are multiply-adds of one forward pass of one image, attention included, as the DiT paper counts them. They are
counted on the meta device, where nothing is computed.
"""

import measuring

from models import SiT_models
from training import costs
from utils import command_line


def main():
    parser = command_line.Parser("Print parameters and GFLOPs of every model.")
    add = command_line.flag_group(parser, "images")
    add("--image-size", command_line.integer(1), "PIXELS", "latents are an eighth of it", default=256)
    args = parser.parse_args()
    multiple = 8 * measuring.DOWNSAMPLING  # for patches of 8
    if args.image_size % multiple:
        parser.error(f"--image-size {args.image_size} must be a multiple of {multiple}")
    rows = []
    for name in SiT_models:
        config = measuring.model_config(name, args.image_size)
        sizes = (config[key] for key in ("hidden_size", "depth", "num_heads"))
        multiply_adds = costs.forward_flops(config) / 2
        rows.append([name, *sizes, f"{costs.num_parameters(config):,}", f"{multiply_adds / 1e9:.2f}"])
    measuring.print_table(["model", "hidden size", "depth", "heads", "parameters", "GFLOPs"], rows)


if __name__ == "__main__":
    main()
