"""The project's scripts as processes that start fast: forked from a server that has imported what they import."""

import atexit
import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts in this folder
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["datasets", "diffusers.models", "sampling.draw", "data.loader", "vae", "yaml", "sklearn.datasets", "torchdiffeq"]
)


@dataclasses.dataclass
class Finished:
    """What `subprocess.CompletedProcess` holds; of several ranks, the first return code that is not 0."""

    returncode: int
    stdout: str
    stderr: str


class Script:
    """A running script: one process, or one for each rank with the environment that torchrun gives them."""

    def __init__(self, script, *arguments, processes=1, cwd=ROOT, environment=None):
        self.folder = tempfile.TemporaryDirectory()
        words = [str(ROOT / script), *map(str, arguments)]
        port = free_port()
        self.ranks = []
        for rank in range(processes):
            variables = dict(environment or {})
            if processes > 1:
                variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            output = str(pathlib.Path(self.folder.name) / str(rank))
            process = _server.Process(target=_run, args=(words, str(cwd), variables, output))
            self.ranks.append(process)
        self._start()

    def _start(self):
        # The server takes its environment from this process, once, and torch reads the number of threads at import.
        before = {key: os.environ.get(key) for key in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        for process in self.ranks:
            process.start()
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value

    def alive(self):
        return any(process.is_alive() for process in self.ranks)

    def signal(self, number, ranks=None):
        """Send a signal to some ranks, or to all."""
        for process in self.ranks if ranks is None else [self.ranks[rank] for rank in ranks]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout=300):
        """What it printed and how it ended. Raises TimeoutError, and kills it."""
        for process in self.ranks:
            process.join(timeout)
        late = self.alive()
        for process in self.ranks:
            process.kill()
            process.join()
        text = {
            kind: "".join(
                pathlib.Path(f"{self.folder.name}/{rank}.{kind}").read_text() for rank in range(len(self.ranks))
            )
            for kind in ("out", "err")
        }
        if late:
            raise TimeoutError(f"not done after {timeout} s:\n{text['out']}\n{text['err']}")
        codes = [process.exitcode for process in self.ranks]
        return Finished(next((code for code in codes if code), 0), text["out"], text["err"])


def run(*arguments, timeout=300, **more):
    """Run a script of the project to its end: arguments of `Script`, result of `Script.wait`."""
    return Script(*arguments, **more).wait(timeout)


def torchrun(*arguments, processes=2, flags=(), timeout=300):
    """Run a script with torchrun itself, as a user does; a `subprocess.CompletedProcess`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *flags]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def start_torchrun(*arguments, folder, processes=2):
    """Start train.py with torchrun, whose own flags come first, in the background; a `subprocess.Popen`."""
    flags = [word for word in map(str, arguments) if word.startswith("--max-restarts")]
    rest = [word for word in map(str, arguments) if word not in flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *flags]
    return subprocess.Popen(
        [*launcher, "train.py", *rest, "--output-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words, cwd, variables, output):
    """In the new process: become `python words...`."""
    for descriptor, target, flags in ((0, os.devnull, os.O_RDONLY), (1, f"{output}.out", 0), (2, f"{output}.err", 0)):
        file = os.open(target, flags or os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update({key: str(value) for key, value in variables.items()})
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a script that was typed
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as the interpreter does when a script ends, and multiprocessing does not
