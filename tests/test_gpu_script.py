"""benchmarks/gpu.sh: parts that fail or take too long do not end the others, and without a GPU all are skipped."""

import json
import subprocess
import sys
import time

import gpu
import pytest
import torch
from processes import ROOT

WRITES = "import json, sys; print('a table'); json.dump({'rate': 3}, open(sys.argv[1], 'w'))"
MACHINE = {"gpus": 0, "torch": "2", "cpus": 2, "missing": [], "no_gpu": "none is here"}
ONE_GPU = MACHINE | {"gpus": 1, "gpu": "NVIDIA T4", "gib": 15.0, "bf16": False, "cuda": "13", "cudnn": 9, "driver": "1"}


def part(name, code, seconds=60, **more):
    return gpu.Part(name, seconds, (sys.executable, "-c", code, "{json}"), **more)


def test_parts_that_fail_or_hang_do_not_end_the_others(tmp_path):
    def disagrees(figures, earlier):
        raise ValueError(f"{earlier['good']['rate']} is not 4")

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [
        part("good", WRITES, summary=lambda figures, earlier: f"{figures['rate']} images/s"),
        part("raises", "print('begun'); raise RuntimeError('no kernel')"),
        part("slow", f"print('half done', flush=True); {child}", seconds=0.3),
        part("absent", "", missing="needs two GPUs"),
        part("differs", WRITES, summary=disagrees),
        part("after", WRITES),
    ]
    start = time.monotonic()
    gpu.run_all(parts, tmp_path, MACHINE, 60, start)
    content = json.loads((tmp_path / "results.json").read_text())
    results = {result["name"]: result for result in content["parts"]}
    outcomes = ["passed", "failed", "timed out", "skipped", "failed", "passed"]
    assert [result["outcome"] for result in results.values()] == outcomes
    says = [result["says"] for result in results.values()][:5]
    assert says == [
        "3 images/s",
        "exit code 1: RuntimeError: no kernel",
        "ended after 0 s",
        "needs two GPUs",
        "3 is not 4",
    ]
    assert results["good"]["figures"] == {"rate": 3} and results["raises"]["last_lines"][-1] == "begun"
    assert "Traceback" in (tmp_path / "raises.err").read_text() and content["machine"] == MACHINE
    table = (tmp_path / "results.md").read_text()
    assert "| slow | timed out |" in table and "### good\n" in table and "\na table" in table


def test_no_part_starts_when_no_time_is_left(tmp_path):
    parts = [part("late", WRITES), part("absent", "", missing="needs two GPUs")]
    results = gpu.run_all(parts, tmp_path, MACHINE, 60, time.monotonic() - 50)
    assert [result["says"] for result in results] == ["no time was left", "needs two GPUs"]


def test_without_a_gpu_the_script_says_what_it_skips(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ["bash", ROOT / "benchmarks" / "gpu.sh", "--output", "new/gpu"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / "new" / "gpu" / "results.json").read_text())["parts"]
    assert len(parts) >= 10 and parts[0]["name"] == "tests"
    assert {result["outcome"] for result in parts} == {"skipped"}
    assert all("finds no GPU" in result["says"] for result in parts)


def test_parts_suit_the_machine():
    def parts(machine):
        return {part.name: part for part in gpu.make_parts(machine, rehearse=False)}

    old = parts(ONE_GPU | {"missing": ["pytest"], "nccl": "2.1"})
    assert old["tests"].missing == "needs the package pytest" and old["train-XL-2"].missing is None
    assert old["ddp-2"].missing == "needs two GPUs, and this machine has one" and old["fsdp-1"].missing is None
    assert old["train-XL-2"].left_out == "bf16: this device has none" and old["sample"].words[-4:-2] == ("0", "1")
    new = parts(ONE_GPU | {"gpus": 7, "bf16": True, "nccl": "2.1", "batch_sizes": dict.fromkeys(gpu.MODELS, 64)})
    assert {"ddp-4", "fsdp-4"} <= new.keys() and not any(part.missing or part.left_out for part in new.values())
    uncompiled = parts(ONE_GPU | {"bf16": True, "nccl": None, "no_compilation": "no compiler"})
    assert uncompiled["train-S-2"].left_out == "compiled rows: no compiler" and uncompiled["fsdp-1"].missing


def test_ranks_must_have_the_losses_of_one_process():
    def rows(*losses, name="ddp"):
        return {"rows": {name: {"ranks": 2, "images_per_second": 6.0, "losses": list(losses)}}}

    earlier = {"one-process": rows(1.0, 0.5, name="one process")}
    assert "50% of one process's a rank" in gpu.ranks_summary(rows(1.0, 0.50001), earlier)
    with pytest.raises(ValueError, match="losses differ"):
        gpu.ranks_summary(rows(1.0, 0.501), earlier)


def test_tests_are_counted_also_when_they_are_cut_off():
    text = "tests/test_cuda.py::test_a[x y] PASSED [ 3%]\ntests/test_cuda.py::test_b FAILED [ 6%]\n"
    text += "tests/test_cuda.py::test_c SKIPPED (no bf16) [ 9%]\ntests/test_cuda.py::test_d "
    figures = gpu.read_tests({}, text)
    assert gpu.tests_summary(figures, {}) == "1 tests passed, 1 failed (test_b), 1 skipped"
