"""Find weights by name, path or URL: python download.py SiT-XL-2-256x256.pt"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

from utils import command_line, hub
from utils.weights import load_weights

NAME = "SiT-XL-2-256x256.pt"


def find_model(name_or_path):
    """Return the state dict of a SiT, EMA first, at a path, name or URL. Raise ValueError if there is none.

    Weights of REPA are converted to this project's time, see utils/foreign.py; a printed line says so."""
    weights = load_weights(hub.resolve(name_or_path))
    for note in weights.notes:
        print(note)
    return weights.state_dict


def main():
    parser = command_line.Parser("Fetch SiT weights into the cache of this machine and print their paths.")
    text = f"released models such as {NAME} or SiT-B/2-256, files on the hub (USER/NAME[/FILE]) or URLs"
    parser.add_argument(
        "names", nargs="*", type=command_line.location, default=[NAME], help=f"{text} (default: {NAME})"
    )
    args = parser.parse_args()
    for name in args.names:
        with command_line.user_errors(parser):
            print(f"{name}: {hub.resolve(name)}")


if __name__ == "__main__":
    main()
