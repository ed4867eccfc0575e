"""The benchmark: each comparison at a tiny size, what is counted as memory, and that a wrong result is no success."""
import csv
import subprocess
import tempfile
from functools import partial

import benchmark
import data
import inference
import numpy as np
import option
import pytest
import reference
import torch
from matplotlib.figure import Figure
from model.edsr import EDSR
from reference import formula, training
from summary import count
from system import flops, memory
from test_scripts import checkout  # noqa: F401 - a fixture

CPU = torch.device("cpu")
SIZES = {"affinity": 8, "affinity_batch": 8, "san_pooling": 12, "san_forward": 13, "chop": 32, "dukd_step": 32,
         "teacher_cache": 32, "data": 32, "precision": 12}
DIFFERENT = "dukd_step", "teacher_cache"
NETWORKS = training.STUDENT, training.TEACHER


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(option, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(formula, "chop", partial(inference.chop, tile=12))  # nine of them, with halos of 6
    monkeypatch.setattr(flops, "SIDES", dict(cpu=32))
    flops.ceiling.cache_clear()
    edsr = dict(n_resblocks=1, n_feats=4)
    for module, constants in (
            (formula, dict(CHANNELS=16, SAN_SIZES=dict(n_resgroups=1, n_resblocks=1, reduction=2), EDSR_SIZES=edsr, SHAVE=2,
                           AT_ONCE=200)),
            (training, dict(BATCH=dict(cpu=2), CROPS=5, STUDENT=edsr, TEACHER=dict(edsr, n_feats=8),
                            PHOTO=(50, 70), EDSR_SIZES=dict(n_resblocks=1, n_feats=16)))):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    sizes = {name: (compare, (SIZES[name],)) for name, (compare, _) in reference.COMPARISONS.items()}
    monkeypatch.setattr(reference, "COMPARISONS", sizes)


def measure(name, size=None, repeats=1, limit=1e9):
    return benchmark.measure(name, size or SIZES[name], reference.COMPARISONS[name][0], CPU, repeats, limit)


def table(folder):
    with (folder / "experiment" / "benchmark" / "benchmark.csv").open() as file:
        return {row["comparison"]: row for row in csv.DictReader(file)}


# ---- the table

def test_every_comparison_is_a_row_of_two_ways_that_agree(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 2")
    rows = table(tmp_path)
    assert status == 0 and list(rows) == list(SIZES) and [line.split()[0] for line in out[2:2 + len(SIZES)]] == list(SIZES)
    for name, row in rows.items():
        assert row["runs"] == "2" and row["size"] == str(SIZES[name])
        assert float(row["faster"]) == pytest.approx(float(row["plain_s"]) / float(row["ours_s"]), abs=0.01, rel=0.01)
        assert float(row["ours_MB"]) >= 0 and float(row["plain_MB"]) >= 0
        if name in DIFFERENT:
            assert row["difference"] == "-"
        else:
            assert float(row["difference"]) <= {"precision": 3e-2, "data": 0}.get(name, 1e-5)
        if name == "data":
            assert row["TFLOP/s"] == row["of_ceiling"] == "-"
        else:
            assert float(row["TFLOP/s"]) > 0 and float(row["of_ceiling"]) > 0
    assert float(rows["precision"]["difference"]) > 1e-4  # else it was not in bf16
    assert (tmp_path / "experiment" / "benchmark" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("tmp*"))  # no temporary folder is left


def test_a_plain_way_that_does_not_fit_is_left_out_and_its_memory_is_worked_out(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 1 --memory 1e-9 --only affinity+chop --sizes 16")
    rows = table(tmp_path)
    assert status == 0 and rows["affinity"]["plain_s"] == rows["chop"]["faster"] == rows["chop"]["difference"] == "-"
    assert float(rows["affinity"]["plain_MB"]) > 0 and any("affinity 16: the plain way" in line for line in out)


def test_where_only_the_right_result_does_not_fit_ours_is_compared_with_the_plain_way_in_time_alone():
    row, remarks = measure("chop", 64, limit=memory.memory_from_shapes(formula.chop_edsr(64, CPU).plain))
    row = dict(zip(benchmark.COLUMNS, row))
    assert row["difference"] == "-" and float(row["faster"]) > 0 and not remarks


def test_the_rate_is_that_of_the_operations_in_parts_of_the_ceiling(monkeypatch):
    monkeypatch.setattr(flops, "seconds", lambda function, device: 2.0)
    a = torch.rand(16, 16)
    compare = lambda size, device: reference.Pair("", lambda: (a @ a,), lambda: (a @ a,), 0)  # noqa: E731
    row = dict(zip(benchmark.COLUMNS, benchmark.measure("product", 16, compare, CPU, 1, 1e9)[0]))
    assert float(row["TFLOP/s"]) == pytest.approx(16**3 / 1e12, rel=0.01) and float(row["of_ceiling"]) == 0.12  # 16^3 / 32^3


def test_a_curve_is_drawn_against_the_number_of_positions_hollow_where_the_plain_way_was_not_run():
    cells = dict(comparison="chop", of="", ours_s="1", ours_MB="3", plain_MB="9")
    axes = Figure().subplots(2)
    benchmark.draw_growth(axes, [dict(cells, size="4", plain_s="2"), dict(cells, size="8", plain_s="-")])
    for axis, known, hollow in zip(axes, ([2], [9, 9]), ([], [64])):
        plain_way, worked_out, ours, _ = axis.lines
        assert list(plain_way.get_ydata()) == known and list(ours.get_xdata()) == [16, 64]
        assert list(worked_out.get_xdata()) == hollow and worked_out.get_markerfacecolor() == "white"


def test_ratios_at_one_size_are_bars():
    axes = Figure().subplots(2)
    cells = dict(size="8", leaner="2.00")
    benchmark.draw_ratios(axes, [dict(cells, comparison="a", faster="3.00"), dict(cells, comparison="b", faster="-")])
    assert [bar.get_width() for bar in axes[0].patches] == [2] and [bar.get_width() for bar in axes[1].patches] == [1, 1]


def test_many_comparisons_are_drawn_in_several_rows():
    cells = dict(zip(benchmark.COLUMNS, ("", "", "8 maps", "1", *["2"] * 9)))
    rows = [tuple({**cells, "comparison": name, "size": size}.values()) for name in "abcdef" for size in ("8", "12")]
    heights = [int.from_bytes(benchmark.picture(some)[20:24], "big") for some in (rows[::2], rows)]
    assert heights == [594, 2 * 594]


# ---- that a wrong result is no success

def test_ways_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(formula, "plain_covariance", lambda x: 1.001 * formula.san.covariance(x))
    with pytest.raises(AssertionError, match="san_pooling 12: plain and ours differ"):
        measure("san_pooling")


@pytest.mark.parametrize("replaced", ["plain_covariance", "plain_gather"])
def test_the_whole_network_feels_what_is_replaced_in_it(monkeypatch, replaced):
    right = getattr(formula, replaced)
    monkeypatch.setattr(formula, replaced, lambda x: 2 * right(x))
    with pytest.raises(AssertionError, match="san_forward"):
        measure("san_forward")


def test_tiles_are_held_against_the_whole_image_and_the_split_is_not(monkeypatch):
    row, remarks = measure("chop")
    assert float(row[benchmark.COLUMNS.index("difference")]) < 1e-5 and len(remarks) == 1
    assert float(remarks[0].split(" grey levels")[0].split()[-1]) > 1e-3 and "whole image at once takes 0 MB" in remarks[0]
    monkeypatch.setattr(formula, "chop", lambda net, lr, memory: formula.plain_chop(net, lr))
    with pytest.raises(AssertionError, match="chop 32: plain and ours differ"):
        measure("chop")


def test_an_image_read_wrong_from_the_cache_is_a_difference(monkeypatch):
    get = data.cache.Cache.get
    monkeypatch.setattr(data.cache.Cache, "get", lambda self, *of: get(self, *of) // (2 if self.folder else 1))
    with pytest.raises(AssertionError, match="data 32: plain and ours differ"):
        measure("data")


def test_a_result_without_numbers_is_a_difference():
    assert benchmark.difference([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, 2.0])]) == float("inf")


# ---- what the ways do

@pytest.mark.parametrize("height, width", [(37, 50), (64, 21)])
def test_the_four_way_split_computes_quarters_of_a_size_and_is_right_where_they_reach_far_enough(monkeypatch, height, width):
    net, seen = EDSR(2, n_resblocks=1, n_feats=4), []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0].numel()))
    lr = 255 * torch.rand(1, 3, height, width)
    with torch.no_grad():
        whole = net(lr)
        seen.clear()
        monkeypatch.setattr(formula, "SHAVE", net.receptive_field + 1)  # of an odd side half reaches one less
        monkeypatch.setattr(formula, "AT_ONCE", 600)
        assert (formula.plain_chop(net, lr) - whole).abs().max() < 1e-3
        assert len(seen) in (16, 4) and max(seen) < 600
        monkeypatch.setattr(formula, "SHAVE", 1)
        assert (formula.plain_chop(net, lr) - whole).abs().max() > 1e-3


