"""benchmarks/cluster.py: bytes and times by closed forms, and the simulation beside two real ranks."""

import collections
import json
import math

import cluster
import processes
import pytest
import ranks
import torch
from ranks import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective, Setting

from models import SiT

CONFIG = dict(input_size=8, hidden_size=64, depth=1, num_heads=4, num_classes=15)
GPU = torch.device("cuda")


def padded(parameters, shards):
    """Numbers of parameters whose rows are filled up so that each of `shards` ranks has as many."""
    return sum(math.ceil(len(p) / shards) * shards * p[0].numel() for p in parameters)


def of_largest_shard(parameters, shards):
    return sum(math.ceil(len(p) / shards) * p[0].numel() for p in parameters)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("mode", "shards"), [("DDP", 1), ("HSDP", 8)])
def test_collectives_and_states_are_those_of_closed_forms(mode, shards):
    setting = Setting(mode, 16, shards, 2, True)
    counts = ranks.simulate(CONFIG, setting, GPU)
    model = SiT(**CONFIG)
    everything = list(model.parameters())
    trained = [p for p in everything if p is not model.pos_embed]
    blocks = list(model.blocks.parameters())
    others = [p for p in everything if not any(p is block for block in blocks)]

    sizes = collections.Counter()
    for collective in counts["collectives"]:
        sizes[collective.phase, collective.kind, collective.ranks] += collective.size
    every_rank, node, replicas = (tuple(range(*limits)) for limits in ((16,), (shards,), (0, 16, 8)))
    if mode == "DDP":
        assert sizes == {("backward", ALL_REDUCE, every_rank): 4 * sum(p.numel() for p in trained)}
    else:
        gathered, reduced = 2 * padded(blocks, shards) + 4 * padded(others, shards), 4 * padded(trained, shards)
        norms = {("update", ALL_REDUCE, node): 4 * len(trained)}
        gather = {(phase, ALL_GATHER, node): gathered for phase in ("forward", "backward")}
        reduce = {("backward", REDUCE_SCATTER, node): reduced}
        across = {("backward", ALL_REDUCE, replicas): reduced // shards}
        assert sizes == norms | gather | reduce | across
    weights = 4 * of_largest_shard(everything, shards)
    gradients = 4 * of_largest_shard(trained, shards)
    steps = 4 * len(trained)  # AdamW counts them for each tensor
    expected = dict(weights=weights, gradients=gradients, optimizer=2 * gradients + steps, EMA=weights)
    assert {key: counts[key] for key in ranks.STATES} == expected
    # Between steps nothing else lives but a batch; DDP's buckets are the gradients.
    states = sum(expected.values()) - (gradients if mode == "HSDP" else 0)
    assert 0 < counts["peak"] - counts["growth"] - states < 10_000
    # Of 8 shards, all rows divide into as many but the single one of the positions, gathered in both passes.
    padding = 0 if mode == "DDP" else 7 / 8 * (2 * 4 * 7 * model.pos_embed.numel() + 2 * 4 * len(trained))
    total = sum(map(cluster.sent, counts["collectives"]))
    assert sum(cluster.closed_form(CONFIG, setting).values()) == pytest.approx(total - padding, rel=1e-12)


def test_times_are_those_of_rings():
    speeds = cluster.Cluster(8, link=100, network=10, hop=1, network_hop=5, flops=1000)
    node, across, everything = tuple(range(8)), (0, 8), tuple(range(16))
    # 7/8 of 800 bytes at 100 a second and 7 hops; twice that for an all-reduce.
    assert speeds.seconds(Collective("forward", ALL_GATHER, node, 800)) == pytest.approx(7 + 7)
    assert speeds.seconds(Collective("backward", ALL_REDUCE, node, 800)) == pytest.approx(2 * (7 + 7))
    # One GPU of each node sends by its own link; eight do by eight of them.
    assert speeds.seconds(Collective("backward", REDUCE_SCATTER, across, 800)) == pytest.approx(40 + 5)
    assert speeds.seconds(Collective("forward", ALL_GATHER, everything, 800)) == pytest.approx(750 / 80 + 14 + 5)

    # 3 and 6 s of computing; 2 + 2 s of gathering hide but the first, 4 + 4 s of reducing but the last.
    free = cluster.Cluster(8, link=100, network=10, hop=0, network_hop=0, flops=1000)
    half = 800 / 7 * 2  # bytes that take 2 s
    gathers, reduces = Collective("forward", ALL_GATHER, node, half), Collective("backward", ALL_REDUCE, node, half)
    computing, communication, total = free.step([gathers, gathers, reduces, reduces], 9000)
    assert computing == {"forward": 3, "backward": 6, "update": 0}
    assert communication == pytest.approx({"forward": 4, "backward": 8, "update": 0})
    assert total == pytest.approx(2 + 3 + 6 + 4)
    # With a tenth of the operations, communication takes all of the time.
    assert free.step([gathers, gathers, reduces, reduces], 900)[2] == pytest.approx(4 + 8)
    # Two reductions between nodes, of 3 s each, run beside those in a node.
    leaves = Collective("backward", ALL_REDUCE, across, 30)
    assert free.step([reduces, leaves, reduces, leaves], 900)[1:] == (
        pytest.approx({"forward": 0, "backward": 8, "update": 0}),
        pytest.approx(0.3 + 3 + 5),
    )


TWO_RANKS = """
import json, sys, warnings
sys.path.insert(0, {path!r})
warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
import cluster, ranks
from utils import distributed
device = distributed.init()
settings = [ranks.Setting("DDP", 2, 1, 32, False), ranks.Setting("FSDP2", 2, 2, 32, True)]
rows = cluster.compare({config}, settings, device)
if rows:
    print(json.dumps(rows))
"""


def test_the_simulation_is_what_two_ranks_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(path=str(processes.ROOT / "benchmarks"), config=CONFIG))
    result = processes.run(script, processes=2)
    assert result.returncode == 0, result.stderr
    for row in json.loads(result.stdout):
        real, simulated = row["real"], row["simulated"]
        for key in ("collectives", *ranks.STATES, "activations"):
            assert simulated[key] == real[key], (row["mode"], key)
        # Kernels take memory for themselves, and Gloo keeps some until it has answered.
        assert 0.8 < simulated["growth"] / real["allocated"] < 1.001, row["mode"]


def test_gpus_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 GPUs are neither 2 to 8"):
        cluster.all_settings(12, 24, 8)
    with pytest.raises(ValueError, match="--global-batch-size 36 does not divide by 16 GPUs"):
        cluster.all_settings(16, 36, 8)
    assert [setting[:3] for setting in cluster.all_settings(16, 32, 8)[::2]] == [
        ("DDP", 16, 1),
        ("FSDP2", 16, 16),
        ("HSDP", 16, 8),
    ]
