"""Find weights by name, path or URL: python download.py SiT-XL-2-256x256.pt"""

from utils import command_line, hub
from utils.weights import load_weights


def find_model(name_or_path):
    """Return a state dict for `SiT.load_state_dict`, EMA weights first.

    Args:
        name_or_path: a path, a released model's name or a URL, as `hub.resolve` takes it.

    Raises:
        ValueError: nothing is there, it cannot be fetched, or it is not a SiT.
    """
    return load_weights(hub.resolve(name_or_path)).state_dict


def main():
    parser = command_line.Parser("Fetch SiT weights into the cache of this machine and print their paths.")
    parser.add_argument(
        "names",
        nargs="*",
        default=["SiT-XL-2-256x256.pt"],
        help="released models such as SiT-XL-2-256x256.pt or SiT-B/2-256, or URLs (default: SiT-XL-2-256x256.pt)",
    )
    args = parser.parse_args()
    for name in args.names:
        with command_line.user_errors(parser):
            print(f"{name}: {hub.resolve(name)}")


if __name__ == "__main__":
    main()
