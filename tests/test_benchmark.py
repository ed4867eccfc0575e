"""The benchmark: each comparison at a tiny size, what is counted as memory, and that a wrong result is no success."""
import csv
import subprocess

import pytest
import torch
from test_scripts import checkout  # noqa: F401 - a fixture

import benchmark
import budget
import memory
import option
import plain

CPU = torch.device("cpu")
SIZES = {"san_pooling": 12, "san_forward": 13, "affinity": 8, "chop": 64}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(option, "ROOT", tmp_path)
    monkeypatch.setattr(plain, "CHANNELS", 16)
    monkeypatch.setattr(plain, "POSITIONS", 2 * 8 * 8)
    monkeypatch.setattr(plain, "SAN_SIZES", dict(n_resgroups=1, n_resblocks=1, reduction=2))
    monkeypatch.setattr(plain, "EDSR_SIZES", dict(n_resblocks=1, n_feats=4))
    monkeypatch.setattr(budget, "free_memory", lambda device: 1e6)  # chop in tiles
    sizes = {name: (compare, (SIZES[name],)) for name, (compare, _) in plain.COMPARISONS.items()}
    monkeypatch.setattr(plain, "COMPARISONS", sizes)


def table(folder):
    with (folder / "experiment" / "benchmark" / "benchmark.csv").open() as file:
        return {row["comparison"]: row for row in csv.DictReader(file)}


def test_every_comparison_is_a_row_of_two_ways_that_agree(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 2")
    rows = table(tmp_path)
    assert status == 0 and list(rows) == list(SIZES) and [line.split()[0] for line in out[2:2 + len(SIZES)]] == list(SIZES)
    for name, row in rows.items():
        assert row["runs"] == "2" and row["size"] == str(SIZES[name]) and float(row["difference"]) < 1e-5
        assert float(row["faster"]) == pytest.approx(float(row["plain_s"]) / float(row["ours_s"]), abs=0.01, rel=0.01)
        assert float(row["ours_MB"]) >= 0 and float(row["plain_MB"]) >= 0
    assert (tmp_path / "experiment" / "benchmark" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_way_that_does_not_fit_is_left_out_and_its_memory_is_worked_out(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 1 --memory 1e-9 --only affinity+chop --sizes 16")
    rows = table(tmp_path)
    assert status == 0 and rows["affinity"]["plain_s"] == rows["chop"]["faster"] == "-"
    assert float(rows["affinity"]["plain_MB"]) > 0 and any("affinity 16: the plain way" in line for line in out)


def test_ways_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(plain, "plain_covariance", lambda x: 1.001 * plain.san.covariance(x))
    with pytest.raises(AssertionError, match="san_pooling 12: plain and ours differ"):
        benchmark.measure("san_pooling", 12, plain.san_pooling, CPU, 1, 1e9)


@pytest.mark.parametrize("replaced", ["plain_covariance", "plain_gather"])
def test_the_whole_network_feels_what_is_replaced_in_it(monkeypatch, replaced):
    right = getattr(plain, replaced)
    monkeypatch.setattr(plain, replaced, lambda x: 2 * right(x))
    with pytest.raises(AssertionError, match="san_forward"):
        benchmark.measure("san_forward", 12, plain.san_forward, CPU, 1, 1e9)


def test_a_result_without_numbers_is_a_difference():
    assert benchmark.difference([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, 2.0])]) == float("inf")


@pytest.mark.parametrize("count", [lambda f: memory.peak_memory(f, CPU)[1], memory.memory_from_shapes])
def test_memory_is_what_is_made_and_lives_forward_and_backward(count):
    x, weight = torch.rand(100), torch.rand(100, requires_grad=True)

    def forward():
        half = x.view(10, 10)[:5]  # a view of what was there
        return (half + 1) * 2  # 200 bytes each, at once

    assert count(forward) == 400
    assert count(lambda: x.mul_(1)) == 0
    # at once in the backward pass: the square, its sum, the incoming gradient (of one number each), the gradient's parts
    assert 800 <= count(lambda: torch.autograd.grad((weight * weight).sum(), weight)) <= 1700


def test_a_comparison_that_is_not_there(run_main):
    status, _, err = run_main("benchmark", "--cpu --only affinity+speed")
    assert status == 2 and len(err) == 1 and "--only speed: there are san_pooling" in err[0]


def test_the_script_passes_flags_on(checkout):  # noqa: F811
    ran = subprocess.run(["bash", str(checkout / "scripts" / "benchmark.sh"), "--only", "chop"], capture_output=True,
                         text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "benchmark.py"), "--only", "chop"]
