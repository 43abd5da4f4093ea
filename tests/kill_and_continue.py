"""Kill runs at random moments and check that the same command resumes them to the same bytes.

    python tests/kill_and_continue.py --kills 5 --checkpoint-kills 20

The first number is of kills at any moment of a run of 40 steps, for one process, DDP and FSDP2 on two ranks each; the
second of kills while a checkpoint is being written, one after the other in one run. Ends with exit code 1 at the first
run that did not end as an uninterrupted one.
"""

import argparse
import pathlib
import random
import signal
import sys
import tempfile
import time

from conftest import TINY
from test_resume import STEPS, WAYS, contents, curve, finish, kill, train

from utils import checkpoint


def main():
    parser = argparse.ArgumentParser(description="Kill runs at random moments and see that they continue.")
    parser.add_argument("--kills", type=int, metavar="N", default=5, help="kills per way to run (default: 5)")
    parser.add_argument(
        "--checkpoint-kills", type=int, metavar="N", default=20, help="while one is written (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        for way in WAYS:
            finish(train(root / way, way))
            for trial in range(args.kills):
                kill_anywhere(root / way, root / f"{way}-{trial}", way)
        kill_while_writing(root / "one process", root / "writing", args.checkpoint_kills)


def kill_anywhere(expected, folder, way):
    after = random.randrange(1, STEPS - 1)
    kill(train(folder, way), folder, after)
    kept = max(checkpoint.steps(folder), default=0)
    finish(train(folder, way))
    same = contents(folder / "checkpoint-40") == contents(expected / "checkpoint-40") and curve(folder) == curve(
        expected
    )
    report(f"{way}: killed after step {after}, continued from step {kept}", same)


def kill_while_writing(expected, folder, kills):
    flags = [*TINY, "--max-steps", 40 + 5 * kills, "--ckpt-every", 1]
    for trial in range(kills):
        script = train(folder, "one process", flags=flags)
        begun = max(checkpoint.steps(folder), default=0) if folder.exists() else 0
        while max(checkpoint.steps(folder), default=0) < begun + 2 or not list(folder.glob(".checkpoint-*.partial")):
            if not script.alive():
                report(f"writing: the run ended before kill {trial + 1}", False)
        time.sleep(random.random() * 0.02)  # some moment of the 30 ms or so that writing takes
        script.signal(signal.SIGKILL)
        script.wait()
        partial = [path.name for path in folder.glob(".checkpoint-*")]
        steps = checkpoint.steps(folder)
        for step in steps:
            checkpoint.check(folder / f"checkpoint-{step}")
        report(
            f"writing: kill {trial + 1} left {partial or 'nothing half-written'}, {len(steps)} intact",
            max(steps) > begun,
        )
    finish(train(folder, "one process", flags=flags))
    same = contents(folder / "checkpoint-40") == contents(expected / "checkpoint-40")
    report(f"writing: {len(curve(folder))} steps in the end, those of the first 40 as without kills", same)


def report(text, good):
    print(f"{'ok  ' if good else 'FAIL'} {text}", flush=True)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