def test_the_teacher_that_was_asked_once_is_not_run():
    pair, seen = training.teacher_cache(32, CPU), []
    forward = EDSR.forward

    def counted(self, lr, features=False):
        seen.append((self.n_feats, tuple(lr.shape)))
        return forward(self, lr, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDSR, "forward", counted)
        pair.ours()
        assert seen == [(4, (2, 3, 8, 8))]
        pair.plain()
        assert seen[1:] == [(4, (2, 3, 8, 8)), (8, (2, 3, 8, 8))]
    pair.close()


def test_files_are_decoded_by_the_plain_way_only(monkeypatch):
    pair, read = training.data(32, CPU), []
    decode = data.dataset.read_photo
    monkeypatch.setattr(data.dataset, "read_photo", lambda path: read.append(path) or decode(path))
    assert [x.shape for x in pair.ours()] == [(5, 3, 8, 8), (5, 3, 32, 32)] and not read
    pair.plain()
    assert len(read) == 2 * 5
    pair.close()


def test_the_teacher_costs_ten_times_the_student():
    student, teacher = (count(EDSR(training.SCALE, **sizes))[0] for sizes in NETWORKS)
    assert 9.5 < teacher / student < 11


# ---- what is counted

@pytest.mark.parametrize("function, operations", [
    (lambda a: a @ a, 2 * 8**3),
    (lambda a: a.addmm_(a.clone(), a[:, :4] @ a[:4]), 2 * 8**3 + 2 * 8 * 4 * 8),
    (lambda a: a.clone()[None].baddbmm_(a[None], a[None]), 2 * 8**3),
    (lambda a: torch.nn.functional.scaled_dot_product_attention(a.view(1, 1, 8, 8), *a.repeat(2, 1, 2, 1).split(1)),
     2 * 2 * 8 * 16 * 8),
    (lambda a: torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3]), 2 * 9 * 36),
    (lambda a: a + a, 0),
])
def test_operations_are_two_per_multiply_add(function, operations):
    with flops.counter() as counter:
        function(torch.rand(8, 8))
    assert counter.get_total_flops() == operations


def test_the_ceiling_is_the_fastest_of_ten_products(monkeypatch):
    times = iter((4.0, 2.0, 8.0, *[4.0] * 7))
    monkeypatch.setattr(flops, "seconds", lambda function, device: (function(), next(times))[1])
    assert flops.ceiling("bf16", CPU) == flops.ceiling("bf16", CPU) == 2 * 32**3 / 2


def test_memory_of_arrays_is_without_files(tmp_path):
    np.save(tmp_path / "file.npy", np.zeros(1_000_000, np.uint8))

    def use(size):
        mapped = np.load(tmp_path / "file.npy", mmap_mode="r")
        return np.ones(size, np.uint8), mapped[:1000].sum()
    assert 500_000 <= memory.array_memory(lambda: use(500_000), CPU)[1] < 600_000


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
    assert status == 2 and len(err) == 1 and "--only speed: there are affinity" in err[0]


def test_the_script_passes_flags_on(checkout):  # noqa: F811
    ran = subprocess.run(["bash", str(checkout / "scripts" / "benchmark.sh"), "--only", "chop"], capture_output=True,
                         text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "benchmark.py"), "--only", "chop"]
